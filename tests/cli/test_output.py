"""What the command line prints fits the terminal, and nothing is cut."""

from __future__ import annotations

import io
import queue
import re

import pytest
from rich.console import Console

from bitquota.cli import output
from bitquota.progress import Progress
from waiting import PATIENCE_S, wait_for


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A terminal of 60 columns that writes into memory."""
    text = io.StringIO()
    monkeypatch.setattr(output, "console", terminal(text, 60))
    return text


def terminal(text: io.StringIO, width: int) -> Console:
    """Return a console that is taken for a terminal, without colours."""
    return Console(file=text, width=width, force_terminal=True, no_color=True, color_system=None)


class TestPrintRows:
    def test_many_columns_become_several_tables(self, page):
        """No column is cut off at the edge; each table begins with the first column."""
        columns = {f"plan-number-{k}.json": f"value-{k}" for k in range(9)}
        output.print_rows([{"": "loss", **columns}], title="Scores")

        printed = page.getvalue()
        assert max(map(len, printed.splitlines())) <= 60
        assert all(name in printed and value in printed for name, value in columns.items())
        assert printed.count("loss") == printed.count("┏") > 1
        assert printed.count("Scores") == 1

    def test_what_fits_is_one_table(self, page):
        """Long text folds; it is no reason for a second table."""
        output.print_rows([{"layer": "x" * 90, "bits": "4"}, {"layer": "b", "bits": "8"}])

        printed = page.getvalue()
        assert printed.count("┏") == 1
        assert printed.count("x") == 90

    def test_a_column_of_long_words_takes_no_room_from_the_edge(self, page):
        """The widest columns give way, down to their longest word; the last one is not cut."""
        row = {
            "chosen by": "diagonal, gram, mixquant_threshold, orthogonality, limpq",
            "stored weights": "3.0 KiB",
            "worse than the best by": "+0.0242 ± 0.012",
            "accuracy": "100.00 %",
        }
        output.print_rows([row])

        printed = page.getvalue()
        assert max(map(len, printed.splitlines())) <= 60
        assert printed.count("┏") == 1
        assert "mixquant_threshold," in printed
        assert "accuracy" in printed

    def test_what_is_no_terminal_gets_everything_in_one_line(self, monkeypatch):
        """A pipe has no width: names are whole, however long."""
        text = io.StringIO()
        monkeypatch.setattr(output, "console", Console(file=text, width=60))
        output.print_rows([{"layer": "a.very.long.name." * 9, "bits": "4"}], spare=["bits"])

        assert "a.very.long.name." * 9 in text.getvalue()
        assert "bits" in text.getvalue()
        assert output.console.width == 60

    @pytest.mark.parametrize(("width", "shown"), [(60, False), (200, True)])
    def test_spare_columns_go_before_names_break(self, monkeypatch, width, shown):
        """A narrow terminal says what it does without; a wide one shows it."""
        text = io.StringIO()
        monkeypatch.setattr(output, "console", terminal(text, width))
        name = "model.layers.11.self_attn.query_projection"
        output.print_rows(
            [{"layer": name, "kind": "linear", "MACs": "1,179,648", "bits": "2,4,8"}],
            spare=["kind", "MACs"],
        )

        printed = text.getvalue()
        assert name in printed
        assert ("1,179,648" in printed) == shown
        assert ("Not shown in 60 columns: kind, MACs" in printed) != shown

    def test_nothing_prints_nothing(self, page):
        """No rows, no table."""
        output.print_rows([])
        assert page.getvalue() == ""


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


class TestShownProgress:
    def test_lines_where_there_is_no_terminal(self, monkeypatch):
        """Stage in words, share of the whole job and time left; also before the first report."""
        spoken = queue.SimpleQueue()
        monkeypatch.setattr(output, "say", spoken.put)
        clock = Clock()
        with output.shown_progress(every_s=0.01, clock=clock) as tell:
            assert "0 %, preparing model and samples, 0 s so far" == spoken.get(timeout=PATIENCE_S)
            clock.now = 100.0
            tell(Progress(stage="pairs", done=3, total=9, fraction=0.25))
            wanted = "25 %, measuring pairs of candidates (3 of 9), 2 min so far, about 5 min left"
            wait_for(lambda: spoken.get(timeout=PATIENCE_S) == wanted, "the line")

    def test_hours_give_dozens_of_lines(self):
        """Densely at first, and never a pause that lets a system end the job."""
        passed, pauses = 0.0, []
        while passed < 4 * 3600:
            pauses.append(output._until_next(passed, output.LINE_S))
            passed += pauses[-1]
        assert [5.0, 300.0] == [pauses[0], pauses[-1]]
        assert 50 < len(pauses) < 100

    def test_a_quick_command_writes_nothing(self, monkeypatch):
        spoken = []
        monkeypatch.setattr(output, "say", spoken.append)
        with output.shown_progress(every_s=3600) as tell:
            tell(Progress(stage="pairs", done=1, total=1, fraction=0.99))
        assert [] == spoken

    def test_a_terminal_gets_one_bar_for_the_whole_job(self, monkeypatch):
        """However many stages there are; in 80 columns the stage can be read."""
        text = io.StringIO()
        monkeypatch.setattr(output, "messages", terminal(text, 80))
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        with output.shown_progress() as tell:
            for k, stage in enumerate(["gram", "starts", "linearisation 1", "evidence"]):
                tell(Progress(stage=stage, done=1, total=2, fraction=0.2 * k))
        *_, last = re.split(r"[\r\n]|\x1b\[[0-9?]*[A-Za-z]", text.getvalue().rstrip("\x1b[?25h\n"))
        assert "100%" in last
        assert "done" in last
        assert len(last) <= 80

    def test_what_a_server_says_is_left_is_shown(self):
        """It knows how fast the job went before this command looked at it."""
        told = output._Told(Clock())
        told.take(Progress(stage="pairs", done=1, total=2, fraction=0.5, left_s=30.0))
        assert told.line().endswith("about 30 s left")

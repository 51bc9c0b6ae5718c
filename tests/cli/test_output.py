"""What the command line prints fits the terminal, and nothing is cut."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from bitquota.cli import output


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """A console of 60 columns that writes into memory."""
    text = io.StringIO()
    monkeypatch.setattr(output, "console", Console(file=text, width=60))
    return text


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

    def test_nothing_prints_nothing(self, page):
        """No rows, no table."""
        output.print_rows([])
        assert page.getvalue() == ""

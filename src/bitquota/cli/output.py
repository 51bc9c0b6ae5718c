"""What the command line shows: tables, progress with time left, JSON.

Design: docs/design/progress.md
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    ProgressColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as Bars
from rich.table import Column, Table
from rich.text import Text

from bitquota.cli import drawing
from bitquota.progress import Pace, Progress, lasting, peak_bytes, stage_words
from bitquota.report import text as report
from bitquota.report.costs import cost_sentences
from bitquota.report.estimate import rounded_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from bitquota.canonical import JsonObject
    from bitquota.plan import Plan
    from bitquota.progress import OnProgress

_WHOLE = 20
"""Words up to this length are not broken while there is room elsewhere."""
_FRAME = 3
"""Characters that a column of a table takes beside its text."""

console = Console()
messages = Console(stderr=True)


LINE_S = 5.0
"""Seconds between the first lines of progress where there is no terminal."""
LINE_SHARE = 0.1
"""Later the share of the time so far that passes between two: hours give dozens, not thousands."""
LONGEST_LINE_S = 300.0
"""At most so many seconds pass: some systems end a job that says nothing for ten minutes."""


@dataclass(slots=True)
class _Told:
    """What was last told of a job, in words."""

    clock: Callable[[], float]
    stage: str = "load"
    counts: str = ""
    fraction: float = 0.0
    pace: Pace = field(init=False)
    started: float = field(init=False)
    server_left_s: float | None = None

    def __post_init__(self) -> None:
        self.pace, self.started = Pace(self.clock), self.clock()
        self.pace.told(0.0)

    def take(self, step: Progress) -> None:
        """Note one report."""
        self.stage = step.stage
        self.counts = f"{step.done:,} of {step.total:,}" if step.total > 1 else ""
        if step.fraction is not None:
            self.fraction = max(self.fraction, step.fraction)
            self.pace.told(self.fraction)
        self.server_left_s = step.left_s

    @property
    def left(self) -> str:
        """How long the job will still take, about."""
        if self.fraction == 1:
            return ""
        left_s = self.pace.left_s if self.server_left_s is None else self.server_left_s
        return "" if left_s is None else f"about {lasting(left_s)} left"

    def line(self) -> str:
        """Everything in one line."""
        counts = f" ({self.counts})" if self.counts else ""
        passed = f"{lasting(self.clock() - self.started)} so far"
        parts = [f"{100 * self.fraction:.0f} %", stage_words(self.stage) + counts, passed]
        return ", ".join([*parts, self.left] if self.left else parts)


class _LeftColumn(ProgressColumn):
    """Time left of the whole job, computed when it is drawn."""

    def __init__(self, told: _Told) -> None:
        super().__init__()
        self._told = told

    def render(self, task: object) -> Text:
        """Return ``about 3 min left`` or nothing."""
        del task
        return Text(self._told.left, style="progress.remaining")


@contextmanager
def shown_progress(
    *, every_s: float = LINE_S, clock: Callable[[], float] = time.monotonic
) -> Iterator[OnProgress]:
    """Show on standard error how far the whole job is; yields the callback that tells it.

    A terminal gets one bar. Anything else gets lines without control characters, so that a log
    shows that something happens: after ``every_s`` seconds, then ever more seldom. A quick command
    prints none.
    """
    told = _Told(clock)
    with _bar(told) if sys.stderr.isatty() else _lines(told, every_s) as tell:
        yield tell


@contextmanager
def _bar(told: _Told) -> Iterator[OnProgress]:
    words = Column(ratio=5, no_wrap=True, overflow="ellipsis")
    with Bars(
        TextColumn("{task.description}", table_column=words),
        BarColumn(bar_width=None, table_column=Column(ratio=2)),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        _LeftColumn(told),
        console=messages,
        expand=True,
    ) as bars:
        task = bars.add_task(stage_words(told.stage), total=1.0)

        def move(step: Progress) -> None:
            told.take(step)
            bars.update(task, description=stage_words(step.stage), completed=told.fraction)

        yield move
        told.take(Progress(stage="done", done=1, total=1, fraction=1.0))
        bars.update(task, description=stage_words("done"), completed=1.0)


@contextmanager
def _lines(told: _Told, every_s: float) -> Iterator[OnProgress]:
    over = threading.Event()

    def speak() -> None:
        while not over.wait(_until_next(told.clock() - told.started, every_s)):
            say(told.line())

    speaker = threading.Thread(target=speak, name="progress", daemon=True)
    speaker.start()
    try:
        yield told.take
    finally:
        over.set()
        speaker.join()


def _until_next(passed_s: float, every_s: float) -> float:
    """Return the seconds until the next line of progress, after ``passed_s`` of work."""
    return max(every_s, min(LINE_SHARE * passed_s, LONGEST_LINE_S))


def print_rows(
    rows: Sequence[Mapping[str, str]], title: str = "", *, spare: Sequence[str] = ()
) -> None:
    """Print rows with equal keys as a table, or as several when the columns need more room.

    What is no terminal has all the room that it needs. In a terminal, columns of ``spare`` are
    left out, the first one first, until the others fit without a break; a line says which.
    """
    if not rows:
        return
    keys = list(rows[0])
    room = console.width if console.is_terminal else max(console.width, _whole_width(keys, rows))
    left_out = []
    for key in spare:
        if key in keys and _whole_width(keys, rows) > room:
            keys.remove(key)
            left_out.append(key)
    # Names fold rather than vanish: a cut layer name is no layer name. Short ones stay whole.
    widths = {key: min(_longest_word(key, rows), _WHOLE) for key in keys}
    with _of_width(room):
        for part, some in enumerate(_that_fit(widths, room)):
            table = Table(title=(title or None) if part == 0 else None, title_justify="left")
            for key, width in _squeezed(some, rows, widths, room).items():
                table.add_column(key, overflow="fold", width=width)
            for row in rows:
                # Text, not markup: a layer may be called "[red]".
                table.add_row(*(Text(row[key]) for key in some))
            console.print(table)
    if left_out:
        console.print(
            Text(f"Not shown in {room} columns: {', '.join(left_out)}; a wider terminal and --json "
                 "have them.", style="dim")
        )  # fmt: skip


def _whole_width(keys: Sequence[str], rows: Sequence[Mapping[str, str]]) -> int:
    """Return the columns of the screen that a table takes if nothing in it is broken."""
    cells = (max(cell_len(text) for text in (key, *(row[key] for row in rows))) for key in keys)
    return sum(width + _FRAME for width in cells) + 1


@contextmanager
def _of_width(room: int) -> Iterator[None]:
    """Let the console be so wide meanwhile."""
    before = console.width
    console.width = room
    try:
        yield
    finally:
        console.width = before


def _longest_word(key: str, rows: Sequence[Mapping[str, str]]) -> int:
    words = [word for text in (key, *(row[key] for row in rows)) for word in text.split()]
    return max(map(len, words), default=0)


def _squeezed(
    keys: Sequence[str], rows: Sequence[Mapping[str, str]], least: Mapping[str, int], room: int
) -> dict[str, int]:
    """Return widths of columns that fit ``room``: the widest give first, none below ``least``.

    Rich alone would shrink columns below their least width and then cut the table at the edge.
    """
    widths = {key: max(cell_len(text) for text in (key, *(r[key] for r in rows))) for key in keys}
    while sum(widths.values()) + _FRAME * len(keys) + 1 > room:
        loose = [key for key in keys if widths[key] > max(least[key], 1)]
        if not loose:
            break
        widths[max(loose, key=lambda key: widths[key])] -= 1
    return widths


def _that_fit(widths: Mapping[str, int], room: int) -> list[list[str]]:
    """Split columns into tables no wider than ``room``; each begins with the first column."""
    first, *others = widths
    # A border and two blanks for each column, and the last border.
    start = widths[first] + _FRAME + 1
    parts, used = [[first]], start
    for key in others:
        needed = widths[key] + _FRAME
        if used + needed > room and len(parts[-1]) > 1:
            parts.append([first])
            used = start
        parts[-1].append(key)
        used += needed
    return parts


def print_plan(
    plan: Plan,
    accuracies: Mapping[str, float] | None = None,
    frontier: Sequence[JsonObject] = (),
) -> None:
    """Print what a plan is and how it compares; a terminal gets it drawn."""
    for sentence in report.quantizable_sentences(plan.inventory):
        console.print(Text(sentence))
    if console.is_terminal:
        drawing.draw_plan(console, plan, frontier)
    else:
        asked = " + ".join(b.text or f"{b.limit} {b.unit}" for b in plan.budgets)
        # The kind would push long layer names over two lines on a narrow terminal.
        rows = [{k: v for k, v in row.items() if k != "kind"} for row in report.layer_rows(plan)]
        print_rows(rows, title=f"Plan for {asked}")
    print_rows(report.comparison_rows(plan, accuracies), title="Measured beside it")
    # As Text: Rich would colour the numbers of a sentence piece by piece.
    console.print(Text(report.verdict(plan)))
    for sentence in (
        *cost_sentences(plan),
        *report.cache_sentences(plan),
        *report.output_sentences(plan),
        *report.caution_sentences(plan),
        *report.rounding_sentences(plan),
        *report.hint_sentences(plan),
    ):
        console.print(Text(sentence))
    console.print(Text(report.proof_sentence(plan)))
    for sentence in report.evidence_sentences(plan):
        console.print(Text(sentence))
    console.print(
        f"Stored weights {report.format_size(plan.size_bits)}: {plan.average_bits:.3f} bits per "
        f"weight in codes, {plan.effective_bits:.3f} with scales and padding; whole model "
        f"{report.format_size(plan.model_bits)}, "
        f"{plan.model_bits / plan.inventory.n_numbers:.3f} bpw.",
        highlight=False,
    )


def say(line: str) -> None:
    """Print one line on standard error as it is: a path is neither coloured nor broken."""
    messages.print(line, highlight=False, markup=False, soft_wrap=True)


def say_use() -> None:
    """Print what this process has taken of processor and memory so far."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = used.ru_utime + used.ru_stime
    memory = rounded_size(peak_bytes())
    say(f"took {seconds:,.0f} s of processor time so far, {memory} of memory at the peak")


def print_json(value: object) -> None:
    """Print JSON for a program to read."""
    sys.stdout.write(json.dumps(value, indent=2, sort_keys=True) + "\n")

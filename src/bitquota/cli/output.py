"""What the command line shows: tables, progress with rate and time left, JSON."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from bitquota.cli import drawing
from bitquota.report import text as report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from bitquota.canonical import JsonObject
    from bitquota.plan import Plan
    from bitquota.progress import Progress as Step

_WHOLE = 20
"""Words up to this length are not broken while there is room elsewhere."""
_FRAME = 3
"""Characters that a column of a table takes beside its text."""

console = Console()
messages = Console(stderr=True)


class _RateColumn(TextColumn):
    """Steps per second, once there is something to divide."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: object) -> Text:
        """Return ``12.3/s`` or nothing."""
        speed = getattr(task, "finished_speed", None) or getattr(task, "speed", None)
        return Text(f"{speed:.1f}/s" if speed else "", style="progress.data.speed")


@contextmanager
def progress_bars() -> Iterator[Callable[[Step], None]]:
    """Show one bar for each stage on standard error; yields the callback that moves them."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=messages,
        disable=not sys.stderr.isatty(),
    ) as bars:
        tasks = {}

        def move(step: Step) -> None:
            if step.stage not in tasks:
                tasks[step.stage] = bars.add_task(step.stage, total=step.total)
            bars.update(tasks[step.stage], completed=step.done, total=step.total)

        yield move


def print_rows(rows: Sequence[Mapping[str, str]], title: str = "") -> None:
    """Print rows with equal keys as a table, or as several when the columns need more room."""
    if not rows:
        return
    # Names fold rather than vanish: a cut layer name is no layer name. Short ones stay whole.
    widths = {key: min(_longest_word(key, rows), _WHOLE) for key in rows[0]}
    for part, keys in enumerate(_that_fit(widths, console.width)):
        table = Table(title=(title or None) if part == 0 else None, title_justify="left")
        for key, width in _squeezed(keys, rows, widths, console.width).items():
            table.add_column(key, overflow="fold", width=width)
        for row in rows:
            # Text, not markup: a layer may be called "[red]".
            table.add_row(*(Text(row[key]) for key in keys))
        console.print(table)


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
        *report.output_sentences(plan),
        *report.caution_sentences(plan),
        *report.hint_sentences(plan),
    ):
        console.print(Text(sentence))
    console.print(Text(report.proof_sentence(plan)))
    for sentence in report.evidence_sentences(plan):
        console.print(Text(sentence))
    console.print(
        f"Stored weights {report.format_size(plan.size_bits)}: {plan.average_bits:.3f} bits per "
        f"weight in codes, {plan.effective_bits:.3f} with scales and padding; whole model "
        f"{report.format_size(plan.model_bits)}.",
        highlight=False,
    )


def say(line: str) -> None:
    """Print one line on standard error as it is: a path is neither coloured nor broken."""
    messages.print(line, highlight=False, markup=False, soft_wrap=True)


def print_json(value: object) -> None:
    """Print JSON for a program to read."""
    sys.stdout.write(json.dumps(value, indent=2, sort_keys=True) + "\n")

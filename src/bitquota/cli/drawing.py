"""A plan drawn in a terminal: bits of every layer as bars, and size against loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from bitquota.report import text as report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from bitquota.canonical import JsonObject
    from bitquota.plan import Plan

STYLES = {1: "red", 2: "red", 3: "yellow", 4: "green", 5: "green", 6: "cyan", 7: "cyan", 8: "blue"}
"""Few bits warm, many bits cold; the terminal's own colours, so that they fit its background."""

_WIDER = "magenta"
_CURVE, _PLAN, _BASELINE = "·", "◆", "○"
_HEIGHT = 14
_WIDEST = 76
_EIGHTHS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One point of the drawing: stored bits, loss increase, sign and style."""

    size_bits: int
    loss: float
    sign: str
    style: str


def bar(bits: int, most: int, width: int) -> Text:
    """Return a bar whose length is the share of ``bits`` in ``most``, in eighths of a character."""
    eighths = round(8 * width * bits / most)
    text = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
    return Text(text, style=STYLES.get(bits, _WIDER))


def layer_table(plan: Plan, width: int) -> Table:
    """Return every layer with a bar for its bits, for a terminal ``width`` characters wide."""
    asked = " + ".join(b.text or f"{b.limit} {b.unit}" for b in plan.budgets)
    # Text, not markup: budgets and layers may be called "[red]".
    table = Table(title=Text(f"Plan for {asked}"), title_justify="left", box=None, pad_edge=False)
    table.add_column("layer", overflow="fold", no_wrap=False)
    table.add_column("bits")
    table.add_column("candidate")
    table.add_column("weights", justify="right")
    table.add_column("stored", justify="right")
    most = max(c.stored_bits for c in plan.candidates)
    long = min(24, max(8, width // 5))
    for candidate, row in zip(plan.candidates, report.layer_rows(plan), strict=True):
        table.add_row(
            Text(row["layer"]),
            bar(candidate.stored_bits, most, long),
            Text(row["candidate"]),
            Text(row["weights"]),
            Text(row["stored"]),
        )
    return table


def marks_of(plan: Plan, frontier: Sequence[JsonObject] = ()) -> list[Mark]:
    """Return the points to draw, the most important last, so that it stays on top."""
    marks = [
        Mark(size_bits=p["size_bits"], loss=p["predicted"], sign=_CURVE, style="blue")
        for p in frontier
    ]
    marks += [
        Mark(size_bits=b.total_bits, loss=b.measured.mean, sign=_BASELINE, style="bright_black")
        for b in plan.baselines
    ]
    if plan.measured is not None:
        size = plan.size_bits + plan.cache_size_bits
        marks.append(Mark(size_bits=size, loss=plan.measured.mean, sign=_PLAN, style="bold green"))
    return marks


def scatter(marks: Sequence[Mark], width: int, unit: str) -> Text:
    """Return size against loss (logarithmic) as lines of text; empty with fewer than two points.

    Losses that are not positive are drawn at the bottom.
    """
    positive = [m.loss for m in marks if m.loss > 0]
    if len(marks) < 2 or not positive:
        return Text("")
    top, low = math.log(max(positive)), math.log(max(min(positive), 1e-6 * max(positive)))
    span = (top - low) or 1.0
    sizes = [m.size_bits for m in marks]
    left, across = min(sizes), (max(sizes) - min(sizes)) or 1
    columns = max(20, min(_WIDEST, width - 12))
    cells: dict[tuple[int, int], Mark] = {}
    for mark in marks:
        height = math.log(max(mark.loss, math.exp(low)))
        row = round((_HEIGHT - 1) * (top - height) / span)
        column = round((columns - 1) * (mark.size_bits - left) / across)
        cells[row, column] = mark
    text = Text(f"loss increase ({unit})\n")
    for row in range(_HEIGHT):
        labelled = row % 4 == 0 or row == _HEIGHT - 1
        value = math.exp(top - span * row / (_HEIGHT - 1))
        text.append(f"{value:>9.2g} " if labelled else " " * 10)
        text.append("┤" if labelled else "│", style="bright_black")
        for column in range(columns):
            mark_here = cells.get((row, column))
            text.append(*((mark_here.sign, mark_here.style) if mark_here else (" ", "")))
        text.append("\n")
    text.append(" " * 10 + "└" + "─" * columns + "\n", style="bright_black")
    first, last = (report.format_size(s).partition(" (")[0] for s in (left, max(sizes)))
    text.append(" " * 11 + first + " " * max(1, columns - len(first) - len(last)) + last + "\n")
    legend = [(_PLAN, "bold green", "plan, measured"), (_BASELINE, "bright_black", "baseline")]
    if any(m.sign == _CURVE for m in marks):
        legend.append((_CURVE, "blue", "best possible, predicted"))
    text.append(" " * 11)
    for sign, style, name in legend:
        text.append(sign, style=style)
        text.append(f" {name}   ")
    return text


def draw_plan(console: Console, plan: Plan, frontier: Sequence[JsonObject] = ()) -> None:
    """Draw a plan for a person at a terminal; the caller prints everything else."""
    console.print(layer_table(plan, console.width))
    unit = "nats/sample" if plan.measured is None else plan.measured.unit
    drawn = scatter(marks_of(plan, frontier), console.width, unit)
    if drawn:
        console.print()
        console.print(drawn)
        console.print()

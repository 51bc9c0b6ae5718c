"""Plot a comparison: what each plan loses at each budget, and how well each metric ranks."""

from __future__ import annotations

import itertools
import textwrap
from typing import TYPE_CHECKING, Any

from bitquota.errors import InvalidInput, MissingDependency

if TYPE_CHECKING:
    from pathlib import Path

    from bitquota.report.comparison import Comparison, Entry

FORMATS = (".png", ".svg", ".pdf")
_COLOURS = {"search": "C3", "measure": "C0", "rule": "C2", "baseline": "0.5"}
_KINDS = {
    "search": "measured on the way",
    "measure": "solved from a score",
    "rule": "rule",
    "baseline": "no measurement",
}
_LABEL_WIDTH = 34


def plot_comparison(comparison: Comparison, path: Path) -> None:
    """Write the plot to ``path``; the ending says the format (``.png``, ``.svg``, ``.pdf``).

    One panel for each budget: every distinct plan with everybody who chose it, best on top, its
    measured loss increase (logarithmic, bars of one standard error). Last, each metric's rank
    correlation over all budgets with the passes it declares. Equal comparisons give equal files.

    Raises:
        MissingDependency: matplotlib is not installed.
        InvalidInput: Another ending.
    """
    check_plot(path)
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n = len(comparison.budgets)
    lines = [sum(map(_n_lines, _plan_labels(comparison, k))) for k in range(n)]
    height = 1.6 + 0.21 * max([*lines, len(_ranking(comparison))])
    # Without this the identifiers in an SVG are random.
    with mpl.rc_context({"svg.hashsalt": "bitquota"}):
        figure = Figure(figsize=(5.2 * (n + 1), height), layout="constrained")
        FigureCanvasAgg(figure)
        *panels, ranks = figure.subplots(1, n + 1, squeeze=False)[0]
        for k, axes in enumerate(panels):
            _draw_losses(comparison, k, axes)
        _draw_ranks(comparison, ranks)
        _draw_legend(comparison, figure)
        figure.savefig(path, dpi=150, metadata=_no_date(path.suffix.lower()))


def check_plot(path: Path) -> None:
    """Raise what ``plot_comparison`` would raise for ``path``, before there is anything to plot."""
    if path.suffix.lower() not in FORMATS:
        msg = f"a plot must end in one of {', '.join(FORMATS)}; got '{path.name}'"
        raise InvalidInput(msg, path=str(path))
    try:
        import matplotlib  # noqa: F401, ICN001  # only asks whether it is there
    except ImportError as err:
        msg = "plots need matplotlib; install the extra: pip install 'bitquota[plot]'"
        raise MissingDependency(msg, extra="plot") from err


def _plan_labels(comparison: Comparison, k: int) -> list[str]:
    names = [", ".join(e.name for e in entries) for entries, _ in comparison.distinct(k)]
    return [textwrap.fill(name, _LABEL_WIDTH) for name in names]


def _n_lines(label: str) -> int:
    return 1 + label.count("\n")


def _places(labels: list[str]) -> list[float]:
    """Return how far down each label stands: every line of text takes one step."""
    ends = list(itertools.accumulate(_n_lines(label) for label in labels))
    return [end - _n_lines(label) / 2 for end, label in zip(ends, labels, strict=True)]


def _draw_losses(comparison: Comparison, k: int, axes: Any) -> None:  # noqa: ANN401  # matplotlib
    labels = _plan_labels(comparison, k)
    places = _places(labels)
    for place, (entries, plan) in zip(places, comparison.distinct(k), strict=True):
        mean, error = max(plan.loss.mean, 0.0), plan.loss.standard_error
        kinds = {entry.kind for entry in entries}
        axes.errorbar(
            [mean],
            [place],
            # On a logarithmic axis a bar must not reach zero.
            xerr=[[min(error, 0.9 * mean)], [error]],
            fmt="o",
            color=next(colour for kind, colour in _COLOURS.items() if kind in kinds),
            # A tie with the best is full, what is clearly worse is hollow.
            markerfacecolor=None if plan.ties_with_best else "white",
            markersize=6,
            linewidth=1.2,
        )
    axes.set_xscale("log", nonpositive="clip")
    axes.set_yticks(places, labels, fontsize=8)
    axes.set_ylim(max(places, default=0.0) + 1.2, min(places, default=0.0) - 1.2)
    axes.set_xlabel(f"loss increase ({comparison.loss}), {comparison.full_precision.unit}")
    axes.set_title(comparison.budget_text(k))
    axes.grid(visible=True, axis="x", alpha=0.3)


def _ranking(comparison: Comparison) -> list[Entry]:
    known = [e for e in comparison.entries if e.rank_correlation is not None]
    return sorted(known, key=lambda e: -(e.rank_correlation or 0.0))


def _draw_ranks(comparison: Comparison, axes: Any) -> None:  # noqa: ANN401  # matplotlib
    ranking = _ranking(comparison)
    values = [entry.rank_correlation or 0.0 for entry in ranking]
    colours = [_COLOURS.get(entry.kind, "C0") for entry in ranking]
    axes.barh(range(len(ranking)), values, color=colours, height=0.6)
    for place, (entry, value) in enumerate(zip(ranking, values, strict=True)):
        axes.text(
            max(value, 0.0) + 0.02,
            place,
            _passes(entry),
            va="center",
            fontsize=7,
        )
    axes.set_yticks(range(len(ranking)), [entry.name for entry in ranking], fontsize=8)
    axes.set_ylim(len(ranking) - 0.3, -0.7)
    axes.set_xlim(min([-0.05, *(value - 0.05 for value in values)]), 1.3)
    axes.axvline(0.0, color="0.3", linewidth=0.8)
    axes.set_xlabel("rank correlation, predicted with measured loss")
    axes.set_title("all ranked plans of all budgets")
    axes.grid(visible=True, axis="x", alpha=0.3)


def _passes(entry: Entry) -> str:
    """Return the declared passes, or those that were run by what declares none."""
    cost, run = (entry.passes, " run") if entry.cost is None else (entry.cost, "")
    if cost == 0:
        return "no passes"
    return f"{cost:,.0f} pass{'' if round(cost) == 1 else 'es'}{run}"


def _draw_legend(comparison: Comparison, figure: Any) -> None:  # noqa: ANN401  # matplotlib
    from matplotlib.lines import Line2D

    kinds = {entry.kind for entry in comparison.entries}
    handles = [
        Line2D([], [], marker="o", linestyle="", color=_COLOURS[kind], label=label)
        for kind, label in _KINDS.items()
        if kind in kinds
    ]
    handles.append(
        Line2D(
            [], [], marker="o", linestyle="", color="0.2", markerfacecolor="white",
            label="clearly worse than the best",
        )
    )  # fmt: skip
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)


def _no_date(suffix: str) -> dict[str, None]:
    """Return metadata that keeps the clock out of the file."""
    return (
        {} if suffix == ".png" else {"Date": None} if suffix == ".svg" else {"CreationDate": None}
    )

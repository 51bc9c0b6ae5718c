"""Plot a comparison: what each metric's plan loses at each budget, and what ranking costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bitquota.errors import InvalidInput, MissingDependency

if TYPE_CHECKING:
    from pathlib import Path

    from bitquota.comparison import Comparison

FORMATS = (".png", ".svg", ".pdf")
_MARKERS = "osD^v<>Pp*hX8"


def plot_comparison(comparison: Comparison, path: Path) -> None:
    """Write the plot to ``path``; the ending says the format (``.png``, ``.svg``, ``.pdf``).

    Left, the measured loss increase of every plan at every budget (logarithmic, bars of one
    standard error); right, each metric's rank correlation against the passes it declares. Equal
    comparisons give equal files.

    Raises:
        MissingDependency: matplotlib is not installed.
        InvalidInput: Another ending.
    """
    check_plot(path)
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without this the identifiers in an SVG are random.
    with mpl.rc_context({"svg.hashsalt": "bitquota"}):
        figure = Figure(figsize=(13, 6), layout="constrained")
        FigureCanvasAgg(figure)
        losses, ranks = figure.subplots(1, 2)
        _draw_losses(comparison, losses)
        _draw_ranks(comparison, ranks)
        figure.legend(*losses.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
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


def _draw_losses(comparison: Comparison, axes: Any) -> None:  # noqa: ANN401  # matplotlib
    n_entries = len(comparison.entries)
    for index, entry in enumerate(comparison.entries):
        points = [(k, p.loss) for k, p in enumerate(entry.plans) if p is not None]
        if not points:
            continue
        # Side by side, so that bars can be told apart.
        shift = 0.6 * (index / max(1, n_entries - 1) - 0.5)
        means = [max(loss.mean, 0.0) for _, loss in points]
        # On a logarithmic axis a bar must not reach zero.
        errors = [loss.standard_error for _, loss in points]
        below = [min(error, 0.9 * mean) for error, mean in zip(errors, means, strict=True)]
        axes.errorbar(
            [k + shift for k, _ in points],
            means,
            yerr=[below, errors],
            fmt=_MARKERS[index % len(_MARKERS)],
            color=f"C{index % 10}",
            markerfacecolor="none" if entry.kind == "baseline" else None,
            markersize=6,
            linewidth=1,
            label=entry.name,
        )
    axes.set_yscale("log", nonpositive="clip")
    axes.set_xticks(range(len(comparison.budgets)))
    axes.set_xticklabels([comparison.budget_text(k) for k in range(len(comparison.budgets))])
    axes.set_xlabel("budget")
    axes.set_ylabel(f"loss increase ({comparison.loss}), {comparison.full_precision.unit}")
    axes.set_title("Measured on samples that no metric saw")
    axes.grid(visible=True, axis="y", alpha=0.3)


def _draw_ranks(comparison: Comparison, axes: Any) -> None:  # noqa: ANN401  # matplotlib
    for index, entry in enumerate(comparison.entries):
        if entry.rank_correlation is None or entry.cost is None:
            continue
        axes.plot(
            [entry.cost],
            [entry.rank_correlation],
            _MARKERS[index % len(_MARKERS)],
            color=f"C{index % 10}",
            markersize=7,
        )
    axes.set_xscale("symlog", linthresh=1.0)
    axes.set_xlim(left=-0.3)
    axes.set_ylim(-1.05, 1.05)
    axes.set_xlabel("declared passes over the calibration samples")
    axes.set_ylabel("rank correlation, predicted and measured")
    axes.set_title("All ranked plans of all budgets")
    axes.grid(visible=True, alpha=0.3)


def _no_date(suffix: str) -> dict[str, None]:
    """Return metadata that keeps the clock out of the file."""
    return (
        {} if suffix == ".png" else {"Date": None} if suffix == ".svg" else {"CreationDate": None}
    )

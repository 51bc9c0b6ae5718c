"""The main charts of a report as one picture, for pull requests: PNG, SVG or PDF."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import numpy as np

from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from bitquota.canonical import JsonObject

_BITS = {
    1: "#8c1d18", 2: "#c2452d", 3: "#d9822b", 4: "#a08a1f", 5: "#4f8f4a", 6: "#23857f",
    7: "#2b74b0", 8: "#3c53b5", 16: "#5a3d8f",
}  # fmt: skip
_ACCENT, _PLAN, _SOFT = "#3156c4", "#a8480c", "#565d6d"
_NAMED = 40
"""Layers up to which each gets its name below its bar."""


def draw_report(document: JsonObject, path: Path) -> None:
    """Write the frontier, the bits of every layer and the sensitivities to ``path``.

    Equal documents give equal files. The ending says the format.

    Args:
        document: From ``charts.document``; what it lacks is left out.
        path: ``.png``, ``.svg`` or ``.pdf``.

    Raises:
        InvalidInput: There is nothing to draw.
        MissingDependency: matplotlib is not installed (see ``comparison_plot.check_plot``).
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = []
    if document["plans"] or document["frontier"]:
        parts.append(_draw_frontier)
    if document["plans"] or document["frontier"]:
        parts.append(_draw_bars)
    if document["matrix"] is not None:
        parts.append(_draw_sensitivities)
    if document["comparison"] is not None:
        parts += [_comparison_of(k) for k in range(len(document["comparison"]["budgets"]))]
    if not parts:
        msg = "a picture needs a plan, a frontier, a matrix or a comparison; there is none"
        raise InvalidInput(msg)
    # Without this the identifiers in an SVG are random; names must stay text, never mathematics.
    with mpl.rc_context({"svg.hashsalt": "bitquota", "text.parse_math": False}):
        figure = Figure(figsize=(11, 3.6 * len(parts)), layout="constrained")
        FigureCanvasAgg(figure)
        for draw, axes in zip(parts, np.ravel(figure.subplots(len(parts), 1)), strict=True):
            draw(document, axes)
        figure.suptitle(str(document["title"]), x=0.01, ha="left", fontweight="bold")
        metadata: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(
            path.suffix.lower(), {}
        )
        figure.savefig(path, dpi=150, metadata=metadata)


def _draw_frontier(document: JsonObject, axes: Any) -> None:  # noqa: ANN401  # matplotlib
    points = document["frontier"]
    kib = 8 * 1024
    if points:
        sizes = [p["size_bits"] / kib for p in points]
        axes.plot(sizes, [p["predicted"] for p in points], "o-", ms=3, color=_ACCENT,
                  label="predicted, best possible")  # fmt: skip
        proved = [p for p in points if p["bound"] is not None and p["bound"] > 0]
        if any(p["bound"] < 0.99 * p["predicted"] for p in proved):
            axes.fill_between(
                [p["size_bits"] / kib for p in proved],
                [p["bound"] for p in proved],
                [p["predicted"] for p in proved],
                color=_ACCENT,
                alpha=0.25,
                label="certificate",
            )
    baselines = {
        (b["name"], b["size_bits"], b["measured"]["mean"]): b
        for plan in document["plans"]
        for b in plan["baselines"]
    }
    _scatter(axes, list(baselines.values()), "o", _SOFT, "baseline, measured", hollow=True)
    measured = [plan for plan in document["plans"] if plan["measured"]]
    _scatter(axes, measured, "D", _PLAN, "plan, measured", hollow=False)
    axes.set_yscale("log", nonpositive="clip")
    axes.yaxis.set_major_formatter(_plain)
    axes.set_xlabel("KiB stored")
    axes.set_ylabel(f"loss increase ({document['unit']})")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(frameon=False, fontsize=8)


def _scatter(
    axes: Any,  # noqa: ANN401  # matplotlib
    entries: Sequence[JsonObject],
    marker: str,
    color: str,
    label: str,
    *,
    hollow: bool,
) -> None:
    if not entries:
        return
    means = [e["measured"]["mean"] for e in entries]
    errors = [e["measured"]["error"] for e in entries]
    # On a logarithmic axis a bar must not reach zero.
    below = [min(error, 0.9 * max(mean, 0.0)) for mean, error in zip(means, errors, strict=True)]
    axes.errorbar(
        [e["size_bits"] / 8192 for e in entries], means, yerr=[below, errors], fmt=marker,
        color=color, markerfacecolor="none" if hollow else color, ms=6, lw=1, label=label,
    )  # fmt: skip


def _draw_bars(document: JsonObject, axes: Any) -> None:  # noqa: ANN401  # matplotlib
    shown = document["plans"][0] if document["plans"] else None
    if shown is None:
        shown = document["frontier"][len(document["frontier"]) // 2]
    bits = shown["bits"]
    names = document["layers"]["names"]
    for width in sorted(set(bits)):
        at = [k for k, b in enumerate(bits) if b == width]
        color = _BITS.get(width, _BITS[16])
        axes.bar(at, [width] * len(at), width=0.85, color=color, label=f"{width} bits")
    axes.set_xlim(-0.6, len(bits) - 0.4)
    if len(names) <= _NAMED:
        axes.set_xticks(range(len(names)))
        axes.set_xticklabels([_brief(n) for n in names], rotation=60, ha="right", fontsize=7)
    else:
        axes.set_xlabel("layer, as in the model")
    axes.set_ylabel("bits")
    axes.set_title(
        f"plan for {shown['budget']}" if "budget" in shown
        else f"average bit-width {shown['average_bits']:.2f}", fontsize=10, loc="left",
    )  # fmt: skip
    axes.legend(frameon=False, fontsize=8, ncols=6, loc="lower right", bbox_to_anchor=(1, 1))


def _draw_sensitivities(document: JsonObject, axes: Any) -> None:  # noqa: ANN401  # matplotlib
    from matplotlib.colors import LogNorm

    matrix = document["matrix"]
    values = _array(matrix["values"]).reshape(-1, len(matrix["columns"])).T
    positive = values[values > 0]
    high = float(positive.max()) if positive.size else 1.0
    low = max(float(np.quantile(positive, 0.02)) if positive.size else high, 1e-5 * high)
    # What is negative or tiny is drawn as the least.
    shown = np.where(np.isnan(values), np.nan, np.maximum(values, low))
    image = axes.imshow(
        shown, aspect="auto", cmap="YlOrRd", norm=LogNorm(low, high if high > low else 2 * low),
        interpolation="nearest",
    )  # fmt: skip
    axes.set_yticks(range(len(matrix["columns"])))
    axes.set_yticklabels(matrix["columns"])
    if len(matrix["groups"]) <= _NAMED:
        axes.set_xticks(range(len(matrix["groups"])))
        axes.set_xticklabels(
            [_brief(n) for n in matrix["groups"]], rotation=60, ha="right", fontsize=7
        )
    axes.set_title(
        f"loss increase of one layer alone ({document['unit']})", fontsize=10, loc="left"
    )
    axes.figure.colorbar(image, ax=axes, pad=0.01, format=_plain)


def _comparison_of(k: int) -> Any:  # noqa: ANN401  # a function of matplotlib's axes
    def draw(document: JsonObject, axes: Any) -> None:  # noqa: ANN401  # matplotlib
        found = document["comparison"]
        entries = [e for e in found["entries"] if e["plans"][k] is not None]
        entries.sort(key=lambda e: float(e["plans"][k]["mean"]), reverse=True)
        means = [max(e["plans"][k]["mean"], 0.0) for e in entries]
        colors = [_PLAN if e["plans"][k]["ties"] else _ACCENT for e in entries]
        axes.barh([_brief(e["name"]) for e in entries], means, color=colors)
        axes.set_xscale("log", nonpositive="clip")
        axes.xaxis.set_major_formatter(_plain)
        axes.tick_params(axis="y", labelsize=8)
        axes.set_title(f"measured loss increase at {found['budgets'][k]}", fontsize=10, loc="left")

    return draw


def _plain(value: float, _position: int | None = None) -> str:
    """Return a tick without mathematics, which is switched off because names come from users."""
    return f"{value:g}"


def _brief(name: str) -> str:
    return name if len(name) <= 28 else f"…{name[-27:]}"


def _array(text: str) -> NDArray[np.float64]:
    return np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float64)

"""An estimate for people: rows of a table, and sentences that say how sure it is.

Design: docs/design/progress.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitquota.progress import lasting, stage_words
from bitquota.report.text import format_size, markdown_table

if TYPE_CHECKING:
    from bitquota.estimate import JobEstimate, Refusal


def estimate_rows(found: JobEstimate) -> list[dict[str, str]]:
    """Return what a job is about and what it takes, one fact in each row."""
    share = 100 * found.quantizable_bits / found.model_bits
    samples = f"{found.samples:,}"
    if found.holdout_samples:
        samples += f", and {found.holdout_samples:,} on which plans are compared"
    losses = {f"loss of {o.name}": f"{o.loss}, as it is {o.kind}" for o in found.outputs}
    facts = {
        "layers": f"{found.n_layers:,} in {found.n_groups:,} decisions",
        "candidates": f"{found.n_candidates:,}, {found.n_pairs:,} pairs of them",
        **losses,
        "samples": samples,
        "passes": _passes(found.passes, found.most_passes),
        "time": _time(found),
        "memory": f"about {rounded_size(found.peak_bytes)} at its peak",
        "model now": format_size(found.model_bits),
        **{f"at {b.text}": f"at most {format_size(b.model_bits)}" for b in found.budgets},
        "quantizable": f"{share:.3g} % of the bytes",
    }
    return [{"what": what, "estimate": text} for what, text in facts.items()]


def stage_rows(found: JobEstimate) -> list[dict[str, str]]:
    """Return one row for each part of the job."""
    return [
        {
            "part": stage_words(stage.stage),
            "passes": _passes(stage.passes, stage.most_passes),
            "time": f"about {lasting(stage.seconds)}" if stage.seconds >= 1 else "below 1 s",
        }
        for stage in found.stages
    ]


def estimate_sentences(found: JobEstimate) -> list[str]:
    """Return how the figures were found, and what will not be done."""
    lines = [
        (
            f"A pass runs the model on all {found.samples:,} samples; a backward pass counts as "
            f"two. One takes about {_seconds(found.seconds_per_pass)} here ({found.engine} on "
            f"{found.device}), timed on one chunk of samples. Passes that are said exactly were "
            "counted from the schedule of the work itself."
        ),
        (
            "Solving, loading and fitting of quantizers to samples are not in the time. What the "
            "measurement cache holds is not run again."
        ),
    ]
    return lines + refusal_sentences(found)


def refusal_sentences(found: JobEstimate) -> list[str]:
    """Return what will not be done, one sentence for each reason."""
    by_reason: dict[tuple[bool, str], list[Refusal]] = {}
    for refusal in found.refused:
        by_reason.setdefault((refusal.size_bits > 0, refusal.reason), []).append(refusal)
    lines = []
    for (stays, reason), held in by_reason.items():
        if stays:
            size = format_size(sum(refusal.size_bits for refusal in held))
            more = f" and {len(held) - 1:,} more" if len(held) > 1 else ""
            lines.append(f"{size} stay as they are, in {held[0].what}{more}: {reason}.")
        else:
            lines.append(f"Left out: {', '.join(r.what for r in held)}: {reason}.")
    return lines


def render_estimate(found: JobEstimate, title: str = "Estimate") -> str:
    """Return everything as Markdown."""
    parts = [
        f"# {title}\n",
        markdown_table(estimate_rows(found)),
        markdown_table(stage_rows(found)),
        "\n\n".join(estimate_sentences(found)) + "\n",
    ]
    return "\n".join(part for part in parts if part)


def _passes(usual: float, most: float) -> str:
    if most - usual < 1e-6 * max(1.0, most):
        return f"{_number(usual)}"
    return f"about {_number(usual)}, at most {_number(most)}"


def _number(passes: float) -> str:
    return f"{passes:,.0f}" if passes >= 100 else f"{passes:.3g}"


def _time(found: JobEstimate) -> str:
    usual = "less than a second" if found.seconds < 1 else f"about {lasting(found.seconds)}"
    if found.most_seconds < 1 or lasting(found.most_seconds) == lasting(found.seconds):
        return usual
    return f"{usual}, at most about {lasting(found.most_seconds)}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else lasting(seconds)


def rounded_size(n_bytes: int) -> str:
    """Return a number of bytes as a size with few digits: ``1.9 GiB``, ``97 MiB``."""
    gigabytes = n_bytes / 2**30
    return f"{gigabytes:.1f} GiB" if gigabytes >= 1 else f"{n_bytes / 2**20:.0f} MiB"

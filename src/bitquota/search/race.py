"""A race of proposed choices on hold-out samples: the worse a choice, the fewer samples it takes.

Successive halving: all choices are measured on a few samples, those that are clearly worse are
dropped, the others are measured on as many samples again, and so on. Comparisons are paired, sample
by sample, so a difference is judged by its own standard error.

References:
    [SH] K. Jamieson, A. Talwalkar. Non-stochastic best arm identification and hyperparameter
    optimization. AISTATS 2016. arXiv 1502.07943.

Design: docs/design/search.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bitquota.search.refinement import CLEARLY
from bitquota.sensitivity.measures.choices import measure_choices
from bitquota.sensitivity.recorder import standard_error

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from bitquota.search.neighborhood import Choice
    from bitquota.search.validation import HoldOut

LEAST_SAMPLES = 32
"""Fewer samples drop nobody: their standard errors mean little."""


def race(
    holdout: HoldOut, proposals: Mapping[Choice, str], *, keep: int, stage: str = "starts"
) -> list[Choice]:
    """Return the choices that are left after the first block of hold-out samples, best first.

    Args:
        holdout: Gets the losses of those that are left; measures on its first block.
        proposals: Distinct choices, with their names, in order of trust.
        keep: So many are never dropped, the best ones.
        stage: Name for progress.

    Raises:
        MeasurementFailed: A loss is not finite.
        Cancelled: The context said so.

    Cost: at most one pass over the block for each choice; with many chunks about a third of that.
    """
    runner = holdout.runner(0)
    alive = list(proposals)
    losses: dict[Choice, NDArray[np.float64]] = {choice: np.empty(0) for choice in alive}
    for k, chunks in enumerate(_rounds(len(runner.chunks))):
        holdout.asked += len(alive) * sum(len(runner.chunks[c]) for c in chunks)
        values = measure_choices(
            runner,
            holdout.table,
            holdout.loss,
            alive,
            context=holdout.context,
            stage=f"{stage}, round {k + 1}",
            chunks=chunks,
        )
        for choice, row in zip(alive, values, strict=True):
            losses[choice] = np.concatenate([losses[choice], row])
        alive = survivors({choice: losses[choice] for choice in alive}, keep)
    for choice in alive:
        holdout.losses[choice] = [losses[choice]]
    return alive


def leader(holdout: HoldOut, alive: Sequence[Choice], proposals: Mapping[Choice, str]) -> Choice:
    """Return the most trusted of the choices that are left and not worse than one standard error.

    The best of many measured ones is lucky; among equals the order of the proposals knows more.
    """
    best = holdout.best(alive)
    near = {c for c in alive if -(g := holdout.gain(c, best))[0] <= g[1]}
    return next(choice for choice in proposals if choice in near)


def survivors(losses: Mapping[Choice, NDArray[np.float64]], keep: int) -> list[Choice]:
    """Return the choices that stay in a race, best first.

    The ``keep`` best stay. Of the others, those that are not clearly worse than the best, and at
    most half of all.
    """
    order = sorted(losses, key=lambda c: (float(losses[c].mean()), c))
    best = losses[order[0]]
    if len(best) < LEAST_SAMPLES:
        return order
    open_ = [c for c in order if not _clearly_worse(losses[c] - best)]
    half = max(keep, (len(order) + 1) // 2)
    return order[:keep] + [c for c in open_ if c not in order[:keep]][: half - keep]


def _clearly_worse(difference: NDArray[np.float64]) -> bool:
    mean = float(difference.mean())
    return mean > 0 and mean > CLEARLY * float(standard_error(difference))


def _rounds(n: int) -> list[range]:
    """Return chunks 0, 1, 2 to 3, 4 to 7, …: each round doubles the samples."""
    found, start = [], 0
    while start < n:
        stop = min(n, max(1, 2 * start))
        found.append(range(start, stop))
        start = stop
    return found


__all__ = ["leader", "race", "survivors"]

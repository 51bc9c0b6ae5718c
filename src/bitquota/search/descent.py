"""A walk downhill on what sums of output differences predict.

Design: docs/design/search.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bitquota.search.neighborhood import Choice, Limits, neighbours

if TYPE_CHECKING:
    from bitquota.sensitivity.measures.gram import OutputDifferences

STEP_ELEMENTS = 2**28
"""Output elements that a step predicts at most, beside those of single moves: some seconds. With
512 samples of ten classes that is 50,000 neighbours, more than a network of 56 layers has."""


def predicted_descent(
    differences: OutputDifferences, limits: Limits, start: Choice, *, max_steps: int = 64
) -> Choice:
    """Walk downhill on the sum-of-differences prediction by one- and two-group moves.

    Where outputs are large, only the moves of two groups whose effects alone add up to the least
    are predicted together.

    Returns:
        The end of the walk; ``start`` itself where no move is predicted to improve.

    Cost: one prediction per neighbour and step, or ``STEP_ELEMENTS`` elements; no passes.
    """
    current = start
    value = float(differences.predict([current])[0])
    for _ in range(max_steps):
        near = neighbours(differences.table, limits, current)
        near = _worth_predicting(differences, current, near)
        if not near:
            break
        predicted = differences.predict_near(current, near)
        best = int(predicted.argmin())
        if not predicted[best] < value - 1e-12:
            break
        current, value = near[best], float(predicted[best])
    return current


def _worth_predicting(
    differences: OutputDifferences, current: Choice, near: list[Choice]
) -> list[Choice]:
    """Return those of ``near`` that a step has time for: the best by the sum of single moves."""
    most = max(1, STEP_ELEMENTS // differences.base_output.numel())
    if len(near) <= most:
        return near
    moves = [
        [(g, new) for g, (old, new) in enumerate(zip(current, choice, strict=True)) if old != new]
        for choice in near
    ]
    single = list(dict.fromkeys(move for some in moves for move in some))
    alone = [(*current[:g], new, *current[g + 1 :]) for g, new in single]
    effect = dict(zip(single, differences.predict_near(current, alone).tolist(), strict=True))
    # Each effect holds the loss of ``current``, which pairs would count twice.
    now = float(differences.predict_near(current, [current])[0])
    sums = np.array([sum(effect[move] - now for move in some) for some in moves])
    return [near[k] for k in sorted(np.argsort(sums, kind="stable")[:most].tolist())]

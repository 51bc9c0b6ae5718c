"""Layers that have no effect once others are zeros, and what their bits are better spent on.

A residual branch or an expert is gone once its last layer is zeros: the layers before it feed
nothing, and one behind a layer of zeros repeats a constant. A sensitivity matrix does not know
that: each of them alone loses the whole branch, and their sum loses it several times. So a choice
with zeros is looked at as it is: what else becoming zeros loses there is measured, and the solver
is asked again with these losses.

Design: docs/design/zero-bits.md
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from bitquota.search.problems import limits_of, proposer
from bitquota.sensitivity.measures.choices import measure_choices

if TYPE_CHECKING:
    from bitquota.matrix import SensitivityMatrix
    from bitquota.measurement_setup import Setup
    from bitquota.search.neighborhood import Choice
    from bitquota.sensitivity.runners.base import Runner
    from bitquota.solver import Problem

STAGE = "idle layers"
"""Name for progress."""

ROUNDS = 3
"""A longer branch loses a layer or more in each."""

SAME = 1e-6
"""Losses of equal outputs differ by roundings, as a share."""


def without_idle_layers(
    setup: Setup, runner: Runner, matrix: SensitivityMatrix, problem: Problem, choice: Choice
) -> Choice:
    """Return a choice within the budgets that measures no worse than ``choice``, or itself.

    Groups that are zeros stay so. Others become zeros where that costs nothing, or less than what
    its bits are worth elsewhere.

    Cost: for each round a run behind each group that may become zeros and three passes, all on the
    first chunk; nothing where no group of ``choice`` is zeros.
    """
    if matrix.loss != setup.loss.name:
        return choice
    table = setup.table
    groups, starts = table.group_of_row, table.offsets[:-1]
    zeros = {  # by group the row of zeros
        int(groups[n]): n
        for n, row in enumerate(table.rows)
        if all(c.pruned for c in row.candidates)
    }

    def with_zeros(among: set[int]) -> Choice:
        return tuple(int(zeros[g] - starts[g]) if g in among else k for g, k in enumerate(choice))

    for _ in range(ROUNDS):
        chosen = starts + np.asarray(choice, dtype=np.int64)
        gone = {g for g, n in zeros.items() if chosen[g] == n}
        others = sorted(zeros.keys() - gone)
        if not gone or not others:
            break

        def losses(*asked: Choice, centre: Choice = choice) -> list[float]:
            measured = measure_choices(
                runner, table, setup.loss, asked, centre=centre,
                context=setup.context, stage=STAGE, chunks=range(1),
            )  # fmt: skip
            return [float(row.mean()) for row in measured]

        before, *alone = losses(choice, *(with_zeros({g}) for g in others))
        same = before * (1 + SAME)
        idle = {g for g, loss in zip(others, alone, strict=True) if loss <= same}
        # What zeros lose here, whatever the matrix says of them around full precision.
        diagonal = matrix.diagonal.copy()
        cross = None if matrix.cross is None else matrix.cross.copy()
        for g, loss in zip(others, alone, strict=True):
            diagonal[zeros[g]] = loss - before + matrix.diagonal[chosen[g]]
            if matrix.cross is not None and cross is not None:
                diagonal[zeros[g]] += matrix.cross[chosen[g], chosen].sum()
                cross[zeros[g], :] = cross[:, zeros[g]] = 0.0
        rows = [n for n, g in enumerate(groups.tolist()) if g not in gone or n == zeros[g]]
        asked_again = replace(matrix, diagonal=diagonal, cross=cross)
        spent = proposer(setup, problem)(asked_again, limits_of(problem).only(rows))
        found = [c for c in (spent, with_zeros(idle)) if c is not None and c != choice]
        if not found:
            break
        loss, best = min(zip(losses(*found), found, strict=True))
        if loss > same:
            break
        choice = best
    return choice

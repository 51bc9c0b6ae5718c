"""Scores of a language model's layers, scaled to what layers lose once all of them are rounded.

A score is taken around full precision. Rounding layer after layer makes up for errors of earlier
ones, so early blocks lose less than their scores say, and late ones more. The share of each layer
in the loss of one uniform plan, as it would ship, is measured on the hold-out samples
(``layer_shares``); what a layer's shares are to its score at that width, all its scores are
multiplied with.

Design: docs/design/language-models.md
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from bitquota.errors import InvalidInput
from bitquota.journal import short_name
from bitquota.search.baselines import baseline_choices, largest, size_only
from bitquota.sensitivity.metrics.stack_shares import layer_shares
from bitquota.sensitivity.runners.stack import StackRunner
from bitquota.solver import build_problem

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bitquota.candidates.budget import Budget
    from bitquota.matrix import SensitivityMatrix
    from bitquota.measurement_setup import Setup
    from bitquota.search.neighborhood import Choice
    from bitquota.sensitivity.runners.base import Runner

WITHIN = 4.0
"""Where scores estimate the loss, a factor is kept within so many times the median of all, and
within that part of it."""

LEAST = 0.01
"""Part of the mean share that every share counts for at least."""


def shared_plan(setup: Setup, budgets: Sequence[Sequence[Budget]]) -> tuple[str, Choice] | None:
    """Return the plan whose shares scale the scores of a setup, with its name, if any do.

    It is the widest uniform plan that keeps every budget.
    """
    if setup.stacked is None or setup.request.measure != "auto":
        return None
    problems = [build_problem(size_only(setup.table), together) for together in budgets]
    fitting = {
        name: choice
        for name, choice in baseline_choices(setup.table).items()
        if name.startswith("uniform") and all(p.is_feasible(choice) for p in problems)
    }
    return next(iter(largest(setup.table, fitting).items()), None)


def scaled_by_shares(
    setup: Setup, matrix: SensitivityMatrix, runner: Runner, name: str, choice: Choice
) -> SensitivityMatrix:
    """Return the matrix with each group's scores in proportion to its share in a uniform plan.

    Args:
        setup: Of a model that is walked part by part.
        matrix: Scores around full precision, without cross terms.
        runner: On the hold-out samples.
        name: Of the plan.
        choice: The plan.

    Raises:
        InvalidInput: Gradients do not reach the output, or all shares together are no loss.
        Cancelled: The context said so.

    Cost: the plan is rounded as it would ship, which the comparison of plans finds in the journal;
    then ``FORWARD_AND_BACK`` passes over the hold-out samples.
    """
    assert isinstance(runner, StackRunner)  # noqa: S101  # callers ask first
    weights = runner.known.shipped(setup.rounded(choice).weights)
    samples = runner.calibration
    walk = short_name([list(choice), samples.digest, list(samples.indices)])
    shares = layer_shares(runner, weights, setup.loss, walk, setup.context)
    factors = _factors(matrix, choice, shares, setup.loss.name)
    per_row = factors[matrix.table.group_of_row]
    error = matrix.diagonal_error
    done = [*matrix.provenance.get("transformed", []), f"shares of {name}"]
    return replace(
        matrix,
        diagonal=matrix.diagonal * per_row,
        diagonal_error=None if error is None else error * per_row,
        loss=setup.loss.name,
        unit=setup.loss.unit,
        provenance={**matrix.provenance, "transformed": done},
    )


def _factors(
    matrix: SensitivityMatrix, choice: Choice, shares: Mapping[str, float], loss: str
) -> np.ndarray:
    """Return f64[groups]; groups whose weights the plan does not quantize have the median."""
    table = matrix.table
    chosen = table.offsets[:-1] + np.asarray(choice)
    scores = matrix.diagonal[chosen]
    rows = [table.rows[r] for r in chosen]
    own = np.array([sum(shares.get(c.layer, 0.0) for c in row.candidates) for row in rows])
    known = np.array([any(c.layer in shares for c in row.candidates) for row in rows])
    known &= scores > 0
    if not 0 < own[known].sum() < np.inf:
        msg = f"a uniform plan must lose something for shares of it; got {own[known].sum():.3g}"
        raise InvalidInput(msg)
    # What a layer loses alone may be made up for by others, but not for any width.
    ratios = np.maximum(own, LEAST * own[known].mean())[known] / scores[known]
    median = float(np.median(ratios))
    if matrix.loss == loss:
        ratios = np.clip(ratios, median / WITHIN, median * WITHIN)
    factors = np.full(len(rows), median)
    factors[known] = ratios
    factors[np.array([row.cached for row in rows])] = 1.0
    return factors

"""Solver problems of a setup: how they are solved, and what bounds a refinement of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bitquota.errors import BudgetTooSmall, Infeasible
from bitquota.search.neighborhood import Limits
from bitquota.solver import Problem, solve

if TYPE_CHECKING:
    from bitquota.matrix import SensitivityMatrix
    from bitquota.measurement_setup import Setup
    from bitquota.search.neighborhood import Choice
    from bitquota.search.refinement import Solve
    from bitquota.solver import Solution

PROPOSAL_GAP = 1e-3
"""Proposals of the refinement are measured anyway: a proof of the last digits buys nothing."""

SOLVER_NODES = 50_000
"""Branch-and-bound nodes for one final solve; the gap that is left is reported."""

PROPOSAL_NODES = 200
"""Branch-and-bound nodes for one proposal; a count, so that plans do not depend on speed."""


def solved(setup: Setup, problem: Problem) -> Solution:
    """Return the solver's answer, which has a choice.

    Raises:
        Infeasible: It found none within the budgets and limits of the request.
    """
    solution = solve(
        problem,
        backend=setup.request.solver,
        gap=setup.request.gap,
        node_limit=SOLVER_NODES,
        time_limit_s=setup.request.time_limit_s,
        seed=setup.request.seed,
        cancelled=setup.context.cancelled,
    )
    if solution.choice is None:
        msg = (
            f"some choice must satisfy all budgets together; the solver ended "
            f"'{solution.status}': raise a budget, or give the solver more time"
        )
        raise Infeasible(msg, status=str(solution.status))
    return solution


def choice_of(solution: Solution) -> Choice:
    """Return the choice of a solution that has one."""
    assert solution.choice is not None  # noqa: S101  # see ``solved``
    return tuple(int(c) for c in solution.choice)


def limits_of(problem: Problem) -> Limits:
    """Return the problem's limits; rows that it forbids become one more limit, of none."""
    return Limits(
        costs=np.vstack([problem.costs, ~problem.allowed[None, :]]).astype(np.int64),
        limits=np.append(problem.limits, np.int64(0)),
    )


def proposer(setup: Setup, problem: Problem) -> Solve:
    """Return how a refinement solves other matrices over the same groups within other limits."""

    def propose(matrix: SensitivityMatrix, limits: Limits) -> Choice | None:
        other = Problem(
            diagonal=matrix.diagonal,
            cross=matrix.cross,
            offsets=problem.offsets,
            costs=limits.costs,
            limits=limits.limits,
            groups=problem.groups,
            labels=problem.labels,
            constant=matrix.constant,
        )
        try:
            solution = solve(
                other,
                backend=setup.request.solver,
                gap=max(PROPOSAL_GAP, setup.request.gap),
                node_limit=PROPOSAL_NODES,
                seed=setup.request.seed,
                cancelled=setup.context.cancelled,
            )
        except (BudgetTooSmall, Infeasible):
            return None  # a trust region may leave nothing
        return None if solution.choice is None else choice_of(solution)

    return propose

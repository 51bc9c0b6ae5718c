"""Our own solver: pick the method, keep the limits, check the answer.

Design: docs/design/solver.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bitquota.errors import InvalidProblem, SolverFailed
from bitquota.solver.elimination import MOST_STATES, eliminated, priced, tables
from bitquota.solver.factored import Entangled, Factored
from bitquota.solver.joint import Jointly
from bitquota.solver.loading import kernels_loaded, load_kernels
from bitquota.solver.one_thread import one_thread
from bitquota.solver.quadratic import INTERIOR_ROWS, Quadratic
from bitquota.solver.separable import solve_knapsack
from bitquota.solver.solution import (
    Certificate,
    Convexification,
    Limit,
    Solution,
    Stats,
    Status,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bitquota.solver.control import Control
    from bitquota.solver.problem import Problem


def solve_native(
    problem: Problem, control: Control, start: NDArray[np.int64] | None = None
) -> Solution:
    """Return the best choice and a bound that no choice is below.

    Args:
        problem: Budgets already checked one by one (``Problem.check_budgets``).
        control: Goal, limits and callbacks. Loading kernels, which the first solves of a process
            do, does not count for the time limit.
        start: A choice to begin with; ignored when it is infeasible.
    """
    knapsack = is_knapsack(problem)
    large = problem.factor is not None and problem.n_rows > INTERIOR_ROWS
    pairs = len(problem.forbidden_pairs) + len(problem.required_pairs) > 0
    sparse = len(problem.terms) > 0 or is_sparse(problem)
    sparse |= pairs and (problem.separable or large)
    if knapsack:
        methods: tuple[str, ...] = ("knapsack",)
    elif sparse:
        methods = ("search", "matrix", "terms")
    elif large:
        methods = ("search",)
    else:
        methods = ("search", "matrix")
    if not kernels_loaded(*methods):
        with control.uncounted():
            load_kernels(*methods)
    with control.watched(), one_thread():
        if knapsack:
            return _knapsack(problem, control)
        if sparse:
            return _by_elimination(problem, control, start)
        if problem.factor is not None:
            return Factored(problem, control).run(start)
        return Quadratic(problem, control).run(start)


def is_sparse(problem: Problem) -> bool:
    """Return whether ``cross`` has terms between less than a quarter of the pairs of groups."""
    if problem.cross is None:
        return False
    starts, joined = problem.offsets[:-1], 0
    for a, b in zip(starts, problem.offsets[1:], strict=True):
        some = (problem.cross[a:b] != 0.0).any(axis=0)
        joined += int(np.logical_or.reduceat(some, starts).sum())
        if 4 * joined >= problem.n_groups**2:
            return False
    return True


def _by_elimination(
    problem: Problem, control: Control, start: NDArray[np.int64] | None
) -> Solution:
    """Solve by elimination where that fits, else as a matrix of all terms.

    Raises:
        InvalidProblem: Neither fits.
    """
    rank = 0 if problem.factor is None else problem.factor.shape[1]
    listed, most = problem.listed(), MOST_STATES // (1 + rank // 16)
    posed = priced(listed)
    found = eliminated(posed, most)
    if found is None and not problem.separable:  # pairs then only cut off what violates them
        posed, found = listed, eliminated(listed, most)
    if found is not None:
        return Jointly(listed, control, tables(posed, found)).run(start)
    if problem.cross is not None or problem.separable:
        return Quadratic(problem, control).run(start)
    if problem.n_rows > INTERIOR_ROWS:
        msg = (
            f"more than {INTERIOR_ROWS:,} rows must have terms that join few groups at a time "
            f"(blocks of some seven, chains); got {problem.n_rows:,} rows and "
            f"{len(problem.terms):,} terms: leave the smallest terms out"
        )
        raise InvalidProblem(msg)
    if problem.factor is None:
        return Quadratic(problem.dense(), control).run(start)
    return Entangled(problem, control).run(start)


def is_knapsack(problem: Problem) -> bool:
    """Return whether ``problem`` is separable with at most one budget and no pairs."""
    pairs = len(problem.forbidden_pairs) + len(problem.required_pairs)
    return problem.separable and len(problem.limits) <= 1 and pairs == 0


def _knapsack(problem: Problem, control: Control) -> Solution:
    """Solve by hull and core; the certificate is one node, and a recursion for the checker."""
    answer = solve_knapsack(
        problem, gap=control.options.gap, stop=control.stopped, halt=control.halt
    )
    # The certificate: no shift is needed, and the point is the choice.
    n, m = problem.n_rows, len(problem.limits)
    z = np.zeros((1, n), dtype=np.float32)
    z[0, problem.rows(answer.choice)] = 1.0
    none = np.zeros(0, dtype=np.int64)
    recursion = answer.exact and answer.states > 0
    certificate = Certificate(
        bound=answer.bound if recursion else answer.relaxed_bound,
        convexifications=(
            Convexification(
                support=problem.allowed,
                shift=np.zeros((n, int(np.diff(problem.offsets).max()))),
                cut_rows=none,
                cut_columns=none,
                cut_values=np.zeros(0),
                products=np.zeros((m, n)),
            ),
        ),
        parent=np.array([-1], dtype=np.int64),
        allowed=np.packbits(problem.allowed[None, :], axis=1),
        convexification=np.zeros(1, dtype=np.int64),
        point=z,
        multipliers=np.full((1, m), answer.price),
        recursion=recursion,
    )
    # The answer.
    solution = Solution(
        status=Status.OPTIMAL if answer.exact else Status.FEASIBLE,
        limit=None if answer.exact else (control.limit or Limit.MEMORY),
        choice=answer.choice,
        objective=answer.objective,
        bound=answer.bound,
        stats=Stats(
            cpu_seconds=control.cpu_seconds(),
            root_bound=answer.relaxed_bound,
            details={"states": float(answer.states)},
        ),
        certificate=certificate,
    )
    control.tell_of(solution)
    return solution


def verified(problem: Problem, solution: Solution) -> Solution:
    """Return ``solution`` after checking its choice from first principles.

    Raises:
        SolverFailed: The choice breaks a constraint, or its value is not the one stated.
    """
    if solution.choice is None:
        return solution
    if not problem.is_feasible(solution.choice):
        spent = problem.spent(solution.choice).tolist()
        msg = (
            f"the answer of '{solution.backend}' must meet every constraint; it takes {spent} of "
            f"{problem.limits.tolist()}, or breaks a pair or a fixed row; report this"
        )
        raise SolverFailed(msg, backend=solution.backend)
    value = problem.evaluate(solution.choice)
    if abs(value - solution.objective) > 1e-9 * max(abs(value), 1e-300):
        msg = (
            f"the answer of '{solution.backend}' must be worth what it states "
            f"({solution.objective}); it is worth {value}; report this"
        )
        raise SolverFailed(msg, backend=solution.backend)
    return solution

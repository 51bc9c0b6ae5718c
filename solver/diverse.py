"""Several good plans that differ: the best, the best that differs from it, and so on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bitquota.errors import Infeasible, InvalidProblem
from bitquota.solver.problem import Problem
from bitquota.solver.solution import Solution, Status
from bitquota.solver.solve import GAP, solve

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    Ints = NDArray[np.int64]


def diverse(
    problem: Problem,
    count: int,
    *,
    distance: int = 1,
    weights: Sequence[int] | None = None,
    gap: float = GAP,
    time_limit_s: float | None = None,
    seed: int = 0,
    cancelled: Callable[[], bool] | None = None,
) -> Iterator[Solution]:
    """Yield up to ``count`` solutions, each the best that differs enough from all before it.

    "Differs enough" is one more row of zeros and weights per earlier choice: the groups that agree
    with it weigh at most the total less ``distance``. So each solution is exact (within ``gap``,
    when no limit strikes), and its certificate is one for ``excluding(problem, earlier, …)``. With
    ``distance`` 1 and no weights these are the ``count`` best choices.

    Args:
        problem: What to solve.
        count: How many solutions at most; fewer come when no other choice is left or nothing was
            found in time.
        distance: Least total weight of the groups in which two solutions differ.
        weights: What each group counts, such as its number of weights; 1 each by default.
        gap: Relative gap of each.
        time_limit_s: Seconds for each.
        seed: For the search.
        cancelled: ``True`` stops.

    Raises:
        InvalidProblem: ``count`` or ``distance`` below 1, or weights that are negative or do not
            fit the groups.
        Infeasible: The problem itself has no solution by one budget alone.
    """
    if count < 1:
        msg = f"'count' must be at least 1; got {count}"
        raise InvalidProblem(msg)
    found: list[Ints] = []
    while len(found) < count:
        rest = excluding(problem, found, distance=distance, weights=weights)
        try:
            solution = solve(
                rest, gap=gap, time_limit_s=time_limit_s, seed=seed, cancelled=cancelled
            )
        except Infeasible:
            if not found:
                raise
            return
        if solution.choice is None:
            if not found:
                yield solution
            return
        found.append(solution.choice)
        yield solution
        if solution.status is not Status.OPTIMAL and cancelled is not None and cancelled():
            return


def excluding(
    problem: Problem,
    choices: Sequence[Ints],
    *,
    distance: int = 1,
    weights: Sequence[int] | None = None,
) -> Problem:
    """Return ``problem`` with the choices nearer than ``distance`` to any of ``choices`` excluded.

    Raises:
        InvalidProblem: See ``diverse``.
    """
    weight = np.ones(problem.n_groups, dtype=np.int64)
    if weights is not None:
        weight = np.asarray(weights, dtype=np.int64)
    if weight.shape != (problem.n_groups,) or bool((weight < 0).any()):
        msg = f"'weights' must hold {problem.n_groups} integers that are not negative"
        raise InvalidProblem(msg)
    if distance < 1:
        msg = f"'distance' must be at least 1; got {distance}"
        raise InvalidProblem(msg)
    if not choices:
        return problem
    rows = np.zeros((len(choices), problem.n_rows), dtype=np.int64)
    for k, choice in enumerate(choices):
        rows[k, problem.rows(choice)] = weight
    limits = np.full(len(choices), int(weight.sum()) - distance, dtype=np.int64)
    return Problem(
        diagonal=problem.diagonal,
        cross=problem.cross,
        offsets=problem.offsets,
        costs=np.concatenate([problem.costs, rows]),
        limits=np.concatenate([problem.limits, limits]),
        resources=(*problem.resources, *(f"like plan {k + 1}" for k in range(len(choices)))),
        groups=problem.groups,
        labels=problem.labels,
        constant=problem.constant,
        allowed=problem.allowed,
        forbidden_pairs=problem.forbidden_pairs,
        required_pairs=problem.required_pairs,
    )

"""The best choices that differ from each other: the best, the best unlike it, and so on.

Design: docs/design/solver.md
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Unpack

import numpy as np

from bitquota.errors import Infeasible, InvalidProblem
from bitquota.solver.dispatch import solve
from bitquota.solver.solution import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from bitquota.solver.control import Wishes
    from bitquota.solver.problem import Problem
    from bitquota.solver.solution import Solution

    Ints = NDArray[np.int64]

    class Options(Wishes, total=False):
        """What may be said to ``alternatives``."""

        first: Solution | None
        distance: int
        weights: Sequence[int] | None
        time_limit_s: float | None
        clock: Callable[[], float]


def top_k(problem: Problem, k: int, **options: Unpack[Options]) -> tuple[Solution, ...]:
    """Return the ``alternatives`` that have a choice; arguments and errors as there."""
    return tuple(s for s in alternatives(problem, k, **options) if s.choice is not None)


def alternatives(
    problem: Problem,
    k: int,
    *,
    first: Solution | None = None,
    distance: int = 1,
    weights: Sequence[int] | None = None,
    time_limit_s: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    **wishes: Unpack[Wishes],
) -> list[Solution]:
    """Return up to ``k`` solutions, each the best that differs enough from all before it.

    "Differs enough" is one more row of zeros and weights per earlier choice: the groups that agree
    with it weigh at most the total less ``distance``. So each solution is exact (within the gap),
    and its certificate is one for ``excluding(problem, earlier, …)``. With ``distance`` 1 and no
    weights these are the ``k`` best choices.

    Args:
        problem: What to solve.
        k: How many solutions at most. Fewer come when no other choice is left (the last has none
            and is infeasible), or after the first that a limit stopped: it may be worse than one
            that would follow, or have no choice.
        first: The answer to ``problem`` itself, where it is known.
        distance: Least total weight of the groups in which two solutions differ.
        weights: What each group counts, such as its number of weights; 1 each by default.
        time_limit_s: Seconds by ``clock`` in all.
        clock: What the time limit is measured with.
        wishes: For each solve; see ``bitquota.solver.solve``.

    Raises:
        InvalidProblem: ``k`` or ``distance`` below 1, or weights that are negative or do not fit
            the groups.
        Infeasible: The problem itself has no solution by one budget alone.
    """
    if k < 1:
        msg = f"'k' must be at least 1; got {k}"
        raise InvalidProblem(msg)
    # Solve, exclude what is too near to the choice, solve again.
    begin = clock()
    found = [] if first is None else [first]
    while len(found) < k and all(s.status is Status.OPTIMAL for s in found):
        choices = [solution.choice for solution in found if solution.choice is not None]
        rest = excluding(problem, choices, distance=distance, weights=weights)
        left = None if time_limit_s is None else max(0.0, time_limit_s - (clock() - begin))
        try:
            solution = solve(rest, time_limit_s=left, clock=clock, **wishes)
        except Infeasible:
            if not found:
                raise
            break
        found.append(solution)
    return found


def excluding(
    problem: Problem,
    choices: Sequence[Ints],
    *,
    distance: int = 1,
    weights: Sequence[int] | None = None,
) -> Problem:
    """Return ``problem`` with the choices nearer than ``distance`` to any of ``choices`` excluded.

    Raises:
        InvalidProblem: See ``top_k``.
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
    taken = np.zeros((len(choices), problem.n_rows), dtype=np.int64)
    for k, choice in enumerate(choices):
        taken[k, problem.rows(choice)] = weight
    allowance = np.full(len(choices), int(weight.sum()) - distance, dtype=np.int64)
    return replace(
        problem,
        costs=np.concatenate([problem.costs, taken]),
        limits=np.concatenate([problem.limits, allowance]),
        resources=(*problem.resources, *(f"unlike plan {k + 1}" for k in range(len(choices)))),
    )

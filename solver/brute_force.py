"""Every choice, one by one: the reference that all other solvers are compared with."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import numpy as np

from bitquota.errors import InvalidProblem
from bitquota.solver.solution import Limit, Solution, Stats, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from bitquota.solver.problem import Problem

LARGEST = 5_000_000
"""Choices of allowed rows beyond which enumeration is refused."""

_CHUNK = 1 << 14


def n_choices(problem: Problem) -> int:
    """Return how many choices of allowed rows there are, constraints aside."""
    allowed = np.add.reduceat(problem.allowed.astype(np.int64), problem.offsets[:-1])
    return math.prod(allowed.tolist())


def feasible_choices(
    problem: Problem, *, largest: int = LARGEST
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Yield all feasible choices in lexicographic order, in chunks.

    Yields:
        ``i64[k, G]`` choices and ``f64[k]`` objectives; ``k`` may be 0.

    Raises:
        InvalidProblem: More than ``largest`` choices.

    Cost: ``O(choices · G²)``.
    """
    total = n_choices(problem)
    if total > largest:
        msg = (
            f"enumeration takes at most {largest:,} choices; this problem has {total:,}: use "
            "another solver"
        )
        raise InvalidProblem(msg, choices=total, largest=largest)
    starts = problem.offsets[:-1]
    locals_of = [
        np.flatnonzero(problem.allowed[a:b])
        for a, b in zip(starts.tolist(), problem.offsets[1:].tolist(), strict=True)
    ]
    sizes = [len(rows) for rows in locals_of]
    for first in range(0, total, _CHUNK):
        index = np.arange(first, min(first + _CHUNK, total))
        choices = np.empty((len(index), len(sizes)), dtype=np.int64)
        for g in reversed(range(len(sizes))):
            index, digit = np.divmod(index, sizes[g])
            choices[:, g] = locals_of[g][digit]
        rows = choices + starts
        fits = np.ones(len(rows), dtype=np.bool_)
        for cost, limit in zip(problem.costs, problem.limits, strict=True):
            fits &= cost[rows].sum(axis=1) <= limit
        chosen = np.zeros((len(rows), problem.n_rows), dtype=np.bool_)
        np.put_along_axis(chosen, rows, values=True, axis=1)
        for a, b in problem.forbidden_pairs.tolist():
            fits &= ~(chosen[:, a] & chosen[:, b])
        for a, b in problem.required_pairs.tolist():
            fits &= ~chosen[:, a] | chosen[:, b]
        choices, rows = choices[fits], rows[fits]
        values = problem.constant + problem.diagonal[rows].sum(axis=1)
        if problem.cross is not None:
            for g in range(problem.n_groups):
                for h in range(g):
                    values += problem.cross[rows[:, g], rows[:, h]]
        yield choices, values


def enumerate_all(
    problem: Problem,
    *,
    largest: int = LARGEST,
    cancelled: Callable[[], bool] | None = None,
) -> Solution:
    """Return the best choice, found by looking at all of them.

    Exact up to the rounding of one sum: two choices whose objectives differ by less than that
    count as equal, and the lexicographically first is returned.

    Raises:
        InvalidProblem: More than ``largest`` choices.
    """
    started = time.process_time()
    best: NDArray[np.int64] | None = None
    best_value, seen = math.inf, 0
    stopped = False
    for choices, values in feasible_choices(problem, largest=largest):
        if cancelled is not None and cancelled():
            stopped = True
            break
        seen += len(values)
        if len(values) and float(values.min()) < best_value:
            at = int(np.argmin(values))
            best, best_value = choices[at], float(values[at])
    stats = Stats(cpu_seconds=time.process_time() - started, details={"feasible": float(seen)})
    if stopped:
        found = best is not None
        return Solution(
            status=Status.FEASIBLE if found else Status.UNKNOWN,
            limit=Limit.CANCELLED,
            choice=best,
            objective=math.inf if best is None else problem.evaluate(best),
            backend="brute_force",
            stats=stats,
        )
    if best is None:
        return Solution(
            status=Status.INFEASIBLE, bound=math.inf, backend="brute_force", stats=stats
        )
    value = problem.evaluate(best)
    return Solution(
        status=Status.OPTIMAL,
        choice=best,
        objective=value,
        bound=value,
        backend="brute_force",
        stats=stats,
    )

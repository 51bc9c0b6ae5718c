"""Every choice, one by one: the reference that all other solvers are compared with."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from bitquota.errors import InvalidProblem
from bitquota.solver.control import Control
from bitquota.solver.solution import Solution, Stats, Status

if TYPE_CHECKING:
    from collections.abc import Iterator

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
    problem: Problem,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """Yield all feasible choices in lexicographic order, in chunks.

    Yields:
        ``i64[k, G]`` choices and ``f64[k]`` objectives; ``k`` may be 0.

    Raises:
        InvalidProblem: More than ``LARGEST`` choices.

    Cost: ``O(choices · G²)``.
    """
    total = n_choices(problem)
    if total > LARGEST:
        msg = (
            f"enumeration takes at most {LARGEST:,} choices; this problem has {total:,}: use "
            "another solver"
        )
        raise InvalidProblem(msg, choices=total, largest=LARGEST)
    starts = problem.offsets[:-1]
    # A choice's number in lexicographic order gives its rows.
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
        # Those that meet every constraint.
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
        # Their objectives.
        choices, rows = choices[fits], rows[fits]
        values = problem.constant + problem.diagonal[rows].sum(axis=1)
        if problem.cross is not None:
            for g in range(problem.n_groups):
                for h in range(g):
                    values += problem.cross[rows[:, g], rows[:, h]]
        if problem.factor is not None:
            parts = problem.factor[rows]
            values += 0.5 * ((parts.sum(axis=1) ** 2).sum(axis=1) - (parts**2).sum(axis=(1, 2)))
        if len(problem.terms):
            taken = np.zeros((len(rows), problem.n_rows), dtype=np.bool_)
            np.put_along_axis(taken, rows, values=True, axis=1)
            for (a, b), value in zip(problem.terms.tolist(), problem.term_values, strict=True):
                values += np.where(taken[:, a] & taken[:, b], value, 0.0)
        yield choices, values


def enumerate_all(problem: Problem, control: Control | None = None) -> Solution:
    """Return the best choice, found by looking at all of them.

    Exact up to the rounding of one sum: two choices whose objectives differ by less than that
    count as equal, and the lexicographically first is returned.

    Raises:
        InvalidProblem: More than ``LARGEST`` choices.
    """
    control = control or Control()
    best: NDArray[np.int64] | None = None
    best_value, seen = math.inf, 0
    for choices, values in feasible_choices(problem):
        if control.stopped():
            break
        seen += len(values)
        if len(values) and float(values.min()) < best_value:
            at = int(np.argmin(values))
            best, best_value = choices[at], float(values[at])
    value = math.inf if best is None else problem.evaluate(best)
    proved, unproved = Status.OPTIMAL, Status.FEASIBLE
    if best is None:
        proved, unproved = Status.INFEASIBLE, Status.UNKNOWN
    return Solution(
        status=proved if control.limit is None else unproved,
        limit=control.limit,
        choice=best,
        objective=value,
        bound=value if control.limit is None else -math.inf,
        backend="brute_force",
        stats=Stats(cpu_seconds=control.cpu_seconds(), details={"feasible": float(seen)}),
    )

"""The part of a problem that is still to be decided, as plain arrays for the kernels."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from bitquota.compiled import compiled
from bitquota.solver.interruptible import go_on

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from bitquota.solver.problem import Problem

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Bools = NDArray[np.bool_]


@dataclass(slots=True, kw_only=True, eq=False)
class Core:
    """A problem restricted to some rows, groups with one row folded into the rest.

    Attributes:
        d: f64[n] linear terms, pair terms with fixed rows included.
        C: f64[n, n] pair terms, f64[0, 0] for a separable problem.
        off: i64[G+1] group offsets.
        grp: i64[n] group of each row.
        A: i64[m, n] costs.
        b: i64[m] limits, what fixed rows take subtracted.
        constant: Objective of the fixed rows, the problem's constant included.
        rows: i64[n] the problem's row that each row stands for.
        full: i64[G of the problem], the problem's fixed row per group, -1 where undecided.
        pairs: i64[p, 2] forbidden pairs among the rows.
        feasible: ``False`` when fixing alone breaks a constraint.
        e: f64[n] what rounding has done to ``d``, and for each choice to the constant.
        halt: u8[1], set when a limit strikes; what works on the core reads it.
    """

    d: Floats
    C: Floats
    off: Ints
    grp: Ints
    A: Ints
    b: Ints
    constant: float
    rows: Ints
    full: Ints
    pairs: Ints
    e: Floats
    feasible: bool = True
    halt: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(1, dtype=np.uint8))

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.d)

    @property
    def n_groups(self) -> int:
        """Number of undecided groups."""
        return len(self.off) - 1

    def near_one(self) -> tuple[Core, float]:
        """Return the core in a unit in which the largest term is near 1, and this unit's inverse.

        A power of two rounds nothing.
        """
        largest = max(np.abs(self.d).max(initial=0.0), np.abs(self.C).max(initial=0.0))
        unit = 2.0 ** -float(np.clip(np.frexp(largest)[1], -1000, 1000))
        one = replace(self, d=self.d * unit, C=self.C * unit, constant=self.constant * unit)
        return one, unit

    def lift(self, cur: Ints) -> Ints:
        """Return the problem's rows, one per group, for the core's rows ``cur``."""
        full = self.full.copy()
        full[full < 0] = self.rows[cur]
        return full

    def lower(self, rows: Ints) -> Ints:
        """Return the core's rows for the problem's, -1 where a row is not the core's."""
        index = np.full(int(max(rows.max(), self.rows.max(initial=0))) + 1, -1, dtype=np.int64)
        index[self.rows] = np.arange(self.n)
        return index[rows[self.full < 0]]

    def value(self, cur: Ints) -> float:
        """Return the objective of the core's rows ``cur``, the constant included."""
        pair = float(self.C[np.ix_(cur, cur)].sum()) if len(self.C) else 0.0
        return self.constant + float(self.d[cur].sum()) + 0.5 * pair


def reduce(
    problem: Problem,
    keep: Bools,
    halt: NDArray[np.uint8] | None = None,
    rounding: Floats | None = None,
) -> Core:
    """Return what is left of ``problem`` when only the rows ``keep`` may be chosen.

    ``rounding`` f64[n] is what has been done to the problem's diagonal already. Every group
    must keep a row. ``O(n²)``, ``O(n)`` for a separable problem.

    Raises:
        Interrupted: ``halt`` was set while a large matrix was copied.
    """
    # Groups with one row are fixed, the others stay.
    group = problem.group_of_row
    counts = np.bincount(group[keep], minlength=problem.n_groups)
    single = counts == 1
    full = np.full(problem.n_groups, -1, dtype=np.int64)
    fixed = np.flatnonzero(keep & single[group])
    full[group[fixed]] = fixed
    rows = np.flatnonzero(keep & ~single[group])
    # Branching splits a group between cheap and dear rows, so they are put in order of cost.
    share = problem.costs / np.maximum(problem.limits, 1)[:, None]
    order_groups(rows, group, share.sum(axis=0), problem.diagonal)
    # The objective, with what fixed rows contribute.
    d = problem.diagonal[rows].copy()
    constant = problem.constant + float(problem.diagonal[fixed].sum())
    halt = np.zeros(1, dtype=np.uint8) if halt is None else halt
    C = problem.pair_terms(rows, lambda: go_on(halt))
    if problem.factor is not None:
        y, squares = problem.factor_sum(fixed)
        d += problem.factor[rows] @ y
        constant += 0.5 * (float(y @ y) - squares)
    elif problem.cross is not None:
        d += problem.cross[np.ix_(rows, fixed)].sum(axis=1)
        constant += 0.5 * float(problem.cross[np.ix_(fixed, fixed)].sum())
    if len(problem.terms):
        beside = np.zeros(problem.n_rows)
        certain = np.zeros(problem.n_rows, dtype=np.bool_)
        certain[fixed] = True
        for here, there in (problem.terms.T, problem.terms.T[::-1]):
            met = certain[there]
            np.add.at(beside, here[met], problem.term_values[met])
        d += beside[rows]
        constant += float(problem.terms_between(fixed).sum())
    # Constraints, likewise.
    sizes = counts[counts > 1]
    off = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    index = np.full(problem.n_rows, -1, dtype=np.int64)
    index[rows] = np.arange(len(rows))
    pairs = problem.all_forbidden_pairs()
    state = np.where(keep, np.where(single[group], 2, 1), 0)  # 2: certain, 1: open, 0: out
    clash = bool(((state[pairs[:, 0]] == 2) & (state[pairs[:, 1]] == 2)).any())
    b = problem.limits - problem.costs[:, fixed].sum(axis=1)
    both = (state[pairs[:, 0]] == 1) & (state[pairs[:, 1]] == 1)
    return Core(
        d=d,
        C=C,
        off=off,
        grp=np.repeat(np.arange(len(sizes), dtype=np.int64), sizes),
        A=np.ascontiguousarray(problem.costs[:, rows]),
        b=np.ascontiguousarray(b),
        constant=constant,
        rows=rows.astype(np.int64),
        full=full,
        pairs=index[pairs[both]],
        e=np.zeros(len(rows)) if rounding is None else rounding[rows],
        feasible=not clash and bool((b >= 0).all()),
        halt=halt,
    )


@compiled
def order_groups(rows: Ints, group: Ints, share: Floats, loss: Floats) -> None:
    """Put ``rows``, which come group by group, in order of share within each, dear losses first."""
    for i in range(1, len(rows)):
        p, j = rows[i], i
        while j > 0 and group[rows[j - 1]] == group[p]:
            q = rows[j - 1]
            if share[q] < share[p] or (share[q] == share[p] and loss[q] >= loss[p]):
                break
            rows[j] = q
            j -= 1
        rows[j] = p


@compiled
def first_least(values: Floats, off: Ints) -> Ints:
    """Return i64[G]: each group's row with the least of ``values``, the first of equal ones."""
    rows = off[:-1].copy()
    for g in range(len(rows)):
        for p in range(off[g] + 1, off[g + 1]):
            if values[p] < values[rows[g]]:
                rows[g] = p
    return rows


def propagated(problem: Problem, keep: Bools) -> Bools | None:
    """Return what ``propagate_steps`` leaves of ``keep``; ``None`` when no choice is left."""
    for step in propagate_steps(problem, keep):
        if step is None:
            return None
        keep = step
    return keep


def propagate_steps(problem: Problem, keep: Bools) -> Iterator[Bools | None]:
    """Drop rows that no feasible choice within ``keep`` contains, by integer reasoning alone.

    A row is dropped when choosing it, with the cheapest rows elsewhere, exceeds a budget, or when
    another group is left with a single row that it must not meet. Yields the rows left after each
    step, whose reasons refer to the rows before it alone; ``None`` when no choice is left.
    """
    group, starts = problem.group_of_row, problem.offsets[:-1]
    pairs = problem.all_forbidden_pairs()
    big = np.iinfo(np.int64).max
    while True:
        if not np.logical_or.reduceat(keep, starts).all():
            yield None
            return
        after = keep.copy()
        for cost, limit in zip(problem.costs, problem.limits, strict=True):
            least = np.minimum.reduceat(np.where(keep, cost, big), starts)
            slack = int(limit) - int(least.sum())
            if slack < 0:
                yield None
                return
            after &= cost - least[group] <= slack
        if len(pairs):
            single = np.bincount(group[keep], minlength=problem.n_groups) == 1
            certain = keep & single[group]
            after[pairs[certain[pairs[:, 0]], 1]] = False
            after[pairs[certain[pairs[:, 1]], 0]] = False
        if np.array_equal(after, keep):
            return
        keep = after
        if not np.logical_or.reduceat(keep, starts).all():
            yield keep
            yield None
            return
        yield keep

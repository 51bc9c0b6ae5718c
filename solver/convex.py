"""From shifts, cuts and products to a convex function below the objective, safely."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bitquota.solver.interruptible import cholesky, pieces
from bitquota.solver.solution import Convexification

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bitquota.solver.core import Core
    from bitquota.solver.problem import Problem
    from bitquota.solver.semidefinite import DualPoint

    Floats = NDArray[np.float64]
    Bytes = NDArray[np.uint8]
    Ints = NDArray[np.int64]

MARGIN = 1e-10
"""Least eigenvalue that is left, relative to the diagonal: ten thousand times rounding."""

CUT_VIOLATION = 1e-4


@dataclass(slots=True, kw_only=True, eq=False)
class Convex:
    """``q(x) = const + l·x + ½ xᵀQx`` below the objective on the core's feasible choices.

    Attributes:
        Q: f64[n, n], positive semidefinite on differences of one-hot vectors.
        l: f64[n].
        const: The core's constant.
        error: f64[n], what rounding may have done to one entry of ``l + Qz``.
        point: The dual point, its shift raised until ``Q`` is safely semidefinite.
    """

    Q: Floats
    l: Floats  # noqa: E741
    const: float
    error: Floats
    point: DualPoint


def convexify(core: Core, point: DualPoint) -> Convex:
    """Return the convex function of ``point``, its shift raised where ``Q`` is not convex.

    ``O(n³)`` for a Cholesky factor, or a few.

    Raises:
        Interrupted: A limit of the core struck meanwhile, at more than about 1,400 rows.
    """
    n = core.n
    if not len(core.C):
        error = core.e + 1e-15 * np.abs(core.d)
        return Convex(Q=core.C, l=core.d, const=core.constant, error=error, point=point)
    Q = np.empty_like(core.C)
    for rows in pieces(n, core.halt):
        Q[rows] = core.C[rows]
    np.subtract.at(Q, (point.cut_rows, point.cut_columns), point.cut_values)
    np.subtract.at(Q, (point.cut_columns, point.cut_rows), point.cut_values)
    linear = core.d.copy()
    add_triples(Q, linear, point.triples, point.triple_values)
    for mu, cost, limit in zip(point.products, core.A, core.b, strict=True):
        if mu.any():
            for rows in pieces(n, core.halt):
                Q[rows] += np.outer(mu[rows], cost) + np.outer(cost[rows], mu)
            linear -= float(limit) * mu
    shift = point.shift.copy()
    for a, b in zip(core.off[:-1], core.off[1:], strict=True):
        Q[a:b, a:b] += shift[a:b, : b - a]
    last = (core.off[1:] - 1)[core.grp]
    free = np.setdiff1d(np.arange(n), core.off[1:] - 1)
    R = np.empty((len(free), len(free)))
    for rows in pieces(len(free), core.halt):
        part = Q[free[rows]] - Q[last[free[rows]]]
        R[rows] = part[:, free] - part[:, last[free]]
    size = np.maximum(np.diag(R), 1e-14 * float(np.abs(np.diag(R)).max(initial=0.0)) + 1e-300)
    root = 1.0 / np.sqrt(size)
    for rows in pieces(len(free), core.halt):
        R[rows] *= root[rows, None]
        R[rows] *= root[None, :]
    for rows in pieces(len(free), core.halt):
        here = slice(rows.start, None)
        R[rows, here] = 0.5 * (R[rows, here] + R[here, rows].T)
        R[here, rows] = R[rows, here].T
    extra = _lacking(R, core.halt) * size
    Q[free, free] += extra
    shift[free, free - core.off[:-1][core.grp[free]]] += extra
    start_of = core.off[:-1][core.grp]
    linear -= 0.5 * shift[np.arange(n), np.arange(n) - start_of]
    magnitude = np.zeros(n)
    for rows in pieces(n, core.halt):
        magnitude[rows] = np.abs(Q[rows]).max(axis=1, initial=0.0)
    error = core.e + 2.3e-16 * (core.n_groups + 10.0) * (np.abs(linear) + core.n_groups * magnitude)
    point.shift = shift
    return Convex(
        Q=np.ascontiguousarray(Q), l=linear, const=core.constant, error=error, point=point
    )


def add_triples(Q: Floats, linear: Floats, triples: Ints, values: Floats) -> None:
    """Take ``values`` times the triangle inequalities off the objective of ``Q`` and ``linear``."""
    np.subtract.at(linear, triples[:, 0], values)
    for a, b, sign in ((0, 1, 1.0), (0, 2, 1.0), (1, 2, -1.0)):
        np.add.at(Q, (triples[:, a], triples[:, b]), sign * values)
        np.add.at(Q, (triples[:, b], triples[:, a]), sign * values)


def _lacking(R: Floats, halt: Bytes) -> float:
    """Return what the diagonal lacks for ``R`` to be safely definite, within a factor of 4."""
    extra, at = 0.0, np.arange(len(R))
    while True:
        R[at, at] += extra - 2.0 * MARGIN
        try:
            cholesky(R, halt)
        except np.linalg.LinAlgError:
            R[at, at] -= extra - 2.0 * MARGIN
            extra = 4.0 * max(extra, MARGIN)
        else:
            return extra


def next_cuts(core: Core, point: DualPoint) -> Ints:
    """Return i64[c, 2], the cuts of the next bound in the problem's rows: active and violated."""
    if not len(point.pair_values):
        return np.zeros((0, 2), dtype=np.int64)
    below = np.triu(-point.pair_values, 1)
    below[core.grp[:, None] == core.grp[None, :]] = 0.0
    found = np.argwhere(below > CUT_VIOLATION)
    order = np.argsort(-below[found[:, 0], found[:, 1]], kind="stable")
    new = core.rows[found[order[: max(100, 2 * core.n)]]]
    n_pairs = len(core.pairs)
    values = point.cut_values[n_pairs:]
    active = values > 1e-6 * float(values.max(initial=0.0))
    old = np.stack([point.cut_rows[n_pairs:], point.cut_columns[n_pairs:]], axis=1)[active]
    both = np.concatenate([core.rows[old].reshape(-1, 2), new.reshape(-1, 2)])
    return np.unique(np.sort(both, axis=1), axis=0)


def cuts_between(core: Core, cuts: Ints) -> Ints:
    """Return those of ``cuts`` i64[c, 2], in the problem's rows, that join two rows of the core."""
    at = np.full(int(max(core.rows.max(), cuts.max(initial=0))) + 1, -1, dtype=np.int64)
    at[core.rows] = np.arange(core.n)
    inside = at[cuts]
    both: Ints = inside[(inside >= 0).all(axis=1)]
    return both


def to_certificate(problem: Problem, core: Core, point: DualPoint) -> Convexification:
    """Return ``point`` in the problem's rows."""
    width = int(np.diff(problem.offsets).max())
    shift = np.zeros((problem.n_rows, width))
    # Column `j` of a shift stands for the `j`-th row of the group, in the core and in the problem.
    row, column = np.nonzero(point.shift)
    other = core.rows[core.off[core.grp[row]] + column]
    start = problem.offsets[:-1][problem.group_of_row]
    shift[core.rows[row], other - start[other]] = point.shift[row, column]
    support = np.zeros(problem.n_rows, dtype=np.bool_)
    support[core.rows] = True
    support[core.full[core.full >= 0]] = True
    first, second = core.rows[point.cut_rows], core.rows[point.cut_columns]
    used = point.cut_values != 0.0
    products = np.zeros((len(problem.limits), problem.n_rows))
    products[:, core.rows] = point.products
    return Convexification(
        support=support,
        shift=shift,
        cut_rows=np.minimum(first, second)[used],
        cut_columns=np.maximum(first, second)[used],
        cut_values=point.cut_values[used],
        products=products,
        triples=core.rows[point.triples],
        triple_values=point.triple_values,
    )

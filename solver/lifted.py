"""The lifted problem of the semidefinite bound: constraints, and sums over them, kept cheap.

In the space ``M = [1 yᵀ; y Y]``, where ``y`` leaves out the last row of each group, every
constraint is ``<A_k, M> = 0`` or ``>= 0`` with ``A_k = ½(u vᵀ + v uᵀ)`` and ``u, v`` from a short
list of *atoms*, so that the Schur matrix is gathered from two small Gram matrices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from bitquota.compiled import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bitquota.solver.core import Core

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Bytes = NDArray[np.uint8]


@compiled
def schur(HM: Floats, HW: Floats, u: Ints, v: Ints, less: Floats, halt: Bytes, out: Floats) -> None:
    """Fill ``out[k, j] = tr(A_k M A_j W)`` for ``j <= k``, unless ``halt`` u8[1] stops it.

    ``HM`` and ``HW`` are the Gram matrices of unit, rows and budgets (``Lifted.expand``); atom
    ``v_k`` is row ``v[k]`` less ``less[k]`` times the unit.
    """
    width = len(HM)
    Mv, Wv = np.empty(width), np.empty(width)
    for k in range(len(u)):
        if halt[0]:
            return
        Mu, Wu = HM[u[k]], HW[u[k]]
        for i in range(width):
            Mv[i] = HM[v[k], i] - less[k] * HM[0, i]
            Wv[i] = HW[v[k], i] - less[k] * HW[0, i]
        for j in range(k + 1):
            r, s, f = u[j], v[j], less[j]
            out[k, j] = 0.25 * (
                Mv[r] * (Wu[s] - f * Wu[0])
                + (Mv[s] - f * Mv[0]) * Wu[r]
                + Mu[r] * (Wv[s] - f * Wv[0])
                + (Mu[s] - f * Mu[0]) * Wv[r]
            )


class Lifted:
    """The lifted problem of a core: atoms, constraints in order, and the objective.

    Atoms, as vectors over ``(1, y)``: 0 is the unit, ``1 + p`` is row ``p`` (the last row of a
    group is the unit less the others), and ``1 + n + k`` is what budget ``k`` leaves, divided by
    its limit. Constraint ``k`` joins atom ``u[k]`` with atom ``v[k]`` less ``less[k]`` units.

    Constraints: ``M_00 = 1``; per free row ``x_p² = x_p``; products of two free rows of a group
    and forbidden pairs, both zero; then inequalities: budgets, products of budgets with rows, cuts
    ``X_ij >= 0``.
    """

    def __init__(self, core: Core, *, products: bool) -> None:
        """List the constraints; ``O(n²)`` for the objective."""
        n, m = core.n, len(core.b)
        self.core, self.n, self.m = core, n, m
        self.last = core.off[1:] - 1
        is_last = np.zeros(n, dtype=np.bool_)
        is_last[self.last] = True
        self.free = np.flatnonzero(~is_last)
        # Rows in terms of the unit and the free rows, and budgets in terms of rows.
        r = len(self.free)
        self.size = r + 1
        self.free_group = core.grp[self.free]
        self.free_start = np.searchsorted(self.free, core.off[:-1])
        entries = np.concatenate([np.ones(r + 1 + core.n_groups), -np.ones(r)])
        at = np.concatenate([[0], 1 + self.free, 1 + self.last, 1 + self.last[self.free_group]])
        to = np.concatenate(
            [[0], 1 + np.arange(r), np.zeros(core.n_groups, dtype=np.int64), 1 + np.arange(r)]
        )
        self.rows = sp.csr_matrix((entries, (at, to)), shape=(n + 1, r + 1))
        self.rows_t = self.rows.T.tocsr()
        self.unit = np.maximum(core.b, 1).astype(np.float64)
        self.share = core.A / self.unit[:, None]
        self.room = core.b / self.unit
        # Constraints: equations, then budgets and their products with rows.
        pairs = [
            (p, q)
            for a, b in zip(core.off[:-1], core.off[1:], strict=True)
            for p in range(a, b - 1)
            for q in range(p + 1, b - 1)
        ]
        self.same = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        zero = np.concatenate([self.same, core.pairs])
        u = [np.zeros(1, dtype=np.int64), 1 + self.free, 1 + zero[:, 0]]
        v = [np.zeros(1, dtype=np.int64), 1 + self.free, 1 + zero[:, 1]]
        self.n_equal = 1 + r + len(zero)
        u.append(np.zeros(m, dtype=np.int64))
        v.append(n + 1 + np.arange(m))
        self.n_products = n * m if products else 0
        if products:
            for k in range(m):
                u.append(1 + np.arange(n))
                v.append(np.full(n, n + 1 + k))
        self.u, self.v = np.concatenate(u).astype(np.int64), np.concatenate(v).astype(np.int64)
        self.less = np.zeros(len(self.u))
        self.less[1 : 1 + r] = 1.0
        self.cuts = np.zeros((0, 2), dtype=np.int64)
        # The objective.
        Y = np.zeros((n + 1 + m, n + 1 + m))
        Y[1 : n + 1, 1 : n + 1] = 0.5 * core.C
        Y[0, 1 : n + 1] = 0.5 * core.d
        Y[1 : n + 1, 0] = 0.5 * core.d
        self.objective = self._contract(Y)

    def add_cuts(self, cuts: Ints) -> None:
        """Append ``X_ij >= 0`` for ``cuts`` i64[c, 2]."""
        self.cuts = np.concatenate([self.cuts, cuts])
        self.u = np.concatenate([self.u, 1 + cuts[:, 0]])
        self.v = np.concatenate([self.v, 1 + cuts[:, 1]])
        self.less = np.concatenate([self.less, np.zeros(len(cuts))])

    def _contract(self, Y: Floats) -> Floats:
        """Return ``Pᵀ Y P`` for the atoms ``P``: unit, rows, budgets."""
        return self._contract_rows(np.ascontiguousarray(self._contract_rows(Y).T)).T

    def _contract_rows(self, Y: Floats) -> Floats:
        n = self.n
        if self.m:
            left = Y[n + 1 :]
            Y = Y[: n + 1].copy()
            Y[0] += self.room @ left
            Y[1:] -= self.share.T @ left
        last = Y[1 + self.last]
        out = np.empty((self.size, Y.shape[1]))
        out[0] = Y[0] + last.sum(axis=0)
        np.subtract(Y[1 + self.free], last[self.free_group], out=out[1:])
        return out

    def _expand_rows(self, Z: Floats) -> Floats:
        """Return ``P Z``."""
        n = self.n
        out = np.empty((n + 1 + self.m, Z.shape[1]))
        out[0] = Z[0]
        out[1 + self.free] = Z[1:]
        out[1 + self.last] = Z[0] - np.add.reduceat(Z[1:], self.free_start, axis=0)
        if self.m:
            out[n + 1 :] = np.outer(self.room, Z[0]) - self.share @ out[1 : n + 1]
        return out

    def expand(self, Z: Floats) -> Floats:
        """Return the Gram matrix ``P Z Pᵀ`` of unit, rows and budgets for symmetric ``Z``."""
        return self._expand_rows(np.ascontiguousarray(self._expand_rows(Z).T))

    def combine(self, y: Floats) -> Floats:
        """Return ``Σ_k y_k A_k``."""
        if not self.n_products:
            return self._combine_sparse(y)
        width = self.n + 1 + self.m
        flat = np.bincount(self.u * width + self.v, weights=y, minlength=width * width)
        Y = flat.astype(np.float64).reshape(width, width)
        Y[:, 0] -= np.bincount(self.u, weights=y * self.less, minlength=width)
        R = self._contract(Y)
        return 0.5 * (R + R.T)

    def _combine_sparse(self, y: Floats) -> Floats:
        """Return ``combine(y)`` without products: the sum has few terms."""
        n, m, size = self.n, self.m, self.n + 1
        plain = self.v <= n
        at = self.n_equal + np.arange(m)
        price = y[at]
        rows = [self.u[plain], self.u[plain], np.zeros(size, dtype=np.int64)]
        columns = [self.v[plain], np.zeros(int(plain.sum()), dtype=np.int64), np.arange(size)]
        budgets = np.concatenate([[price @ self.room], -(price @ self.share)])
        values = [y[plain], -(y * self.less)[plain], budgets]
        Y = sp.csr_matrix(
            (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))),
            shape=(size, size),
        )
        R = self.rows_t @ (Y @ self.rows)
        half = (0.5 * (R + R.T)).toarray()
        return np.asarray(half, dtype=np.float64)

    def read(self, H: Floats) -> Floats:
        """Return ``<A_k, Z>`` from ``expand(Z)``."""
        values: Floats = H[self.u, self.v] - self.less * H[self.u, 0]
        return values

    def apply(self, Z: Floats) -> Floats:
        """Return ``<A_k, Z>`` for symmetric ``Z``."""
        return self.read(self.expand(Z))

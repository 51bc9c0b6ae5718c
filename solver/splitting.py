"""Cuts for all pairs of rows at once: the doubly nonnegative relaxation, by a splitting method.

With ``M = [1 xᵀ; x X]`` in place of ``[1; x] [1; x]ᵀ``, the relaxation asks that ``M`` be positive
semidefinite on the face that one row per group leaves, that no entry be negative, that different
rows of a group have no product, and that ``x`` fit the budget. An interior point would need a
multiplier for each of the hundreds of thousands of pairs. Here two matrices, one of each kind, are
brought together: a step takes the positive part of a matrix, whose eigenvectors are followed from
step to step. Only the multipliers of ``X >= 0`` are kept, as cuts; the interior point then finds
the best shift for them, so that neither the end of the iteration nor its precision (float32,
vectors that are about right) matters for the bound that follows.

References:
    [OWX18] D. E. Oliveira, H. Wolkowicz, Y. Xu: ADMM for the SDP relaxation of the QAP, 2018 (the
        splitting on the face).
    [RGN19] N. Rontsis, P. J. Goulart, Y. Nakatsukasa: Efficient semidefinite programming with
        approximate ADMM, 2019 (eigenvectors followed from step to step).

Design: docs/design/solver.md
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg as sla
import scipy.sparse as sp

from bitquota.solver.convex import add_triples
from bitquota.solver.interruptible import go_on
from bitquota.solver.linear_relaxation import linear_relaxation
from bitquota.solver.semidefinite import center
from bitquota.solver.triangles import correct, violated

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bitquota.solver.core import Core
    from bitquota.solver.semidefinite import DualPoint

    Floats = NDArray[np.float64]
    Singles = NDArray[np.float32]
    Ints = NDArray[np.int64]

STEPS, FURTHER = 240, 120
"""Steps at first, and each further time."""
MOST_STEPS, SETTLED = 480, 0.005
"""Steps at first, as long as the value changes by this part of it in ``FURTHER`` of them: where
layers are strongly correlated and the budget is loose, it still falls by 3 % before ``STEPS``."""
WHOLE = 300
"""Columns of the face up to which a step takes all eigenvalues of a matrix."""
SPARE = 32
"""Vectors that are followed beside those of positive eigenvalues, or a quarter of these."""
SHIFT = 0.7
"""Part of the most negative eigenvalue, which is underestimated, by which power steps are shifted:
with half of it, vectors of the negative end took the place of small positive ones."""
COLD = 4  # power steps from a basis that knows nothing
PRICED = 0.1
"""Part of the price of its budget that counts as a row's size, beside what it loses alone."""
LEFT = 0.1
"""The same part, for what the budget leaves."""
START = 1.2  # penalty, relative to the ratio of the multipliers' and the entries' sizes
LONGER = 1.6  # step of the multipliers; up to 1.618 converges
ADAPT_EVERY, ADAPT = 10, 1.3
"""The penalty moves by this factor where one residual is twice the other."""

ROUNDS, ROUND = 8, 15
"""How often triangle inequalities are looked for, and steps after each time."""
VIOLATED, TRIPLES, NEW_TRIPLES = 0.004, 600_000, 15_000
"""By how much triples must be violated, of how many at most the worst are taken, and how many."""


class Splitting:
    """The iteration on one core, which can be continued.

    Rows are scaled by ``s``, the root of what they lose and of a part of their price: then errors
    of one size matter alike in all of them. Without the price, rows that lose nothing would hardly
    move.
    """

    def __init__(self, core: Core) -> None:
        """Start from a distribution in every group; ``O(n²)``."""
        self.core = core
        self.starts = core.off[:-1]
        # The budgets as one, by the prices that they have without pair terms.
        none = np.zeros((0, 0))
        self.prices, _ = linear_relaxation(replace(core, C=none, pairs=core.pairs[:0]))
        self.cost, self.limit = self.prices @ core.A, float(self.prices @ core.b)
        size = np.abs(core.C).max(axis=1, initial=0.0)
        weight = np.abs(core.d) + PRICED * self.cost + 1e-3 * size
        weight += 1e-12 * float(np.max(weight)) + 1e-290
        self.s = np.sqrt(weight)
        x = center(core)[0]
        self.unit = float(np.sqrt(weight @ x / core.n_groups))
        self.left = float(np.sqrt(LEFT * self.limit)) if self.limit > 0.0 else 0.0
        n = core.n
        self.C = np.zeros((n + 2, n + 2), dtype=np.float32)
        self.C[1:-1, 1:-1] = 0.5 * core.C / np.outer(self.s, self.s)
        at = np.arange(1, n + 1)
        self.C[at, at] = core.d / weight
        self.face = self._face()
        self.face_t = self.face.T.tocsr()
        self.q = self.face.getrow(n + 1).toarray().ravel()
        norm = float(self.q @ self.q)
        self.bend = (1.0 - 1.0 / np.sqrt(1.0 + norm)) / norm if norm else 0.0
        group = np.concatenate([[-1], core.grp, [-2]])
        self.zero = group[:, None] == group[None, :]
        self.zero[0, :-1] = self.zero[:-1, 0] = True
        self.zero[-1, -1] = False
        full = np.concatenate([[self.unit], self.s * x, [0.0]])
        full[-1] = (
            self.left * max(0.0, 1.0 - float(self.cost @ x) / self.limit) if self.left else 0.0
        )
        self.Y = np.outer(full, full).astype(np.float32)
        self._fill(self.Y, x)
        self.Z = np.zeros_like(self.C)
        self.excess = np.zeros_like(self.C)
        self.beta = START * float(np.linalg.norm(self.C) / np.linalg.norm(self.Y))
        self.done, self.price = 0, 0.0
        self.basis: Singles | None = None
        """f32[r, k], vectors on the face: those of positive eigenvalues, and some others."""
        far = np.cos(1.0 + np.arange(self.face.shape[1])).astype(np.float32)
        self.far: Singles = far / np.linalg.norm(far)
        """f32[r], a vector of the most negative one, about."""
        self.triples = np.zeros((0, 3), dtype=np.int64)
        self.held = np.zeros(0)
        """f64[t], multipliers of the triples over the penalty."""
        self.cut_values, self.products = np.zeros((0, 0)), np.zeros((0, 0))

    def _face(self) -> sp.csr_matrix:
        """Return an orthonormal basis, f32[n + 1, n + 1 - G], of what sums to one in groups."""
        core = self.core
        first = np.zeros(core.n + 2)
        first[0] = self.unit
        rows, columns, values, width = [], [], [], 1
        for a, b in zip(self.starts, core.off[1:], strict=True):
            u = 1.0 / self.s[a:b]
            first[1 + a : 1 + b] = u / (u @ u)
            basis = sla.qr(u[:, None])[0][:, 1:]
            at = np.indices(basis.shape)
            rows.append(1 + a + at[0].ravel())
            columns.append(width + at[1].ravel())
            values.append(basis.ravel())
            width += b - a - 1
        rows.append(np.arange(core.n + 1))
        columns.append(np.zeros(core.n + 1, dtype=np.int64))
        values.append(first[:-1] / np.linalg.norm(first))
        index = np.concatenate(rows), np.concatenate(columns)
        basis = sp.csr_matrix((np.concatenate(values), index), shape=(core.n + 2, width))
        # What the budget leaves follows from the rest.
        use = np.zeros(core.n + 2)
        if self.left:
            use[0] = self.left / self.unit
            use[1:-1] = -self.left * self.cost / self.limit / self.s
        return (
            (basis + sp.csr_matrix(np.outer(np.eye(core.n + 2)[-1], basis.T @ use)))
            .astype(np.float32)
            .tocsr()
        )

    def _fill(self, Y: Singles, x: Floats) -> None:
        """Make ``Y``, scaled entries between groups, ``[1 xᵀ; x X]``, scaled."""
        np.copyto(Y, np.float32(0.0), where=self.zero)
        Y[0, 0] = self.unit**2
        Y[0, 1:-1] = Y[1:-1, 0] = self.unit * self.s * x
        at = np.arange(1, len(Y) - 1)
        Y[at, at] = self.s**2 * x

    def _semidefinite(self, M: Singles) -> Singles:
        """Return the nearest matrix to ``M`` that is positive semidefinite on the face, about."""
        if self.face.shape[1] > WHOLE:
            if self.done == 0:  # the start is
                return M.copy()
            values, vectors = self._positive(M)
        else:
            R = self._bent(self._bent(self.face_t @ (self.face_t @ M).T).T)
            values, vectors = sla.eigh(
                R, driver="evr", subset_by_value=(0.0, np.inf), overwrite_a=True,
                check_finite=False,
            )  # fmt: skip
        root: Singles = self.face @ self._bent(vectors * np.sqrt(np.maximum(values, 0.0)))
        product: Singles = root @ root.T
        return product

    def _positive(self, M: Singles) -> tuple[Singles, Singles]:
        """Return eigenvalues of ``M`` on the face, the positive ones, and their vectors, about.

        They change little from step to step: one power step on what spanned them, and the
        eigenvalues within what that spans. The power is shifted so that the negative end grows no
        faster than what is near zero. Small eigenvalues are found late, which may cost steps.

        Raises:
            Interrupted: A limit of the core struck meanwhile.
        """
        size, rounds, basis = self.face.shape[1], 1, self.basis
        if basis is None:
            waves = np.outer(1.0 + np.arange(size), 2.0 + np.arange(size // 6))
            basis, rounds = _orthonormal(np.cos(waves**2).astype(np.float32)), COLD
        for _ in range(rounds):
            go_on(self.core.halt)
            image = self._times(M, np.column_stack([basis, self.far]))
            image, far = image[:, :-1], image[:, -1]
            shift = np.float32(max(0.0, -SHIFT * float(self.far @ far)))
            self.far = far - basis @ (far @ basis)
            self.far /= max(float(np.linalg.norm(self.far)), 1e-30)
            basis = _orthonormal(image + shift * basis)
        go_on(self.core.halt)
        image = self._times(M, basis)
        within = basis.T @ image
        values, turned = sla.eigh(0.5 * (within + within.T), driver="evd", check_finite=False)
        positive = int((values > 0.0).sum())
        wanted = min(size // 2, positive + max(SPARE, positive // 4))
        found = basis @ turned[:, -wanted:]
        self.basis = found
        if (fresh := wanted - len(values)) > 0:
            away = image - basis @ within
            away = away[:, np.argsort(-np.abs(away).max(axis=0), kind="stable")[:fresh]]
            self.basis = np.hstack([away / max(float(np.abs(away).max()), 1e-30), found])
        return values[len(values) - positive :], found[:, found.shape[1] - positive :]

    def _times(self, M: Singles, V: Singles) -> Singles:
        """Return ``M V`` on the face."""
        return self._bent(self.face_t @ (M @ (self.face @ self._bent(V))))

    def _bent(self, M: Singles) -> Singles:
        """Return ``(I + qqᵀ)^-½ M``: with it the face's basis is orthonormal again."""
        bent: Singles = M - np.outer(np.float32(self.bend) * self.q, self.q @ M)
        return bent

    def _fit(self, M: Singles) -> None:
        """Make ``M`` the nearest matrix to it without negative entries whose ``x`` fits."""
        s, unit = self.s, self.unit
        weight = s**4 + 2.0 * unit**2 * s**2
        middle = (s**2 * M.diagonal()[1:-1] + 2.0 * unit * s * M[0, 1:-1]) / weight
        if len(self.triples):
            correct(self.triples, self.held, M, middle, s, weight, True)  # noqa: FBT003
            for _ in range(2):
                x = self._distribution(middle, weight)
                moved = x.copy()
                correct(self.triples, self.held, M, moved, s, weight, False)  # noqa: FBT003
                middle += moved - x
        x = self._distribution(middle, weight)
        np.maximum(M, np.float32(0.0), out=M)
        self._fill(M, x)

    def _distribution(self, middle: Floats, weight: Floats) -> Floats:
        """Return the distributions in groups nearest to ``middle`` that the budget allows."""
        x = _simplex(middle, weight, self.starts, self.core.grp)
        if self.cost @ x <= self.limit:
            return x
        low, high = 0.0, max(2.0 * self.price, 1e-9 * float(weight.min()))
        verified = False
        for _ in range(200):
            price = 0.5 * (low + high) if verified else high
            lower = middle - price * self.cost / weight
            x = _simplex(lower, weight, self.starts, self.core.grp)
            if self.cost @ x <= self.limit:
                high, verified, self.price = price, True, price
                if high - low < 1e-4 * high:
                    break
            else:
                low, high = price, high if verified else 4.0 * high
        return x

    def run(self, steps: int) -> None:
        """Take ``steps`` steps, ``O(n² k)`` each for ``k`` positive eigenvalues.

        Raises:
            Interrupted: A limit of the core struck meanwhile; what was reached stays.
        """
        Y = np.empty_like(self.Y)
        for left in range(steps, 0, -1):
            go_on(self.core.halt)
            np.multiply(self.Z, 1.0 / self.beta, out=Y)
            Y += self.Y
            F = self._semidefinite(Y)
            np.add(self.C, self.Z, out=Y)
            Y *= -1.0 / self.beta
            Y += F
            self._fit(Y)
            apart = np.subtract(Y, F, out=F)
            self.done += 1
            adapt = 1.0
            if self.done % ADAPT_EVERY == 0:
                moved = float(np.linalg.norm(Y - self.Y)) * self.beta
                moved /= float(np.linalg.norm(self.C))
                off = float(np.linalg.norm(apart)) / float(np.linalg.norm(Y))
                if not 0.5 <= off / max(moved, 1e-30) <= 2.0:
                    adapt = ADAPT if off > moved else 1.0 / ADAPT
            if left == 1:
                self.excess = self.C + self.Z
                self.excess += self.beta * apart
            apart *= LONGER * self.beta
            self.Z += apart
            self.Y, Y = Y, self.Y
            self.beta *= adapt
            self.held /= adapt

    def settle(self) -> None:
        """Take ``STEPS`` steps, or up to ``MOST_STEPS`` until the value hardly changes.

        Raises:
            Interrupted: As ``run``.
        """
        self.run(STEPS - FURTHER)
        value, settled = self.value, False
        while self.done < STEPS or (self.done < MOST_STEPS and not settled):
            self.run(FURTHER)
            settled = abs(self.value - value) <= SETTLED * abs(self.value)
            value = self.value

    @property
    def value(self) -> float:
        """The scaled objective, of a matrix that fits but need not be semidefinite yet."""
        return float((self.C * self.Y).sum(dtype=np.float64))

    def separate(self) -> int:
        """Keep the triples that hold something, add violated ones; returns how many these are."""
        X = self.Y[1:-1, 1:-1].astype(np.float64) / np.outer(self.s, self.s)
        found, values = violated(X, self.core.grp, VIOLATED, TRIPLES, self.core.halt)
        go_on(self.core.halt)
        worst = found[np.argsort(-values, kind="stable")[:NEW_TRIPLES]]
        kept = self.held > 0.0
        both = np.concatenate([self.triples[kept], worst])
        held = np.concatenate([self.held[kept], np.zeros(len(worst))])
        self.triples, first = np.unique(both, axis=0, return_index=True)
        self.held = held[first]
        return len(found)

    def follow(self, before: Splitting) -> None:
        """Go on from where a splitting of these and further rows was."""
        at = np.argsort(before.core.rows)
        at = at[np.searchsorted(before.core.rows, self.core.rows, sorter=at)]
        at = np.concatenate([[0], 1 + at, [before.core.n + 1]])
        factor = np.concatenate([[self.unit], self.s, [self.left or 1.0]])
        factor /= np.concatenate([[before.unit], before.s, [before.left or 1.0]])[at]
        scale = np.outer(factor, factor).astype(np.float32)
        self.Y, self.Z = before.Y[np.ix_(at, at)] * scale, before.Z[np.ix_(at, at)] / scale
        self.beta, self.price, self.done = before.beta, before.price, before.done
        here = np.full(before.core.n + 2, -1, dtype=np.int64)
        here[at] = np.arange(len(at))
        triples = here[1 + before.triples] - 1
        left = (triples >= 0).all(axis=1)
        self.triples, self.held = triples[left], before.held[left]

    def relaxed(self) -> Core:
        """Return the core less the multipliers of ``X >= 0`` and of products, whose bound is one.

        In place of a product of rows of one group, ``C`` then has terms inside of groups.
        """
        core = self.core
        C, d = core.C.copy(), core.d.copy()
        add_triples(C, d, self.triples, self.held * self.beta)
        found = self.excess[1:-1, 1:-1] + 0.5 * (C - core.C) / np.outer(self.s, self.s)
        found = np.where(self.zero[1:-1, 1:-1], 0.0, found)
        np.maximum(found, 0.0, out=found)
        self.cut_values = 2.0 * np.triu(found, 1) * np.outer(self.s, self.s)
        C -= self.cut_values + self.cut_values.T
        self.products = np.zeros(core.A.shape)
        if self.left:
            found = np.maximum(self.excess[-1, 1:-1].astype(np.float64), 0.0)
            self.products = np.outer(self.prices, found * 2.0 * self.left * self.s / self.limit)
            half = self.products.T @ core.A
            C += half + half.T
        return replace(core, C=C, d=d - core.b @ self.products)

    def complete(self, point: DualPoint) -> None:
        """Add these multipliers to ``point``, one of the relaxed core without cuts."""
        values = self.cut_values
        np.add.at(values, (point.cut_rows, point.cut_columns), point.cut_values)  # forbidden pairs
        point.cut_rows, point.cut_columns = np.nonzero(values)
        point.cut_values = values[point.cut_rows, point.cut_columns]
        point.products = self.products
        used = self.held > 0.0
        point.triples, point.triple_values = self.triples[used], self.held[used] * self.beta


def continued(splitting: Splitting | None, core: Core) -> Splitting:
    """Return the splitting of ``core``, settled or after ``FURTHER`` steps, and triangles.

    One of further rows is continued on those that are left.

    Raises:
        Interrupted: A limit of the core struck meanwhile.
    """
    if splitting is None or not np.array_equal(splitting.core.rows, core.rows):
        before, splitting = splitting, Splitting(core)
        if before is not None and np.isin(core.rows, before.core.rows).all():
            splitting.follow(before)
    if splitting.done:
        splitting.run(FURTHER)
    else:
        splitting.settle()
    for _ in range(ROUNDS):
        if splitting.separate() < core.n:
            break
        splitting.run(ROUND)
    return splitting


def _orthonormal(A: Singles) -> Singles:
    """Return an orthonormal basis, f32[r, k], of what the columns span."""
    basis: Singles = sla.qr(A, mode="economic", overwrite_a=True, check_finite=False)[0]
    return basis


def _simplex(middle: Floats, weight: Floats, starts: Ints, group: Ints) -> Floats:
    """Return the distributions in groups nearest to ``middle``, distances weighed by ``weight``."""
    active = np.ones(len(middle), dtype=np.bool_)
    while True:
        above = np.add.reduceat(np.where(active, middle, 0.0), starts) - 1.0
        spread = np.add.reduceat(np.where(active, 1.0 / weight, 0.0), starts)
        x = np.where(active, middle - (above / spread)[group] / weight, 0.0)
        fewer = x > 0.0
        if np.array_equal(fewer, active):
            return x
        active = fewer

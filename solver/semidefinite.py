"""The semidefinite bound: shifts, cuts and products that make the objective convex and high.

An interior-point method in the lifted space ``M = [1 yᵀ; y Y]``, where ``y`` leaves out the last
row of each group. Every constraint is ``<A_k, M> = 0`` or ``>= 0`` with ``A_k = ½(u vᵀ + v uᵀ)``
and ``u, v`` from a short list of *atoms*, so that the Schur matrix is gathered from two small Gram
matrices. Each iterate's dual gives valid shifts, cuts and products: it can be stopped at any time.

References:
    [HRVW96] C. Helmberg, F. Rendl, R. Vanderbei, H. Wolkowicz: An interior-point method for
        semidefinite programming, 1996 (the search direction).
    [HRW00] C. Helmberg, F. Rendl, R. Weismantel: A semidefinite programming approach to the
        quadratic knapsack problem, 2000 (products of the budget with rows).
    [BEP09] A. Billionnet, S. Elloumi, M.-C. Plateau: Improving the performance of standard
        solvers for quadratic 0-1 programs by a tight convex reformulation (QCR), 2009.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.linalg as sla
import scipy.sparse as sp

from bitquota.solver.compiled import compiled

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from bitquota.solver.core import Core

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]


@compiled
def schur(HM: Floats, HW: Floats, u: Ints, v: Ints, less: Floats, out: Floats) -> None:
    """Fill ``out[k, j] = tr(A_k M A_j W)`` for ``j <= k``.

    ``HM`` and ``HW`` are the Gram matrices of unit, rows and budgets (``Lifted.expand``); atom
    ``v_k`` is row ``v[k]`` less ``less[k]`` times the unit.
    """
    width = len(HM)
    Mv, Wv = np.empty(width), np.empty(width)
    for k in range(len(u)):
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


@dataclass(slots=True, kw_only=True, eq=False)
class DualPoint:
    """Shifts, cuts and products of one dual iterate, in the core's rows (see ``solution``)."""

    shift: Floats
    cut_rows: Ints
    cut_columns: Ints
    cut_values: Floats
    products: Floats
    multipliers: Floats
    bound: float
    iterations: int
    row_values: Floats
    """f64[n], the primal ``x``."""
    pair_values: Floats
    """f64[n, n], the primal ``X``: where it is negative a cut helps."""


def center(core: Core) -> tuple[Floats, Floats]:
    """Return a start: a distribution per group that fits the budgets, and positive row weights.

    The distribution is that of a barrier problem with the linear terms alone, ``p ∝ 1/(d + λA +
    ν)``: rows that cost much loss start with little weight, as they end.
    """
    n = core.n
    starts = core.off[:-1]
    low = np.minimum.reduceat(core.d, starts)[core.grp]
    size = np.abs(core.C).max(axis=1, initial=0.0)
    spread = core.d - low + 0.3 * size
    level = float(np.median(np.maximum.reduceat(spread, starts))) or 1.0
    counts = np.diff(core.off)[core.grp]
    least = np.minimum.reduceat(core.A, starts, axis=1).sum(axis=1)
    span = np.maximum(core.b - least, 1)
    price = (core.A / span[:, None]).sum(axis=0) if len(core.b) else np.zeros(n)
    price = price - np.minimum.reduceat(price, starts)[core.grp]
    room = least + 0.9 * (core.b - least)

    def distribution(lam: float) -> Floats:
        weight = 1.0 / (spread + lam * price + 0.05 * level)
        total = np.add.reduceat(weight, starts)
        mixed: Floats = 0.98 * weight / total[core.grp] + 0.02 / counts
        return mixed

    lam = 0.0
    p = distribution(lam)
    for step in range(60):
        if bool((core.A @ p <= room).all()):
            break
        lam = level * 0.05 * 1.6**step
        p = distribution(lam)
    return p, 1.0 / p


def _most_negative(core: Core, p: Floats) -> float:
    """Return (about) the least eigenvalue of ``sqrt(p) C sqrt(p)``."""
    root = np.sqrt(p)
    scaled = core.C * root[:, None] * root[None, :]
    if core.n <= 300:
        return float(np.linalg.eigvalsh(scaled)[0])
    v = np.cos(1.0 + np.arange(core.n))
    bound = float(np.abs(scaled).sum(axis=1).max())
    if bound == 0.0:
        return 0.0
    for _ in range(40):  # power iteration on bound·I - scaled
        v = bound * v - scaled @ v
        v /= np.linalg.norm(v)
    return float(v @ (scaled @ v)) * 1.3 - 1e-3 * bound


@dataclass(slots=True, kw_only=True, eq=False)
class State:
    """An interior point: primal ``M`` and slacks ``s``, dual ``y`` and ``S``."""

    M: Floats
    S: Floats
    y: Floats
    s: Floats


def start(lifted: Lifted) -> State:
    """Return a strictly feasible dual and an (almost) feasible primal point."""
    core, free = lifted.core, lifted.free
    p, weight = center(core)
    X = np.outer(p, p)
    for a, b in zip(core.off[:-1], core.off[1:], strict=True):
        X[a:b, a:b] = np.diag(p[a:b])
    M = np.empty((lifted.size, lifted.size))
    M[0, 0] = 1.0
    M[0, 1:] = M[1:, 0] = p[free]
    M[1:, 1:] = X[np.ix_(free, free)]
    least = _most_negative(core, p)
    kappa = 1.3 * max(-least, 0.05 * float(np.abs(core.d * p).mean()), 1e-12)
    last = (core.off[1:] - 1)[core.grp]
    y = np.zeros(len(lifted.u))
    # D = kappa·diag(1/p): in the free rows that is x_p² - x_p for each, and for the last row
    # the same with x_last = 1 - Σ x_p.
    r, ne = len(free), lifted.n_equal
    y[1 : 1 + r] = -0.5 * kappa * (weight[free] + weight[last[free]])
    y[1 + r : 1 + r + len(lifted.same)] = -kappa * weight[last[lifted.same[:, 0]]]
    slack = np.maximum(lifted.apply(M)[ne:], 1e-4)
    while True:
        y[ne:] = np.minimum(0.02 * kappa / slack, 0.02 * kappa / max(1, len(slack)) / slack)
        S = lifted.objective - lifted.combine(y)
        try:
            factor = sla.cho_factor(S[1:, 1:], lower=True)
            break
        except np.linalg.LinAlgError:
            y[1 : 1 + r + len(lifted.same)] *= 1.5
            kappa *= 1.5
    top = S[0, 0] - S[1:, 0] @ sla.cho_solve(factor, S[1:, 0])
    y[0] = top - kappa
    S[0, 0] -= y[0]
    return State(M=M, S=S, y=y, s=slack)


def _length(L: NDArray[np.floating[Any]], dZ: Floats) -> float:
    """Return the largest step (at most 1) from ``Z = LLᵀ`` along ``dZ`` within the cone.

    Lanczos on ``L⁻¹ dZ L⁻ᵀ``; the residual is taken off, so that the step is hardly ever too long.
    """
    n = len(L)
    if n <= 90:
        Y = sla.solve_triangular(L, dZ, lower=True, check_finite=False)
        Y = sla.solve_triangular(L, Y.T, lower=True, check_finite=False)
        least = float(np.linalg.eigvalsh(Y + Y.T)[0])
        return 1.0 if least >= 0.0 else min(1.0, -2.0 / least)
    F = np.asfortranarray(L)
    trsv = sla.blas.dtrsv
    most = min(40, n)
    V = np.zeros((most + 1, n))
    V[0] = np.cos(1.0 + np.arange(n))
    V[0] /= np.linalg.norm(V[0])
    alpha, beta = np.zeros(most), np.zeros(most)
    least = 0.0
    for j in range(most):
        w = trsv(F, V[j], lower=1, trans=1)
        w = trsv(F, dZ @ w, lower=1, trans=0)
        alpha[j] = V[j] @ w
        w -= V[: j + 1].T @ (V[: j + 1] @ w)
        w -= V[: j + 1].T @ (V[: j + 1] @ w)
        beta[j] = float(np.linalg.norm(w))
        last = j == most - 1 or beta[j] < 1e-12
        if last or j % 4 == 3:
            theta, S = sla.eigh_tridiagonal(
                alpha[: j + 1], beta[:j], select="i", select_range=(0, 0)
            )
            slack = beta[j] * abs(float(S[-1, 0]))
            least = float(theta[0]) - slack
            if last or slack < 0.02 * max(abs(least), 0.3):
                break
        V[j + 1] = w / beta[j]
    return 1.0 if least >= -1.0 else min(1.0, -1.0 / least)


def _length_linear(z: Floats, dz: Floats) -> float:
    falling = dz < 0.0
    if not falling.any():
        return 1.0
    return min(1.0, float((-z[falling] / dz[falling]).min()))


def interior_point(
    lifted: Lifted,
    *,
    tolerance: float,
    most: int = 60,
    state: State | None = None,
    stop: Callable[[float], bool] | None = None,
) -> tuple[State, int]:
    """Solve the lifted problem to relative gap ``tolerance``; returns the state and iterations.

    Mehrotra predictor-corrector in the direction of [HRVW96]. The dual stays feasible from the
    first iterate on. ``stop`` sees the dual value after each iteration. Each iteration costs
    ``O(K³ + N³)`` for K constraints and N free rows.
    """
    state = state or start(lifted)
    M, S, y, s = state.M, state.S, state.y, state.s
    N, ne, K = lifted.size, lifted.n_equal, len(lifted.u)
    right = np.zeros(K)
    right[0] = 1.0
    done = 0
    B = np.zeros((K, K))
    for _iteration in range(most):
        w = y[ne:]
        try:
            LS, LM = np.linalg.cholesky(S), np.linalg.cholesky(M)
        except np.linalg.LinAlgError:
            break
        W = _inverse(LS)
        HM, HW = lifted.expand(M), lifted.expand(W)
        AM, AW = lifted.read(HM), lifted.read(HW)
        residual = right - AM
        residual[ne:] += s
        gap = float((M * S).sum()) + float(s @ w)
        infeasible = float(np.abs(residual).max())
        if infeasible < 1e-6 and gap <= tolerance * abs(y[0]):
            break
        mu = gap / (N + K - ne)
        schur(HM, HW, lifted.u, lifted.v, lifted.less, B)
        ratio = s / w
        B[np.arange(ne, K), np.arange(ne, K)] += ratio
        if not (np.isfinite(B.diagonal()).all() and B.diagonal().min() > 1e-280):
            break
        unit = 1.0 / np.sqrt(np.diag(B))
        factor = _factor(B, unit)
        if factor is None:
            break

        def direction(
            target: float, second: Floats | None, cross: Floats | float, /,
            M: Floats = M, W: Floats = W, AM: Floats = AM, AW: Floats = AW, s: Floats = s,
            w: Floats = w, residual: Floats = residual, ratio: Floats = ratio,
            factor: Floats = factor, unit: Floats = unit,
        ) -> tuple[Floats, Floats, Floats, Floats]:  # fmt: skip
            rhs = residual - (target * AW - AM)
            if second is not None:
                rhs += lifted.apply(second)
            extra = (target - s * w - cross) / w
            rhs[ne:] += extra
            dy = unit * sla.cho_solve((factor, False), unit * rhs, check_finite=False)
            dS = -lifted.combine(dy)
            half = _times(M, dS) @ W
            dM = target * W - M - 0.5 * (half + half.T)
            if second is not None:
                dM -= second
            return dy, dS, dM, extra - ratio * dy[ne:]

        dy, dS, dM, ds = direction(0.0, None, 0.0)
        primal = 0.98 * min(_length(LM, dM), _length_linear(s, ds))
        dual = 0.98 * min(_length(LS, dS), _length_linear(w, dy[ne:]))
        after = float(((M + primal * dM) * (S + dual * dS)).sum())
        after += float((s + primal * ds) @ (w + dual * dy[ne:]))
        sigma = min(1.0, max(1e-4, (after / gap) ** 2))
        if min(primal, dual) < 0.1:
            sigma = max(sigma, 0.3)
        half = _times(dM, dS) @ W
        dy, dS, dM, ds = direction(sigma * mu, 0.5 * (half + half.T), ds * dy[ne:])
        primal = 0.95 * min(_length(LM, dM), _length_linear(s, ds))
        dual = 0.95 * min(_length(LS, dS), _length_linear(w, dy[ne:]))
        M, s = M + primal * dM, s + primal * ds
        y = y + dual * dy
        S = lifted.objective - lifted.combine(y)
        done += 1
        if stop is not None and stop(float(y[0]) + lifted.core.constant):
            break
        if max(primal, dual) < 1e-5:
            break
    return State(M=M, S=S, y=y, s=s), done


def _times(Z: Floats, dS: Floats) -> Floats:
    """Return ``Z dS`` for symmetric matrices; shifts alone make ``dS`` sparse."""
    if len(dS) > 150:
        sparse = sp.csr_matrix(dS)
        if sparse.nnz < 0.1 * dS.size:
            return np.asarray(sparse @ Z).T
    product: Floats = Z @ dS
    return product


def _inverse(L: NDArray[np.floating[Any]]) -> Floats:
    """Return ``(LLᵀ)⁻¹`` from the lower factor."""
    # The transpose of a C-ordered lower factor is a Fortran-ordered upper one.
    upper, _ = sla.lapack.dpotri(np.array(L.T, order="F"), lower=0, overwrite_c=1)
    upper = np.triu(upper)
    inverse: Floats = upper + np.triu(upper, 1).T
    return np.ascontiguousarray(inverse)


def _factor(B: Floats, unit: Floats) -> Floats | None:
    """Return the upper Cholesky factor of the scaled Schur matrix, regularised if need be.

    Only the lower triangle of ``B`` is read; ``B`` is overwritten.
    """
    B *= unit[:, None]
    B *= unit[None, :]
    diagonal = np.arange(len(unit))
    kept = np.tril(B, -1) if len(unit) < 400 else None
    for ridge in (1e-12, 1e-9):
        B[diagonal, diagonal] = 1.0 + ridge
        # The transpose is in Fortran order: LAPACK works in place.
        factor, info = sla.lapack.dpotrf(B.T, lower=0, clean=0, overwrite_a=1)
        if info == 0:
            result: Floats = factor
            return result
        if kept is None:
            return None
        B[:] = kept
    return None


def dual_point(lifted: Lifted, state: State, iterations: int) -> DualPoint:
    """Read shifts, cuts and products out of a state, in the core's rows."""
    core, free = lifted.core, lifted.free
    n, m, r, ne = core.n, len(core.b), len(free), lifted.n_equal
    width = int(np.diff(core.off).max())
    shift = np.zeros((n, width))
    start_of = core.off[:-1][core.grp]
    y = state.y
    shift[free, free - start_of[free]] = -2.0 * y[1 : 1 + r]
    same = lifted.same
    values = -y[1 + r : 1 + r + len(same)]
    shift[same[:, 0], same[:, 1] - start_of[same[:, 0]]] = values
    shift[same[:, 1], same[:, 0] - start_of[same[:, 1]]] = values
    pair_values = y[1 + r + len(same) : ne]
    at = ne + m + lifted.n_products
    products = np.zeros((m, n))
    if lifted.n_products:
        products = np.maximum(y[ne + m : at], 0.0).reshape(m, n) / lifted.unit[:, None]
    cuts = np.concatenate([core.pairs, lifted.cuts])
    amounts = np.concatenate([pair_values, np.maximum(y[at:], 0.0)])
    first, second = cuts.min(axis=1, initial=n), cuts.max(axis=1, initial=0)
    X = lifted.expand(state.M)[1 : n + 1, 1 : n + 1]
    return DualPoint(
        shift=shift,
        cut_rows=first,
        cut_columns=second,
        cut_values=amounts,
        products=products,
        multipliers=np.maximum(y[ne : ne + m], 0.0) / lifted.unit,
        bound=float(y[0]) + core.constant,
        iterations=iterations,
        row_values=np.diag(X).copy(),
        pair_values=X,
    )

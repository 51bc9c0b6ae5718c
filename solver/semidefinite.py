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
def schur(Ma: Floats, Wa: Floats, u: Ints, v: Ints, out: Floats) -> None:
    """Fill ``out[k, j] = tr(A_k M A_j W)`` for ``j <= k`` from the atoms' Gram matrices."""
    for k in range(len(u)):
        Mu, Mv, Wu, Wv = Ma[u[k]], Ma[v[k]], Wa[u[k]], Wa[v[k]]
        for j in range(k + 1):
            r, s = u[j], v[j]
            out[k, j] = 0.25 * (Mv[r] * Wu[s] + Mv[s] * Wu[r] + Mu[r] * Wv[s] + Mu[s] * Wv[r])


class Lifted:
    """The lifted problem of a core: atoms, constraints in order, and the objective.

    Constraints: ``M_00 = 1``; per free row ``x_p² = x_p``; products of two free rows of a group
    and forbidden pairs, both zero; then inequalities: budgets, products of budgets with rows, cuts
    ``X_ij >= 0``.
    """

    def __init__(self, core: Core, *, products: bool) -> None:
        """Build the sparse atoms; ``O(n²)`` for the objective."""
        n, m = core.n, len(core.b)
        self.core = core
        reference = core.off[1:] - 1
        self.free = np.setdiff1d(np.arange(n), reference)
        r = len(self.free)
        self.size = r + 1
        column = 1 + np.arange(r)
        entries = np.concatenate([np.ones(r), np.ones(core.n_groups), -np.ones(r)])
        at = np.concatenate([self.free, reference, reference[core.grp[self.free]]])
        to = np.concatenate([column, np.zeros(core.n_groups, dtype=np.int64), column])
        T = sp.csr_matrix((entries, (at, to)), shape=(n, r + 1))
        one = sp.csr_matrix(([1.0], ([0], [0])), shape=(1, r + 1))
        ones = sp.csr_matrix((np.ones(n), (np.arange(n), np.zeros(n, int))), shape=(n, r + 1))
        self.unit = np.maximum(core.b, 1).astype(np.float64)
        slack = -np.asarray(T.T @ (core.A / self.unit[:, None]).T).T.reshape(m, r + 1)
        slack[:, 0] += core.b / self.unit
        self.atoms = sp.vstack([one, T, T - ones, sp.csr_matrix(slack)]).tocsr()
        self.atoms_t = self.atoms.T.tocsr()
        pairs = [
            (p, q)
            for a, b in zip(core.off[:-1], core.off[1:], strict=True)
            for p in range(a, b - 1)
            for q in range(p + 1, b - 1)
        ]
        self.same = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        zero = np.concatenate([self.same, core.pairs])
        u = [np.zeros(1, dtype=np.int64), 1 + self.free, 1 + zero[:, 0]]
        v = [np.zeros(1, dtype=np.int64), 1 + n + self.free, 1 + zero[:, 1]]
        self.n_equal = 1 + r + len(zero)
        for k in range(m):
            u.append(np.zeros(1, dtype=np.int64))
            v.append(np.array([2 * n + 1 + k]))
        self.n_products = n * m if products else 0
        if products:
            for k in range(m):
                u.append(1 + np.arange(n))
                v.append(np.full(n, 2 * n + 1 + k))
        self.u, self.v = np.concatenate(u).astype(np.int64), np.concatenate(v).astype(np.int64)
        self.cuts = np.zeros((0, 2), dtype=np.int64)
        self.objective = np.asarray(T.T @ np.asarray(T.T @ (0.5 * core.C)).T).T
        linear = 0.5 * np.asarray(T.T @ core.d)
        self.objective[0] += linear
        self.objective[:, 0] += linear

    def add_cuts(self, cuts: Ints) -> None:
        """Append ``X_ij >= 0`` for ``cuts`` i64[c, 2]."""
        self.cuts = np.concatenate([self.cuts, cuts])
        self.u = np.concatenate([self.u, 1 + cuts[:, 0]])
        self.v = np.concatenate([self.v, 1 + cuts[:, 1]])

    def combine(self, y: Floats) -> Floats:
        """Return ``Σ_k y_k A_k``."""
        k = self.atoms.shape[0]
        Y = sp.csr_matrix((y, (self.u, self.v)), shape=(k, k))
        R: Floats = (self.atoms_t @ (Y @ self.atoms)).toarray()
        return 0.5 * (R + R.T)

    def gram(self, Z: Floats) -> Floats:
        """Return the Gram matrix of the atoms in ``Z``."""
        half = np.asarray(self.atoms @ Z)
        return np.ascontiguousarray(self.atoms @ half.T)

    def apply(self, Z: Floats) -> Floats:
        """Return ``<A_k, Z>`` for symmetric ``Z``."""
        values: Floats = self.gram(Z)[self.u, self.v]
        return values


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
    """Return the largest step (at most 1) from ``Z = LLᵀ`` along ``dZ`` within the cone."""
    n = len(L)
    if n <= 260:
        Y = sla.solve_triangular(L, dZ, lower=True, check_finite=False)
        Y = sla.solve_triangular(L, Y.T, lower=True, check_finite=False)
        least = float(
            sla.eigh(Y + Y.T, eigvals_only=True, subset_by_index=[0, 0], check_finite=False)[0]
        )
        return 1.0 if least >= 0.0 else min(1.0, -2.0 / least)
    Z = L @ L.T
    length = 1.0
    while length > 1e-7:
        try:
            np.linalg.cholesky(Z + length * dZ)
        except np.linalg.LinAlgError:
            length *= 0.8
            continue
        return length
    return 0.0


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
    eye = np.eye(N)
    done = 0
    B = np.empty((K, K))
    for _iteration in range(most):
        w = y[ne:]
        try:
            LS, LM = np.linalg.cholesky(S), np.linalg.cholesky(M)
        except np.linalg.LinAlgError:
            break
        W = sla.cho_solve((LS, True), eye, check_finite=False)
        W = 0.5 * (W + W.T)
        Ma, Wa = lifted.gram(M), lifted.gram(W)
        AM, AW = Ma[lifted.u, lifted.v], Wa[lifted.u, lifted.v]
        residual = right - AM
        residual[ne:] += s
        gap = float((M * S).sum()) + float(s @ w)
        infeasible = float(np.abs(residual).max())
        if infeasible < 1e-6 and gap <= tolerance * abs(y[0]):
            break
        mu = gap / (N + K - ne)
        schur(Ma, Wa, lifted.u, lifted.v, B)
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
            dy = unit * sla.cho_solve((factor, True), unit * rhs, check_finite=False)
            dS = -lifted.combine(dy)
            half = M @ dS @ W
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
        half = dM @ dS @ W
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


def _factor(B: Floats, unit: Floats) -> Floats | None:
    """Return the lower Cholesky factor of the scaled Schur matrix, regularised if need be."""
    scaled = B * unit[:, None] * unit[None, :]
    for ridge in (1e-13, 1e-10, 1e-8):
        scaled[np.arange(len(unit)), np.arange(len(unit))] = 1.0 + ridge
        try:
            factor: Floats = sla.cholesky(scaled, lower=True, check_finite=False)
        except np.linalg.LinAlgError:
            continue
        return factor
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
    X = lifted.gram(state.M)[1 : n + 1, 1 : n + 1]
    return DualPoint(
        shift=shift,
        cut_rows=first,
        cut_columns=second,
        cut_values=amounts,
        products=products,
        multipliers=np.maximum(y[ne : ne + m], 0.0) / lifted.unit,
        bound=float(y[0]) + core.constant,
        iterations=iterations,
        pair_values=X,
    )

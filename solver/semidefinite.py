"""The semidefinite bound: shifts, cuts and products that make the objective convex and high.

An interior-point method on the lifted problem (``lifted``). Each iterate's dual gives valid shifts,
cuts and products: it can be stopped at any time.

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

from bitquota.solver.lifted import schur

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from bitquota.solver.core import Core
    from bitquota.solver.lifted import Lifted

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]


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

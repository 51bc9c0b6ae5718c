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

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import scipy.linalg as sla
import scipy.sparse as sp
import scipy.sparse.linalg as sla_sparse

from bitquota.solver.interruptible import Interrupted, cholesky, go_on, inverse, pieces, product
from bitquota.solver.lifted import schur

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from bitquota.solver.core import Core
    from bitquota.solver.lifted import Lifted

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Bytes = NDArray[np.uint8]

MOST_ITERATIONS = 60
ALIKE = (1.0, 0.7, 0.4)
"""Correlations of the errors of one group's rows that are tried; measured ones are .25 to .95."""
LACKS_LITTLE = 0.05
"""Part of the diagonal that may be added."""


@dataclass(slots=True, kw_only=True, eq=False)
class DualPoint:
    """Shifts, cuts and products of one dual iterate, in the core's rows (see ``solution``)."""

    shift: Floats
    cut_rows: Ints
    cut_columns: Ints
    cut_values: Floats
    products: Floats
    multipliers: Floats
    row_values: Floats
    """f64[n], the primal ``x``."""
    pair_values: Floats
    """f64[n, n], the primal ``X``: where it is negative a cut helps."""
    triples: Ints = field(default_factory=lambda: np.zeros((0, 3), dtype=np.int64))
    triple_values: Floats = field(default_factory=lambda: np.zeros(0))

    def times(self, unit: float) -> DualPoint:
        """Return the point of the same core with all terms ``unit`` times as large."""
        return replace(
            self,
            shift=self.shift * unit,
            cut_values=self.cut_values * unit,
            products=self.products * unit,
            multipliers=self.multipliers * unit,
            triple_values=self.triple_values * unit,
        )


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


def _least_eigenvalue(C: Floats, p: Floats, halt: Bytes) -> float:
    """Return (about) the least eigenvalue of ``sqrt(p) C sqrt(p)``, rather too low.

    Raises:
        Interrupted: ``halt`` u8[1] was set meanwhile.
    """
    root, bound = np.sqrt(p), 0.0
    scaled = np.empty_like(C)
    for rows in pieces(len(C), halt):
        scaled[rows] = C[rows] * root[rows, None] * root[None, :]
        bound = max(bound, float(np.abs(scaled[rows]).sum(axis=1).max()))
    if len(C) <= 300:
        return float(np.linalg.eigvalsh(scaled)[0])
    if bound == 0.0:
        return 0.0

    def times(v: Floats) -> Floats:
        go_on(halt)
        image: Floats = scaled @ v
        return image

    operator = sla_sparse.LinearOperator(scaled.shape, matvec=times, dtype=np.float64)
    first = np.cos(1.0 + np.arange(len(C)))
    try:
        found = sla_sparse.eigsh(
            operator, k=1, which="SA", v0=first, tol=0.02, maxiter=300, return_eigenvectors=False
        )
    except sla_sparse.ArpackNoConvergence:
        return -bound
    return float(found[0]) - 0.02 * abs(float(found[0]))


def dominant_point(core: Core, z: Floats) -> DualPoint:
    """Return a point at ``z`` without cuts and products whose shift alone outweighs ``C``."""
    point = plain_point(core, z)
    start = core.off[:-1][core.grp]
    if len(core.C):
        point.shift[np.arange(core.n), np.arange(core.n) - start] = np.abs(core.C).sum(axis=1)
    return point


def plain_point(core: Core, z: Floats, multipliers: Floats | None = None) -> DualPoint:
    """Return a point at ``z`` without shift, cuts and products."""
    n, m = core.n, len(core.b)
    none = np.zeros(0, dtype=np.int64)
    return DualPoint(
        shift=np.zeros((n, int(np.diff(core.off).max()))), cut_rows=none, cut_columns=none,
        cut_values=np.zeros(0), products=np.zeros((m, n)),
        multipliers=np.zeros(m) if multipliers is None else multipliers, row_values=z,
        pair_values=np.zeros((0, 0)),
    )  # fmt: skip


def flat_point(core: Core) -> DualPoint:
    """Return a point without cuts and products, for the price of one to three eigenvalues.

    In a Gram matrix the errors of one group's rows are alike, so that a block ``2 r sqrt(d_p d_q)``
    which it would have inside a group, with ``r`` their correlation, makes ``C`` almost
    semidefinite; a multiple of its diagonal does the rest. ``r`` is not in ``C``: of a few, the
    first that needs little of that diagonal is taken. For cores where an interior point takes long,
    and for trees, which a nearly singular ``Q`` makes large.

    Raises:
        Interrupted: A limit of the core struck meanwhile.
    """
    n = core.n
    point = plain_point(core, center(core)[0])
    size, Q = np.zeros(n), np.empty_like(core.C)
    for rows in pieces(n, core.halt):
        size[rows] = np.abs(core.C[rows]).max(axis=1, initial=0.0)
        Q[rows] = core.C[rows]
    weight = 2.0 * np.abs(core.d) + 1e-6 * size + 1e-12 * float(size.max(initial=0.0)) + 1e-290
    root = np.sqrt(weight)
    start = core.off[:-1][core.grp]
    best = np.inf
    for alike in ALIKE:
        shift = np.zeros_like(point.shift)
        for a, b in zip(core.off[:-1], core.off[1:], strict=True):
            shift[a:b, : b - a] = alike * np.outer(root[a:b], root[a:b])
            shift[np.arange(a, b), np.arange(b - a)] = weight[a:b]
            Q[a:b, a:b] = shift[a:b, : b - a]
        lacking = max(0.0, -_least_eigenvalue(Q, 1.0 / weight, core.halt))
        if lacking < best:
            best, point.shift[:] = lacking, shift
        if best < LACKS_LITTLE:
            break
    point.shift[np.arange(n), np.arange(n) - start] += best * weight
    return point


@dataclass(slots=True, kw_only=True, eq=False)
class State:
    """An interior point, or a change of one: primal ``M``, slacks ``s``, dual ``y`` and ``S``."""

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
    least = _least_eigenvalue(core.C, p, core.halt)
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
            factor = cholesky(S[1:, 1:], core.halt)
            break
        except np.linalg.LinAlgError:
            y[1 : 1 + r + len(lifted.same)] *= 1.5
            kappa *= 1.5
    top = S[0, 0] - S[1:, 0] @ sla.cho_solve((factor.T, False), S[1:, 0])
    y[0] = top - kappa
    S[0, 0] -= y[0]
    return State(M=M, S=S, y=y, s=slack)


def _length(L: Floats, dZ: Floats, halt: Bytes) -> float:
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
        go_on(halt)
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
    lifted: Lifted, *, tolerance: float, stop: Callable[[float], bool]
) -> tuple[State, int]:
    """Solve the lifted problem to relative gap ``tolerance``; returns the state and iterations.

    A limit of the core ends it at the last whole iterate.

    Mehrotra predictor-corrector in the direction of [HRVW96]. The dual stays feasible from the
    first iterate on. ``stop`` sees the dual value after each iteration. Each iteration costs
    ``O(K³ + N³)`` for K constraints and N free rows.
    """
    state = start(lifted)
    B = np.zeros((len(lifted.u), len(lifted.u)))
    for done in range(MOST_ITERATIONS):
        try:
            newton = _Newton.at(lifted, state, tolerance, B)
            if newton is None:
                return state, done
            state, longest = newton.step()
        except Interrupted:
            return state, done
        if stop(float(state.y[0]) + lifted.core.constant) or longest < 1e-5:
            return state, done + 1
    return state, MOST_ITERATIONS


@dataclass(slots=True, kw_only=True, eq=False)
class _Newton:
    """The linear system of one iteration, factored.

    Attributes:
        lifted, state: What it is a system of.
        L_S, L_M: Lower Cholesky factors.
        W: Inverse of ``S``.
        AM, AW: f64[K], the constraints' values at ``M`` and ``W``.
        residual: f64[K], what ``M`` and ``s`` lack of feasibility.
        gap: ``<M, S> + s·w``.
        ratio: ``s / w``.
        factor, unit: Of the scaled Schur matrix, and its scale.
    """

    lifted: Lifted
    state: State
    L_S: Floats
    L_M: Floats
    W: Floats
    AM: Floats
    AW: Floats
    residual: Floats
    gap: float
    ratio: Floats
    factor: Floats
    unit: Floats

    @classmethod
    def at(cls, lifted: Lifted, state: State, tolerance: float, B: Floats) -> _Newton | None:
        """Return the system at ``state``; ``None`` where it is solved, or cannot be factored.

        ``B`` f64[K, K] is room for the Schur matrix.
        """
        M, S, s, ne, K = state.M, state.S, state.s, lifted.n_equal, len(lifted.u)
        w = state.y[ne:]
        try:
            L_S, L_M = cholesky(S, lifted.core.halt), cholesky(M, lifted.core.halt)
        except np.linalg.LinAlgError:
            return None
        W = inverse(L_S, lifted.core.halt)
        HM, HW = lifted.expand(M), lifted.expand(W)
        AM, AW = lifted.read(HM), lifted.read(HW)
        # Solved?
        residual = -AM
        residual[0] += 1.0
        residual[ne:] += s
        gap = float((M * S).sum()) + float(s @ w)
        if float(np.abs(residual).max()) < 1e-6 and gap <= tolerance * abs(state.y[0]):
            return None
        # The Schur matrix.
        schur(HM, HW, lifted.u, lifted.v, lifted.less, lifted.core.halt, B)
        go_on(lifted.core.halt)
        ratio = s / w
        B[np.arange(ne, K), np.arange(ne, K)] += ratio
        if not (np.isfinite(B.diagonal()).all() and B.diagonal().min() > 1e-280):
            return None
        unit = 1.0 / np.sqrt(np.diag(B))
        factor = _factor(B, unit, lifted.core.halt)
        if factor is None:
            return None
        return cls(
            lifted=lifted, state=state, L_S=L_S, L_M=L_M, W=W, AM=AM, AW=AW, residual=residual,
            gap=gap, ratio=ratio, factor=factor, unit=unit,
        )  # fmt: skip

    def step(self) -> tuple[State, float]:
        """Return the next state, and the longer of the primal and the dual step."""
        state, lifted = self.state, self.lifted
        ne, w, halt = lifted.n_equal, state.y[lifted.n_equal :], lifted.core.halt
        # Predict: how far does the gap fall on the way to zero?
        d = self._direction(0.0, None, 0.0)
        primal, dual = self._lengths(d, 0.98)
        after = float(((state.M + primal * d.M) * (state.S + dual * d.S)).sum())
        after += float((state.s + primal * d.s) @ (w + dual * d.y[ne:]))
        sigma = min(1.0, max(1e-4, (after / self.gap) ** 2))
        if min(primal, dual) < 0.1:
            sigma = max(sigma, 0.3)
        # Correct, and aim at a part of the gap.
        target = sigma * (self.gap / (lifted.size + len(lifted.u) - ne))
        half = product(_times(d.M, d.S, halt), self.W, halt)
        d = self._direction(target, 0.5 * (half + half.T), d.s * d.y[ne:])
        primal, dual = self._lengths(d, 0.95)
        y = state.y + dual * d.y
        S = lifted.objective - lifted.combine(y)
        after_step = State(M=state.M + primal * d.M, S=S, y=y, s=state.s + primal * d.s)
        return after_step, max(primal, dual)

    def _lengths(self, d: State, part: float) -> tuple[float, float]:
        """Return ``part`` of the longest primal and dual steps within the cone."""
        w, dw = (y[self.lifted.n_equal :] for y in (self.state.y, d.y))
        halt = self.lifted.core.halt
        return (
            part * min(_length(self.L_M, d.M, halt), _length_linear(self.state.s, d.s)),
            part * min(_length(self.L_S, d.S, halt), _length_linear(w, dw)),
        )

    def _direction(self, target: float, second: Floats | None, cross: Floats | float) -> State:
        """Return the direction to complementarity ``target``, second-order terms taken off."""
        lifted, state, W, ne = self.lifted, self.state, self.W, self.lifted.n_equal
        w = state.y[ne:]
        rhs = self.residual - (target * self.AW - self.AM)
        if second is not None:
            rhs += lifted.apply(second)
        extra = (target - state.s * w - cross) / w
        rhs[ne:] += extra
        dy = self.unit * sla.cho_solve((self.factor, False), self.unit * rhs, check_finite=False)
        dS = -lifted.combine(dy)
        halt = lifted.core.halt
        half = product(_times(state.M, dS, halt), W, halt)
        dM = target * W - state.M - 0.5 * (half + half.T)
        if second is not None:
            dM -= second
        return State(M=dM, S=dS, y=dy, s=extra - self.ratio * dy[ne:])


def _times(Z: Floats, dS: Floats, halt: Bytes) -> Floats:
    """Return ``Z dS`` for symmetric matrices; shifts alone make ``dS`` sparse."""
    if len(dS) > 150:
        sparse = sp.csr_matrix(dS)
        if sparse.nnz < 0.1 * dS.size:
            return np.asarray(sparse @ Z).T
    return product(Z, dS, halt)


def _factor(B: Floats, unit: Floats, halt: Bytes) -> Floats | None:
    """Return the upper Cholesky factor of the scaled Schur matrix, regularised if need be.

    Only the lower triangle of ``B`` is read; ``B`` is overwritten.
    """
    B *= unit[:, None]
    B *= unit[None, :]
    diagonal = np.arange(len(unit))
    for ridge in (1e-12, 1e-9):
        B[diagonal, diagonal] = 1.0 + ridge
        try:
            return cholesky(B, halt).T
        except np.linalg.LinAlgError:
            continue
    return None


def dual_point(lifted: Lifted, state: State) -> DualPoint:
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
        row_values=np.diag(X).copy(),
        pair_values=X,
    )

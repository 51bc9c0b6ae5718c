"""The convex relaxation of a problem in factor form, solved in the dimension of the factor.

With ``U`` the factor, ``l_p = diagonal_p - ½ ‖U_p‖²``, costs ``A`` and limits ``b``, every feasible
one-hot ``x``, any ``w`` and any prices ``λ >= 0`` obey, because ``½ ‖y‖² >= w·y - ½ ‖w‖²``::

    objective(x) >= constant - ½ ‖w‖² - λ·b + Σ_g min_{p in g} (l_p + U_p·w + λ·A_p)

The right-hand side is concave in ``(w, λ)``, which are few numbers. Its minima are smoothed at a
falling temperature ``τ`` and the smoothed function is raised by Newton steps: the matrix of second
derivatives is as small as the factor's rank, and only groups that are not decided yet enter it.

References:
    [Nes05] Y. Nesterov: Smooth minimization of non-smooth functions, 2005 (the smoothing).

Design: docs/design/solver.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from bitquota.compiled import compiled, read_only
from bitquota.solver.interruptible import PIECE, Interrupted, go_on, product

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bitquota.solver.problem import Problem

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Bools = NDArray[np.bool_]
    Bytes = NDArray[np.uint8]

TOLERANCE = 1e-6
"""What smoothing may cost the bound, relative to it."""
LOOSE = 1e-5
"""The same where a tree follows, to which the last fifth of the steps is worth less than nodes."""
_COOLING = 0.1
_STAGES, _STEPS = 60, 8
_EPS = 2.3e-16
_NEAR = 1e-2
"""Part of the first temperature with which the steps begin near a maximum."""
_DECIDED = 1e-9
"""Groups with a row of more than one less this weight do not enter the second derivatives."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Relaxed:
    """A dual point, and what it proves.

    Attributes:
        w: f64[r].
        prices: f64[m], ``λ``.
        weights: f64[n], the smoothed minima's weights: nearly the relaxation's optimum.
        bound: Proved for the kept rows, every rounding allowed for.
        lower: f64[n], values of the rows less their rounding; ``+inf`` for rows that are not kept.
        least: f64[G], the least of them in each group.
    """

    w: Floats
    prices: Floats
    weights: Floats
    bound: float
    lower: Floats
    least: Floats

    def excess(self, problem: Problem) -> Floats:
        """Return f64[n]: by how much choosing each row raises the bound."""
        return self.lower - np.repeat(self.least, np.diff(problem.offsets))


class FactorForm:
    """What does not change while a problem in factor form is relaxed."""

    def __init__(self, problem: Problem, halt: Bytes) -> None:
        """Compute the linear terms; ``O(n r)``."""
        none = np.zeros((problem.n_rows, 0))
        self.U = none if problem.factor is None else problem.factor
        self.problem, self.halt = problem, halt
        self.squares = np.einsum("ij,ij->i", self.U, self.U)
        self.linear = problem.diagonal - 0.5 * self.squares
        self.unit = np.maximum(problem.limits, 1).astype(np.float64)

    def bound(self, keep: Bools, w: Floats, prices: Floats, weights: Floats) -> Relaxed:
        """Return what a dual point proves for the rows ``keep``. ``O(n r)``."""
        lower = self.values(keep, w, prices)
        least = np.minimum.reduceat(lower, self.problem.offsets[:-1])
        return Relaxed(
            w=w, prices=prices, weights=weights, bound=self.total(w, prices, least), lower=lower,
            least=least,
        )  # fmt: skip

    def values(self, keep: Bools, w: Floats, prices: Floats) -> Floats:
        """Return f64[n]: what the rows are worth at a dual point, less their rounding."""
        problem, m, r = self.problem, len(prices), len(w)
        priced = prices @ problem.costs if m else np.zeros(problem.n_rows)
        value = self.linear + self.U @ w + priced
        size = np.abs(problem.diagonal) + 0.5 * self.squares + priced
        size += np.sqrt(self.squares) * float(np.sqrt(w @ w))
        return np.where(keep, value - 2.0 * _EPS * (r + m + 16) * size - 1e-290, np.inf)

    def total(self, w: Floats, prices: Floats, least: Floats) -> float:
        """Return what least values of the groups prove together, less its rounding."""
        problem, m, r = self.problem, len(prices), len(w)
        square, spent = 0.5 * float(w @ w), float(prices @ problem.limits) if m else 0.0
        total = problem.constant - square - spent + float(least.sum())
        lost = abs(problem.constant) + square + abs(spent) + float(np.abs(least).sum())
        return total - 2.0 * _EPS * (problem.n_groups + r + m + 32) * lost

    def relax(self, keep: Bools, tolerance: float = TOLERANCE) -> Relaxed:
        """Return a dual point that is best but for smoothing, or as far as a limit let it come.

        Cost: about 40 passes over the factor, and ``O(r²)`` per row of undecided groups.
        """
        problem = self.problem
        terms = Terms(
            linear=self.linear, U=self.U, off=problem.offsets, ok=keep, A=problem.costs,
            b=problem.limits, constant=problem.constant, halt=self.halt,
        )  # fmt: skip
        return self.bound(keep, *best_dual(terms, tolerance))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Terms:
    """``constant + linear·x + ½ ‖Uᵀx‖²`` over one row of ``ok`` per group, ``A x <= b``."""

    linear: Floats
    U: Floats
    off: Ints
    ok: Bools
    A: Ints
    b: Ints
    constant: float
    halt: Bytes

    def __post_init__(self) -> None:
        """Give kernels one type of array, wherever it comes from."""
        for name in ("U", "off", "ok"):
            object.__setattr__(self, name, read_only(getattr(self, name)))


class Minima(Protocol):
    """How the least values over the choices at given linear terms are found and smoothed."""

    undecided: int
    """Groups that entered the second derivatives."""
    largest: float
    """The largest of the terms that are not linear ones."""

    def weigh(self, s: Floats, tau: float, z: Floats, found: Floats) -> None:
        """Fill ``z`` and ``found`` as the function ``weigh`` does."""

    def times(self, unit: float) -> Minima:
        """Return the same of terms ``unit`` times as large."""

    def second(self, U: Floats, A: Floats, z: Floats) -> Floats:
        """Return the covariance of the sum of the chosen rows of ``[U, A]`` under the weights."""


class Separate:
    """Minima of every group alone."""

    def __init__(self, terms: Terms) -> None:
        """Look at the groups of ``terms``."""
        self.terms, self.undecided, self.largest = terms, 0, 0.0

    def weigh(self, s: Floats, tau: float, z: Floats, found: Floats) -> None:
        """See ``Minima``."""
        weigh(s, self.terms.off, self.terms.ok, tau, z, found)

    def times(self, unit: float) -> Separate:  # noqa: ARG002  # its terms are scaled already
        """See ``Minima``."""
        return self

    def second(self, U: Floats, A: Floats, z: Floats) -> Floats:
        """See ``Minima``: a sum over the groups that are not decided."""
        terms, width = self.terms, U.shape[1] + len(A)
        H = np.zeros((width, width))
        groups = np.flatnonzero(np.maximum.reduceat(z, terms.off[:-1]) < 1.0 - _DECIDED).astype(
            np.int64
        )
        self.undecided = len(groups)
        most = int(np.diff(terms.off).max())
        step = max(1, min(int(PIECE / (2.0 * width * width * most)), 2**22 // (width * most)))
        rows = np.empty((min(step, max(len(groups), 1)) * most, width))
        for at in range(0, len(groups), step):
            go_on(terms.halt)
            count = deviations(U, A, terms.off, groups[at : at + step], z, rows)
            H += rows[:count].T @ rows[:count]
        return H


def best_dual(
    terms: Terms,
    tolerance: float = TOLERANCE,
    minima: Minima | None = None,
    near: tuple[Floats, Floats] | None = None,
) -> tuple[Floats, Floats, Floats]:
    """Return ``w``, prices and weights f64[n] at the maximum, or as far as a limit let it come.

    Args:
        terms: What to bound; any rank will do, 0 too.
        tolerance: What smoothing may cost, relative to the maximum.
        minima: How the choices' least values are found; by default each group's is its own.
        near: ``w`` and prices not far from the maximum.
    """
    # In a unit in which squares neither vanish nor overflow; a power of four rounds nothing.
    largest = float(np.abs(terms.linear).max(initial=minima.largest if minima else 0.0))
    if largest and not 1e-60 < largest < 1e60:
        half = 2.0 ** round(-0.5 * math.log2(largest))
        scaled = replace(
            terms, linear=terms.linear * half * half, U=terms.U * half,
            constant=terms.constant * half * half,
        )  # fmt: skip
        near = None if near is None else (near[0] * half, near[1] * half * half)
        w, prices, weights = best_dual(
            scaled, tolerance, None if minima is None else minima.times(half * half), near
        )
        return w / half, prices / half / half, weights
    # Weights that are even in every group, should there be no time for others.
    kept = np.add.reduceat(terms.ok.astype(np.float64), terms.off[:-1])
    even = np.where(terms.ok, 1.0 / np.repeat(np.maximum(kept, 1.0), np.diff(terms.off)), 0.0)
    unit, m = np.maximum(terms.b, 1).astype(np.float64), len(terms.b)
    best, state = (np.zeros(terms.U.shape[1]), np.zeros(m), even), None
    if not terms.U.shape[1] + m:
        return best
    try:
        state = _State(terms, even, unit, minima or Separate(terms), near)
        for _ in range(_STAGES):
            for _step in range(_STEPS):
                if state.step() <= 0.02 * state.tau * (state.minima.undecided + m):
                    break
            goal = max(tolerance * abs(state.hard + terms.constant), 1e-11 * state.size)
            if state.spread + m * state.tau <= goal or state.tau <= 1e-14 * state.size:
                break
            state.tau *= _COOLING
    except Interrupted:
        pass
    w, prices, weights = best if state is None else state.best
    return w, prices / unit, weights


class _State:
    """Where the Newton steps stand.

    Attributes:
        tau: The temperature.
        hard: The function without smoothing.
        size: Sum of the sizes of what it adds up.
        spread: What smoothing costs it.
        best: The best ``w``, scaled prices and weights so far.
    """

    def __init__(
        self, terms: Terms, even: Floats, unit: Floats, minima: Minima,
        near: tuple[Floats, Floats] | None,
    ) -> None:  # fmt: skip
        self.terms, self.ok, self.off, self.minima = terms, terms.ok, terms.off, minima
        self.r, m = terms.U.shape[1], len(terms.b)
        self.costs = terms.A / unit[:, None]
        self.limits = terms.b / unit
        # The `w` of even weights, and prices on the same scale.
        self.z = even
        w = self._transposed(self.z)[: self.r]
        s = terms.linear + terms.U @ w
        # Where nothing is to be decided, any small scale does.
        reach = self._reach(s) or 1e-9 * float(np.abs(s[self.ok]).sum()) or 1.0
        across = [self._reach(cost) for cost in self.costs]
        prices = np.array([reach / c if c > 0.0 else reach for c in across])
        self.tau = max(0.25 * reach / (len(self.off) - 1), 1e-150)
        if near is not None:
            w, prices = near[0], np.maximum(near[1] * unit, 1e-9 * prices)
            s, self.tau = terms.linear + terms.U @ w, max(_NEAR * self.tau, 1e-150)
        self.v = np.concatenate([w, np.maximum(prices, 1e-150)])
        self.s = s + self.v[self.r :] @ self.costs if m else s
        self.hard, self.size, self.spread = -np.inf, 1.0, np.inf
        self.best = (np.zeros(self.r), np.zeros(m), even.copy())
        self.top = -np.inf
        self.smooth = self._look(self.s, self.v)

    def _reach(self, values: Floats) -> float:
        """Return the sum over the groups of how far kept values are apart."""
        starts = self.off[:-1]
        high = np.maximum.reduceat(np.where(self.ok, values, -np.inf), starts)
        low = np.minimum.reduceat(np.where(self.ok, values, np.inf), starts)
        return float((high - low).sum())

    def _transposed(self, z: Floats) -> Floats:
        """Return ``[Uᵀz, A z]``."""
        terms, out = self.terms, np.zeros(self.r + len(self.limits))
        step = max(1, int(PIECE / (2.0 * max(self.r, 1))))
        for at in range(0, len(z), step):
            go_on(terms.halt)
            out[: self.r] += z[at : at + step] @ terms.U[at : at + step]
        out[self.r :] = self.costs @ z
        return out

    def _look(self, s: Floats, v: Floats) -> float:
        """Fill the weights at row values ``s``; returns the smoothed function."""
        found = np.zeros(4)
        self.minima.weigh(s, self.tau, self.z, found)
        w, prices = v[: self.r], v[self.r :]
        fixed = -0.5 * float(w @ w) - float(prices @ self.limits)
        self.hard, self.size, self.spread = fixed + found[1], found[2] - fixed, found[3]
        if self.hard > self.top:
            self.top = self.hard
            self.best = (w.copy(), prices.copy(), self.z.copy())
        return fixed + float(found[0]) + self.tau * float(np.log(prices).sum())

    def step(self) -> float:
        """Take one Newton step; returns what it was expected to gain, twice.

        Raises:
            Interrupted: A limit struck.
        """
        terms, r, tau = self.terms, self.r, self.tau
        self.smooth = self._look(self.s, self.v)  # the temperature may have changed
        prices = self.v[r:]
        g = self._transposed(self.z)
        g[:r] -= self.v[:r]
        g[r:] += tau / prices - self.limits
        H = self.minima.second(terms.U, self.costs, self.z) / tau
        H[np.arange(r), np.arange(r)] += 1.0
        at = np.arange(r, len(g))
        H[at, at] += tau / prices / prices
        if not np.isfinite(H).all() or not np.diag(H).min(initial=np.inf) > 0.0:
            return 0.0  # beside a diverged row nothing else counts
        root = 1.0 / np.sqrt(np.diag(H))
        H *= root[:, None]  # one after the other: their product may overflow
        H *= root[None, :]
        H[np.arange(len(g)), np.arange(len(g))] += 1e-13
        step = root * np.linalg.solve(H, root * g)
        expected = float(g @ step)
        # Prices stay positive, and the function rises.
        falling = step[r:] < 0.0
        length = min([1.0, *(-0.9 * prices[falling] / step[r:][falling]).tolist()])
        change = product(terms.U, step[:r, None], terms.halt)[:, 0] + step[r:] @ self.costs
        before, v, s = self.smooth, self.v, self.s
        for _ in range(30):
            go_on(terms.halt)
            self.v, self.s = v + length * step, s + length * change
            self.smooth = self._look(self.s, self.v)
            if self.smooth >= before + 0.05 * length * expected:
                return expected
            length *= 0.4
        self.v, self.s = v, s
        return 0.0


@compiled
def weigh(s: Floats, off: Ints, ok: Bools, tau: float, z: Floats, found: Floats) -> None:
    """Fill ``z`` with the weights ``exp(-s/τ)`` of every group's kept rows, which sum to one.

    ``found`` f64[4] gets the sum of the smoothed minima ``-τ log Σ exp(-s/τ)``, of the minima, of
    their sizes, and of what smoothing costs.
    """
    found[:] = 0.0
    for g in range(len(off) - 1):
        least = np.inf
        for p in range(off[g], off[g + 1]):
            if ok[p] and s[p] < least:
                least = s[p]
        total = 0.0
        for p in range(off[g], off[g + 1]):
            z[p] = 0.0
            if ok[p]:
                x = (s[p] - least) / tau
                if x < 40.0:
                    z[p] = np.exp(-x)
                    total += z[p]
        for p in range(off[g], off[g + 1]):
            z[p] /= total
            if z[p] > 0.0:
                found[3] -= tau * z[p] * np.log(z[p])
        found[0] += least - tau * np.log(total)
        found[1] += least
        found[2] += abs(least)


@compiled
def deviations(U: Floats, A: Floats, off: Ints, groups: Ints, z: Floats, out: Floats) -> int:
    """Fill ``out`` with ``√z_p ([U, A]_p - mean of the group)`` for weighted rows of ``groups``.

    Returns how many rows were filled.
    """
    r, m = U.shape[1], len(A)
    mean = np.zeros(r + m)
    count = 0
    for g in groups:
        mean[:] = 0.0
        for p in range(off[g], off[g + 1]):
            if z[p] > 1e-12:
                for i in range(r):
                    mean[i] += z[p] * U[p, i]
                for k in range(m):
                    mean[r + k] += z[p] * A[k, p]
        for p in range(off[g], off[g + 1]):
            if z[p] > 1e-12:
                root = np.sqrt(z[p])
                for i in range(r):
                    out[count, i] = root * (U[p, i] - mean[i])
                for k in range(m):
                    out[count, r + k] = root * (A[k, p] - mean[r + k])
                count += 1
    return count

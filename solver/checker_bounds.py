"""The bound of one certificate node, in exact integers or with outward rounding.

With ``Q`` and ``l`` as in ``solution.py``, and because ``q(z) - s·z = constant - ½ zᵀQz`` for
``s = l + Q z``, a node proves::

    constant - ½ zᵀQz - λ·limits + Σ_g min_{p in g, allowed} (l_p + (Q z)_p + Σ_k λ_k costs_kp)

Design: docs/design/certificates.md
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from bitquota.solver.checker_factor import Formula, exact_terms, formulas, rounded_terms
from bitquota.solver.exact import dyadic, is_positive_semidefinite
from bitquota.solver.outward import TINY, gamma, is_positive_definite, wide

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from bitquota.solver.checker_regions import Enemies
    from bitquota.solver.problem import Problem
    from bitquota.solver.solution import Convexification

    Bools = NDArray[np.bool_]


class BadPoint(ValueError):
    """A node's ``point`` breaks a rule; ``node`` says which one of those that were handed in."""

    def __init__(self, must: str, node: int) -> None:
        super().__init__(f"'point' must {must}")
        self.node = node


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Frame:
    """A convexification whose signs and shapes were found right.

    Attributes:
        shift: f64[n, n], ``D``; ``None`` when it is zero.
        cuts: f64[n, n], ``Y``; ``None`` when it is zero.
        products: f64[m, n], ``μ``; ``None`` when it is zero.
        support: bool[n].
        triples: i64[t, 3]; triple_values: f64[t], ``γ``.
    """

    shift: NDArray[np.float64] | None
    cuts: NDArray[np.float64] | None
    products: NDArray[np.float64] | None
    support: Bools
    triples: NDArray[np.int64]
    triple_values: NDArray[np.float64]

    @classmethod
    def of(cls, problem: Problem, given: Convexification, enemies: Enemies) -> Frame:
        """Return the dense matrices of ``given``.

        Raises:
            ValueError: A shape or a sign is wrong, or ``D`` is not symmetric.
        """
        offsets = problem.offsets.tolist()
        n, m = offsets[-1], len(problem.limits)
        width = max(b - a for a, b in itertools.pairwise(offsets))
        for name, array, shape in (
            ("support", given.support, (n,)),
            ("shift", given.shift, (n, width)),
            ("products", given.products, (m, n)),
        ):
            if tuple(array.shape) != shape or not np.isfinite(array).all():
                msg = f"'{name}' must be finite, of shape {shape}; got shape {array.shape}"
                raise ValueError(msg)
        if bool((given.products < 0).any()):
            msg = f"'products' must not be negative; got {float(given.products.min())}"
            raise ValueError(msg)
        return cls(
            shift=_block_diagonal(offsets, np.asarray(given.shift, dtype=np.float64)),
            cuts=_cuts(problem, given, enemies),
            products=np.asarray(given.products, dtype=np.float64) if given.products.any() else None,
            support=np.asarray(given.support, dtype=np.bool_),
            triples=_triples(offsets, given),
            triple_values=given.triple_values,
        )

    def products_of_triples(self) -> Iterator[tuple[NDArray[Any], NDArray[Any], int]]:
        """Yield rows, columns and the sign of ``γ`` there, each pair of rows both ways."""
        for a, b, sign in ((0, 1, 1), (0, 2, 1), (1, 2, -1)):
            yield self.triples[:, a], self.triples[:, b], sign
            yield self.triples[:, b], self.triples[:, a], sign


def _block_diagonal(offsets: list[int], shift: NDArray[np.float64]) -> NDArray[np.float64] | None:
    if not shift.any():
        return None
    n = offsets[-1]
    D = np.zeros((n, n))
    for start, stop in itertools.pairwise(offsets):
        size = stop - start
        if shift[start:stop, size:].any():
            msg = f"'shift' must be zero beyond its group; rows {start}:{stop} are not"
            raise ValueError(msg)
        D[start:stop, start:stop] = shift[start:stop, :size]
    if not np.array_equal(D, D.T):
        msg = "'shift' must be symmetric in every group"
        raise ValueError(msg)
    return D


def _triples(offsets: list[int], given: Convexification) -> NDArray[np.int64]:
    triples, values = given.triples, given.triple_values
    if (
        triples.shape != (len(values), 3)
        or not np.isfinite(values).all()
        or bool((values < 0).any())
    ):
        msg = "'triples' must have three rows and a finite value from 0 on each"
        raise ValueError(msg)
    group = np.searchsorted(offsets, triples, side="right")
    apart = (group[:, 0] != group[:, 1]) & (group[:, 0] != group[:, 2])
    apart &= group[:, 1] != group[:, 2]
    if not (apart & (triples >= 0).all(axis=1) & (triples < offsets[-1]).all(axis=1)).all():
        msg = "a triple must have rows of three groups"
        raise ValueError(msg)
    return triples


def _cuts(problem: Problem, given: Convexification, enemies: Enemies) -> NDArray[np.float64] | None:
    rows, columns = given.cut_rows.tolist(), given.cut_columns.tolist()
    values: list[float] = given.cut_values.tolist()
    if not len(rows) == len(columns) == len(values):
        msg = "'cut_rows', 'cut_columns' and 'cut_values' must be equally long"
        raise ValueError(msg)
    if not rows:
        return None
    n = int(problem.offsets[-1])
    group = np.searchsorted(problem.offsets, np.arange(n), side="right")
    Y = np.zeros((n, n))
    seen: set[tuple[int, int]] = set()
    for i, j, value in zip(rows, columns, values, strict=True):
        if not 0 <= i < j < n or (i, j) in seen or group[i] == group[j]:
            msg = f"a cut must join rows i < j of two groups, once; got ({i}, {j})"
            raise ValueError(msg)
        if not np.isfinite(value) or (value < 0 and j not in enemies[i]):
            msg = f"a cut must not be negative; got {value} at ({i}, {j})"
            raise ValueError(msg)
        seen.add((i, j))
        Y[i, j] = Y[j, i] = value
    return Y


def _differences(support: Bools, offsets: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return rows ``p`` and references ``r``: the ``e_p - e_r`` span what ``v`` may be."""
    rows: list[int] = []
    references: list[int] = []
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        *others, last = np.flatnonzero(support[start:stop]).tolist() or [0]
        rows += [start + p for p in others]
        references += [start + last] * len(others)
    return np.array(rows, dtype=np.int64), np.array(references, dtype=np.int64)


def _reduced(Q: NDArray[Any], p: NDArray[Any], r: NDArray[Any], sign: int) -> NDArray[Any]:
    """Return ``BᵀQB`` for the differences (``sign`` -1) or the sums (+1) of unit vectors."""
    reduced: NDArray[Any] = (
        Q[np.ix_(p, p)] + sign * Q[np.ix_(p, r)] + sign * Q[np.ix_(r, p)] + Q[np.ix_(r, r)]
    )
    return reduced


def _check_points(
    points: NDArray[Any], starts: NDArray[np.int64], support: Bools
) -> NDArray[np.float64]:
    """Return the sums of ``points`` f32[k, n] by group, or raise ``BadPoint``."""
    # float64 sums of float32 values of one sign cannot vanish by rounding.
    sums: NDArray[np.float64] = np.add.reduceat(points.astype(np.float64), starts, axis=1)
    for bad, must in (
        ((points[:, ~support] != 0).any(axis=1), "be zero outside the support"),
        ((points < 0).any(axis=1), f"not be negative; got {float(points.min(initial=0.0))}"),
        ((sums <= 0).any(axis=1), "have a positive sum in every group"),
    ):
        if bad.any():
            raise BadPoint(must, int(np.argmax(bad)))
    return sums


class ExactBounds:
    """Bounds in integers over powers of two (and the denominators of ``z``)."""

    def __init__(self, problem: Problem, frame: Frame) -> None:
        self.problem, self.frame = problem, frame

    @cached_property
    def _terms(self) -> tuple[NDArray[Any], NDArray[Any] | None, int]:
        """``l`` and ``Q`` (``None`` when zero) as integers, and their exponent."""
        problem, frame = self.problem, self.frame
        n = int(problem.offsets[-1])
        zero = np.zeros((n, n)) if self._is_quadratic() else np.zeros((0, 0))
        given = [
            zero if part is None else part for part in (problem.cross, frame.shift, frame.cuts)
        ]
        products = np.zeros((0, 0)) if frame.products is None else frame.products
        (d, cross, D, Y, mu, gamma_), exponent = dyadic(
            problem.diagonal, *given, products, frame.triple_values
        )
        if problem.factor is not None:
            terms, fine = exact_terms(problem)
            low = min(exponent, fine)
            d, D, Y, mu, gamma_ = (part * (1 << (exponent - low)) for part in (d, D, Y, mu, gamma_))
            cross, exponent = terms * (1 << (fine - low)), low
        linear = 2 * d
        if not self._is_quadratic():
            return linear, None, exponent - 1
        Q = cross + D - Y
        linear = linear - np.diag(D)
        for rows, columns, sign in frame.products_of_triples():
            np.add.at(Q, (rows, columns), sign * gamma_)
        np.subtract.at(linear, frame.triples[:, 0], 2 * gamma_)
        for k in range(len(mu)):
            (cost, limit), _ = dyadic(problem.costs[k], problem.limits[k : k + 1])
            Q = Q + mu[k][:, None] * cost[None, :] + cost[:, None] * mu[k][None, :]
            linear = linear - 2 * limit[0] * mu[k]
        return linear, 2 * Q, exponent - 1

    def _is_quadratic(self) -> bool:
        frame = self.frame
        problem = self.problem
        parts = (problem.cross, problem.factor, frame.shift, frame.cuts, frame.products)
        return any(part is not None for part in parts) or len(frame.triples) > 0

    def is_convex(self) -> bool:
        """Return whether ``vᵀQv >= 0`` on the support. Exact."""
        _, Q, _ = self._terms
        if Q is None:
            return True
        p, r = _differences(self.frame.support, self.problem.offsets)
        return is_positive_semidefinite(_reduced(Q, p, r, -1))

    def node(
        self,
        mask: Bools,
        point: NDArray[Any],
        multipliers: NDArray[np.float64],
        removed: list[int],
    ) -> Formula:
        """Return what the node proves, and what it proves with each removed row chosen.

        Raises:
            BadPoint: ``point`` is not one.
        """
        problem, starts = self.problem, self.problem.offsets[:-1]
        _check_points(point[None], starts, self.frame.support)
        linear, Q, exponent = self._terms
        (z,), _ = dyadic(point)
        sums = np.add.reduceat(z, starts)
        # z as integers over one denominator.
        denominator = 1
        for total in sums.tolist():
            denominator *= total
        counts = np.diff(problem.offsets)
        u = z * np.repeat(denominator // sums, counts)  # z = u / denominator
        quadratic = u * 0 if Q is None else Q @ u
        # Multipliers and what they price.
        (prices,), fine = dyadic(multipliers)
        (costs, limits), _ = dyadic(problem.costs, problem.limits)
        priced = prices @ costs if len(prices) else u * 0
        low = min(exponent, fine)
        # Row values, as integers over 2**low / denominator.
        rows = ((linear * denominator + quadratic) << (exponent - low)) + (
            (priced * denominator) << (fine - low)
        )
        unit = Fraction(2) ** low / denominator
        # The sum over the groups, and with each removed row chosen.
        least = [
            min(rows[a:b][mask[a:b]].tolist())
            for a, b in zip(starts.tolist(), problem.offsets[1:].tolist(), strict=True)
        ]
        total = Fraction(float(problem.constant)) + sum(least) * unit
        total -= Fraction(2) ** (exponent - 1) * (u @ quadratic) / denominator**2
        total -= Fraction(2) ** fine * sum(prices * limits)
        group = np.repeat(np.arange(len(starts)), counts)
        return total, [total + (rows[p] - least[group[p]]) * unit for p in removed]


class OutwardBounds:
    """Bounds in floats, every rounding accounted for.

    Args:
        problem: The problem.
        frame: The convexification.
        real: ``np.float64``, which processors are fast at, or ``np.longdouble``.
    """

    def __init__(
        self,
        problem: Problem,
        frame: Frame,
        real: type[np.floating[Any]] = np.longdouble,
    ) -> None:
        self.problem, self.frame, self.real = problem, frame, real

    def _real(self, array: NDArray[Any]) -> NDArray[Any]:
        return np.asarray(array).astype(self.real)

    def _gamma(self, roundings: int) -> Any:  # noqa: ANN401  # a scalar of type real
        return self.real(gamma(roundings, float(np.finfo(self.real).eps) / 2) * (1 + 2.0**-50))

    @cached_property
    def _terms(self) -> tuple[Any, Any, Any, Any, int]:
        """``l``, its absolute sum, ``Q`` (``None`` when zero), its absolute sum, roundings."""
        problem, frame = self.problem, self.frame
        linear = self._real(problem.diagonal)
        size = np.abs(linear)
        roundings = 4 + 4 * len(problem.limits)
        parts = [p for p in (problem.cross, frame.shift, frame.cuts) if p is not None]
        plain = not parts and frame.products is None and not len(frame.triples)
        if plain and problem.factor is None:
            return linear, size, None, None, roundings
        n = int(problem.offsets[-1])
        Q = np.zeros((n, n), dtype=self.real)
        Q_size = np.zeros((n, n), dtype=self.real)
        for part in parts:
            Q += -self._real(part) if part is frame.cuts else self._real(part)
            Q_size += np.abs(self._real(part))
        if problem.factor is not None:
            terms, terms_size = rounded_terms(problem, self.real)
            Q, Q_size = Q + terms, Q_size + terms_size
            roundings += problem.factor.shape[1] + 2
        if len(frame.triples):
            value = self._real(frame.triple_values)
            for rows, columns, sign in frame.products_of_triples():
                np.add.at(Q, (rows, columns), sign * value)
                np.add.at(Q_size, (rows, columns), value)
            linear, size = linear.copy(), size.copy()
            np.subtract.at(linear, frame.triples[:, 0], value)
            np.add.at(size, frame.triples[:, 0], value)
            roundings += 2 * int(np.bincount(frame.triples.ravel()).max())
        if frame.shift is not None:
            half = np.diag(self._real(frame.shift)) / 2
            linear, size = linear - half, size + np.abs(half)
        if frame.products is not None:
            mu, costs = self._real(frame.products), self._real(problem.costs)
            outer = mu.T @ costs
            Q, Q_size = Q + outer + outer.T, Q_size + outer + outer.T
            limits = self._real(problem.limits)
            linear, size = linear - limits @ mu, size + np.abs(limits) @ mu
        return linear, size, Q, Q_size, roundings

    def is_convex(self) -> bool:
        """Return ``True`` only if ``vᵀQv >= 0`` on the support is proved."""
        _, _, Q, Q_size, roundings = self._terms
        if Q is None:
            return True
        p, r = _differences(self.frame.support, self.problem.offsets)
        error = self._gamma(roundings + 4) * _reduced(Q_size, p, r, 1) + self.real(TINY)
        return is_positive_definite(wide(_reduced(Q, p, r, -1)), wide(error))

    def nodes(
        self,
        masks: Bools,
        points: NDArray[Any],
        multipliers: NDArray[np.float64],
        removed: Sequence[list[int]],
    ) -> list[Formula]:
        """Return lower bounds of what ``ExactBounds.node`` returns, for ``k`` nodes at once.

        Args:
            masks: bool[k, n], the nodes' rows.
            points: f32[k, n].
            multipliers: f64[k, m].
            removed: The rows of each node that are to be chosen in turn.

        Raises:
            BadPoint: One of ``points`` is not one.
        """
        problem, starts = self.problem, self.problem.offsets[:-1]
        _check_points(points, starts, self.frame.support)
        linear, size, Q, Q_size, roundings = self._terms
        # Row values, and the sizes that went into them.
        counts = np.diff(problem.offsets)
        given = self._real(points)
        z = given / np.repeat(np.add.reduceat(given, starts, axis=1), counts, axis=1)
        prices, costs, limits = (
            self._real(multipliers),
            self._real(problem.costs),
            self._real(problem.limits),
        )
        priced = prices @ costs  # [k, n]
        rows, rows_size = linear + priced, size + priced
        square = square_size = np.zeros(len(z), dtype=self.real)
        if Q is not None:
            product, product_size = z @ Q, z @ Q_size
            rows, rows_size = rows + product, rows_size + product_size
            square, square_size = (z * product).sum(1) / 2, (z * product_size).sum(1) / 2
        # Roundings behind every term: Q or l, the quotient z twice, two dot products, the sums.
        # Without Q there are no quotients and no dot products of rows.
        n, m = len(linear) if Q is not None else 0, len(limits)
        factor = self._gamma(
            roundings + 2 * (int(counts.max()) + 2) + 2 * n + 2 * m + len(starts) + 16
        )
        # The sum over the groups, every value at the low end of its error.
        lower = rows - factor * rows_size - self.real(TINY)
        infinite = self.real(np.inf)
        least = np.minimum.reduceat(np.where(masks, lower, infinite), starts, axis=1)
        constant, spent = self._real(np.array(problem.constant)), prices @ np.abs(limits)
        total = constant - square - prices @ limits + least.sum(axis=1)
        lost = np.abs(constant) + square_size + spent + np.abs(least).sum(axis=1)
        total = total - factor * lost - self.real(TINY)
        return formulas(total, lower, least, counts, removed, factor)

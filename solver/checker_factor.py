"""What the checker derives for problems in factor form, from the factor itself.

The formula is that without convexification in ``solution.py``. Where a convexification is used,
the pair terms ``U_p·U_q`` are needed as a matrix, with what rounding does to them.

Design: docs/design/certificates.md
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from bitquota.solver.exact import dyadic
from bitquota.solver.outward import TINY, gamma, round_down

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bitquota.solver.problem import Problem

    Bools = NDArray[np.bool_]

Value = Fraction | float
"""A proved number: an exact fraction, a float, or an infinity."""
Formula = tuple[Value, Sequence[Value]]
"""What a node's formula proves, and what it proves with each of some rows chosen."""

_PIECE = 1 << 14
"""Rows whose factor is converted at a time."""


def rounded_terms(problem: Problem, real: type[np.floating[Any]]) -> tuple[Any, Any]:
    """Return the pair terms of all rows and sizes that their roundings are relative to: [n, n].

    ``gamma(r + 2)`` times the sizes bounds the error.
    """
    U = np.asarray(problem.factor).astype(real)
    inside = _inside(problem)
    terms, size = U @ U.T, np.abs(U) @ np.abs(U).T
    terms[inside] = size[inside] = 0.0
    a, b = problem.terms.T
    for first, second in ((a, b), (b, a)):
        terms[first, second] += problem.term_values.astype(real)
        size[first, second] += np.abs(problem.term_values).astype(real)
    return terms, size


def exact_terms(problem: Problem) -> tuple[NDArray[Any], int]:
    """Return the pair terms of all rows as integers, and their exponent."""
    (U, pairs), exponent = dyadic(np.asarray(problem.factor), problem.term_values)
    terms = U @ U.T
    terms[_inside(problem)] = 0
    a, b = problem.terms.T
    for first, second in ((a, b), (b, a)):
        terms[first, second] += pairs << -exponent
    return terms, 2 * exponent


def exact_pairs(problem: Problem, rows: NDArray[np.int64]) -> tuple[Fraction, Fraction]:
    """Return the sum of the terms between ``rows``, and what its rounding is relative to. Exact."""
    total, size, chosen = Fraction(), Fraction(), np.asarray(problem.factor)
    for column in chosen.T:
        (values,), exponent = dyadic(column[rows])
        listed: list[int] = values.tolist()
        unit = Fraction(2) ** (2 * exponent)
        total += (sum(listed) ** 2 - sum(v * v for v in listed)) * unit
        size += sum(map(abs, listed)) ** 2 * unit
    return total / 2, size / 2


def _inside(problem: Problem) -> Bools:
    group = np.repeat(np.arange(len(problem.offsets) - 1), np.diff(problem.offsets))
    found: Bools = group[:, None] == group[None, :]
    return found


def formulas(
    total: NDArray[Any],
    lower: NDArray[Any],
    least: NDArray[Any],
    counts: NDArray[np.int64],
    removed: Sequence[list[int]],
    factor: Any,  # noqa: ANN401  # a scalar of the arrays' type
    tiny: Any = 0.0,  # noqa: ANN401  # likewise
) -> list[Formula]:
    """Return the bounds of ``k`` nodes, and what they are with each removed row chosen.

    Args:
        total: [k], lower bounds.
        lower: [k, n], lower bounds of the rows' values.
        least: [k, G], the least value of each group.
        counts: i64[G], rows of each group.
        removed: The rows of each node that are to be chosen in turn.
        factor: What roundings of the three numbers that are added lose, relative to their sizes.
        tiny: What they lose besides.
    """
    node = np.repeat(np.arange(len(total)), list(map(len, removed)))
    row = np.array([p for rows in removed for p in rows], dtype=np.int64)
    floor = least[node, np.repeat(np.arange(len(counts)), counts)[row]]
    size = np.abs(total)[node] + np.abs(lower[node, row]) + np.abs(floor)
    by_row = total[node] + (lower[node, row] - floor) - factor * size - tiny
    parts = np.split(round_down(by_row), np.cumsum(list(map(len, removed)))[:-1])
    return list(zip(round_down(total).tolist(), [p.tolist() for p in parts], strict=True))


class FactorBounds:
    """The formula in floats, every rounding accounted for, or in integers.

    Args:
        problem: The problem.
        real: ``np.float64``, which processors are fast at, or ``np.longdouble``.
    """

    def __init__(self, problem: Problem, real: type[np.floating[Any]] = np.longdouble) -> None:
        self.problem, self.real = problem, real

    def nodes(
        self,
        masks: Bools,
        points: NDArray[Any],
        multipliers: NDArray[np.float64],
        removed: Sequence[list[int]],
    ) -> list[Formula]:
        """Return lower bounds of what ``exactly`` returns, for ``k`` nodes at once.

        Args:
            masks: bool[k, n], the nodes' rows.
            points: f64[k, r], ``w``.
            multipliers: f64[k, m].
            removed: The rows of each node that are to be chosen in turn.
        """
        problem, real = self.problem, self.real
        starts, counts = problem.offsets[:-1], np.diff(problem.offsets)
        w, prices = points.astype(real), multipliers.astype(real)
        lower = np.where(masks, self._rows(w, prices), real(np.inf))
        least = np.minimum.reduceat(lower, starts, axis=1)
        total = self._total(w, prices, least)
        return formulas(total, lower, least, counts, removed, self._gamma(8), real(TINY))

    def _total(self, w: NDArray[Any], prices: NDArray[Any], least: NDArray[Any]) -> NDArray[Any]:
        """Return [k], what ``least`` [k, number] adds up to with the rest of the formula."""
        # Pairwise or one by one, it does not matter to the bound.
        limits, constant = self.problem.limits.astype(self.real), self.real(self.problem.constant)
        square, spent = (w * w).sum(axis=1) / 2, prices @ limits
        total = constant - square - spent + least.sum(axis=1)
        lost = abs(constant) + square + prices @ np.abs(limits) + np.abs(least).sum(axis=1)
        factor = self._gamma(w.shape[1] + prices.shape[1] + len(self.problem.offsets) + 15)
        found: NDArray[Any] = total - factor * lost - self.real(TINY)
        return found

    def _rows(self, w: NDArray[Any], prices: NDArray[Any]) -> NDArray[Any]:
        """Return [k, n]: the rows' values at the low end of their error, ``_PIECE`` at a time."""
        problem, real = self.problem, self.real
        found = np.empty((len(w), len(problem.diagonal)), dtype=real)
        factor = self._gamma(w.shape[1] + prices.shape[1] + 12)
        for at in range(0, len(problem.diagonal), _PIECE):
            here = slice(at, at + _PIECE)
            U, diagonal = self._factor(here).astype(real), problem.diagonal[here].astype(real)
            half, priced = (U * U).sum(axis=1) / 2, prices @ problem.costs[:, here].astype(real)
            value = (diagonal - half) + w @ U.T + priced
            size = np.abs(diagonal) + half + np.abs(w) @ np.abs(U).T + priced
            found[:, here] = value - factor * size - real(TINY)
        return found

    def _gamma(self, roundings: int) -> Any:  # noqa: ANN401  # a scalar of type real
        return self.real(gamma(roundings, float(np.finfo(self.real).eps) / 2) * (1 + 2.0**-50))

    def node(
        self,
        mask: Bools,
        point: NDArray[Any],
        multipliers: NDArray[np.float64],
        removed: list[int],
    ) -> Formula:
        """Return what the node proves, and what it proves with each removed row chosen. Exact."""
        problem = self.problem
        values, _, unit, total = self._integers(point, multipliers, np.zeros(0))
        starts = problem.offsets[:-1].tolist()
        least = [
            min(values[a:b][mask[a:b]].tolist())
            for a, b in zip(starts, problem.offsets[1:].tolist(), strict=True)
        ]
        total += sum(least) * unit
        group = np.repeat(np.arange(len(starts)), np.diff(problem.offsets))
        return total, [total + (values[p] - least[group[p]]) * unit for p in removed]

    def _integers(
        self, point: NDArray[Any], multipliers: NDArray[np.float64], terms: NDArray[np.float64]
    ) -> tuple[NDArray[Any], NDArray[Any], Fraction, Fraction]:
        """Return rows' values and ``terms`` as integers, their unit, and what is left to add."""
        problem, whole = self.problem, slice(None)
        (d, U, w, pairs), exponent = dyadic(problem.diagonal, self._factor(whole), point, terms)
        (prices,), fine = dyadic(multipliers) if len(multipliers) else ((np.zeros(0, object),), 0)
        (costs, limits), _ = dyadic(problem.costs, problem.limits)
        # Twice the rows' values, over 2**low: d has one factor of the unit, products have two.
        low = min(2 * exponent, fine)
        values = (2 * d) << (exponent - low)
        if U.shape[1]:
            values = values + ((2 * (U @ w) - (U * U).sum(axis=1)) << (2 * exponent - low))
        if len(prices):
            values = values + ((2 * (prices @ costs)) << (fine - low))
        total = Fraction(float(problem.constant))
        total -= Fraction(2) ** (2 * exponent) * int((w * w).sum()) / 2
        total -= Fraction(2) ** fine * int(sum(prices * limits))
        return values, (2 * pairs) << (exponent - low), Fraction(2) ** low / 2, total

    def _factor(self, rows: slice) -> NDArray[np.float64]:
        """Return the factor's ``rows``; without a factor, no columns of them."""
        if self.problem.factor is None:
            return np.zeros((len(self.problem.diagonal[rows]), 0))
        return np.asarray(self.problem.factor[rows])

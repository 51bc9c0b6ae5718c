"""From relaxed bit-widths to whole ones that keep every limit exactly.

Design: docs/design/training.md
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bitquota.errors import BudgetTooSmall

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from bitquota.candidates.table import Candidate
    from bitquota.training.prices import Prices


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unit:
    """What gets one bit-width: the weights of a group of layers, or the input of one layer."""

    layers: tuple[int, ...]
    of_inputs: bool
    relaxed: float
    allowed: tuple[int, ...]


def repair(
    prices: Prices, relaxed: Sequence[float], relaxed_inputs: Mapping[int, float] | None = None
) -> tuple[Candidate, ...]:
    """Return whole bit-widths near the relaxed ones, within all limits exactly.

    Layers of one group get one width; its relaxed width is their mean, weighed by weights. Every
    unit starts at the largest width that is not above its relaxed one. Over a limit, of the units
    that take of it the one whose width exceeds its relaxed width the most is lowered, the most
    expensive first. Under all, units are raised, the one whose relaxed width exceeds its width the
    most first, as long as one fits. A unit that no sum counts takes the nearest width.

    Args:
        prices: Of all candidates.
        relaxed: Bit-width of each layer's weights.
        relaxed_inputs: Bit-width of inputs, by position of the layer.

    Raises:
        BudgetTooSmall: Budgets or ties of layers exclude each other.

    A heuristic; the limits hold exactly, and no single unit could be raised further.
    """
    state = _State(prices, _units(prices, relaxed, relaxed_inputs or {}))
    state.lower()
    state.raise_all()
    return tuple(
        prices.candidate(
            la,
            prices.widths[state.at[0][k]],
            prices.input_widths[state.at[1][k]],
        )
        for k, la in enumerate(prices.layers)
    )


def _units(
    prices: Prices, relaxed: Sequence[float], relaxed_inputs: Mapping[int, float]
) -> list[_Unit]:
    groups: dict[str, list[int]] = {}
    for k, layer in enumerate(prices.layers):
        groups.setdefault(layer.group, []).append(k)
    units = []
    for members in groups.values():
        weight = sum(prices.layers[k].n_weights for k in members)
        mean = sum(relaxed[k] * prices.layers[k].n_weights for k in members) / weight
        every = tuple(range(len(prices.widths)))
        units.append(_Unit(layers=tuple(members), of_inputs=False, relaxed=mean, allowed=every))
    peaks = [b for b in range(len(prices.budgets)) if prices.is_peak(b)]
    for k, bits in relaxed_inputs.items():
        allowed = tuple(
            a
            for a in range(len(prices.input_widths))
            if all(prices.costs[b, k, 0, a] <= prices.budgets[b].available for b in peaks)
        )
        units.append(_Unit(layers=(k,), of_inputs=True, relaxed=bits, allowed=allowed))
    return units


class _State:
    """The widths of all units, and what they take together.

    Attributes:
        at: Positions of the widths on offer, of weights and of inputs, by layer.
        spent: ``i64[sums]`` of the budgets that add layers up.
        settled: Units that no sum counts.
    """

    def __init__(self, prices: Prices, units: Sequence[_Unit]) -> None:
        self.units = units
        sums = [b for b in range(len(prices.budgets)) if not prices.is_peak(b)]
        self.costs = prices.costs[sums]
        self.limits = np.array([prices.budgets[b].available for b in sums], dtype=np.int64)
        self.offers = (prices.widths, tuple(a or 32 for a in prices.input_widths))
        n = len(prices.layers)
        self.at = (np.zeros(n, dtype=np.int64), np.zeros(n, dtype=np.int64))
        self.settled: set[int] = set()
        for u, unit in enumerate(units):
            offered = self.offers[unit.of_inputs]
            axis = self.costs.ndim - 2 + unit.of_inputs
            alone = self.costs[:, list(unit.layers)]
            if (alone == alone.take([0], axis=axis)).all():
                nearest = min(unit.allowed, key=lambda a: (abs(offered[a] - unit.relaxed), a))
                self._put(unit, nearest)
                self.settled.add(u)
            else:
                below = [a for a in unit.allowed if offered[a] <= unit.relaxed + 1e-6]
                self._put(unit, max(below, default=unit.allowed[0]))
        self.spent = sum(
            (self._costs(k, self.at[0][k], self.at[1][k]) for k in range(n)),
            start=np.zeros(len(sums), dtype=np.int64),
        )

    def _put(self, unit: _Unit, position: int) -> None:
        for k in unit.layers:
            self.at[unit.of_inputs][k] = position

    def _costs(self, k: int, width: int, input_width: int) -> NDArray[np.int64]:
        found: NDArray[np.int64] = self.costs[:, k, width, input_width]
        return found

    def _bits(self, unit: _Unit) -> int:
        return self.offers[unit.of_inputs][int(self.at[unit.of_inputs][unit.layers[0]])]

    def _of(self, unit: _Unit, position: int | None = None) -> NDArray[np.int64]:
        """Return what a unit takes now, or would at another width."""
        total = np.zeros(len(self.limits), dtype=np.int64)
        for k in unit.layers:
            place = [self.at[0][k], self.at[1][k]]
            if position is not None:
                place[unit.of_inputs] = position
            total += self._costs(k, *place)
        return total

    def _next(self, unit: _Unit, by: int) -> int | None:
        at = unit.allowed.index(int(self.at[unit.of_inputs][unit.layers[0]])) + by
        return unit.allowed[at] if 0 <= at < len(unit.allowed) else None

    def _move(self, unit: _Unit, position: int) -> None:
        self.spent = self.spent + self._of(unit, position) - self._of(unit)
        self._put(unit, position)

    def lower(self) -> None:
        """Lower units until every limit holds."""
        while (over := self.spent > self.limits).any():
            found = []
            for u, unit in enumerate(self.units):
                down = self._next(unit, -1)
                if down is None:
                    continue
                taken, lower = self._of(unit)[over], self._of(unit, down)[over]
                if (lower < taken).any() and (lower <= taken).all():
                    price = float((taken / self.limits[over]).sum())
                    found.append((self._bits(unit) - unit.relaxed, price, -u, down))
            if not found:
                msg = (
                    "no step to smaller bit-widths leads into all budgets at once: raise one of "
                    "them, offer other bit-widths, or tie fewer layers"
                )
                raise BudgetTooSmall(msg)
            _, _, u, down = max(found)
            self._move(self.units[-u], down)

    def raise_all(self) -> None:
        """Raise units as long as every limit holds."""
        while True:
            found = []
            for u, unit in enumerate(self.units):
                up = self._next(unit, 1)
                if up is None or u in self.settled:
                    continue
                more = self._of(unit, up) - self._of(unit)
                if (self.spent + more <= self.limits).all():
                    found.append((unit.relaxed - self._bits(unit), -u, up))
            if not found:
                return
            _, u, up = max(found)
            self._move(self.units[-u], up)

"""The checker's own proof that no choice of a separable problem is below a value.

Without cross terms, with one budget and no pairs, a recursion over the groups keeps all (cost,
loss) states that could still lead to a choice below the value. Losses are rounded down to whole
multiples of a power of two once, and from then on all arithmetic on states is on integers; floats
decide only which states are certain to lead nowhere, with margins for their rounding.

With a price ``λ >= 0``, ``v_p = diagonal_p + λ cost_p`` and a base row in every group, each choice
``x`` within the budget obeys::

    objective(x) >= constant - λ limit + Σ_g v_base(g) + Σ_g (v_x(g) - v_base(g))
                    + λ (limit - cost(x))

so a row, or a partial choice, whose terms reach the value already can be left out.

Design: docs/design/certificates.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from bitquota.solver.outward import TINY, UNIT, gamma, wide

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bitquota.solver.outward import Wide
    from bitquota.solver.problem import Problem

    Bools = NDArray[np.bool_]
    Ints = NDArray[np.int64]

MOST_STATES = 2_000_000
"""More states than that are not followed."""
_LOSS_BITS = 60
"""Sums of whole losses stay below two to this power."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Open:
    """A group with more than one row left.

    Attributes:
        cost: i64[k], of its rows, less that of its base row.
        loss: i64[k], likewise, rounded down to whole units.
        saves: Least price of a unit of cost saved; ``inf`` when none can be.
        spends: Likewise of a unit spent.
    """

    cost: Ints
    loss: Ints
    saves: np.longdouble
    spends: np.longdouble


def reason_not_proved(problem: Problem, mask: Bools, price: float, claim: float) -> str:
    """Return why "no choice of the rows ``mask`` is below ``claim``" is not proved, or nothing.

    Args:
        problem: Separable, with one budget and without pairs; anything else is not proved.
        mask: bool[n], a row in every group.
        price: ``λ``; any value is sound, a good one keeps the states few.
        claim: The value.

    Cost: a sort of the states per group with several rows left.
    """
    pairs = len(problem.forbidden_pairs) + len(problem.required_pairs)
    if not problem.separable or len(problem.limits) != 1 or pairs:
        return "a recursion proves separable problems with one budget and no pairs only"
    starts, cost, limit = problem.offsets[:-1], problem.costs[0], int(problem.limits[0])
    group = np.repeat(np.arange(len(starts)), np.diff(problem.offsets))
    lam, loss = np.longdouble(price), wide(problem.diagonal)
    value = loss + lam * wide(cost)
    rounding = 4 * UNIT * (np.abs(loss) + lam * wide(cost)) + TINY
    low = np.where(mask, value - rounding, np.longdouble(np.inf))
    base = _first_least(low, starts, group)
    # What a group adds at least, its base row's value taken off: zero, but for rounding.
    under = np.minimum.reduceat(low, starts) - (value + rounding)[base]
    terms = np.concatenate(
        [[np.longdouble(problem.constant), -lam * np.longdouble(limit)], (value - rounding)[base]]
    )
    floor = (terms.sum() + under.sum()) - gamma(2 * len(terms) + 8) * np.abs(terms).sum() - TINY
    room = np.longdouble(claim) - floor
    room += 4 * UNIT * (np.abs(np.longdouble(claim)) + np.abs(floor))
    if room <= 0:
        return ""
    gain = value - value[base][group] - (rounding + rounding[base][group])
    kept = mask & (gain < room)
    kept[base] = True
    cheapest = limit - sum(cost[base].tolist())
    groups, unit = _open_groups(problem, kept, base, gain)
    target = Fraction(claim) - Fraction(float(problem.constant))
    target -= sum((Fraction(v) for v in problem.diagonal[base].tolist()), Fraction())
    return _run(groups, cheapest, math.ceil(target / Fraction(unit)), unit, lam, room)


def _first_least(values: Wide, starts: Ints, group: Ints) -> Ints:
    order = np.lexsort((values, group))
    return order[starts]


def _open_groups(
    problem: Problem, kept: Bools, base: Ints, gain: Wide
) -> tuple[list[_Open], float]:
    """Return the groups with several rows, those of small prices first, and the unit of loss."""
    starts = problem.offsets[:-1]
    open_groups = np.flatnonzero(np.add.reduceat(kept.astype(np.int64), starts) > 1)
    spans = []
    largest = np.longdouble(0)
    for g in open_groups.tolist():
        rows = starts[g] + np.flatnonzero(kept[starts[g] : problem.offsets[g + 1]])
        difference = wide(problem.diagonal[rows]) - wide(problem.diagonal[base[g] : base[g] + 1])
        spans.append((rows, difference, int(base[g])))
        largest += np.abs(difference).max()
    unit = 2.0 ** (math.frexp(float(largest))[1] - _LOSS_BITS) if largest > 0 else 1.0
    groups = []
    for rows, difference, at in spans:
        cost = problem.costs[0, rows] - problem.costs[0, at]
        whole = difference / np.longdouble(unit)
        loss = np.floor(whole - 2 * UNIT * np.abs(whole)).astype(np.int64)
        loss[rows == at] = 0
        price = np.maximum(gain[rows], 0) * (1 - 8 * UNIT)
        saves, spends = cost < 0, cost > 0
        amount = wide(np.maximum(np.abs(cost), 1))
        infinite = np.longdouble(np.inf)
        groups.append(
            _Open(
                cost=cost,
                loss=loss,
                saves=(price / amount)[saves].min(initial=infinite),
                spends=(price / amount)[spends].min(initial=infinite),
            )
        )
    groups.sort(key=lambda g: min(g.saves, g.spends))
    return groups, unit


def _run(
    groups: list[_Open], budget: int, target: int, unit: float, lam: np.longdouble,
    room: np.longdouble,
) -> str:  # fmt: skip
    """Follow all states; a choice within ``budget`` with a loss below ``target`` disproves."""
    infinite = np.longdouble(np.inf)
    later_saves, later_spends = [infinite], [infinite]
    for group in reversed(groups):
        later_saves.append(min(later_saves[-1], group.saves))
        later_spends.append(min(later_spends[-1], group.spends))
    cost, loss = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    for done, group in enumerate(groups, start=1):
        if len(cost) * len(group.cost) > MOST_STATES:
            return f"the recursion must take at most {MOST_STATES:,} states; it takes more"
        cost = (cost[:, None] + group.cost[None, :]).ravel()
        loss = (loss[:, None] + group.loss[None, :]).ravel()
        saved, spent = later_saves[len(groups) - done], later_spends[len(groups) - done]
        losses, costs = wide(loss) * np.longdouble(unit), wide(cost) * lam
        price = losses + costs - 8 * UNIT * (np.abs(losses) + np.abs(costs))
        over = wide(cost - budget)
        with np.errstate(invalid="ignore"):  # no more to save, and nothing to be saved
            extra = np.where(over > 0, over * saved, -over * min(lam, spent))
        extra = np.where(over == 0, np.longdouble(0), extra) * (1 - 8 * UNIT)
        alive = price + extra - 8 * UNIT * np.abs(price) < room
        cost, loss = cost[alive], loss[alive]
        order = np.lexsort((loss, cost))
        cost, loss = cost[order], loss[order]
        # Of two states the one that is no dearer and loses no more decides.
        before = np.concatenate([[np.iinfo(np.int64).max], np.minimum.accumulate(loss)[:-1]])
        cost, loss = cost[loss < before], loss[loss < before]
    fits = loss[cost <= budget]
    if not len(fits) or int(fits.min()) >= target:
        return ""
    below = (target - int(fits.min())) * unit
    return f"the recursion finds a choice that may be below the bound by {below:.3g}"

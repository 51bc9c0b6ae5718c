"""How well predictions agree with measurements, and the plans to find that out on."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import ArrayLike, NDArray

    from bitquota.candidates.table import CandidateTable
    from bitquota.search.neighborhood import Choice, Limits

_ATTEMPTS = 20
"""Draws for each plan before the budget is taken to have no more distinct ones."""


def spearman(predicted: ArrayLike, measured: ArrayLike, *, least: int = 3) -> float | None:
    """Return Spearman's rank correlation, ties at their mean rank.

    ``None`` where it says nothing: fewer than ``least`` plans, or one side all equal. Its standard
    error is about ``1/√(n - 1)`` for unrelated numbers.
    """
    a, b = _ranks(predicted), _ranks(measured)
    if len(a) < least or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _ranks(values: ArrayLike) -> NDArray[np.float64]:
    """Return each value's rank, ties at their mean; importing ``scipy.stats`` takes a second."""
    _, place, counts = np.unique(
        np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True
    )
    ranks: NDArray[np.float64] = np.cumsum(counts) - (counts - 1) / 2
    return ranks[place]


def random_choices(table: CandidateTable, limits: Limits, n: int, seed: int) -> list[Choice]:
    """Return up to ``n`` distinct random plans that spend what the limits allow.

    From the cheapest rows, groups are raised in random order to random rows that still fit, until
    none can be raised. Fewer than ``n`` come back where the limits leave no more.

    Cost: O(n · groups · rows); no passes.
    """
    generator = np.random.default_rng([seed, 1])
    return _distinct(
        n, lambda: _fill(table, limits, cheapest_choice(table, limits), generator), skip=set()
    )


def near_choices(
    table: CandidateTable, limits: Limits, centres: Sequence[Choice], n: int, seed: int
) -> list[Choice]:
    """Return up to ``n`` distinct plans a few groups away from ``centres``, in turn; not these.

    One to three random groups take another random row; then random groups are lowered until the
    limits hold, and raised until they are used up. Cost: O(n · groups · rows); no passes.
    """
    generator = np.random.default_rng([seed, 2])
    offsets = table.offsets
    counts = np.diff(offsets)
    turn = iter(range(n * _ATTEMPTS))

    def draw() -> Choice | None:
        choice = list(centres[next(turn, 0) % len(centres)])
        for g in generator.choice(len(counts), size=min(3, len(counts)), replace=False)[
            : int(generator.integers(1, 4))
        ]:
            choice[g] = int(generator.integers(counts[g]))
        cheapest = cheapest_choice(table, limits)
        for g in generator.permutation(len(counts)):
            if limits.allow(table, choice):
                break
            choice[g] = cheapest[g]
        return _fill(table, limits, tuple(choice), generator)

    if not centres:
        return []
    return _distinct(n, draw, skip=set(centres))


def _distinct(n: int, draw: Callable[[], Choice | None], skip: set[Choice]) -> list[Choice]:
    found: dict[Choice, None] = {}
    for _ in range(n * _ATTEMPTS):
        if len(found) == n:
            break
        choice = draw()
        if choice is not None and choice not in skip:
            found[choice] = None
    return list(found)


def prices(limits: Limits) -> NDArray[np.float64]:
    """Return f64[n]: what each row costs, relative to the limits, summed over them."""
    found: NDArray[np.float64] = (limits.costs / np.maximum(limits.limits, 1)[:, None]).sum(axis=0)
    return found


def cheapest_choice(table: CandidateTable, limits: Limits) -> Choice:
    """Return each group's row with the smallest price."""
    price = prices(limits)
    pairs = itertools.pairwise(table.offsets.tolist())
    return tuple(int(price[a:b].argmin()) for a, b in pairs)


def _fill(
    table: CandidateTable, limits: Limits, start: Choice, generator: np.random.Generator
) -> Choice | None:
    """Raise random groups to random rows that cost more and fit; ``None`` if ``start`` does not."""
    if not limits.allow(table, start):
        return None
    offsets, choice = table.offsets, list(start)
    spent = limits.spent(table, choice)
    for g in generator.permutation(len(choice)):
        a, b = int(offsets[g]), int(offsets[g + 1])
        added = limits.costs[:, a:b] - limits.costs[:, a + choice[g]][:, None]
        fits = (spent[:, None] + added <= limits.limits[:, None]).all(axis=0)
        higher = np.flatnonzero(fits & (added > 0).any(axis=0))
        if len(higher):
            chosen = int(generator.choice(higher))
            spent, choice[g] = spent + added[:, chosen], chosen
    # What the random rows left over goes to whoever can still take it.
    for g in generator.permutation(len(choice)):
        a, b = int(offsets[g]), int(offsets[g + 1])
        added = limits.costs[:, a:b] - limits.costs[:, a + choice[g]][:, None]
        fits = (spent[:, None] + added <= limits.limits[:, None]).all(axis=0)
        higher = np.flatnonzero(fits & (added > 0).any(axis=0))
        if len(higher):
            chosen = int(higher[added[:, higher].sum(axis=0).argmax()])
            spent, choice[g] = spent + added[:, chosen], chosen
    return tuple(choice)

"""Compiled parts of the separable solver: hulls of groups, and one step of the core's recursion."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bitquota.compiled import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Bools = NDArray[np.bool_]
    Bytes = NDArray[np.uint8]


@compiled
def group_hulls(
    d: Floats, a: Ints, off: Ints, ok: Bools, rows: Ints, first: Ints, slope: Floats
) -> int:
    """Fill the lower convex hull of (cost, loss) of every group, cheapest row first.

    ``rows[first[g]:first[g+1]]`` are the hull's rows of group ``g``; ``slope[i]`` is what the
    step from ``rows[i-1]`` to ``rows[i]`` gains per unit of cost (``inf`` for the first row).
    Returns the number of hull rows. ``O(n B)``.
    """
    count = 0
    for g in range(len(off) - 1):
        first[g] = count
        start = count
        # Insertion sort by cost, then loss: groups have few rows.
        size = 0
        for p in range(off[g], off[g + 1]):
            if not ok[p]:
                continue
            i = start + size
            while i > start and (
                a[rows[i - 1]] > a[p] or (a[rows[i - 1]] == a[p] and d[rows[i - 1]] > d[p])
            ):
                rows[i] = rows[i - 1]
                i -= 1
            rows[i] = p
            size += 1
        # Keep what lies below the line between its neighbours.
        count = start
        for i in range(start, start + size):
            p = rows[i]
            if count > start and d[p] >= d[rows[count - 1]]:
                continue
            if count > start and a[p] == a[rows[count - 1]]:
                continue
            gain = np.inf
            while count > start:
                q = rows[count - 1]
                gain = (d[q] - d[p]) / np.float64(a[p] - a[q])
                if count - 1 == start or gain < slope[count - 1]:
                    break
                count -= 1
            rows[count] = p
            slope[count] = gain if count > start else np.inf
            count += 1
    first[len(off) - 1] = count
    return count


class States(NamedTuple):
    """Partial choices, by cost.

    Attributes:
        cost: i64[s], total cost.
        price: f64[s], total reduced cost.
        parent: i64[s], the state of the step before that each extends.
        option: i64[s], and with which option.
    """

    cost: Ints
    price: Floats
    parent: Ints
    option: Ints


class Prices(NamedTuple):
    """What a unit of cost is worth.

    Attributes:
        lam: The price of the relaxation.
        down: Least reduced cost of saving a unit in the groups to come.
        up: Likewise of spending one.
    """

    lam: float
    down: float
    up: float


@compiled
def extend(
    states: States, da: Ints, dp: Floats, budget: int, prices: Prices, limit: float, halt: Bytes,
    out: States,
) -> int:  # fmt: skip
    """Add one group's options to all states; returns the number of states kept, -1 if too many.

    -1 too where ``halt`` u8[1] is not 0.

    Options are sorted by ``da``, their cost; ``dp`` is their reduced cost. A state goes when
    another is no dearer and no more costly, or when its price with the cheapest way to use or to
    save the rest of the budget reaches ``limit``. Dominance compares ``price - lam * cost``, the
    loss itself.
    """
    cost, price, lam = states.cost, states.price, prices.lam
    n, k = len(cost), len(da)
    at = np.zeros(k, np.int64)
    count = 0
    best_loss = np.inf
    last_cost = np.int64(-1)
    while True:
        # Merge: the least cost among the next states of all options.
        pick, least, least_loss = -1, np.int64(9223372036854775807), np.inf
        for j in range(k):
            if at[j] < n:
                c = cost[at[j]] + da[j]
                if c <= least:
                    loss = price[at[j]] + dp[j] - lam * np.float64(c - budget)
                    if c < least or loss < least_loss:
                        pick, least, least_loss = j, c, loss
        if pick < 0:
            return count
        if halt[0]:
            return -1
        # Keep it unless it leads nowhere.
        state = at[pick]
        at[pick] += 1
        value = price[state] + dp[pick]
        over = least - budget
        if over > 0:
            bound = value + prices.down * np.float64(over)
        else:
            bound = value + min(lam, prices.up) * np.float64(-over)
        if bound >= limit or least_loss >= best_loss or least == last_cost:
            continue
        if count >= len(out.cost):
            return -1
        best_loss, last_cost = least_loss, least
        out.cost[count], out.price[count] = least, value
        out.parent[count], out.option[count] = state, pick
        count += 1

"""Groups that pairs tie together one to one, as one group for the search.

Two groups are tied when their pairs leave exactly one partner for every row, each another. A search
that changes one or two groups at a time cannot move three tied ones; on the collapsed core it moves
them as one.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bitquota.solver.core import Core

    Ints = NDArray[np.int64]


def partners(core: Core) -> Ints | None:
    """Return ``i64[n, k]``, one column per former group of a tied one; ``None`` without ties.

    The rows are those of the collapsed core, in order; each lists the core's rows that it stands
    for, padded with -1. Rows that ties put together and a pair forbids are left out; where that
    leaves none of a group, which has no choice then, ``None`` is returned too.
    """
    if not len(core.pairs):
        return None
    # match[g]: for the groups tied to g, each row of g with its partners by group.
    match = {
        g: {p: {g: p} for p in range(*core.off[g : g + 2].tolist())} for g in range(core.n_groups)
    }
    leader = list(range(core.n_groups))
    for (g, h), apart in sorted(_pairs_by_groups(core).items()):
        partner = _one_to_one(core, g, h, apart)
        first, second = leader[g], leader[h]
        if partner is None or first == second:
            continue
        of_second = {members[h]: members for members in match.pop(second).values()}
        for members in match[first].values():
            members.update(of_second[partner[members[g]]])
        leader = [first if one == second else one for one in leader]
    if len(match) == core.n_groups:
        return None
    forbidden = {tuple(sorted(pair)) for pair in core.pairs.tolist()}
    groups = [[sorted(members.values()) for members in match[g].values()] for g in sorted(match)]
    groups = [
        [rows for rows in group if forbidden.isdisjoint(combinations(rows, 2))] for group in groups
    ]
    if not all(groups):
        return None
    listed = [rows for group in groups for rows in group]
    out = np.full((len(listed), max(map(len, listed))), -1, dtype=np.int64)
    for i, together in enumerate(listed):
        out[i, : len(together)] = together
    return out


def _pairs_by_groups(core: Core) -> dict[tuple[int, int], set[tuple[int, int]]]:
    """Return the forbidden pairs of each pair of groups, rows of the first group first."""
    found: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for a, b in core.pairs.tolist():
        p, q = (a, b) if core.grp[a] < core.grp[b] else (b, a)
        found.setdefault((int(core.grp[p]), int(core.grp[q])), set()).add((p, q))
    return found


def _one_to_one(core: Core, g: int, h: int, apart: set[tuple[int, int]]) -> dict[int, int] | None:
    """Return the partner in group ``h`` that ``apart`` leaves each row of ``g``, or ``None``."""
    rows, others = (range(*core.off[k : k + 2].tolist()) for k in (g, h))
    if len(rows) != len(others) or len(apart) != len(rows) * (len(rows) - 1):
        return None
    left = {p: [q for q in others if (p, q) not in apart] for p in rows}
    if any(len(qs) != 1 for qs in left.values()) or len({q for (q,) in left.values()}) < len(rows):
        return None
    return {p: q for p, (q,) in left.items()}


def collapsed(core: Core, table: Ints) -> Core:
    """Return ``core`` with one row per row of ``table`` (``partners``); ``O(n²)``."""
    used = table >= 0
    member = np.zeros((len(table), core.n))
    member[np.nonzero(used)[0], table[used]] = 1.0
    d = member @ core.d
    C = core.C
    if len(C):
        C = member @ core.C @ member.T
        d += 0.5 * np.diag(C)
    first = core.grp[table[:, 0]]
    sizes = np.unique(first, return_counts=True)[1]
    grp = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
    if len(C):
        C[grp[:, None] == grp[None, :]] = 0.0
    row_of = np.full(core.n, -1, dtype=np.int64)
    row_of[table[used]] = np.nonzero(used)[0]
    pairs = row_of[core.pairs]
    pairs = pairs[(pairs >= 0).all(axis=1)]
    pairs = pairs[grp[pairs[:, 0]] != grp[pairs[:, 1]]]
    whole = np.where(used[None, :, :], core.A[:, table], 0).sum(axis=2)
    return replace(
        core,
        d=d,
        C=np.ascontiguousarray(C),
        off=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        grp=grp,
        e=member @ core.e,
        A=np.ascontiguousarray(whole),
        pairs=pairs,
    )


def expanded(table: Ints, cur: Ints, core: Core) -> Ints:
    """Return the core's rows for the collapsed core's rows ``cur``, one per group."""
    rows = table[cur]
    chosen = rows[rows >= 0]
    out = np.empty(core.n_groups, dtype=np.int64)
    out[core.grp[chosen]] = chosen
    return out

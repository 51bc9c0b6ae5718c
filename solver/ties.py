"""Groups that pairs tie together one to one, as one group for the search.

Two groups are tied when their pairs leave exactly one partner for every row, each another. A search
that changes one or two groups at a time cannot move three tied ones; on the collapsed core it moves
them as one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bitquota.solver.core import Core

    Ints = NDArray[np.int64]


def partners(core: Core) -> Ints | None:
    """Return ``i64[n, k]``, one column per former group of a tied one; ``None`` without ties.

    The rows are those of the collapsed core, in order; each lists the core's rows that it stands
    for, padded with -1.
    """
    if not len(core.pairs):
        return None
    counts = np.diff(core.off)
    leader = np.arange(core.n_groups)
    match = {g: {p: {g: p} for p in range(core.off[g], core.off[g + 1])} for g in leader.tolist()}
    tied = False
    by_groups: dict[tuple[int, int], set[tuple[int, int]]] = {}
    for a, b in core.pairs.tolist():
        p, q = (a, b) if core.grp[a] < core.grp[b] else (b, a)
        by_groups.setdefault((int(core.grp[p]), int(core.grp[q])), set()).add((p, q))
    for (g, h), apart in sorted(by_groups.items()):
        size = int(counts[g])
        if counts[h] != size or len(apart) != size * (size - 1) or leader[g] == leader[h]:
            continue
        rows = range(core.off[g], core.off[g + 1])
        others = range(core.off[h], core.off[h + 1])
        left = {p: [q for q in others if (p, q) not in apart] for p in rows}
        if any(len(qs) != 1 for qs in left.values()) or len({q for (q,) in left.values()}) != size:
            continue
        first, second = int(leader[g]), int(leader[h])
        of_second = {members[h]: members for members in match.pop(second).values()}
        for members in match[first].values():
            members.update(of_second[left[members[g]][0]])
        leader[leader == second] = first
        tied = True
    if not tied:
        return None
    listed = [sorted(members.values()) for g in sorted(match) for members in match[g].values()]
    out = np.full((len(listed), max(map(len, listed))), -1, dtype=np.int64)
    for i, together in enumerate(listed):
        out[i, : len(together)] = together
    return out


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
    row_of = np.zeros(core.n, dtype=np.int64)
    row_of[table[used]] = np.nonzero(used)[0]
    pairs = row_of[core.pairs]
    pairs = pairs[grp[pairs[:, 0]] != grp[pairs[:, 1]]]
    whole = np.where(used[None, :, :], core.A[:, table], 0).sum(axis=2)
    return replace(
        core,
        d=d,
        C=np.ascontiguousarray(C),
        off=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        grp=grp,
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

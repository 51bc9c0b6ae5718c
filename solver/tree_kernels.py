"""Compiled branch and bound: which rows a node keeps, where it branches, and the tree.

Notation as in ``relaxation_kernels``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bitquota.compiled import compiled
from bitquota.solver.relaxation_kernels import EPS, Relaxed, priced, relax
from bitquota.solver.search_kernels import Space, place, repair, tabu_search

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Singles = NDArray[np.float32]
    Ints = NDArray[np.int64]
    Bytes = NDArray[np.uint8]


NO_ROW = 2**62
"""Above every budget."""
CLOSED, OPEN, SINGLE = 0, 1, 2
"""What ``evaluate_node`` finds: a region that needs no branching, one that does, one choice."""


class Nodes(NamedTuple):
    """The nodes of a tree, as kernels fill them; ``N`` is the room for nodes.

    Attributes:
        allowed: u8[N, n], rows of each region.
        kept: u8[N, n], those of them that can still improve.
        point: f32[N, n], where the bound was computed.
        lam: f64[N, m], multipliers there.
        bound: f64[N].
        parent: i64[N].
        group: i64[N], the group that is branched on; -1 for none.
        split: i64[N], first row of that group's upper part.
        kind: u8[N]; 0 visibly empty, 1 bounded by the formula, 2 single choice.
        keys: f64[N+1], bounds of the open nodes as a heap.
        ids: i64[N+1], their indices.
        counts: i64[4]: nodes, open nodes, incumbents found, branchings.
    """

    allowed: Bytes
    kept: Bytes
    point: Singles
    lam: Floats
    bound: Floats
    parent: Ints
    group: Ints
    split: Ints
    kind: Bytes
    keys: Floats
    ids: Ints
    counts: Ints


@compiled
def cheapest(A: Ints, off: Ints, ok: Bytes, k: int, g: int) -> int:
    """Return the least cost of a row of a group; more than any budget where it has no row."""
    least = NO_ROW
    for p in range(off[g], off[g + 1]):
        if ok[p]:
            least = min(least, A[k, p])
    return least


@compiled
def empty(core: Relaxed, ok: Bytes) -> bool:
    """Return whether no choice is left visibly: by rows, by a budget in integers, or by a pair."""
    off, grp, pairs = core.off, core.grp, core.pairs
    for g in range(len(off) - 1):
        some = 0
        for p in range(off[g], off[g + 1]):
            some += ok[p]
        if some == 0:
            return True
    for k in range(len(core.b)):
        total = 0
        for g in range(len(off) - 1):
            total += cheapest(core.A, off, ok, k, g)
        if total > core.b[k]:
            return True
    # Two groups with one row each that must not go together.
    for t in range(len(pairs)):
        i, j = pairs[t, 0], pairs[t, 1]
        if ok[i] and ok[j] and alone(grp, off, ok, i) and alone(grp, off, ok, j):
            return True
    return False


@compiled
def alone(grp: Ints, off: Ints, ok: Bytes, row: int) -> bool:
    """Return whether ``ok`` has no other row of the group of ``row``."""
    for p in range(off[grp[row]], off[grp[row] + 1]):  # noqa: SIM110  # as numba compiles it
        if ok[p] and p != row:
            return False
    return True


@compiled
def shrink(
    core: Relaxed, s: Floats, lam: Floats, ok: Bytes, bound: float, cutoff: float, kept: Bytes
) -> None:
    """Fill ``kept`` with the rows of ``ok`` that can still improve.

    A row goes when the node's formula with that row chosen reaches ``cutoff``, when it and the
    cheapest other rows exceed a budget, or when it meets a certain row that it must not meet.
    All reasons refer to ``ok``, so that a certificate can repeat them.
    """
    kept[:] = ok
    drop_by_bound(core, s, lam, ok, bound, cutoff, kept)
    drop_by_cost(core, ok, kept)
    # A row whose partner is the only one left of its group is out.
    pairs = core.pairs
    for t in range(len(pairs)):
        for side in range(2):
            i, j = pairs[t, side], pairs[t, 1 - side]
            if ok[i] and kept[j] and alone(core.grp, core.off, ok, i):
                kept[j] = 0


@compiled
def drop_by_bound(
    core: Relaxed, s: Floats, lam: Floats, ok: Bytes, bound: float, cutoff: float, kept: Bytes
) -> None:
    """Drop from ``kept`` the rows that raise ``bound`` to ``cutoff`` when they are chosen."""
    off = core.off
    margin = 1e-12 * abs(cutoff)
    low = s - core.e
    for g in range(len(off) - 1):
        least = np.inf
        for p in range(off[g], off[g + 1]):
            if ok[p]:
                low[p] = priced(core.F, low, lam, p)
                least = min(least, low[p])
        for p in range(off[g], off[g + 1]):
            if ok[p] and bound + (low[p] - least) * (1.0 - 1e-9) - margin >= cutoff:
                kept[p] = 0


@compiled
def drop_by_cost(core: Relaxed, ok: Bytes, kept: Bytes) -> None:
    """Drop from ``kept`` the rows that exceed a budget beside the cheapest other rows."""
    off, A = core.off, core.A
    least = np.zeros(len(off) - 1, np.int64)
    for k in range(len(core.b)):
        slack = core.b[k]
        for g in range(len(off) - 1):
            least[g] = cheapest(A, off, ok, k, g)
            slack -= least[g]
        for g in range(len(off) - 1):
            for p in range(off[g], off[g + 1]):
                if kept[p] and A[k, p] - least[g] > slack:
                    kept[p] = 0


@compiled
def mixing(Q: Floats, kept: Bytes, z: Floats, start: int, stop: int) -> float:
    """Return what the convex function loses by mixing the rows of a group as ``z`` does."""
    value = 0.0
    if len(Q):
        for p in range(start, stop):
            if kept[p]:
                value += 0.5 * Q[p, p] * z[p]
                for q in range(start, stop):
                    value -= 0.5 * Q[p, q] * z[p] * z[q]
    return max(value, 0.0)


@compiled
def held(
    F: Floats, kept: Bytes, z: Floats, lam: Floats, first: int, stop: int
) -> tuple[float, float]:
    """Return the weight on the rows from ``first`` to ``stop``, and the price of their cost."""
    weight, price = 0.0, 0.0
    for p in range(first, stop):
        if kept[p]:
            weight += z[p]
            for k in range(len(lam)):
                price += lam[k] * F[k, p] * z[p]
    return weight, price


@compiled
def choose_branch(core: Relaxed, kept: Bytes, z: Floats, lam: Floats) -> tuple[int, int]:
    """Return a group and the first row of its upper part.

    Heavy layers first: rows of a group are in order of cost; a split's score is the geometric
    mean of the weights on both sides times the price of the cost between them, plus what the
    convex function loses by mixing rows of the group.
    """
    F = core.F
    best_g, best_t, best_score = -1, -1, -1.0
    for g in range(len(core.off) - 1):
        start, stop = core.off[g], core.off[g + 1]
        count = 0
        for p in range(start, stop):
            count += kept[p]
        if count < 2:
            continue
        mixed = mixing(core.Q, kept, z, start, stop)
        seen = 0
        for t in range(start, stop):
            seen += kept[t]
            if not kept[t] or seen < 2:
                continue
            below, below_price = held(F, kept, z, lam, start, t)
            above, above_price = held(F, kept, z, lam, t, stop)
            share = below * above
            score = 1e-300 * count
            if share > 0.0:
                distance = abs(above_price / above - below_price / below)
                score = np.sqrt(share) * distance + mixed * 4.0 * share
            if score > best_score:
                best_g, best_t, best_score = g, t, score
    return best_g, best_t


@compiled
def push(keys: Floats, ids: Ints, size: int, key: float, node: int) -> int:
    """Insert into a binary heap (least key first); returns the new size."""
    i = size
    while i > 0:
        up = (i - 1) // 2
        if keys[up] <= key:
            break
        keys[i], ids[i] = keys[up], ids[up]
        i = up
    keys[i], ids[i] = key, node
    return size + 1


@compiled
def pop(keys: Floats, ids: Ints, size: int) -> int:
    """Remove the least of a binary heap; returns the new size."""
    size -= 1
    key, node = keys[size], ids[size]
    i = 0
    while True:
        child = 2 * i + 1
        if child >= size:
            break
        if child + 1 < size and keys[child + 1] < keys[child]:
            child += 1
        if keys[child] >= key:
            break
        keys[i], ids[i] = keys[child], ids[child]
        i = child
    keys[i], ids[i] = key, node
    return size


@compiled
def value_of(core: Relaxed, cur: Ints) -> tuple[float, float]:
    """Return the objective of the choice ``cur``, and the same rounded down."""
    C, d = core.C, core.d
    value, size, error = core.constant, abs(core.constant), 0.0
    for g in range(len(cur)):
        error += core.lost[cur[g]]
        value += d[cur[g]]
        size += abs(d[cur[g]])
        for i in range(g if len(C) else 0):
            value += C[cur[g], cur[i]]
            size += abs(C[cur[g], cur[i]])
    # A sum of k terms is off by at most about k roundings of the sum of their sizes; the
    # terms of fixed groups have been summed into d and constant before.
    return value, value - error - EPS * (len(d) + 0.5 * len(cur) * len(cur) + 10.0) * size


@compiled
def evaluate_node(
    core: Relaxed, nodes: Nodes, node: int, z: Floats, s: Floats, work: Floats, cur: Ints,
    cutoff: float, rounds: int,
) -> int:  # fmt: skip
    """Bound a node and prepare its branching; returns ``CLOSED``, ``OPEN`` or ``SINGLE``.

    For a single choice ``cur`` holds it, and the node's bound is its objective, rounded down.
    """
    off, ok = core.off, nodes.allowed[node]
    if empty(core, ok):
        nodes.bound[node] = np.inf
        nodes.kind[node] = 0
        return CLOSED
    count = 0
    for g in range(len(off) - 1):
        for p in range(off[g], off[g + 1]):
            if ok[p]:
                count += 1
                cur[g] = p
    if count == len(cur):
        nodes.bound[node] = value_of(core, cur)[1]
        nodes.kind[node] = 2
        return SINGLE
    # Bound.
    lam = nodes.lam[node]
    bound = relax(core, ok, z, s, lam, cutoff, rounds, nodes.point[node], work)
    nodes.bound[node] = bound
    nodes.kind[node] = 1
    if bound >= cutoff:
        return CLOSED
    # Fix, then choose where to branch.
    shrink(core, s, lam, ok, bound, cutoff, nodes.kept[node])
    nodes.group[node], nodes.split[node] = choose_branch(core, nodes.kept[node], z, lam)
    return OPEN


@compiled
def probe(
    core: Relaxed, order: Ints, ok: Bytes, z0: Floats, s0: Floats, lam0: Floats,
    cutoff: float, rounds: int, removed: Ints, points: Singles, lams: Floats,
) -> int:  # fmt: skip
    """Try each row of ``order`` as its group's only one; drop from ``ok`` those cut off.

    The t-th dropped row is ``removed[t]``, with ``points[t]`` and ``lams[t]`` as its proof (a
    point of zeros where the region is visibly empty). Returns how many were dropped.
    """
    off, grp = core.off, core.grp
    n, m = len(core.l), len(core.f)
    z, s, work, lam = np.zeros(n), np.zeros(n), np.zeros(n), np.zeros(m)
    only = np.zeros(n, np.uint8)
    count = 0
    for t in range(len(order)):
        if core.halt[0]:
            break
        p = order[t]
        if not ok[p] or alone(grp, off, ok, p):
            continue
        only[:] = ok
        only[off[grp[p]] : off[grp[p] + 1]] = 0
        only[p] = 1
        if empty(core, only):
            points[count, :] = 0.0
            lams[count, :] = 0.0
        else:
            z[:], s[:], lam[:] = z0, s0, lam0
            value = relax(core, only, z, s, lam, cutoff, rounds, points[count], work)
            if value < cutoff:
                continue
            lams[count, :] = lam
        removed[count] = p
        ok[p] = 0
        count += 1
    return count


@compiled
def improves(core: Relaxed, cur: Ints, value: float, best: float) -> bool:
    """Return whether ``cur`` keeps budgets and pairs and is visibly better than ``best``."""
    # Without an incumbent best is infinite, and infinity minus infinity no number.
    if np.isfinite(best) and not value < best - 1e-13 * abs(best):
        return False
    for k in range(len(core.b)):
        total = 0
        for i in range(len(cur)):
            total += core.A[k, cur[i]]
        if total > core.b[k]:
            return False
    for r in range(len(core.pairs)):
        p, q = core.pairs[r, 0], core.pairs[r, 1]
        if cur[core.grp[p]] == p and cur[core.grp[q]] == q:
            return False
    return True


@compiled
def make_child(core: Relaxed, nodes: Nodes, node: int, half: int) -> int:
    """Append the lower (0) or upper (1) half of ``node`` and return its index."""
    off, g, t = core.off, nodes.group[node], nodes.split[node]
    child: int = nodes.counts[0]
    nodes.counts[0] += 1
    nodes.parent[child] = node
    nodes.allowed[child, :] = nodes.kept[node]
    nodes.lam[child, :] = nodes.lam[node]
    if g >= 0:
        for p in range(off[g], off[g + 1]):
            if (p < t) == (half == 1):
                nodes.allowed[child, p] = 0
    return child


@compiled
def round_up(core: Relaxed, ok: Bytes, z: Floats, weight: Floats, cur: Ints) -> bool:
    """Set ``cur`` to a choice near ``z``, improved by search; returns whether one was found."""
    off = core.off
    for i in range(len(cur)):
        top = -1
        for p in range(off[i], off[i + 1]):
            if ok[p] and (top < 0 or z[p] > z[top]):
                top = p
        cur[i] = top
    space = Space(core.d, core.P, off, core.grp, core.A, core.b, core.halt)
    if not repair(space, place(space, cur), weight):
        return False
    tabu_search(space, cur, 0, 200, 1, 1)
    return True


@compiled
def grow(
    core: Relaxed, nodes: Nodes, best: Floats, best_cur: Ints, gap: float, floor: float,
    most: int, rounds: int,
) -> None:  # fmt: skip
    """Branch up to ``most`` times, best bound first.

    Node 0 must be evaluated and in the heap. ``best`` is (objective, cutoff).
    """
    n = len(core.l)
    z, s, work, cur = np.zeros(n), np.zeros(n), np.zeros(n), best_cur.copy()
    weight = 1.0 / (core.f + 1.0)
    counts, bound = nodes.counts, nodes.bound
    for _ in range(most):
        # Take the open node of the least bound.
        if counts[1] == 0 or counts[0] + 2 > len(bound) or core.halt[0]:
            return
        node = nodes.ids[0]
        if nodes.keys[0] >= best[1]:
            return
        counts[1] = pop(nodes.keys, nodes.ids, counts[1])
        counts[3] += 1
        for half in range(2 if nodes.group[node] >= 0 else 1):
            # Branch.
            child = make_child(core, nodes, node, half)
            for p in range(n):
                z[p] = np.float64(nodes.point[node, p])
                s[p] = core.d[p]
            # Bound and fix.
            code = evaluate_node(core, nodes, child, z, s, work, cur, best[1], rounds)
            if code == OPEN:
                key = max(bound[child], bound[node])
                counts[1] = push(nodes.keys, nodes.ids, counts[1], key, child)
                # Now and then look for a better choice near the relaxation's point.
                if counts[3] % 8 == 1 and round_up(core, nodes.allowed[child], z, weight, cur):
                    code = SINGLE
            if code == SINGLE:
                value = value_of(core, cur)[0]
                if improves(core, cur, value, best[0]):
                    best[0] = value
                    best[1] = value - max(gap * abs(value), floor)
                    best_cur[:] = cur
                    counts[2] += 1


@compiled
def settle(parent: Ints, own: Floats, cutoff: float) -> Floats:
    """Return what each node proves: its own bound, or if more what its children prove.

    Removed rows prove at least ``cutoff``. Parents stand before their children.
    """
    n = len(parent)
    below = np.full(n, np.inf)
    has = np.zeros(n, np.uint8)
    value = own.copy()
    for i in range(n - 1, -1, -1):
        if has[i]:
            value[i] = max(value[i], min(below[i], cutoff))
        if parent[i] >= 0:
            has[parent[i]] = 1
            below[parent[i]] = min(below[parent[i]], value[i])
    return value

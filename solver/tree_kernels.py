"""Compiled branch and bound: which rows a node keeps, where it branches, and the tree.

Notation as in ``relaxation_kernels``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bitquota.solver.compiled import compiled
from bitquota.solver.relaxation_kernels import EPS, Relaxed, relax
from bitquota.solver.search_kernels import fields, repair, tabu_search

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Singles = NDArray[np.float32]
    Ints = NDArray[np.int64]
    Bytes = NDArray[np.uint8]


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
def empty(A: Ints, b: Ints, off: Ints, ok: Bytes) -> bool:
    """Return whether a group has no row or the cheapest rows exceed a budget, in integers."""
    m = len(b)
    for g in range(len(off) - 1):
        some = False
        for p in range(off[g], off[g + 1]):
            if ok[p]:
                some = True
        if not some:
            return True
    for k in range(m):
        total = 0
        for g in range(len(off) - 1):
            least = 4611686018427387904
            for p in range(off[g], off[g + 1]):
                if ok[p] and A[k, p] < least:
                    least = A[k, p]
            total += least
        if total > b[k]:
            return True
    return False


@compiled
def clash(pairs: Ints, grp: Ints, off: Ints, ok: Bytes) -> bool:
    """Return whether two groups with one row each are left with a forbidden pair."""
    for t in range(len(pairs)):
        i, j = pairs[t, 0], pairs[t, 1]
        if ok[i] and ok[j] and alone(grp, off, ok, i) and alone(grp, off, ok, j):
            return True
    return False


@compiled
def shrink(
    core: Relaxed, s: Floats, lam: Floats, ok: Bytes, bound: float, cutoff: float, kept: Bytes
) -> None:
    """Fill ``kept`` with the rows of ``ok`` that can still improve.

    A row goes when the node's formula with that row chosen reaches ``cutoff``, when it and the
    cheapest other rows exceed a budget, or when it meets a certain row that it must not meet.
    All reasons refer to ``ok``, so that a certificate can repeat them.
    """
    for p in range(len(s)):
        kept[p] = ok[p]
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
    e, off, F = core.e, core.off, core.F
    m = len(core.b)
    margin = 1e-12 * abs(cutoff)
    for g in range(len(off) - 1):
        least = np.inf
        for p in range(off[g], off[g + 1]):
            if ok[p]:
                value = s[p] - e[p]
                for j in range(m):
                    value += lam[j] * F[j, p]
                least = min(least, value)
        for p in range(off[g], off[g + 1]):
            if ok[p]:
                value = s[p] - e[p]
                for j in range(m):
                    value += lam[j] * F[j, p]
                if bound + (value - least) * (1.0 - 1e-9) - margin >= cutoff:
                    kept[p] = 0


@compiled
def drop_by_cost(core: Relaxed, ok: Bytes, kept: Bytes) -> None:
    """Drop from ``kept`` the rows that exceed a budget beside the cheapest other rows."""
    off, A = core.off, core.A
    least = np.zeros(len(off) - 1, np.int64)
    for k in range(len(core.b)):
        slack = core.b[k]
        for g in range(len(off) - 1):
            least[g] = 4611686018427387904
            for p in range(off[g], off[g + 1]):
                if ok[p]:
                    least[g] = min(least[g], A[k, p])
            slack -= least[g]
        for g in range(len(off) - 1):
            for p in range(off[g], off[g + 1]):
                if kept[p] and A[k, p] - least[g] > slack:
                    kept[p] = 0


@compiled
def alone(grp: Ints, off: Ints, ok: Bytes, row: int) -> bool:
    """Return whether ``ok`` has no other row of the group of ``row``."""
    for p in range(off[grp[row]], off[grp[row] + 1]):  # noqa: SIM110  # as numba compiles it
        if ok[p] and p != row:
            return False
    return True


@compiled
def choose_branch(
    Q: Floats, F: Floats, off: Ints, kept: Bytes, z: Floats, lam: Floats
) -> tuple[int, int]:
    """Return a group and the first row of its upper part.

    Heavy layers first: rows of a group are in order of cost; a split's score is the geometric
    mean of the weights on both sides times the price of the cost between them, plus what the
    convex function loses by mixing rows of the group.
    """
    best_g, best_t, best_score = -1, -1, -1.0
    m = F.shape[0]
    for g in range(len(off) - 1):
        first, last, count = -1, -1, 0
        for p in range(off[g], off[g + 1]):
            if kept[p]:
                if first < 0:
                    first = p
                last = p
                count += 1
        if count < 2:
            continue
        mixing = 0.0
        weight = 0.0
        for p in range(off[g], off[g + 1]):
            if kept[p]:
                weight += z[p]
                if len(Q):
                    mixing += 0.5 * Q[p, p] * z[p]
                    for q in range(off[g], off[g + 1]):
                        mixing -= 0.5 * Q[p, q] * z[p] * z[q]
        below, below_cost = 0.0, 0.0
        for t in range(first + 1, last + 1):
            if kept[t - 1]:
                below += z[t - 1]
                for k in range(m):
                    below_cost += lam[k] * F[k, t - 1] * z[t - 1]
            if not kept[t]:
                continue
            above, above_cost = 0.0, 0.0
            for p in range(t, last + 1):
                if kept[p]:
                    above += z[p]
                    for k in range(m):
                        above_cost += lam[k] * F[k, p] * z[p]
            share = below * above
            if share <= 0.0:
                score = 1e-300 * count
            else:
                distance = abs(above_cost / above - below_cost / below)
                score = np.sqrt(share) * distance + max(mixing, 0.0) * 4.0 * share
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
def value_of(core: Relaxed, cur: Ints) -> float:
    """Return the objective of the choice ``cur``."""
    value = core.constant
    for i in range(len(cur)):
        value += core.d[cur[i]]
        for j in range(i if len(core.C) else 0):
            value += core.C[cur[i], cur[j]]
    return value


@compiled
def safe_value(core: Relaxed, cur: Ints) -> float:
    """Return the objective of the choice ``cur``, rounded down."""
    C, d = core.C, core.d
    value, size = core.constant, abs(core.constant)
    for g in range(len(cur)):
        value += d[cur[g]]
        size += abs(d[cur[g]])
        for i in range(g if len(C) else 0):
            value += C[cur[g], cur[i]]
            size += abs(C[cur[g], cur[i]])
    # A sum of k terms is off by at most about k roundings of the sum of their sizes; the
    # terms of fixed groups have been summed into d and constant before.
    return value - EPS * (len(d) + 0.5 * len(cur) * len(cur) + 10.0) * size


@compiled
def evaluate_node(
    core: Relaxed, nodes: Nodes, node: int, z: Floats, s: Floats, work: Floats, cur: Ints,
    cutoff: float, rounds: int,
) -> int:  # fmt: skip
    """Bound a node and prepare its branching; returns ``CLOSED``, ``OPEN`` or ``SINGLE``.

    For a single choice ``cur`` holds it, and the node's bound is its objective, rounded down.
    """
    off, ok = core.off, nodes.allowed[node]
    if empty(core.A, core.b, off, ok) or clash(core.pairs, core.grp, off, ok):
        nodes.bound[node] = np.inf
        nodes.kind[node] = 0
        return CLOSED
    single = True
    for g in range(len(off) - 1):
        count = 0
        for p in range(off[g], off[g + 1]):
            if ok[p]:
                count += 1
                cur[g] = p
        if count > 1:
            single = False
    if single:
        nodes.bound[node] = safe_value(core, cur)
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
    g, t = choose_branch(core.Q, core.F, off, nodes.kept[node], z, lam)
    nodes.group[node], nodes.split[node] = g, t
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
        p = order[t]
        if not ok[p] or alone(grp, off, ok, p):
            continue
        only[:] = ok
        only[off[grp[p]] : off[grp[p] + 1]] = 0
        only[p] = 1
        if empty(core.A, core.b, off, only) or clash(core.pairs, grp, off, only):
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
    for p in range(off[len(off) - 1]):
        nodes.allowed[child, p] = nodes.kept[node, p]
    if g >= 0:
        for p in range(off[g], off[g + 1]):
            if (p < t) == (half == 1):
                nodes.allowed[child, p] = 0
    for k in range(len(core.b)):
        nodes.lam[child, k] = nodes.lam[node, k]
    return child


@compiled
def round_up(
    core: Relaxed, ok: Bytes, z: Floats, h: Floats, used: Ints, weight: Floats, cur: Ints
) -> bool:
    """Set ``cur`` to a choice near ``z``, improved by search; returns whether one was found."""
    off, A, b, P, d = core.off, core.A, core.b, core.P, core.d
    for i in range(len(cur)):
        top = -1
        for p in range(off[i], off[i + 1]):
            if ok[p] and (top < 0 or z[p] > z[top]):
                top = p
        cur[i] = top
    fields(d, P, A, cur, h, used)
    if not repair(P, off, A, b, cur, h, used, weight):
        return False
    tabu_search(d, P, off, core.grp, A, b, cur, 0, 200, 1, 1)
    return True


@compiled
def grow(
    core: Relaxed, nodes: Nodes, best: Floats, best_cur: Ints, gap: float, floor: float,
    most: int, rounds: int,
) -> None:  # fmt: skip
    """Branch up to ``most`` times, best bound first.

    Node 0 must be evaluated and in the heap. ``best`` is (objective, cutoff).
    """
    n, m, G = len(core.l), len(core.b), len(core.off) - 1
    z, s, work = np.zeros(n), np.zeros(n), np.zeros(n)
    h, used, cur = np.zeros(n), np.zeros(m, np.int64), np.zeros(G, np.int64)
    weight = np.zeros(m)
    for k in range(m):
        weight[k] = 1.0 / (core.f[k] + 1.0)
    counts, bound = nodes.counts, nodes.bound
    for _ in range(most):
        # Take the open node of the least bound.
        if counts[1] == 0 or counts[0] + 2 > len(bound):
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
                if counts[3] % 8 == 1:
                    ok = nodes.allowed[child]
                    if round_up(core, ok, z, h, used, weight, cur):
                        code = SINGLE
            if code == SINGLE:
                value = value_of(core, cur)
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

"""Compiled branch and bound: which rows a node keeps, where it branches, and the tree.

Notation as in ``relaxation_kernels``; ``C``/``d`` are the core's own terms, ``pairs`` i64[p, 2]
forbidden pairs, ``grp`` i64[n] the group of each row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bitquota.solver.compiled import compiled
from bitquota.solver.relaxation_kernels import EPS, relax
from bitquota.solver.search_kernels import fields, repair, tabu_search

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Singles = NDArray[np.float32]
    Ints = NDArray[np.int64]
    Bytes = NDArray[np.uint8]


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
        if ok[i] and ok[j]:
            single = True
            for r in (i, j):
                for p in range(off[grp[r]], off[grp[r] + 1]):
                    if ok[p] and p != r:
                        single = False
            if single:
                return True
    return False


@compiled
def shrink(
    s: Floats, e: Floats, lam: Floats, F: Floats, A: Ints, b: Ints, off: Ints, grp: Ints,
    pairs: Ints, ok: Bytes, bound: float, cutoff: float, kept: Bytes,
) -> int:  # fmt: skip
    """Fill ``kept`` with the rows of ``ok`` that can still improve; returns how many went.

    A row goes when the node's formula with that row chosen reaches ``cutoff``, when it and the
    cheapest other rows exceed a budget, or when it meets a certain row that it must not meet.
    All reasons refer to ``ok``, so that a certificate can repeat them.
    """
    n, m = len(s), len(b)
    removed = 0
    for p in range(n):
        kept[p] = ok[p]
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
                    removed += 1
    for k in range(m):
        slack = b[k]
        for g in range(len(off) - 1):
            least_cost = 4611686018427387904
            for p in range(off[g], off[g + 1]):
                if ok[p]:
                    least_cost = min(least_cost, A[k, p])
            slack -= least_cost
        for g in range(len(off) - 1):
            least_cost = 4611686018427387904
            for p in range(off[g], off[g + 1]):
                if ok[p]:
                    least_cost = min(least_cost, A[k, p])
            for p in range(off[g], off[g + 1]):
                if kept[p] and A[k, p] - least_cost > slack:
                    kept[p] = 0
                    removed += 1
    for t in range(len(pairs)):
        for side in range(2):
            i, j = pairs[t, side], pairs[t, 1 - side]
            if ok[i] and kept[j]:
                single = True
                for p in range(off[grp[i]], off[grp[i] + 1]):
                    if ok[p] and p != i:
                        single = False
                if single:
                    kept[j] = 0
                    removed += 1
    return removed


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
def evaluate_node(
    Q: Floats, l: Floats, const: float, e: Floats, off: Ints, grp: Ints, F: Floats, f: Floats,  # noqa: E741
    A: Ints, b: Ints, pairs: Ints, C: Floats, d: Floats, constant: float,
    node: int, allowed: Bytes, kept: Bytes, point: Singles, lam: Floats, bound: Floats,
    group: Ints, split: Ints, kind: Bytes, z: Floats, s: Floats, work: Floats, cur: Ints,
    cutoff: float, rounds: int,
) -> int:  # fmt: skip
    """Bound a node and prepare its branching; returns 0 closed, 1 open, 2 a single choice.

    ``kind``: 0 visibly empty, 1 bounded by the formula, 2 single choice (``cur`` holds it and
    ``bound`` its objective, rounded down).
    """
    ok = allowed[node]
    if empty(A, b, off, ok) or clash(pairs, grp, off, ok):
        bound[node] = np.inf
        kind[node] = 0
        return 0
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
        value, size = constant, abs(constant)
        for g in range(len(cur)):
            value += d[cur[g]]
            size += abs(d[cur[g]])
            for i in range(g if len(C) else 0):
                value += C[cur[g], cur[i]]
                size += abs(C[cur[g], cur[i]])
        # A sum of k terms is off by at most about k roundings of the sum of their sizes; the
        # terms of fixed groups have been summed into d and constant before.
        bound[node] = value - EPS * (len(ok) + 0.5 * len(cur) * len(cur) + 10.0) * size
        kind[node] = 2
        return 2
    bound[node] = relax(
        Q, l, const, e, off, F, f, ok, z, s, lam[node], cutoff, rounds, point[node], work
    )
    kind[node] = 1
    if bound[node] >= cutoff:
        return 0
    shrink(s, e, lam[node], F, A, b, off, grp, pairs, ok, bound[node], cutoff, kept[node])
    g, t = choose_branch(Q, F, off, kept[node], z, lam[node])
    group[node], split[node] = g, t
    return 1


@compiled
def probe(
    Q: Floats, l: Floats, const: float, e: Floats, off: Ints, grp: Ints, F: Floats, f: Floats,  # noqa: E741
    A: Ints, b: Ints, pairs: Ints, order: Ints, ok: Bytes, z0: Floats, s0: Floats, lam0: Floats,
    cutoff: float, rounds: int, removed: Ints, points: Singles, lams: Floats,
) -> int:  # fmt: skip
    """Try each row of ``order`` as its group's only one; drop from ``ok`` those cut off.

    The t-th dropped row is ``removed[t]``, with ``points[t]`` and ``lams[t]`` as its proof (a
    point of zeros where the region is visibly empty). Returns how many were dropped.
    """
    n, m = len(l), len(f)
    z, s, work, lam = np.zeros(n), np.zeros(n), np.zeros(n), np.zeros(m)
    alone = np.zeros(n, np.uint8)
    count = 0
    for t in range(len(order)):
        p = order[t]
        if not ok[p]:
            continue
        g = grp[p]
        others = 0
        for q in range(n):
            alone[q] = ok[q]
        for q in range(off[g], off[g + 1]):
            if q != p and ok[q]:
                alone[q] = 0
                others += 1
        if others == 0:
            continue
        if empty(A, b, off, alone) or clash(pairs, grp, off, alone):
            points[count, :] = 0.0
            lams[count, :] = 0.0
        else:
            for q in range(n):
                z[q] = z0[q]
                s[q] = s0[q]
            for k in range(m):
                lam[k] = lam0[k]
            value = relax(
                Q, l, const, e, off, F, f, alone, z, s, lam, cutoff, rounds, points[count], work
            )
            if value < cutoff:
                continue
            lams[count, :] = lam
        removed[count] = p
        ok[p] = 0
        count += 1
    return count


@compiled
def grow(
    Q: Floats, l: Floats, const: float, e: Floats, off: Ints, grp: Ints, F: Floats, f: Floats,  # noqa: E741
    A: Ints, b: Ints, pairs: Ints, C: Floats, P: Floats, d: Floats, constant: float,
    allowed: Bytes, kept: Bytes, point: Singles, lam: Floats, bound: Floats, parent: Ints,
    group: Ints, split: Ints, kind: Bytes, keys: Floats, ids: Ints, counts: Ints,
    best: Floats, best_cur: Ints, gap: float, floor: float, most: int, rounds: int,
) -> None:  # fmt: skip
    """Branch up to ``most`` times, best bound first.

    Node 0 must be evaluated and in the heap. ``counts`` is (nodes, heap size, incumbents found,
    branchings); ``best`` is (objective, cutoff). ``P`` is ``C`` with forbidden pairs priced.
    """
    n, m, G = len(l), len(b), len(off) - 1
    z, s, work = np.zeros(n), np.zeros(n), np.zeros(n)
    h, used, cur = np.zeros(n), np.zeros(m, np.int64), np.zeros(G, np.int64)
    weight = np.zeros(m)
    for k in range(m):
        weight[k] = 1.0 / (f[k] + 1.0)
    capacity = len(bound)
    for _ in range(most):
        if counts[1] == 0 or counts[0] + 2 > capacity:
            return
        node = ids[0]
        if keys[0] >= best[1]:
            return
        counts[1] = pop(keys, ids, counts[1])
        counts[3] += 1
        g, t = group[node], split[node]
        halves = 2 if g >= 0 else 1
        for half in range(halves):
            child = counts[0]
            counts[0] += 1
            parent[child] = node
            for p in range(n):
                allowed[child, p] = kept[node, p]
                z[p] = np.float64(point[node, p])
            if g >= 0:
                for p in range(off[g], off[g + 1]):
                    if (p < t) == (half == 1):
                        allowed[child, p] = 0
            for k in range(m):
                lam[child, k] = lam[node, k]
            for p in range(n):
                s[p] = d[p]
            code = evaluate_node(
                Q, l, const, e, off, grp, F, f, A, b, pairs, C, d, constant,
                child, allowed, kept, point, lam, bound, group, split, kind, z, s, work, cur,
                best[1], rounds,
            )  # fmt: skip
            if code == 1:
                bound[child] = max(bound[child], -np.inf)
                counts[1] = push(keys, ids, counts[1], max(bound[child], bound[node]), child)
                if counts[3] % 8 == 1:
                    for i in range(G):
                        top = -1
                        for p in range(off[i], off[i + 1]):
                            if allowed[child, p] and (top < 0 or z[p] > z[top]):
                                top = p
                        cur[i] = top
                    fields(d, P, A, cur, h, used)
                    if repair(P, off, A, b, cur, h, used, weight):
                        tabu_search(d, P, off, grp, A, b, cur, 0, 200, 1, 1)
                        code = 2
            if code == 2:
                value = constant
                for i in range(G):
                    value += d[cur[i]]
                    for j in range(i if len(C) else 0):
                        value += C[cur[i], cur[j]]
                # Without an incumbent best is infinite, and infinity minus infinity no number.
                good = not np.isfinite(best[0]) or value < best[0] - 1e-13 * abs(best[0])
                for k in range(m):
                    total = 0
                    for i in range(G):
                        total += A[k, cur[i]]
                    if total > b[k]:
                        good = False
                for r in range(len(pairs)):
                    if (
                        cur[grp[pairs[r, 0]]] == pairs[r, 0]
                        and cur[grp[pairs[r, 1]]] == pairs[r, 1]
                    ):
                        good = False
                if good:
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

"""Compiled parts of branch and bound: node relaxations by coordinate descent, and the tree.

Shared notation: ``Q`` f64[n, n] (f64[0, 0] stands for zeros) and ``l`` f64[n] of the convex
function ``q(x) = const + l·x + ½ xᵀQx``, ``off`` i64[G+1], ``A``/``F`` i64/f64[m, n] costs,
``b``/``f`` i64/f64[m] limits, ``e`` f64[n] rounding allowance of one entry of ``s = l + Qz``,
``ok`` u8[n] rows of a node's region, ``lam`` f64[m] multipliers.

A bound computed here subtracts an allowance for its own rounding (see ``node_bound``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bitquota.solver.compiled import compiled
from bitquota.solver.search_kernels import fields, repair, tabu_search

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Singles = NDArray[np.float32]
    Ints = NDArray[np.int64]
    Bytes = NDArray[np.uint8]

EPS = 2.3e-16


@compiled
def lagrangian(
    s: Floats, ok: Bytes, off: Ints, F: Floats, f: Floats, lam: Floats, k: int
) -> tuple[float, float]:
    """Return ``Σ_g min(s + λF) - λ·f`` and its slope in ``lam[k]`` (the least on ties)."""
    m = len(f)
    total, use = 0.0, 0.0
    for g in range(len(off) - 1):
        best, best_cost = np.inf, 0.0
        for p in range(off[g], off[g + 1]):
            if ok[p]:
                value = s[p]
                for j in range(m):
                    value += lam[j] * F[j, p]
                cost = F[k, p]
                if value < best or (value == best and cost < best_cost):
                    best, best_cost = value, cost
        total += best
        use += best_cost
    for j in range(m):
        total -= lam[j] * f[j]
    return total, use - f[k]


@compiled
def best_multiplier(
    s: Floats, ok: Bytes, off: Ints, F: Floats, f: Floats, lam: Floats, k: int
) -> float:
    """Maximise ``lagrangian`` over ``lam[k] >= 0`` in place and return the maximum.

    The function is concave and piecewise linear: a bracket's two lines meet above the maximum,
    and the meeting point is the next trial (finitely many, usually below ten).
    """
    start = lam[k]
    lam[k] = 0.0
    v0, g0 = lagrangian(s, ok, off, F, f, lam, k)
    if g0 <= 0.0:
        return v0
    low, v_low, g_low = 0.0, v0, g0
    high = start
    if high <= 0.0:
        spread = 0.0
        for p in range(len(s)):
            if ok[p]:
                spread = max(spread, abs(s[p]))
        high = (spread + 1e-300) / (f[k] + 1.0)
    v_high, g_high = 0.0, 1.0
    for _ in range(200):
        lam[k] = high
        v_high, g_high = lagrangian(s, ok, off, F, f, lam, k)
        if g_high <= 0.0:
            break
        low, v_low, g_low = high, v_high, g_high
        high *= 4.0
    if g_high > 0.0:
        return v_high
    best, best_lam = v_high, high
    if v_low > best:
        best, best_lam = v_low, low
    for _ in range(60):
        if g_low - g_high <= 0.0:
            break
        middle = (v_high - v_low + g_low * low - g_high * high) / (g_low - g_high)
        if not (low < middle < high):
            break
        lam[k] = middle
        value, slope = lagrangian(s, ok, off, F, f, lam, k)
        if value > best:
            best, best_lam = value, middle
        top = v_low + g_low * (middle - low)
        if value >= top - 1e-12 * (abs(top) + 1e-300):
            break
        if slope > 0.0:
            low, v_low, g_low = middle, value, slope
        else:
            high, v_high, g_high = middle, value, slope
    lam[k] = best_lam
    return best


@compiled
def gradient(Q: Floats, l: Floats, z: Floats, s: Floats) -> None:  # noqa: E741
    """Fill ``s = l + Qz``."""
    n = len(l)
    for p in range(n):
        s[p] = l[p]
    if not len(Q):
        return
    for q in range(n):
        if z[q] != 0.0:
            weight, row = z[q], Q[q]
            for p in range(n):
                s[p] += weight * row[p]


@compiled
def descend(
    Q: Floats, s: Floats, z: Floats, ok: Bytes, off: Ints, F: Floats, lam: Floats, sweeps: int
) -> float:
    """Lower ``q(z) + λ·Fz`` by moving weight between two rows of a group at a time.

    Exact line search for each pair; ``s`` is kept up to date. Returns the decrease of the last
    sweep.
    """
    n, m = len(s), F.shape[0]
    gain = 0.0
    for _ in range(sweeps):
        gain = 0.0
        for g in range(len(off) - 1):
            for _inner in range(3):
                low, low_value, high, high_value = -1, np.inf, -1, -np.inf
                for p in range(off[g], off[g + 1]):
                    if ok[p]:
                        value = s[p]
                        for j in range(m):
                            value += lam[j] * F[j, p]
                        if value < low_value:
                            low, low_value = p, value
                        if z[p] > 0.0 and value > high_value:
                            high, high_value = p, value
                slope = high_value - low_value
                if high < 0 or low == high or slope <= 0.0:
                    break
                curve = 0.0
                if len(Q):
                    curve = Q[low, low] + Q[high, high] - 2.0 * Q[low, high]
                step = z[high]
                if curve > 0.0 and slope < curve * step:
                    step = slope / curve
                decrease = step * (slope - 0.5 * curve * step)
                # Steps that change nothing visible cost as much as others: leave them out.
                if decrease <= 0.02 * gain / (g + 1.0) * 0.1 and step < z[high]:
                    break
                z[low] += step
                if step == z[high]:
                    z[high] = 0.0
                else:
                    z[high] -= step
                if len(Q):
                    row_low, row_high = Q[low], Q[high]
                    for p in range(n):
                        s[p] += step * (row_low[p] - row_high[p])
                gain += decrease
    return gain


@compiled
def node_bound(
    const: float, l: Floats, e: Floats, z: Floats, s: Floats, ok: Bytes, off: Ints,  # noqa: E741
    F: Floats, f: Floats, lam: Floats, work: Floats,
) -> float:  # fmt: skip
    """Return a bound on the node, best over multipliers (set in ``lam``), rounding allowed for.

    ``const + ½ (l - s)·z + Σ_g min_p (s_p - e_p + λF_p) - λf``, less an allowance for summation.
    """
    n, m = len(l), len(f)
    base, size = const, abs(const)
    for p in range(n):
        work[p] = s[p] - e[p]
        if z[p] != 0.0:
            term = 0.5 * (l[p] - s[p]) * z[p]
            base += term
            size += abs(term) + 0.5 * e[p] * z[p] / EPS / (n + 10.0)
    total = 0.0
    if m == 0:
        for g in range(len(off) - 1):
            best = np.inf
            for p in range(off[g], off[g + 1]):
                if ok[p] and work[p] < best:
                    best = work[p]
            total += best
    elif m == 1:
        total = best_multiplier(work, ok, off, F, f, lam, 0)
    else:
        for _ in range(3):
            before = total
            for k in range(m):
                total = best_multiplier(work, ok, off, F, f, lam, k)
            if total - before <= 1e-9 * abs(total):
                break
    for j in range(m):
        size += 3.0 * lam[j] * f[j]
    size += abs(total)
    # The last term covers numbers so small that rounding is no longer relative to them.
    return base + total - EPS * (n + 10.0) * size - 1e-300


@compiled
def restrict(z: Floats, s: Floats, ok: Bytes, off: Ints) -> None:
    """Move the weight of rows that are out onto allowed rows of their group (``s`` unchanged)."""
    for g in range(len(off) - 1):
        total, best = 0.0, -1
        for p in range(off[g], off[g + 1]):
            if not ok[p]:
                z[p] = 0.0
            else:
                total += z[p]
                if best < 0 or s[p] < s[best]:
                    best = p
        if total <= 1e-9:
            for p in range(off[g], off[g + 1]):
                z[p] = 0.0
            z[best] = 1.0
        else:
            for p in range(off[g], off[g + 1]):
                z[p] /= total


@compiled
def store(z: Floats, ok: Bytes, off: Ints, point: Singles) -> None:
    """Round ``z`` to float32 into ``point`` and set ``z`` to its exact-quotient reading."""
    for g in range(len(off) - 1):
        total = 0.0
        for p in range(off[g], off[g + 1]):
            value = np.float32(z[p]) if ok[p] else np.float32(0.0)
            if value < np.float32(1e-7):
                value = np.float32(0.0)
            point[p] = value
            total += np.float64(value)
        for p in range(off[g], off[g + 1]):
            z[p] = np.float64(point[p]) / total


@compiled
def relax(
    Q: Floats, l: Floats, const: float, e: Floats, off: Ints, F: Floats, f: Floats,  # noqa: E741
    ok: Bytes, z: Floats, s: Floats, lam: Floats, cutoff: float, rounds: int, point: Singles,
    work: Floats,
) -> float:  # fmt: skip
    """Bound one node: coordinate descent and multiplier steps until it is cut off or stalls.

    ``z`` and ``lam`` are warm starts and hold the certificate's values afterwards; ``s`` is the
    gradient at ``z``.
    """
    n, m = len(l), len(f)
    restrict(z, s, ok, off)
    gradient(Q, l, z, s)
    trial, best_lam, best_z = lam.copy(), lam.copy(), z.copy()
    best = -np.inf
    stalled = 0
    for step in range(rounds):
        if step > 0:
            descend(Q, s, z, ok, off, F, trial, 2)
        for k in range(m):
            lam[k] = trial[k]
        bound = node_bound(const, l, e, z, s, ok, off, F, f, lam, work)
        if bound > best:
            gained = bound > best + 0.05 * (cutoff - best)
            best = bound
            for k in range(m):
                best_lam[k] = lam[k]
            for p in range(n):
                best_z[p] = z[p]
        else:
            gained = False
        if best >= cutoff:
            break
        stalled = 0 if gained else stalled + 1
        if stalled >= 3:
            break
        for k in range(m):
            trial[k] += 0.5 * (lam[k] - trial[k])
    for k in range(m):
        lam[k] = best_lam[k]
    for p in range(n):
        z[p] = best_z[p]
    store(z, ok, off, point)
    gradient(Q, l, z, s)
    return node_bound(const, l, e, z, s, ok, off, F, f, lam, work)


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

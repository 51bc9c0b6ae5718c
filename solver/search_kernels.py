"""Compiled parts of the local search: swaps of one or two groups, and tabu search over them.

Shared notation: ``d`` f64[n] linear terms, ``C`` f64[n, n] pair terms (f64[0, 0] stands for
zeros), ``off`` i64[G+1], ``grp`` i64[n], ``A`` i64[m, n] costs, ``b`` i64[m] limits, ``cur`` i64[G]
chosen rows, ``h = d + C x`` f64[n], ``used = A x`` i64[m].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bitquota.solver.compiled import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

_TIE = 1e-13
"""Relative size of an improvement that counts; below it two plans are the same."""


@compiled
def fields(d: Floats, C: Floats, A: Ints, cur: Ints, h: Floats, used: Ints) -> float:
    """Fill ``h`` and ``used`` for ``cur`` and return the objective without the constant."""
    n = len(d)
    for p in range(n):
        h[p] = d[p]
    if len(C):
        for g in range(len(cur)):
            row = C[cur[g]]
            for p in range(n):
                h[p] += row[p]
    for k in range(A.shape[0]):
        total = 0
        for g in range(len(cur)):
            total += A[k, cur[g]]
        used[k] = total
    value = 0.0
    for g in range(len(cur)):
        value += 0.5 * (h[cur[g]] + d[cur[g]])
    return value


@compiled
def move(C: Floats, A: Ints, cur: Ints, h: Floats, used: Ints, g: int, p: int) -> None:
    """Choose row ``p`` in group ``g``."""
    old = cur[g]
    if old == p:
        return
    if len(C):
        new_row, old_row = C[p], C[old]
        for q in range(len(h)):
            h[q] += new_row[q] - old_row[q]
    for k in range(A.shape[0]):
        used[k] += A[k, p] - A[k, old]
    cur[g] = p


@compiled
def relax_descent(
    price: Floats, C: Floats, off: Ints, A: Ints, cur: Ints, h: Floats, used: Ints
) -> int:
    """Lower ``objective + price·x`` one group at a time, budgets ignored; returns the moves."""
    moves = 0
    for _ in range(60):
        changed = False
        for g in range(len(cur)):
            best, best_value = cur[g], h[cur[g]] + price[cur[g]]
            margin = _TIE * (abs(best_value) + 1e-300)
            for p in range(off[g], off[g + 1]):
                value = h[p] + price[p]
                if value < best_value - margin:
                    best, best_value = p, value
            if best != cur[g]:
                move(C, A, cur, h, used, g, best)
                changed = True
                moves += 1
        if not changed:
            break
    return moves


@compiled
def repair(
    C: Floats, off: Ints, A: Ints, b: Ints, cur: Ints, h: Floats, used: Ints, weight: Floats
) -> bool:
    """Lower weighted budget violation, least loss per violation first; returns feasibility."""
    m = A.shape[0]
    for _ in range(4 * len(h) + 10):
        violation = 0.0
        for k in range(m):
            if used[k] > b[k]:
                violation += weight[k] * (used[k] - b[k])
        if violation <= 0.0:
            return True
        best_g, best_p, best_score = -1, -1, np.inf
        for g in range(len(cur)):
            c = cur[g]
            for p in range(off[g], off[g + 1]):
                if p == c:
                    continue
                after = 0.0
                for k in range(m):
                    over = used[k] + A[k, p] - A[k, c] - b[k]
                    if over > 0:
                        after += weight[k] * over
                gain = violation - after
                if gain <= 0.0:
                    continue
                loss = h[p] - h[c]
                score = loss / gain if loss > 0.0 else loss * gain - 1.0
                if score < best_score:
                    best_g, best_p, best_score = g, p, score
        if best_g < 0:
            return False
        move(C, A, cur, h, used, best_g, best_p)
    return False


@compiled
def best_move(
    C: Floats, off: Ints, A: Ints, b: Ints, cur: Ints, h: Floats, used: Ints,
    tabu: Ints, now: int, aspire: float, pairs: int, e: Floats, da: Ints, diff: Floats,
) -> tuple[int, int, float]:  # fmt: skip
    """Return the feasible move of one or two groups that lowers the objective most.

    A move may not choose a row ``p`` with ``tabu[p] > now`` unless it changes the objective by
    less than ``aspire``. Returns rows ``(p, r, change)``; ``r = -1`` for a move of one group,
    ``p = -1`` for none. ``e``, ``da``, ``diff`` are work space.
    """
    n, m, G = len(h), A.shape[0], len(cur)
    best_p, best_r, best = -1, -1, np.inf
    for g in range(G):
        c = cur[g]
        for p in range(off[g], off[g + 1]):
            e[p] = h[p] - h[c]
            for k in range(m):
                da[k, p] = A[k, p] - A[k, c]
            if p == c:
                continue
            feasible = True
            for k in range(m):
                if used[k] + da[k, p] > b[k]:
                    feasible = False
            if feasible and e[p] < best and (tabu[p] <= now or e[p] < aspire):
                best_p, best_r, best = p, -1, e[p]
    if pairs == 0:
        return best_p, best_r, best
    for g in range(G - 1):
        c = cur[g]
        start = off[g + 1]
        for p in range(off[g], start):
            if p == c:
                continue
            if len(C):
                new_row, old_row = C[p], C[c]
                for q in range(start, n):
                    diff[q] = new_row[q] - old_row[q]
            for i in range(g + 1, G):
                base = e[p] - diff[cur[i]]
                ci = cur[i]
                for r in range(off[i], off[i + 1]):
                    change = base + e[r] + diff[r]
                    if change >= best or r == ci:
                        continue
                    feasible = True
                    for k in range(m):
                        if used[k] + da[k, p] + da[k, r] > b[k]:
                            feasible = False
                    if feasible and ((tabu[p] <= now and tabu[r] <= now) or change < aspire):
                        best_p, best_r, best = p, r, change
    return best_p, best_r, best


@compiled
def tabu_search(
    d: Floats, C: Floats, off: Ints, grp: Ints, A: Ints, b: Ints, cur: Ints,
    patience: int, most: int, pairs: int, seed: int,
) -> float:  # fmt: skip
    """Improve the feasible ``cur`` in place; returns the objective without the constant.

    Steepest descent over moves of one and (with ``pairs``) two groups, then tabu moves until
    ``patience`` of them in a row bring nothing or ``most`` are done. ``O(n²)`` per move with
    pairs, ``O(n)`` without. Deterministic for a seed.
    """
    n, m, G = len(d), A.shape[0], len(cur)
    h, used = np.empty(n), np.empty(m, np.int64)
    e, da, diff = np.zeros(n), np.zeros((m, n), np.int64), np.zeros(n)
    tabu = np.zeros(n, np.int64)
    value = fields(d, C, A, cur, h, used)
    best, best_cur = value, cur.copy()
    state = np.uint64(seed * 2654435761 + 88172645463325252)
    idle = 0
    for now in range(1, most + 1):
        margin = _TIE * (abs(best) + 1e-300)
        p, r, change = best_move(
            C, off, A, b, cur, h, used, tabu, now, best - value - margin, pairs, e, da, diff
        )
        if p < 0:
            idle += 1
            if idle > patience:
                break
            continue
        if change > -margin and patience == 0:
            break
        state ^= state << np.uint64(13)
        state ^= state >> np.uint64(7)
        state ^= state << np.uint64(17)
        tenure = 3 + G // 12 + int(np.int64(state % np.uint64(4 + G // 8)))
        tabu[cur[grp[p]]] = now + tenure
        move(C, A, cur, h, used, grp[p], p)
        if r >= 0:
            tabu[cur[grp[r]]] = now + tenure
            move(C, A, cur, h, used, grp[r], r)
        value += change
        if value < best - margin:
            best = value
            best_cur[:] = cur
            idle = 0
        else:
            idle += 1
            if idle > patience:
                break
    cur[:] = best_cur
    return fields(d, C, A, cur, h, used)


@compiled
def kick(off: Ints, A: Ints, b: Ints, cur: Ints, strength: int, seed: int) -> None:
    """Change ``strength`` random groups of the feasible ``cur``, staying feasible."""
    m, G = A.shape[0], len(cur)
    state = np.uint64(seed * 2654435761 + 88172645463325252)
    used = np.zeros(m, np.int64)
    for k in range(m):
        for g in range(G):
            used[k] += A[k, cur[g]]
    done, tries = 0, 0
    while done < strength and tries < 20 * strength + 50:
        tries += 1
        state ^= state << np.uint64(13)
        state ^= state >> np.uint64(7)
        state ^= state << np.uint64(17)
        g = int(np.int64(state % np.uint64(G)))
        size = off[g + 1] - off[g]
        p = off[g] + int(np.int64((state >> np.uint64(20)) % np.uint64(size)))
        feasible = p != cur[g]
        for k in range(m):
            if used[k] + A[k, p] - A[k, cur[g]] > b[k]:
                feasible = False
        if feasible:
            for k in range(m):
                used[k] += A[k, p] - A[k, cur[g]]
            cur[g] = p
            done += 1

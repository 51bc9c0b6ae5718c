"""Compiled parts of the local search: moves of one or two groups, and tabu search over them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bitquota.compiled import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Bytes = NDArray[np.uint8]

_TIE = 1e-13
"""Relative size of an improvement that counts; below it two plans are the same."""


class Space(NamedTuple):
    """What is searched.

    Attributes:
        d: f64[n], linear terms.
        C: f64[n, n], pair terms, forbidden pairs priced; f64[0, 0] stands for zeros.
        off: i64[G+1], first row of each group.
        grp: i64[n], group of each row.
        A: i64[m, n], costs.
        b: i64[m], limits.
        halt: u8[1], not 0 once a limit was reached.
    """

    d: Floats
    C: Floats
    off: Ints
    grp: Ints
    A: Ints
    b: Ints
    halt: Bytes


class Place(NamedTuple):
    """Where a search stands; moves change it.

    Attributes:
        cur: i64[G], chosen rows.
        h: f64[n], ``d + C x``.
        used: i64[m], ``A x``.
    """

    cur: Ints
    h: Floats
    used: Ints


class Steps(NamedTuple):
    """Work space of ``best_move``, and what it must not do.

    Attributes:
        tabu: i64[n], until when a row must not be chosen.
        e: f64[n], change of the objective by choosing a row in its group.
        da: i64[m, n], change of what is used.
        diff: f64[n], change of ``h`` by one move.
    """

    tabu: Ints
    e: Floats
    da: Ints
    diff: Floats


@compiled
def place(space: Space, cur: Ints) -> Place:
    """Return the place of the choice ``cur``, which moves will change."""
    h = space.d.copy()
    if len(space.C):
        for g in range(len(cur)):
            row = space.C[cur[g]]
            for p in range(len(h)):
                h[p] += row[p]
    used = np.zeros(len(space.b), np.int64)
    for k in range(len(used)):
        for g in range(len(cur)):
            used[k] += space.A[k, cur[g]]
    return Place(cur, h, used)


@compiled
def objective(space: Space, at: Place) -> float:
    """Return the objective without the constant."""
    value = 0.0
    for g in range(len(at.cur)):
        value += 0.5 * (at.h[at.cur[g]] + space.d[at.cur[g]])
    return value


@compiled
def move(space: Space, at: Place, p: int) -> None:
    """Choose row ``p`` in its group."""
    C, h = space.C, at.h
    old = at.cur[space.grp[p]]
    if old == p:
        return
    if len(C):
        new_row, old_row = C[p], C[old]
        for q in range(len(h)):
            h[q] += new_row[q] - old_row[q]
    for k in range(len(space.b)):
        at.used[k] += space.A[k, p] - space.A[k, old]
    at.cur[space.grp[p]] = p


@compiled
def relax_descent(space: Space, at: Place, price: Floats) -> int:
    """Lower ``objective + price·x`` one group at a time, budgets ignored; returns the moves."""
    cur, h, off = at.cur, at.h, space.off
    moves = 0
    for _ in range(60):
        before = moves
        for g in range(len(cur)):
            if space.halt[0]:
                return moves
            best, best_value = cur[g], h[cur[g]] + price[cur[g]]
            margin = _TIE * (abs(best_value) + 1e-300)
            for p in range(off[g], off[g + 1]):
                value = h[p] + price[p]
                if value < best_value - margin:
                    best, best_value = p, value
            if best != cur[g]:
                move(space, at, best)
                moves += 1
        if moves == before:
            break
    return moves


@compiled
def repair(space: Space, at: Place, weight: Floats) -> bool:
    """Lower weighted budget violation, least loss per violation first; returns feasibility."""
    cur, h, used, off, A, b = at.cur, at.h, at.used, space.off, space.A, space.b
    m = len(b)
    for _ in range(4 * len(h) + 10):
        violation = 0.0
        for k in range(m):
            if used[k] > b[k]:
                violation += weight[k] * (used[k] - b[k])
        if violation <= 0.0:
            return True
        if space.halt[0]:
            return False
        # Of all moves of one group, take the one of least loss per violation.
        best_p, best_score = -1, np.inf
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
                    best_p, best_score = p, score
        if best_p < 0:
            return False
        move(space, at, best_p)
    return False


@compiled
def fits(b: Ints, used: Ints, da: Ints, p: int, r: int) -> bool:
    """Return whether the budgets allow to choose rows ``p`` and ``r``."""
    for k in range(len(b)):  # noqa: SIM110  # as numba compiles it
        if used[k] + da[k, p] + da[k, r] > b[k]:
            return False
    return True


@compiled
def best_move(
    space: Space, at: Place, steps: Steps, now: int, aspire: float, pairs: int
) -> tuple[int, int, float]:
    """Return the feasible move of one or two groups that lowers the objective most.

    A move may not choose a row ``p`` with ``tabu[p] > now`` unless it changes the objective by
    less than ``aspire``. Returns rows ``(p, r, change)``; ``r = -1`` for a move of one group,
    ``p = -1`` for none.
    """
    cur, h, off, A = at.cur, at.h, space.off, space.A
    tabu, e, da = steps.tabu, steps.e, steps.da
    best_p, best = -1, np.inf
    for g in range(len(cur)):
        c = cur[g]
        for p in range(off[g], off[g + 1]):
            e[p] = h[p] - h[c]
            for k in range(len(space.b)):
                da[k, p] = A[k, p] - A[k, c]
        for p in range(off[g], off[g + 1]):
            allowed = p != c and e[p] < best and (tabu[p] <= now or e[p] < aspire)
            if allowed and fits(space.b, at.used, da, p, c):
                best_p, best = p, e[p]
    if pairs == 0:
        return best_p, -1, best
    return best_pair(space, at, steps, now, aspire, best_p, best)


@compiled
def best_pair(
    space: Space, at: Place, steps: Steps, now: int, aspire: float, best_p: int, best: float
) -> tuple[int, int, float]:
    """Return the best move of two groups where it is better than ``best``, that of ``best_p``."""
    cur, off, C = at.cur, space.off, space.C
    tabu, e, diff = steps.tabu, steps.e, steps.diff
    best_r = -1
    for g in range(len(cur) - 1):
        if space.halt[0]:
            break
        start = off[g + 1]
        for p in range(off[g], start):
            if p == cur[g]:
                continue
            if len(C):
                new_row, old_row = C[p], C[cur[g]]
                for q in range(start, len(diff)):
                    diff[q] = new_row[q] - old_row[q]
            for i in range(g + 1, len(cur)):
                c = cur[i]
                base = e[p] - diff[c]
                for r in range(off[i], off[i + 1]):
                    change = base + e[r] + diff[r]
                    if change >= best or r == c:
                        continue
                    allowed = (tabu[p] <= now and tabu[r] <= now) or change < aspire
                    if allowed and fits(space.b, at.used, steps.da, p, r):
                        best_p, best_r, best = p, r, change
    return best_p, best_r, best


@compiled
def seeded(seed: int) -> np.uint64:
    """Return the first state of the random numbers of ``seed``."""
    return np.uint64(seed * 2654435761 + 88172645463325252)


@compiled
def xorshift(state: np.uint64) -> np.uint64:
    """Return the next state of the random numbers."""
    state ^= state << np.uint64(13)
    state ^= state >> np.uint64(7)
    state ^= state << np.uint64(17)
    return state


@compiled
def tabu_search(space: Space, cur: Ints, patience: int, most: int, pairs: int, seed: int) -> float:
    """Improve the feasible ``cur`` in place; returns the objective without the constant.

    Steepest descent over moves of one and (with ``pairs``) two groups, then tabu moves until
    ``patience`` of them in a row bring nothing, ``most`` are done or a limit strikes. ``O(n²)``
    per move with pairs, ``O(n)`` without. Deterministic for a seed.
    """
    n, m, G = len(space.d), len(space.b), len(cur)
    at = place(space, cur)
    steps = Steps(np.zeros(n, np.int64), np.zeros(n), np.zeros((m, n), np.int64), np.zeros(n))
    value = objective(space, at)
    best, best_cur = value, cur.copy()
    state = seeded(seed)
    idle = 0
    for now in range(1, most + 1):
        margin = _TIE * (abs(best) + 1e-300)
        p, r, change = best_move(space, at, steps, now, best - value - margin, pairs)
        if space.halt[0]:
            break
        idle += 1
        if p >= 0:
            if change > -margin and patience == 0:
                break
            # Move, and keep the rows that were left from coming back for a while.
            state = xorshift(state)
            tenure = 3 + G // 12 + int(np.int64(state % np.uint64(4 + G // 8)))
            steps.tabu[cur[space.grp[p]]] = now + tenure
            move(space, at, p)
            if r >= 0:
                steps.tabu[cur[space.grp[r]]] = now + tenure
                move(space, at, r)
            value += change
            if value < best - margin:
                best = value
                best_cur[:] = cur
                idle = 0
        if idle > patience:
            break
    cur[:] = best_cur
    return objective(space, place(space, cur))


@compiled
def kick(space: Space, cur: Ints, strength: int, seed: int) -> None:
    """Change ``strength`` random groups of the feasible ``cur``, staying feasible."""
    off, A, b = space.off, space.A, space.b
    state = seeded(seed)
    used = place(space, cur).used
    done, tries = 0, 0
    while done < strength and tries < 20 * strength + 50:
        tries += 1
        state = xorshift(state)
        g = int(np.int64(state % np.uint64(len(cur))))
        size = off[g + 1] - off[g]
        p = off[g] + int(np.int64((state >> np.uint64(20)) % np.uint64(size)))
        feasible = p != cur[g]
        for k in range(len(b)):
            if used[k] + A[k, p] - A[k, cur[g]] > b[k]:
                feasible = False
        if feasible:
            for k in range(len(b)):
                used[k] += A[k, p] - A[k, cur[g]]
            cur[g] = p
            done += 1

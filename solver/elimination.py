"""Minima over choices whose terms join few groups, by eliminating one group after the other.

The groups that a term joins form a graph. A group is eliminated by writing down, for every state of
its remaining neighbours (its *separator*), the least value that it, and what was eliminated into
it, can have beside that state. Groups without terms have an empty separator; a block of ``k``
groups with all terms between them takes ``B^k`` numbers; a chain of any length ``B²`` a group. So
one mechanism covers independent blocks, chains and bands, and nothing is relaxed: the value found
is the least one, for any linear terms beside the pairs'.

References:
    [Dec99] R. Dechter: Bucket elimination, a unifying framework for reasoning, 1999.

Design: docs/design/solver.md
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bitquota.compiled import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bitquota.solver.problem import Problem

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Bools = NDArray[np.bool_]

MOST_STATES = 1 << 22
"""States of all tables together up to which a problem is solved by elimination."""
PRICE, LARGEST_PRICES = 1e3, 1e297
"""Of a forbidden pair, relative to all terms together; and of all such pairs, so that sums end."""
_EPS = 2.3e-16


class Tables(NamedTuple):
    """The tables of all groups, in the order of elimination.

    The table of the ``k``-th group holds, for every state ``s`` of its separator and each row ``j``
    of its own, a number at ``begin[k] + s * width[k] + j``; its message, one for every ``s``, at
    ``message[k] + s``.

    Attributes:
        first: i64[G], the first row of the group.
        width: i64[G], how many it has.
        begin: i64[G+1].
        message: i64[G+1].
        parent: i64[G], into which table the message goes; -1 for none.
        child_begin, child: Of each table, those whose messages go into it.
        map_begin: i64[G], where the states of its separator stand, for the states of the parent.
        maps: i32[...], those.
        static: f64[...], the terms between the group and its separator.
    """

    first: Ints
    width: Ints
    begin: Ints
    message: Ints
    parent: Ints
    child_begin: Ints
    child: Ints
    map_begin: Ints
    maps: NDArray[np.int32]
    static: Floats


@dataclass(slots=True, kw_only=True, eq=False)
class Eliminated:
    """The order in which groups are eliminated, and their separators.

    Attributes:
        order: Groups.
        separators: Of each, in the order in which they are eliminated later.
        states: How many numbers all tables hold.
    """

    order: list[int]
    separators: list[list[int]]
    states: int


def priced(problem: Problem) -> Problem:
    """Return the problem with a term for each forbidden pair that no gain makes up for.

    What feasible choices are worth stays as it is, so a bound of this problem is one of the other.
    """
    pairs = problem.all_forbidden_pairs()
    if not len(pairs):
        return problem
    size = float(np.maximum.reduceat(np.abs(problem.diagonal), problem.offsets[:-1]).sum())
    size += float(np.abs(problem.term_values).sum())
    if problem.factor is not None:
        size += float(np.square(np.abs(problem.factor).sum(axis=0)).sum())
    price = min(PRICE * size, LARGEST_PRICES / len(pairs)) or 1.0
    terms, at = np.unique(np.concatenate([problem.terms, pairs]), axis=0, return_inverse=True)
    values = np.concatenate([problem.term_values, np.full(len(pairs), price)])
    total = np.zeros(len(terms))
    np.add.at(total, at.ravel(), values)
    return replace(problem, terms=terms, term_values=total)


def neighbours(problem: Problem) -> dict[int, set[int]]:
    """Return for each group with terms the groups that these join it to."""
    found: dict[int, set[int]] = {}
    group = problem.group_of_row
    ends = np.unique(group[problem.terms], axis=0) if len(problem.terms) else problem.terms
    for g, h in ends.tolist():
        found.setdefault(g, set()).add(h)
        found.setdefault(h, set()).add(g)
    return found


def eliminated(problem: Problem, most: int = MOST_STATES) -> Eliminated | None:
    """Return a cheap order of elimination, or ``None`` if its tables exceed ``most`` states.

    The group whose table is smallest goes next. Exponential in how entangled the groups are.
    """
    width: list[int] = np.diff(problem.offsets).tolist()
    near = neighbours(problem)
    order = [g for g in range(problem.n_groups) if g not in near]
    separators: list[list[int]] = [[] for _ in order]
    states = sum(width[g] for g in order)

    def size(g: int) -> int:
        found = width[g]
        for h in near[g]:
            found *= width[h]
        return found

    heap = [(size(g), g) for g in near]
    heapq.heapify(heap)
    while heap:
        cost, g = heapq.heappop(heap)
        if g not in near or cost != size(g):
            continue
        states += cost
        if states > most:
            return None
        between = near.pop(g)
        for h in between:
            near[h].discard(g)
            near[h] |= between - {h}
        for h in between:
            heapq.heappush(heap, (size(h), h))
        order.append(g)
        separators.append(list(between))
    place = {g: k for k, g in enumerate(order)}
    for separator in separators:
        separator.sort(key=place.__getitem__)
    return Eliminated(order=order, separators=separators, states=states)


def tables(problem: Problem, found: Eliminated) -> Tables:
    """Return the tables of an order. ``O(states)``."""
    counts, order = np.diff(problem.offsets), found.order
    G, place = len(order), {g: k for k, g in enumerate(order)}
    width = counts[order]
    shapes = [tuple(counts[s].tolist()) for s in found.separators]
    messages = np.array([int(np.prod(shape, dtype=np.int64)) for shape in shapes], dtype=np.int64)
    begin = np.concatenate([[0], np.cumsum(messages * width)]).astype(np.int64)
    parent = np.array([place[s[0]] if s else -1 for s in found.separators], dtype=np.int64)
    children = np.flatnonzero(parent >= 0)
    children = children[np.argsort(parent[children], kind="stable")]
    child_begin = np.searchsorted(parent[children], np.arange(G + 1)).astype(np.int64)
    # Which state of its separator each state of the parent's table has.
    maps, map_begin, at = [], np.zeros(G, dtype=np.int64), 0
    for k in children.tolist():
        up = int(parent[k])
        axes = [*found.separators[up], order[up]]
        state = np.zeros((*shapes[up], int(width[up])), dtype=np.int32)
        stride = 1
        for h in reversed(found.separators[k]):
            shape = [1] * len(axes)
            shape[axes.index(h)] = int(counts[h])
            state += (stride * np.arange(counts[h], dtype=np.int32)).reshape(shape)
            stride *= int(counts[h])
        maps.append(state.ravel())
        map_begin[k], at = at, at + state.size
    return Tables(
        first=problem.offsets[order], width=width, begin=begin,
        message=np.concatenate([[0], np.cumsum(messages)]).astype(np.int64), parent=parent,
        child_begin=child_begin, child=children.astype(np.int64), map_begin=map_begin,
        maps=np.concatenate([np.zeros(0, dtype=np.int32), *maps]),
        static=_terms(problem, found, place, begin),
    )  # fmt: skip


def _terms(problem: Problem, found: Eliminated, place: dict[int, int], begin: Ints) -> Floats:
    """Return f64[states], the terms of each group with its separator, in the tables' places."""
    static, counts = np.zeros(int(begin[-1])), np.diff(problem.offsets)
    if not len(problem.terms):
        return static
    # By the two groups that they join.
    group = problem.group_of_row
    ends = group[problem.terms]
    by = np.lexsort((ends[:, 1], ends[:, 0]))
    parts = np.split(by, np.flatnonzero(np.diff(ends[by], axis=0).any(axis=1)) + 1)
    for part in parts:
        g, h = ends[part[0]].tolist()
        block = np.zeros((counts[g], counts[h]))
        block[tuple((problem.terms[part] - problem.offsets[[g, h]]).T)] = problem.term_values[part]
        if place[g] > place[h]:
            g, h, block = h, g, block.T
        k = place[g]
        shape = [1] * len(found.separators[k])
        shape[found.separators[k].index(h)] = int(counts[h])
        table = static[begin[k] : begin[k + 1]].reshape(
            *counts[found.separators[k]].tolist(), int(counts[g])
        )
        table += block.T.reshape(*shape, int(counts[g]))
    return static


@compiled
def soften(
    t: Tables, s: Floats, ok: Bools, tau: float, share: Floats, soft: Floats, hard: Floats,
    halt: NDArray[np.uint8],
) -> bool:  # fmt: skip
    """Eliminate all groups under ``exp(-value/τ)``, and under minima beside it.

    Args:
        t: The tables.
        s: f64[n], linear terms.
        ok: bool[n], rows that may be chosen; every group has one.
        tau: The temperature.
        share: f64[states] gets the weight of each row beside each state of the separator.
        soft: f64[messages] gets ``-τ log Σ exp(-value/τ)``.
        hard: f64[messages] gets the least values.
        halt: u8[1].

    Returns:
        ``False`` where a limit struck.
    """
    for k in range(len(t.first)):
        if halt[0]:
            return False
        width, first = t.width[k], t.first[k]
        for state in range(t.message[k + 1] - t.message[k]):
            at = t.begin[k] + state * width
            least, hardest = np.inf, np.inf
            for j in range(width):
                share[at + j] = np.inf
                if not ok[first + j]:
                    continue
                a = t.static[at + j] + s[first + j]
                b = a
                for i in range(t.child_begin[k], t.child_begin[k + 1]):
                    c = t.child[i]
                    m = t.message[c] + t.maps[t.map_begin[c] + state * width + j]
                    a += soft[m]
                    b += hard[m]
                share[at + j] = a
                least, hardest = min(least, a), min(hardest, b)
            total = 0.0
            for j in range(width):
                x = (share[at + j] - least) / tau
                share[at + j] = np.exp(-x) if x < 40.0 else 0.0
                total += share[at + j]
            for j in range(width):
                share[at + j] /= total
            soft[t.message[k] + state] = least - tau * np.log(total)
            hard[t.message[k] + state] = hardest
    return True


@compiled
def marginals(t: Tables, share: Floats, weight: Floats, z: Floats) -> float:
    """Fill ``z`` f64[n] with the rows' weights, ``weight`` f64[messages] with the separators'.

    Returns the entropy.
    """
    z[:] = 0.0
    weight[:] = 0.0
    entropy = 0.0
    for k in range(len(t.first) - 1, -1, -1):
        width, first = t.width[k], t.first[k]
        if t.parent[k] < 0:
            weight[t.message[k]] = 1.0
        for state in range(t.message[k + 1] - t.message[k]):
            above = weight[t.message[k] + state]
            if above <= 0.0:
                continue
            for j in range(width):
                part = share[t.begin[k] + state * width + j]
                if part <= 0.0:
                    continue
                z[first + j] += above * part
                entropy -= above * part * np.log(part)
                for i in range(t.child_begin[k], t.child_begin[k + 1]):
                    c = t.child[i]
                    m = t.message[c] + t.maps[t.map_begin[c] + state * width + j]
                    weight[m] += above * part
    return entropy


@compiled
def spreads(
    t: Tables, U: Floats, A: Floats, share: Floats, weight: Floats, mean: Floats, out: Floats,
    at: Ints,
) -> int:  # fmt: skip
    """Fill ``out`` with weighted deviations whose products sum to the covariance of ``[U, A]``.

    Given the state of its separator, a group and what was eliminated into it vary about a mean;
    the variances of these conditional means, from the last group to the first, add up to that of
    the sum of all chosen rows.

    Args:
        t: The tables.
        U: f64[n, r].
        A: f64[m, n].
        share: Of ``soften``.
        weight: Of ``marginals``.
        mean: f64[messages, r + m], filled for states with weight.
        out: f64[rows, r + m].
        at: i64[2], the table and state to go on with; the tables' number when done.

    Returns:
        How many rows were filled.
    """
    r, m = U.shape[1], len(A)
    count = 0
    widest = t.width.max()
    rows = np.empty((widest, r + m))
    while at[0] < len(t.first):
        k = at[0]
        width, first = t.width[k], t.first[k]
        for state in range(at[1], t.message[k + 1] - t.message[k]):
            above = weight[t.message[k] + state]
            if above <= 1e-13:
                continue
            if count + width > len(out):
                at[1] = state
                return count
            middle = mean[t.message[k] + state]
            middle[:] = 0.0
            heaviest = 0.0
            for j in range(width):
                here = t.begin[k] + state * width + j
                if above * share[here] <= 1e-13:
                    continue
                for i in range(r):
                    rows[j, i] = U[first + j, i]
                for i in range(m):
                    rows[j, r + i] = A[i, first + j]
                for i in range(t.child_begin[k], t.child_begin[k + 1]):
                    c = t.child[i]
                    below = mean[t.message[c] + t.maps[t.map_begin[c] + state * width + j]]
                    for x in range(r + m):
                        rows[j, x] += below[x]
                for x in range(r + m):
                    middle[x] += share[here] * rows[j, x]
                heaviest = max(heaviest, share[here])
            if heaviest > 1.0 - 1e-9:
                continue
            for j in range(width):
                here = t.begin[k] + state * width + j
                if above * share[here] > 1e-13:
                    root = np.sqrt(above * share[here])
                    for x in range(r + m):
                        out[count, x] = root * (rows[j, x] - middle[x])
                    count += 1
        at[0], at[1] = k + 1, 0
    return count


@compiled
def lowest(
    t: Tables, s: Floats, ok: Bools, table: Floats, down: Floats, up: Floats, low: Floats,
    least: Floats,
) -> None:  # fmt: skip
    """Bound from below what any choice is worth, alone and with each row chosen.

    Every sum is lowered by more than its rounding, so all numbers are true bounds.

    Args:
        t: The tables.
        s: f64[n], linear terms.
        ok: bool[n], rows that may be chosen; every group has one.
        table: f64[states], room: the sums of the tables.
        down: f64[messages], room: the worth of what was eliminated.
        up: f64[messages], room: the worth of all else.
        low: f64[n] gets the least value of the row's component with the row chosen.
        least: f64[G], by elimination, gets that of the component.
    """
    for k in range(len(t.first)):
        width, first = t.width[k], t.first[k]
        for state in range(t.message[k + 1] - t.message[k]):
            at = t.begin[k] + state * width
            best = np.inf
            for j in range(width):
                table[at + j] = np.inf
                if not ok[first + j]:
                    continue
                value = t.static[at + j] + s[first + j]
                size = abs(t.static[at + j]) + abs(s[first + j])
                number = t.child_begin[k + 1] - t.child_begin[k]
                for i in range(t.child_begin[k], t.child_begin[k + 1]):
                    c = t.child[i]
                    m = t.message[c] + t.maps[t.map_begin[c] + state * width + j]
                    value += down[m]
                    size += abs(down[m])
                value -= _EPS * (number + 2.0) * size
                table[at + j] = value
                best = min(best, value)
            down[t.message[k] + state] = best
    low[:] = np.inf
    up[:] = np.inf
    for k in range(len(t.first) - 1, -1, -1):
        width, first = t.width[k], t.first[k]
        if t.parent[k] < 0:
            up[t.message[k]] = 0.0
            least[k] = down[t.message[k]]
        else:
            least[k] = least[t.parent[k]]
        for state in range(t.message[k + 1] - t.message[k]):
            beyond = up[t.message[k] + state]
            if beyond == np.inf:
                continue
            for j in range(width):
                if not ok[first + j]:
                    continue
                value = table[t.begin[k] + state * width + j]
                whole = value + beyond
                size = abs(value) + abs(beyond)
                low[first + j] = min(low[first + j], whole - _EPS * 2.0 * size)
                number = t.child_begin[k + 1] - t.child_begin[k]
                if number:
                    for i in range(t.child_begin[k], t.child_begin[k + 1]):
                        c = t.child[i]
                        m = t.message[c] + t.maps[t.map_begin[c] + state * width + j]
                        size += 2.0 * abs(down[m])
                    size += abs(t.static[t.begin[k] + state * width + j]) + abs(s[first + j])
                for i in range(t.child_begin[k], t.child_begin[k + 1]):
                    c = t.child[i]
                    m = t.message[c] + t.maps[t.map_begin[c] + state * width + j]
                    rest = whole - down[m] - _EPS * (number + 6.0) * size
                    up[m] = min(up[m], rest)


@compiled
def chosen(t: Tables, table: Floats, rows: Ints) -> None:
    """Fill ``rows`` i64[G], by elimination, with the best choice by the sums of ``lowest``."""
    state = np.zeros(len(t.first), dtype=np.int64)
    for k in range(len(t.first) - 1, -1, -1):
        width = t.width[k]
        at = t.begin[k] + state[k] * width
        best = 0
        for j in range(1, width):
            if table[at + j] < table[at + best]:
                best = j
        rows[k] = t.first[k] + best
        for i in range(t.child_begin[k], t.child_begin[k + 1]):
            c = t.child[i]
            state[c] = t.maps[t.map_begin[c] + state[k] * width + best]

"""What can be seen before anything is bounded: constants, symmetry, rows that are never better.

All of it leaves the problem's best choices alone, and a certificate says enough for the checker to
see the same.

Design: docs/design/solver.md
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from bitquota.compiled import compiled
from bitquota.solver.branch import Tree
from bitquota.solver.convex import convexify
from bitquota.solver.semidefinite import dominant_point

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from bitquota.solver.branch import Incumbent
    from bitquota.solver.core import Core
    from bitquota.solver.problem import Problem

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Bools = NDArray[np.bool_]
    Bytes = NDArray[np.uint8]

_EPS = 2.3e-16


def folded(problem: Problem, halt: Bytes | None = None) -> tuple[Problem, Floats]:
    """Return ``problem`` with blocks of ``cross`` that are sums ``a_p + b_q`` moved to the rest.

    Over one-hot vectors such a block of two groups is linear. Only blocks that are sums to the
    last bit are moved, constants among them; none once ``halt`` u8[1] is set. ``O(n²)``.

    Returns:
        The problem, and f64[n] what the rounding of the move may have done to one entry of
        ``diagonal`` (that of the constant is spread over the groups).
    """
    none = np.zeros(problem.n_rows)
    if problem.cross is None:
        return problem, none
    starts, group, G = problem.offsets[:-1], problem.group_of_row, problem.n_groups
    # Margins are read at each group's least loss, which is none that diverged.
    at = np.lexsort((np.abs(problem.diagonal), group))[starts]
    linear = np.zeros((G, G), dtype=np.bool_)
    C, halt = problem.cross, np.zeros(1, dtype=np.uint8) if halt is None else halt
    find_sums(C, problem.offsets, at, linear, halt)
    linear &= linear.T
    if not linear.any() or halt[0]:
        return problem, none
    by_row = C[:, at]
    moved = np.where(linear[group], by_row, 0.0)  # [n, G]
    corner = np.where(linear, by_row[at], 0.0)
    size = np.abs(moved).sum(axis=1) + np.abs(problem.diagonal)
    constant = np.abs(corner).sum() + abs(problem.constant)
    rounding = _EPS * (G + 4.0) * (size + (G + 4.0) * constant / G)
    return (
        replace(
            problem,
            diagonal=problem.diagonal + moved.sum(axis=1),
            cross=np.where(linear[group][:, group], 0.0, C),
            constant=problem.constant - 0.5 * float(corner.sum()),
        ),
        rounding,
    )


@compiled
def find_sums(C: Floats, off: Ints, at: Ints, linear: Bools, halt: Bytes) -> None:
    """Mark blocks whose rows differ by constants; ``at`` i64[G] is a row of each group."""
    for g in range(len(at)):
        if halt[0]:
            return
        first = off[g]
        for h in range(len(at)):
            same, filled = True, False
            for p in range(first, off[g + 1]):
                for q in range(off[h], off[h + 1]):
                    filled = filled or C[p, q] != 0.0
                    if C[p, q] - C[p, at[h]] != C[first, q] - C[first, at[h]]:
                        same = False
                        break
                if not same:
                    break
            linear[g, h] = same and filled


def _replaces(
    pairs: Ints, group: int, d: Floats, C: Floats | None, keep: Bools, starts: Ints
) -> tuple[Bools, Floats]:
    """Return for ``pairs`` i64[k, 2] of rows of a group what the first costs at most for the other.

    Whether it raises no term beside any of ``keep`` elsewhere, and by how much the objective rises
    in the worst case.
    """
    worst = d[pairs[:, 0]] - d[pairs[:, 1]]
    never = worst <= 0.0
    if C is None:
        return never, worst
    rises = np.where(keep, C[pairs[:, 0]] - C[pairs[:, 1]], -np.inf)
    most = np.maximum.reduceat(rises, starts, axis=1)
    most[:, group] = 0.0
    return never & (most <= 0.0).all(axis=1), worst + most.sum(axis=1)


def undominated(
    problem: Problem, keep: Bools, pairs: Ints, stop: Callable[[], bool] = lambda: False
) -> Bools:
    """Return ``keep`` without rows that another kept row of their group replaces at no loss.

    A row goes when another costs no more of any resource, is in no pair that it is not in, and
    lowers the objective (or leaves it as it is) beside any rows of ``keep`` elsewhere. What is left
    may leave more out when asked again, or when it was stopped. ``O(B n²)``.

    Args:
        problem: Its pairs do not count.
        keep: bool[n].
        pairs: i64[k, 2], the forbidden ones.
        stop: Asked between groups.
    """
    left, keep, n, starts = keep.copy(), keep.copy(), problem.n_rows, problem.offsets[:-1]
    enemies: dict[int, set[int]] = {}
    for a, b in pairs.tolist():
        enemies.setdefault(a, set()).add(b)
        enemies.setdefault(b, set()).add(a)
    d, A, C = problem.diagonal, problem.costs, problem.cross
    # What a row costs beside the first kept rows of the other groups, to leave most pairs out.
    first = np.maximum.reduceat(np.where(keep, -np.arange(n), -n), starts) * -1
    beside, rounding, sizes = d.copy(), np.abs(d), np.abs(d)
    for start, end in zip(starts, problem.offsets[1:], strict=True):
        if stop():
            return left
        if C is None:
            break
        part = C[start:end]
        beside[start:end] += part[:, first].sum(axis=1)
        rounding[start:end] += np.abs(part[:, first]).sum(axis=1)
        sizes[start:end] += np.abs(part).sum(axis=1)
    rounding *= 1e-9
    for g in range(problem.n_groups):
        if stop():
            break
        start, end = problem.offsets[g : g + 2].tolist()
        rows = start + np.flatnonzero(keep[start:end])
        # may[j, i]: row j costs no more than row i, and beside the first rows loses no more.
        cost, low, high = A[:, rows], beside[rows] - rounding[rows], beside[rows] + rounding[rows]
        may = (cost[:, :, None] <= cost[:, None, :]).all(axis=0) & (low[:, None] <= high)
        np.fill_diagonal(may, val=False)
        pairs_here = rows[np.argwhere(may)]
        if not len(pairs_here):
            continue
        never, worst = _replaces(pairs_here, g, d, C, keep, starts)
        # Either no term rises, or the sum falls by more than its rounding.
        never |= worst < -1e-13 * n * (sizes[pairs_here[:, 0]] + sizes[pairs_here[:, 1]])
        # The last rows first: of equal ones the first stays.
        for q, p in sorted(pairs_here[never].tolist(), key=lambda pair: (-pair[1], pair[0])):
            if left[p] and left[q] and enemies.get(q, set()) <= enemies.get(p, set()):
                left[p] = False
    return left


def interchangeable(problem: Problem) -> Ints:
    """Return i64[k, 2]: pairs of groups that can be exchanged, as chains, first before second.

    Two groups are, when exchanging what is chosen in them changes neither the objective nor what
    is used: then those choices suffice in which rows along a chain never fall. Groups in pairs are
    left out. ``O(G n)`` per kind of group.
    """
    C, off = problem.cross, problem.offsets
    if C is None:
        return np.zeros((0, 2), dtype=np.int64)
    paired = set(problem.group_of_row[problem.all_forbidden_pairs()].ravel().tolist())
    chains: dict[bytes, list[int]] = {}
    found: list[tuple[int, int]] = []
    for g in range(problem.n_groups):
        mine = slice(off[g], off[g + 1])
        parts = (problem.diagonal[mine], problem.costs[:, mine], problem.allowed[mine])
        ends = chains.setdefault(b"".join(part.tobytes() for part in parts), [])
        for k, h in enumerate(ends if g not in paired else ()):
            if _exchange(C, slice(off[h], off[h + 1]), mine):
                found.append((h, g))
                ends[k] = g
                break
        else:
            if g not in paired:
                ends.append(g)
    return np.array(found, dtype=np.int64).reshape(-1, 2)


def _exchange(C: Floats, a: slice, b: slice) -> bool:
    """Return whether exchanging the rows ``a`` and ``b`` leaves ``C`` as it is."""
    between = C[a, b]
    if not np.array_equal(between, between.T):
        return False
    changed = C[a] != C[b]
    changed[:, a] = changed[:, b] = False
    return not changed.any()


def ordered(problem: Problem, chains: Ints) -> Problem:
    """Return ``problem`` with the pairs that ``interchangeable`` groups need not meet."""
    pairs = [
        (int(problem.offsets[g]) + i, int(problem.offsets[h]) + j)
        for g, h in chains.tolist()
        for i in range(int(problem.offsets[g + 1] - problem.offsets[g]))
        for j in range(i)
    ]
    more = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return replace(problem, forbidden_pairs=np.concatenate([problem.forbidden_pairs, more]))


def hopeless(core: Core, incumbent: Incumbent) -> tuple[Tree, Ints] | None:
    """Return rows that lose more alone than the incumbent does, and a bounded root that drops them.

    A diverged candidate would set the scale of all numbers. The bound is too simple to be led
    astray by it: a diagonally dominant shift, at the incumbent. ``O(n²)``, and one Cholesky factor
    where there are such rows; ``None`` where there are none.

    Raises:
        Interrupted: A limit of the core struck meanwhile.
    """
    if incumbent.rows is None or ((cur := core.lower(incumbent.rows)) < 0).any():
        return None
    z = np.zeros(core.n)
    z[cur] = 1.0
    # What the formula would drop; most often nothing.
    starts, s = core.off[:-1], core.d
    if len(core.C):
        s = s + core.C @ z + np.abs(core.C).sum(axis=1) * (z - 0.5)
    low = np.minimum.reduceat(s, starts)
    bound = core.value(cur) - float(s @ z) + float(low.sum())
    if not (bound + s - low[core.grp] >= incumbent.cutoff).any():
        return None
    point = dominant_point(core, z)
    tree = Tree(core, convexify(core, point))
    tree.root(incumbent, z, point.multipliers, rounds=1)
    gone = np.flatnonzero(tree.kept[0] == 0)
    return (tree, gone) if len(gone) and tree.kind[0] == 1 else None


def largest_term(problem: Problem, keep: Bools, stop: Callable[[], bool] = lambda: False) -> float:
    """Return the largest term of rows ``keep``, or of those looked at before ``stop``."""
    most = max(abs(problem.constant), float(np.abs(problem.diagonal[keep]).max(initial=0.0)))
    if problem.factor is not None:
        most = max(
            most,
            float(np.einsum("ij,ij->i", problem.factor, problem.factor)[keep].max(initial=0.0)),
        )
    most = max(most, float(np.abs(problem.term_values).max(initial=0.0)))
    if problem.cross is not None:
        for row in np.flatnonzero(keep):
            if stop():
                break
            most = max(most, float(np.abs(problem.cross[row][keep]).max(initial=0.0)))
    return most

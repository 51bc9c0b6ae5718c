"""What the checker says about the regions of a certificate's nodes by integer reasoning alone.

Everything here is derived from the costs, limits and pairs of the problem, for many nodes at once.

Design: docs/design/certificates.md
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from bitquota.solver.problem import Problem

    Bools = NDArray[np.bool_]
    Ints = NDArray[np.int64]

_BLOCK = 200_000
"""Nodes times rows that are worked on at once."""


class Enemies(dict[int, set[int]]):
    """For each row, the rows that it must not meet; rows without any are left out."""

    def __missing__(self, row: int) -> set[int]:
        """Return nothing."""
        return set()

    def forbid(self, a: int, b: int) -> None:
        """Note that two rows must not meet."""
        self.setdefault(a, set()).add(b)
        self.setdefault(b, set()).add(a)


def blocks(nodes: Ints, n_rows: int) -> Iterator[Ints]:
    """Yield ``nodes`` in blocks that fit the processor's cache."""
    step = max(1, _BLOCK // n_rows)
    for start in range(0, len(nodes), step):
        yield nodes[start : start + step]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Regions:
    """Facts about ``N`` regions of one problem.

    Attributes:
        problem: The problem.
        enemies: For each row, the rows that it must not meet.
        masks: bool[N, n], the rows of each region.
        kept: bool[N, n], the rows that some child keeps.
        parents: bool[N], whether a region has children.
        empty: bool[N], whether it visibly holds no choice.
        single: bool[N], whether every group has one row.
        open: bool[N, n], rows that no child keeps and that neither a budget nor a pair excludes.
    """

    problem: Problem
    enemies: Enemies
    masks: Bools
    kept: Bools
    parents: Bools
    empty: Bools
    single: Bools
    open: Bools

    @classmethod
    def of(cls, problem: Problem, enemies: Enemies, masks: Bools, parent: Ints) -> Regions:
        """Derive the facts.

        Args:
            problem: The problem.
            enemies: See the class.
            masks: See the class.
            parent: i64[N], -1 for node 0 and below the node's own index elsewhere.

        Raises:
            ValueError: Children allow rows that their parent does not, or differ in two groups.
        """
        starts = problem.offsets[:-1]
        kept, parents = _kept(masks, parent, starts)
        counts = np.diff(problem.offsets)
        n, some = int(problem.offsets[-1]), bool(enemies)
        meets = np.zeros((n, n) if some else (0, 0), dtype=np.float32)
        for p, others in enemies.items():
            meets[p, list(others)] = 1.0
        empty = np.zeros(len(masks), dtype=np.bool_)
        single = np.zeros(len(masks), dtype=np.bool_)
        opened = masks & ~kept & parents[:, None]
        for block in blocks(np.arange(len(masks)), n):
            mask = masks[block]
            # Rows left per group, and pairs with rows that are certain.
            rows = np.add.reduceat(mask.astype(np.int64), starts, axis=1)
            single[block] = (rows == 1).all(axis=1)
            lost = (rows == 0).any(axis=1)
            alone = mask & np.repeat(rows == 1, counts, axis=1)
            if some:
                # Sums of ones are exact in float32 up to 2**24 rows.
                met = alone.astype(np.float32) @ meets > 0
                lost |= (alone & met).any(axis=1)
                opened[block] &= ~met
            # Budgets: the cheapest rows, and each row beside them.
            for cost, limit in zip(problem.costs, problem.limits.tolist(), strict=True):
                # Groups without rows count nothing: their regions are empty already.
                priced = np.where(mask, cost, np.iinfo(np.int64).max)
                least = np.minimum.reduceat(priced, starts, axis=1) * (rows > 0)
                room = limit - least.sum(axis=1)
                lost |= room < 0
                extra = cost - np.repeat(least, counts, axis=1)
                opened[block] &= extra <= room[:, None]
            empty[block] = lost
        return cls(
            problem=problem, enemies=enemies, masks=masks, kept=kept, parents=parents,
            empty=empty, single=single, open=opened,
        )  # fmt: skip

    @property
    def undecided(self) -> Bools:
        """bool[N]: the regions that need a formula, or children."""
        return ~self.empty & ~(self.single & ~self.parents)

    def open_rows(self, node: int) -> list[int]:
        """Return the removed rows of ``node`` that no simple argument excludes."""
        return np.flatnonzero(self.open[node]).tolist()

    def is_dominated(self, p: int, node: int) -> bool:
        """Return whether a kept row of its group is as good as ``p`` wherever ``node`` allows."""
        problem, mask = self.problem, self.masks[node]
        if problem.factor is not None or len(problem.terms):
            return False
        g = int(np.searchsorted(problem.offsets, p, side="right")) - 1
        start, stop = problem.offsets[g : g + 2].tolist()
        for q in (start + np.flatnonzero(self.kept[node, start:stop])).tolist():
            if bool((problem.costs[:, q] > problem.costs[:, p]).any()):
                continue
            if self.enemies[q] <= self.enemies[p] and self._never_worse(q, p, g, mask):
                return True
        return False

    def _never_worse(self, q: int, p: int, g: int, mask: Bools) -> bool:
        """Return whether ``q`` in place of ``p`` raises no objective; exact where it says yes."""
        problem = self.problem
        diagonal = problem.diagonal
        if problem.cross is None:
            return bool(diagonal[q] <= diagonal[p])
        others = mask.copy()
        others[problem.offsets[g] : problem.offsets[g + 1]] = False
        rows = np.flatnonzero(others)
        difference = problem.cross[q, rows] - problem.cross[p, rows]
        groups = np.searchsorted(problem.offsets, rows, side="right") - 1
        first = np.flatnonzero(np.diff(groups, prepend=-1))
        worst = diagonal[q] - diagonal[p]
        size = abs(diagonal[q]) + abs(diagonal[p])
        if len(rows):
            worst += np.maximum.reduceat(difference, first).sum()
            size += np.abs(problem.cross[[q, p]][:, rows]).sum()
        if worst > 1e-12 * len(mask) * size:  # far more than rounding can be
            return False
        total = Fraction(float(diagonal[q])) - Fraction(float(diagonal[p]))
        a, b = problem.cross[q].tolist(), problem.cross[p].tolist()
        for part in np.split(rows, first[1:]):
            total += max((Fraction(a[j]) - Fraction(b[j]) for j in part.tolist()), default=0)
        return total <= 0


def pairs_of_orders(problem: Problem, enemies: Enemies, orders: Ints) -> list[tuple[int, int]]:
    """Return the pairs of rows that the order of interchangeable groups rules out.

    Args:
        problem: The problem.
        enemies: For each row, the rows that it must not meet.
        orders: i64[k, 2], chains of groups (see ``solution.py``).

    Raises:
        ValueError: Groups that cannot be exchanged, or that form no chains.
    """
    pairs: list[tuple[int, int]] = []
    if orders.ndim != 2 or orders.shape[1] != 2:
        msg = f"'orders' must have two columns; got shape {orders.shape}"
        raise ValueError(msg)
    for column in orders.T.tolist():
        if len(set(column)) < len(column):
            msg = "'orders' must name a group once as the first and once as the second"
            raise ValueError(msg)
    last = len(problem.offsets) - 2
    for g, h in orders.tolist():
        if not 0 <= g < h <= last or not _exchangeable(problem, enemies, g, h):
            msg = f"'orders' must name groups that can be exchanged; got {g} and {h}"
            raise ValueError(msg)
        first, second = problem.offsets[[g, h]].tolist()
        size = int(problem.offsets[g + 1]) - first
        pairs += [(first + i, second + j) for i in range(size) for j in range(i)]
    return pairs


def _exchangeable(problem: Problem, enemies: Enemies, g: int, h: int) -> bool:
    """Return whether exchanging two groups' rows leaves the problem exactly as it is."""
    rows = [np.arange(*problem.offsets[k : k + 2]) for k in (g, h)]
    if len(rows[0]) != len(rows[1]) or any(enemies[p] for p in np.concatenate(rows).tolist()):
        return False
    exchanged = np.arange(problem.offsets[-1])
    exchanged[rows[0]], exchanged[rows[1]] = rows[1], rows[0]
    changed = np.concatenate(rows)
    return (
        np.array_equal(problem.diagonal[changed], problem.diagonal[exchanged[changed]])
        and np.array_equal(problem.allowed[changed], problem.allowed[exchanged[changed]])
        and np.array_equal(problem.costs[:, changed], problem.costs[:, exchanged[changed]])
        and problem.factor is None
        and not len(problem.terms)
        and (
            problem.cross is None
            or np.array_equal(
                problem.cross[changed], problem.cross[exchanged[changed]][:, exchanged]
            )
        )
    )


def _kept(masks: Bools, parent: Ints, starts: Ints) -> tuple[Bools, Bools]:
    """Return which rows the children keep, and who has children."""
    kept, parents = np.zeros_like(masks), np.zeros(len(masks), dtype=np.bool_)
    if len(parent) < 2:
        return kept, parents
    children = 1 + np.argsort(parent[1:], kind="stable")
    first = np.flatnonzero(np.diff(parent[children], prepend=-2))
    above = parent[children][first]
    below = masks[children]
    some = np.logical_or.reduceat(below, first, axis=0)
    every = np.logical_and.reduceat(below, first, axis=0)
    more = (some & ~masks[above]).any(axis=1)
    if more.any():
        node = int(above[np.argmax(more)])
        msg = f"the children of node {node} must not allow rows that it does not"
        raise ValueError(msg)
    differ = np.logical_or.reduceat(some & ~every, starts, axis=1).sum(axis=1) > 1
    if differ.any():
        msg = f"the children of node {int(above[np.argmax(differ)])} must differ in one group only"
        raise ValueError(msg)
    kept[above], parents[above] = some, True
    return kept, parents

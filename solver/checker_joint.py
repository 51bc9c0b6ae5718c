"""What the checker derives where few groups have terms together: least values by elimination.

The formula is the last one in the docstring of ``solution.py``. The order of elimination is
found here, and everything is done on arrays with one axis for every group: in floats with every
sum lowered by more than its rounding, or in integers.

Design: docs/design/certificates.md
"""

from __future__ import annotations

import heapq
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from bitquota.solver.checker_factor import FactorBounds, Formula, formulas
from bitquota.solver.outward import TINY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from bitquota.solver.problem import Problem

    Bools = NDArray[np.bool_]
    Ints = NDArray[np.int64]

_MOST_STATES = 1 << 23
"""Numbers of all arrays together beyond which nothing is proved."""
_AT_ONCE = 1 << 21
"""Numbers of the largest array, over all nodes that are worked on at once."""


def priced(problem: Problem, pairs: list[tuple[int, int]]) -> Problem:
    """Return the problem with a term for each of ``pairs``, which must not go together.

    No choice is worth less, and feasible ones are worth what they were: whatever the price, a bound
    of this problem is a bound. It is twice as high as what solvers need to make use of.
    """
    size = sum(
        float(np.abs(problem.diagonal[a:b]).max())
        for a, b in zip(problem.offsets[:-1], problem.offsets[1:], strict=True)
    )
    size += math.fsum(np.abs(problem.term_values).tolist())
    if problem.factor is not None:
        size += float((np.abs(problem.factor).sum(axis=0) ** 2).sum())
    price = max(min(2e3 * size, 2e297 / max(len(pairs), 1)), 2.0 * (size == 0.0))
    found = {(a, b): v for (a, b), v in zip(
        problem.terms.tolist(), problem.term_values.tolist(), strict=True
    )}  # fmt: skip
    for a, b in pairs:
        end = (min(a, b), max(a, b))
        found[end] = found.get(end, 0.0) + price
    return replace(
        problem, terms=np.array(list(found), dtype=np.int64).reshape(-1, 2),
        term_values=np.array(list(found.values())),
    )  # fmt: skip


class Components:
    """An order in which the groups are eliminated, and the terms that each step meets.

    Attributes:
        fits: Whether the arrays can be held.
        between: Of each group with terms, in order, those that it then has terms with.
        above: Which of these is eliminated first.
        alone: Groups without terms.
        largest: Numbers of the largest array.
    """

    def __init__(self, problem: Problem) -> None:
        """Find the order: the group of the smallest array goes first."""
        self.counts: list[int] = np.diff(problem.offsets).tolist()
        group = np.repeat(np.arange(len(self.counts)), self.counts)
        near: dict[int, set[int]] = {}
        self.blocks: dict[tuple[int, int], tuple[Ints, Ints, Ints]] = {}
        ends, places = group[problem.terms], problem.terms - problem.offsets[group[problem.terms]]
        by = np.lexsort((ends[:, 1], ends[:, 0]))
        cuts = np.flatnonzero(np.diff(ends[by], axis=0).any(axis=1)) + 1
        for part in np.split(by, cuts) if len(by) else ():
            g, h = ends[part[0]].tolist()
            near.setdefault(g, set()).add(h)
            near.setdefault(h, set()).add(g)
            self.blocks[g, h] = (part, *places[part].T)
        self.alone = [g for g in range(len(self.counts)) if g not in near]
        self.between: dict[int, list[int]] = {}
        self.largest = total = 1
        waiting = [(self._size({g} | near[g]), g) for g in near]
        heapq.heapify(waiting)
        while waiting and total <= _MOST_STATES:
            size, g = heapq.heappop(waiting)
            if g not in near or size != self._size({g} | near[g]):
                continue
            total, self.largest = total + size, max(self.largest, size)
            between = near.pop(g)
            for h in between:
                near[h] = (near[h] | between) - {g, h}
            for h in between:
                heapq.heappush(waiting, (self._size({h} | near[h]), h))
            self.between[g] = sorted(between)
        self.fits = total <= _MOST_STATES
        place = {g: at for at, g in enumerate(self.between)}
        self.above = {
            g: min(its, key=lambda h: place.get(h, -1)) for g, its in self.between.items() if its
        }

    def _size(self, groups: set[int]) -> int:
        return math.prod(self.counts[g] for g in groups)

    def least(
        self,
        values: list[Any],
        terms: Any,  # noqa: ANN401  # an array of any kind of number
        kept: list[Ints] | None,
        unit: Any,  # noqa: ANN401
    ) -> tuple[list[Any], list[Any], list[Any]]:
        """Return least values of ``k`` nodes, every one lowered by more than its rounding.

        Args:
            values: Of each group [k, rows].
            terms: [number], in the order of the problem's.
            kept: Of each group, which of its rows ``values`` holds; ``None`` for all.
            unit: Twice the unit roundoff of the numbers; 0 for integers.

        Returns:
            Of each component [k]; of each group [k] that of its component; of each group [k, rows]
            that of its component with the row chosen.
        """
        arrays = self._arrays(terms, kept)
        # Down: what was eliminated into each group, beside the states of its neighbours.
        tables: dict[int, tuple[list[int], Any, list[tuple[int, Any]]]] = {}
        waiting: dict[int, list[tuple[int, Any]]] = {}
        roots: dict[int, Any] = {}
        for g, between in self.between.items():
            axes = sorted([g, *between])
            parts = [_spread(values[g], [g], axes)]
            ends = [(min(g, h), max(g, h)) for h in between]
            parts += [_spread(arrays[e][None], list(e), axes) for e in ends if e in arrays]
            messages = [(c, _spread(m, self.between[c], axes)) for c, m in waiting.pop(g, [])]
            table = _sum([*parts, *(m for _, m in messages)], unit)
            tables[g] = (axes, table, messages)
            if between:
                message = table.min(axis=1 + axes.index(g))
                waiting.setdefault(self.above[g], []).append((g, message))
            else:
                roots[g] = table.min(axis=1)
        # Up: what all else is worth beside these states. A message is part of its table's sum, so
        # that taking it off leaves a bound of what is left.
        up: dict[int, Any] = {}
        whole, low = dict(roots), list(values)
        for g, between in reversed(self.between.items()):
            axes, table, messages = tables.pop(g)
            if between:
                whole[g] = whole[self.above[g]]
                table = _sum([table, _spread(up.pop(g), between, axes)], unit)
            low[g] = table.min(axis=_others(axes, [g]))
            for c, message in messages:
                up[c] = _sum([table, -message], unit).min(axis=_others(axes, self.between[c]))
        for g in self.alone:
            roots[g] = whole[g] = values[g].min(axis=1)
        return list(roots.values()), [whole[g] for g in range(len(self.counts))], low

    def _arrays(self, terms: Any, kept: list[Ints] | None) -> dict[tuple[int, int], Any]:  # noqa: ANN401
        """Return the terms of each two groups that have any, [rows, rows]."""
        found = {}
        for (g, h), (part, first, second) in self.blocks.items():
            block = np.zeros((self.counts[g], self.counts[h]), dtype=terms.dtype)
            block[first, second] = terms[part]
            found[g, h] = block if kept is None else block[np.ix_(kept[g], kept[h])]
        return found


def _spread(array: Any, its: list[int], axes: list[int]) -> Any:  # noqa: ANN401
    """Return ``array`` [k, its groups' rows] with an axis for every group of ``axes``."""
    shape = iter(array.shape[1:])
    return array.reshape(array.shape[0], *(next(shape) if g in its else 1 for g in axes))


def _others(axes: list[int], its: list[int]) -> tuple[int, ...]:
    return tuple(1 + at for at, g in enumerate(axes) if g not in its)


def _sum(parts: list[Any], unit: Any) -> Any:  # noqa: ANN401
    """Return the sum, lowered by more than its rounding."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    if not unit or len(parts) == 1:
        return total
    size = np.abs(parts[0])
    for part in parts[1:]:
        size = size + np.abs(part)
    lost = unit * (len(parts) + 2) * size
    return np.where(np.isfinite(total), total - np.where(np.isfinite(lost), lost, 0), np.inf)


class JointBounds(FactorBounds):
    """The formula with terms of pairs, in floats, every rounding accounted for, or in integers.

    Args:
        problem: Its terms of pairs are ``terms``; it may have a factor.
        components: How these are eliminated.
        real: ``np.float64``, which processors are fast at, or ``np.longdouble``.
    """

    def __init__(
        self, problem: Problem, components: Components,
        real: type[np.floating[Any]] = np.longdouble,
    ) -> None:  # fmt: skip
        super().__init__(problem, real)
        self.components = components

    def nodes(
        self,
        masks: Bools,
        points: NDArray[Any],
        multipliers: NDArray[np.float64],
        removed: Sequence[list[int]],
    ) -> list[Formula]:
        """Return lower bounds of what ``node`` returns, for ``k`` nodes at once; see there."""
        step, found = max(1, _AT_ONCE // self.components.largest), []
        for at in range(0, len(masks), step):
            here = slice(at, at + step)
            found += self._some(masks[here], points[here], multipliers[here], removed[here])
        return found

    def _some(
        self, masks: Bools, points: NDArray[Any], multipliers: NDArray[np.float64],
        removed: Sequence[list[int]],
    ) -> list[Formula]:  # fmt: skip
        problem, real, starts = self.problem, self.real, self.problem.offsets[:-1]
        w, prices = points.astype(real), multipliers.astype(real)
        values = np.where(masks, self._rows(w, prices), real(np.inf))
        roots, whole, low = self.components.least(
            np.split(values, starts[1:], axis=1), problem.term_values.astype(real), None,
            np.finfo(real).eps,
        )  # fmt: skip
        total = self._total(w, prices, np.stack(roots, axis=1))
        counts = np.diff(problem.offsets)
        return formulas(
            total, np.concatenate(low, axis=1), np.stack(whole, axis=1), counts, removed,
            self._gamma(8), real(TINY),
        )  # fmt: skip

    def node(
        self, mask: Bools, point: NDArray[Any], multipliers: NDArray[np.float64],
        removed: list[int],
    ) -> Formula:  # fmt: skip
        """Return what the node proves, and what it proves with each removed row chosen. Exact."""
        problem = self.problem
        values, terms, unit, total = self._integers(point, multipliers, problem.term_values)
        pieces = zip(problem.offsets[:-1].tolist(), problem.offsets[1:].tolist(), strict=True)
        kept = [np.flatnonzero(mask[a:b]) for a, b in pieces]
        rows = [a + its for a, its in zip(problem.offsets[:-1].tolist(), kept, strict=True)]
        roots, whole, low = self.components.least(
            [values[its][None] for its in rows], terms, kept, 0
        )
        total += sum(int(root[0]) for root in roots) * unit
        by_row = {}
        for its, mine, component in zip(rows, low, whole, strict=True):
            for row, value in zip(its.tolist(), mine[0].tolist(), strict=True):
                by_row[row] = total + (int(value) - int(component[0])) * unit
        return total, [by_row[row] for row in removed]

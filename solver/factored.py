"""The solver for problems in factor form, which never makes ``U Uᵀ`` as a whole.

The relaxation (``factor_relaxation.py``) gives every row a price. Choices are sought among rows
that cost next to nothing more than the best of their group: these are few, so their pair terms are
a small matrix, and the search for small problems does the rest. Rows whose price exceeds the gap
go. Problems of up to ``INTERIOR_ROWS`` rows then get a tree under the factor's own convex
function: with few columns, a semidefinite bound gains less than a hundred of its nodes.

Design: docs/design/solver.md
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from bitquota.solver import search_kernels
from bitquota.solver.branch import Region
from bitquota.solver.core import first_least, reduce
from bitquota.solver.factor_relaxation import LOOSE, TOLERANCE, FactorForm
from bitquota.solver.quadratic import INTERIOR_ROWS, ROUNDING, Quadratic
from bitquota.solver.search import Effort, search, space_of
from bitquota.solver.semidefinite import plain_point

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bitquota.solver.control import Control
    from bitquota.solver.core import Core
    from bitquota.solver.factor_relaxation import Relaxed
    from bitquota.solver.problem import Problem
    from bitquota.solver.semidefinite import DualPoint
    from bitquota.solver.solution import Solution

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Bools = NDArray[np.bool_]

_ROUNDS = ((1.0, 8), (1.5, 8), (2.5, 4))
"""Rows that are looked at beside the best ones, per undecided group, and restarts: small matrices
found better choices than large ones in the same time."""
_PATIENCE = 10
"""Tabu moves without improvement: more restarts find better choices than longer ones."""
_DIVERGED = 1e6
"""Squares of a row of the factor so many times the median are looked at alone."""
_FEWEST = 20
_MOST = 400
"""Rows looked at beside the best ones: bounds for the factors above."""


def lost_in_products(problem: Problem, keep: Bools) -> Floats:
    """Return f64[n]: what rounding takes from sums of pair terms with a row, and of a choice's.

    Only the rows ``keep`` may be chosen.
    """
    norms, rank = np.zeros(problem.n_rows), 0
    if problem.factor is not None:
        norms = np.where(keep, np.einsum("ij,ij->i", problem.factor, problem.factor), 0.0)
        norms = np.sqrt(norms)
        rank = problem.factor.shape[1]
    most = float(np.maximum.reduceat(norms, problem.offsets[:-1]).sum())
    values = np.abs(problem.term_values)
    by_row = np.bincount(problem.terms.ravel(), np.repeat(values, 2), problem.n_rows)
    lost: Floats = np.abs(problem.diagonal) + norms * most + 0.5 * most * most
    lost += by_row + values.sum()
    lost *= 2.3e-16 * (problem.n_groups + rank + 8)
    return lost


class Entangled(Quadratic):
    """One run on a factor beside terms that join too many groups: all of them as one matrix."""

    def __init__(self, problem: Problem, control: Control) -> None:
        """Begin; see ``Quadratic``."""
        super().__init__(problem, control)
        self.rounding = lost_in_products(problem, problem.allowed)


class Factored(Quadratic):
    """One run on a problem in factor form; as ``Quadratic`` otherwise."""

    probes_first = False
    first_nodes = 1_000_000

    def __init__(self, problem: Problem, control: Control) -> None:
        """Begin; see ``Quadratic``."""
        super().__init__(problem, control)
        self.form = self._form()
        self.rounding = lost_in_products(problem, problem.allowed)

    def _form(self) -> FactorForm:
        return FactorForm(self.problem, self.control.halt)

    def run(self, start: Ints | None = None) -> Solution:
        """Solve as far as the limits and the method allow; see ``Quadratic.run``."""
        problem = self.problem
        if (root := self._begin(start)) is None:
            return self.run_regions([])
        # Bound, then choose among the rows that the bound leaves cheap.
        large = problem.n_rows > INTERIOR_ROWS
        relaxed = self._relax(root)
        self._choose(root, relaxed)
        if self._drop_diverged(root, self._out(root, relaxed)):
            relaxed = self._relax(root)
            self._choose(root, relaxed)
        if self.incumbent.rows is None and not large:
            self._search(root)
        # Rows whose price exceeds the gap go; what they leave sets the floor.
        gone = self._out(root, relaxed)
        left = root.keep & ~gone
        largest = float(self.form.squares[left].max(initial=0.0))
        largest = max(largest, float(np.abs(problem.diagonal[left]).max(initial=0.0)))
        self.incumbent.floor = ROUNDING * max(largest, abs(problem.constant))
        closed = root.bound >= self.incumbent.cutoff
        if closed or self.control.stopped() or large:
            return self._solution()
        self.rounding = lost_in_products(problem, left)
        if gone.any():
            root.keep = left
            root.node = self.record.node(root.node, root.keep)
            self._prove(root, relaxed)
        # The tree drops rows by its own root's formula, which needs a node of its own.
        root.node = self.record.node(root.node, root.keep)
        return self.run_regions([root])

    def _relax(self, root: Region) -> Relaxed:
        """Bound the root by the relaxation."""
        large = self.problem.n_rows > INTERIOR_ROWS
        self.root = self.form.relax(root.keep, TOLERANCE if large else LOOSE)
        self.nodes += 1
        self._prove(root, self.root)
        root.bound = self.current = self.root_bound = max(root.bound, self.root.bound)
        self._tell("bound")
        return self.root

    def _prove(self, region: Region, relaxed: Relaxed) -> None:
        """Give the region's node the formula of ``relaxed``, which was found for more rows."""
        entry = self.record.entries[region.node]
        entry.own, entry.w, entry.multipliers = relaxed.bound, relaxed.w, relaxed.prices

    def _point(self, core: Core, region: Region, *, strong: bool) -> DualPoint:
        """Return the factor's own convex function and the relaxation's optimum, at first."""
        if strong or region.plain_rows or not core.n_groups:
            return super()._point(core, region, strong=strong)
        point = plain_point(core, self.root.weights[core.rows], self.root.prices)
        width = point.shift.shape[1]
        # Row by row, the products with the rows of its group.
        U, at = self.form.U[core.rows], core.off[core.grp]
        for column in range(width):
            here = at + column
            inside = here < core.off[core.grp + 1]
            point.shift[inside, column] = np.einsum("ij,ij->i", U[inside], U[here[inside]])
        return point

    def _drop_diverged(self, region: Region, known: Bools) -> bool:
        """Drop rows that lose too much even if budgets cost nothing; returns whether any did.

        A diverged candidate sets the scale of prices, under which it may look cheap. Nothing is
        done where all such rows are ``known`` to go.
        """
        form, problem = self.form, self.problem
        none, before = np.zeros(len(problem.limits)), region.keep
        free = form.bound(region.keep, np.zeros(form.U.shape[1]), none, form.linear)
        excess = free.excess(problem)
        gone = region.keep & (excess > 0.0) & (free.bound + excess > self._beyond(free))
        left, group = region.keep & ~gone, problem.group_of_row
        if (gone & ~known).any() and np.logical_or.reduceat(left, problem.offsets[:-1]).all():
            region.node = self.record.node(region.node, region.keep)
            self._prove(region, free)
            region.bound = self.current = max(region.bound, free.bound)
            region.keep = left
            region.node = self.record.node(region.node, region.keep)
        # A row of the factor is bounded at a `w` of its own.
        far = form.squares > _DIVERGED * float(np.median(form.squares))
        for row in np.flatnonzero(region.keep & far & ~known).tolist():
            alone = region.keep & (group != group[row])
            alone[row] = True
            own = form.bound(alone, form.U[row], none, form.linear)
            rest = region.keep.copy()
            rest[row] = False
            if own.bound > self._beyond(own) and rest[group == group[row]].any():
                self._prove(Region(node=self.record.node(region.node, alone), keep=alone), own)
                region.keep, region.node = rest, self.record.node(region.node, rest)
        return region.keep is not before

    def _out(self, region: Region, relaxed: Relaxed) -> Bools:
        """Return the rows of ``region`` whose price exceeds the gap."""
        return region.keep & (relaxed.bound + relaxed.excess(self.problem) > self._beyond(relaxed))

    def _beyond(self, relaxed: Relaxed) -> float:
        """Return a number that is above the cutoff by more than a sum can be rounded."""
        size = float(np.abs(relaxed.least).sum()) + abs(relaxed.bound)
        return self.incumbent.cutoff + 1e-14 * size

    def _choose(self, region: Region, relaxed: Relaxed) -> None:
        """Search among the rows whose choice costs least beyond the relaxation."""
        excess = relaxed.excess(self.problem)
        self._round(region, relaxed)
        heaviest = np.maximum.reduceat(relaxed.weights, self.problem.offsets[:-1])
        undecided = int((heaviest < 0.999).sum())
        for index, (share, restarts) in enumerate(_ROUNDS):
            if self.control.stopped():
                return
            if self.problem.n_rows > INTERIOR_ROWS:  # no tree is to follow
                restarts *= 8  # noqa: PLW2901
            count = min(_MOST, max(_FEWEST, int(share * undecided)))
            effort = Effort(restarts=restarts, patience=_PATIENCE, bisections=8)
            self._look(region, excess, count, effort, index)

    def _round(self, region: Region, relaxed: Relaxed) -> None:
        """Offer the relaxation's heaviest rows, brought within the budgets by its prices."""
        linear = reduce(self._priced_alone(relaxed), region.keep, self.control.halt)
        if not linear.n_groups:
            self._take(linear.lift(np.zeros(0, dtype=np.int64)))
            return
        space = space_of(linear)
        weight = 1.0 / np.maximum(linear.b, 1).astype(np.float64)
        starts = (-relaxed.weights[linear.rows], weight @ linear.A if len(weight) else linear.d)
        for values in starts:
            cur = first_least(values, linear.off)
            if search_kernels.repair(space, search_kernels.place(space, cur), weight):
                self._take(linear.lift(cur))
                return

    def _priced_alone(self, relaxed: Relaxed) -> Problem:
        """Return the problem with pair terms replaced by what they are near the relaxation."""
        none = self.problem.forbidden_pairs[:0]
        return replace(
            self.problem, factor=None, diagonal=self.form.linear + self.form.U @ relaxed.w,
            forbidden_pairs=none, required_pairs=none,
        )  # fmt: skip

    def _look(self, region: Region, excess: Floats, count: int, effort: Effort, seed: int) -> None:
        """Search among the incumbent's rows and the ``count`` others of least ``excess``."""
        problem, chosen = self.problem, self.incumbent.rows
        few = region.keep & (excess <= 0.0)
        if chosen is not None:
            few = np.zeros(problem.n_rows, dtype=np.bool_)
            few[chosen] = True
        others = np.flatnonzero(region.keep & ~few)
        if len(others) > count:
            others = others[np.argpartition(excess[others], count)[:count]]
        few[others] = True
        core = reduce(problem, few, self.control.halt, self.rounding)
        if not core.n_groups:
            self._take(core.lift(np.zeros(0, dtype=np.int64)))
            return
        cur, _ = search(
            core,
            effort=effort,
            seed=self.control.options.seed * 31 + seed,
            starts=[] if chosen is None else [core.lower(chosen)],
            on_better=lambda cur, _value: self._take(core.lift(cur)),
            stop=self.control.stopped,
        )
        if cur is not None:
            self._take(core.lift(cur))

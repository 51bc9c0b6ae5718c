"""The solver for problems whose terms join few groups, alone or beside a factor.

A price on every budget, and the factor's dual vector ``w``, leave linear terms and those of pairs.
Their least value is found by elimination (``elimination.py``), so that the bound lacks nothing but
what prices cannot say of whole numbers: independent blocks and chains are bounded as tightly as
separable problems are. What remains is closed by regions that are split in two.

Design: docs/design/solver.md
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from bitquota.compiled import read_only
from bitquota.solver.branch import Region
from bitquota.solver.elimination import chosen, lowest, marginals, soften, spreads
from bitquota.solver.factor_relaxation import FactorForm, Relaxed, Terms, best_dual
from bitquota.solver.factored import Factored
from bitquota.solver.interruptible import Interrupted, go_on
from bitquota.solver.presolve import largest_term
from bitquota.solver.quadratic import MEMORY_LIMIT_BYTES, ROUNDING
from bitquota.solver.search import Effort
from bitquota.solver.separable import value_below
from bitquota.solver.solution import Limit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bitquota.solver.control import Control
    from bitquota.solver.elimination import Tables
    from bitquota.solver.problem import Problem
    from bitquota.solver.solution import Solution

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Bools = NDArray[np.bool_]
    Bytes = NDArray[np.uint8]

_ROWS = 4096
"""Deviations that are multiplied at a time."""
_LOOKS = ((20, 4), (80, 8), (200, 4))
"""Rows that are searched beside the best ones at the root, and restarts."""


class Joint:
    """Smoothed minima over components of groups; see ``factor_relaxation.Minima``."""

    def __init__(self, tables: Tables, ok: Bools, halt: Bytes) -> None:
        """Look at the rows ``ok`` of ``tables``."""
        self.tables, self.ok, self.halt, self.undecided = tables, read_only(ok), halt, 0
        self.largest = float(np.abs(tables.static).max(initial=0.0))
        self.share = np.empty(int(tables.begin[-1]))
        self.soft, self.hard, self.weight = (np.empty(int(tables.message[-1])) for _ in range(3))
        self.roots = tables.message[:-1][tables.parent < 0]

    def times(self, unit: float) -> Joint:
        """Return the same of terms ``unit`` times as large."""
        scaled = self.tables._replace(static=self.tables.static * unit)
        return Joint(scaled, self.ok, self.halt)

    def weigh(self, s: Floats, tau: float, z: Floats, found: Floats) -> None:
        """Fill ``z`` and ``found`` as the function ``weigh`` of separate groups does.

        Raises:
            Interrupted: A limit struck.
        """
        if not soften(self.tables, s, self.ok, tau, self.share, self.soft, self.hard, self.halt):
            raise Interrupted
        found[0], least = self.soft[self.roots].sum(), self.hard[self.roots]
        found[1], found[2] = least.sum(), np.abs(least).sum()
        found[3] = tau * marginals(self.tables, self.share, self.weight, z)

    def second(self, U: Floats, A: Floats, z: Floats) -> Floats:
        """Return the covariance of the sum of the chosen rows of ``[U, A]`` under the weights.

        Raises:
            Interrupted: A limit struck.
        """
        tables, width = self.tables, U.shape[1] + len(A)
        starts = np.sort(tables.first)
        self.undecided = int((np.maximum.reduceat(z, starts) < 1.0 - 1e-9).sum())
        H, mean = np.zeros((width, width)), np.empty((int(tables.message[-1]), width))
        out = np.empty((max(_ROWS, int(tables.width.max())), width))
        at = np.zeros(2, dtype=np.int64)
        while at[0] < len(tables.first):
            go_on(self.halt)
            count = spreads(tables, U, A, self.share, self.weight, mean, out, at)
            H += out[:count].T @ out[:count]
        return H


class JointForm(FactorForm):
    """What does not change while such a problem is relaxed."""

    def __init__(self, problem: Problem, halt: Bytes, tables: Tables) -> None:
        """Make room for tables."""
        super().__init__(problem, halt)
        self.tables = tables
        self.table = np.empty(int(tables.begin[-1]))
        self.down, self.up = (np.empty(int(tables.message[-1])) for _ in range(2))
        self.group = np.searchsorted(problem.offsets, tables.first)
        self.roots = np.flatnonzero(tables.parent < 0)

    def bound(self, keep: Bools, w: Floats, prices: Floats, weights: Floats) -> Relaxed:
        """Return what a dual point proves for the rows ``keep``; ``O(n r)`` and the tables."""
        least = self._eliminate(self.values(keep, w, prices), keep)
        ordered = np.empty_like(least)
        ordered[self.group] = least
        return Relaxed(
            w=w, prices=prices, weights=weights,
            bound=self.total(w, prices, least[self.roots]), lower=self.low, least=ordered,
        )  # fmt: skip

    def _eliminate(self, values: Floats, keep: Bools) -> Floats:
        """Return f64[G], the groups' least values in the tables' order; fills ``low``."""
        self.low, least = np.empty(len(values)), np.empty(len(self.group))
        keep = read_only(keep)
        lowest(self.tables, values, keep, self.table, self.down, self.up, self.low, least)
        return least

    def relax_near(self, keep: Bools, near: tuple[Floats, Floats] | None) -> Relaxed:
        """Return a dual point for ``keep``, sought from that of a larger region if there is one."""
        problem = self.problem
        terms = Terms(
            linear=self.linear, U=self.U, off=problem.offsets, ok=keep, A=problem.costs,
            b=problem.limits, constant=problem.constant, halt=self.halt,
        )  # fmt: skip
        minima = Joint(self.tables, keep, self.halt)
        return self.bound(keep, *best_dual(terms, minima=minima, near=near))

    def best_at(self, keep: Bools, w: Floats, prices: Floats) -> Ints:
        """Return i64[G], the rows of the best choice at ``w`` and prices."""
        self._eliminate(self.values(keep, w, prices), keep)
        rows = np.empty(len(self.group), dtype=np.int64)
        chosen(self.tables, self.table, rows)
        return np.sort(rows)


class Jointly(Factored):
    """One run on such a problem: regions with a price for every budget.

    Args:
        problem: Budgets already checked one by one (``Problem.check_budgets``).
        control: Goal, limits and callbacks, started.
        tables: Of ``elimination.tables``.
    """

    def __init__(self, problem: Problem, control: Control, tables: Tables) -> None:
        self.tables = tables
        super().__init__(problem, control)
        self.record.joint = True
        self.form: JointForm

    def _form(self) -> JointForm:
        return JointForm(self.problem, self.control.halt, self.tables)

    def run(self, start: Ints | None = None) -> Solution:
        """Solve to the relative gap asked for, or as far as the limits allow. Exact."""
        root = self._begin(start)
        # It gets a bound whatever the limits are.
        return self.run_regions([] if root is None else self._work(root))

    def _work(self, region: Region) -> list[Region]:
        """Bound a region and look for choices; returns what is left of it, split in two."""
        if not self._propagate(region):
            return []
        problem, starts = self.problem, self.problem.offsets[:-1]
        if (np.add.reduceat(region.keep, starts, dtype=np.int64) == 1).all():
            rows = np.flatnonzero(region.keep)
            self.record.entries[region.node].own = value_below(problem, rows)
            self._take(rows)
            return []
        most = self.control.options.node_limit
        if most is not None and self.nodes >= most and self.nodes:
            self.control.limit = Limit.NODE
            return [region]
        # Bound, and choose.
        relaxed = self.form.relax_near(region.keep, self._near(region.node))
        self._prove(region, relaxed)
        region.bound = max(region.bound, relaxed.bound)
        self.current = region.bound
        self.nodes += 1
        if self.nodes == 1:
            self.root_bound = min(region.bound, self.incumbent.cutoff)
        self._tell("bound")
        self._choose(region, relaxed)
        # Rows whose price exceeds the gap go; what those of the root leave sets the floor.
        gone = self._out(region, relaxed)
        diverged = self.nodes == 1 and self._drop_diverged(region, gone)
        if self.nodes == 1:
            self.incumbent.floor = ROUNDING * largest_term(problem, region.keep & ~gone)
        if region.bound >= self.incumbent.cutoff:
            return []
        self.memory += 8 * problem.n_rows + 8 * (len(relaxed.w) + len(relaxed.prices))
        if self.memory > MEMORY_LIMIT_BYTES:
            self.control.limit = Limit.MEMORY
            return [region]
        if diverged:  # what is left has prices of its own
            return [region]
        if gone.any():
            region.keep = region.keep & ~gone
            region.node = self.record.node(region.node, region.keep)
            self._prove(region, relaxed)
            if not np.logical_or.reduceat(region.keep, starts).all():
                self.record.entries[region.node].own = math.inf
                return []
        return self._halves(region, relaxed)

    def _near(self, node: int) -> tuple[Floats, Floats] | None:
        """Return the dual point of the nearest region above ``node`` that has one."""
        while node >= 0:
            entry = self.record.entries[node]
            if entry.w is not None and entry.multipliers is not None:
                return entry.w, entry.multipliers
            node = entry.parent
        return None

    def _halves(self, region: Region, relaxed: Relaxed) -> list[Region]:
        """Split where what rows cost at the prices differs most under the relaxation's weights."""
        problem, z = self.problem, relaxed.weights * region.keep
        starts, group = problem.offsets[:-1], problem.group_of_row
        z = z + 1e-12 * region.keep
        z = z / np.add.reduceat(z, starts)[group]
        value = relaxed.prices @ problem.costs + self.form.U @ relaxed.w
        value = np.where(region.keep, value, 0.0)
        mean = np.add.reduceat(z * value, starts)[group]
        spread = np.add.reduceat(z * np.abs(value - mean), starts)
        several = np.add.reduceat(region.keep, starts, dtype=np.int64) > 1
        if not (spread[several] > 0.0).any():
            spread = 1.0 - np.maximum.reduceat(z, starts)
        g = int(np.argmax(np.where(several, spread, -1.0)))
        rows = np.arange(*problem.offsets[g : g + 2])
        rows = rows[region.keep[rows]]
        rows = rows[np.lexsort((problem.diagonal[rows], value[rows]))]
        cut = 1 + int(np.searchsorted(np.cumsum(z[rows])[:-1], 0.5))
        children = []
        for part in (rows[: min(cut, len(rows) - 1)], rows[min(cut, len(rows) - 1) :]):
            keep = region.keep.copy()
            keep[rows] = False
            keep[part] = True
            node = self.record.node(region.node, keep)
            children.append(Region(node=node, keep=keep, bound=region.bound))
        return children

    def _choose(self, region: Region, relaxed: Relaxed) -> None:
        """Round by prices; at the root, search among rows that cost little more than these."""
        before = self.incumbent.objective
        self._round(region, relaxed)
        looks = _LOOKS if self.nodes == 1 else _LOOKS[: self.incumbent.objective < before]
        excess = relaxed.excess(self.problem)
        for index, (count, restarts) in enumerate(looks):
            if self.control.stopped() or region.bound >= self.incumbent.cutoff:
                return
            self._look(region, excess, count, Effort(restarts=restarts), index)

    def _round(self, region: Region, relaxed: Relaxed) -> None:
        """Offer the best choices at prices near the relaxation's that keep the budgets."""
        problem, w = self.problem, relaxed.w
        unit = float(np.abs(relaxed.least).max()) + 1e-290
        prices = np.maximum(relaxed.prices, 1e-9 * unit / np.maximum(problem.limits, 1))
        low, high = 0.0, math.inf
        for _ in range(24 if self.nodes == 1 else 10):
            factor = (
                math.sqrt((1.0 + low) * (1.0 + high)) - 1.0
                if high < math.inf
                else (8.0 * low if low else 1e-4)
            )
            rows = self.form.best_at(region.keep, w, (1.0 + factor) * prices)
            if (problem.costs[:, rows].sum(axis=1) <= problem.limits).all():
                self._take(rows)
                high = factor
            else:
                low = factor
            if self.control.stopped() or high - low < 1e-7:
                return

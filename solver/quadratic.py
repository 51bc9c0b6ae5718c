"""The exact solver for problems with cross-layer terms.

Regions (sets of rows that may still be chosen) wait in a queue, least bound first. A region gets
a semidefinite bound, loses the rows whose choice alone is cut off, and is searched by a tree of
cheap nodes; if that does not close it, it gets a stronger bound, and in the end it is split in
two.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from bitquota.solver.branch import Incumbent, Record, Region, Tree
from bitquota.solver.convex import convexify, cuts_between, next_cuts
from bitquota.solver.core import propagate_steps, reduce
from bitquota.solver.interruptible import Interrupted, go_on
from bitquota.solver.lifted import Lifted
from bitquota.solver.linear_relaxation import linear_relaxation
from bitquota.solver.presolve import (
    folded,
    hopeless,
    interchangeable,
    largest_term,
    ordered,
    undominated,
)
from bitquota.solver.search import DENSE_ROWS, default_effort, found_alone, rounded, search
from bitquota.solver.semidefinite import (
    DualPoint,
    dual_point,
    flat_point,
    interior_point,
    plain_point,
)
from bitquota.solver.separable import value_below
from bitquota.solver.solution import Limit, Solution, Stats, Status
from bitquota.solver.splitting import Splitting, continued
from bitquota.solver.tree_kernels import OPEN, SINGLE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bitquota.solver.control import Control
    from bitquota.solver.core import Core
    from bitquota.solver.problem import Problem

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Bools = NDArray[np.bool_]

MEMORY_LIMIT_BYTES = 2 * 2**30
"""Node arrays beyond this stop the solver with what is proved by then."""
SPARE_MEMORY_BYTES = 2**28
"""Unfinished trees are kept up to here, in case that their regions are not taken further."""
CLOSING_S = 1e-8
"""Seconds that one number of a node's point takes in the certificate, on a busy machine."""
TREE_NODES = 1200
"""Cheap nodes that take about as long as one semidefinite bound, at every size measured."""
SPLIT_NODES = 100
"""The same under cuts for all pairs, where a node takes longer and further steps gain more."""
FIRST_NODES = 300  # the same under the simple bound, which comes first
WEAK = 100.0  # relative gap of the simple bound beyond which no tree is grown under it
PROMISING = 0.125
"""A tree goes on beyond these when its gap has fallen to this part, and then by half each time
that its nodes double."""
PLAIN_AGAIN = 0.95
"""A region that products and cuts have made smaller than this is bounded without them again."""
PROBE_ROUNDS = 12
PROBE_ROWS = 3000
"""Rows up to which each is tried alone: of a separable problem with more, prices drop most."""
PAIR_ROWS = 1500
"""Separable regions with pairs of up to so many rows get the semidefinite bound (of problems of
up to ``DENSE_ROWS`` rows: a checker has to hold the shift as a matrix)."""
BOUND_TOLERANCE = 1e-2
"""Relative gap of the interior point: any dual iterate is valid, the rest is left to the tree."""
SPLIT_TOLERANCE = 1e-3
"""The same under cuts for all pairs: the tree gains less than the last two or three iterations."""
LARGE_ROWS, LARGE_TOLERANCE = 1500, 4e-2
"""Above so many rows an iteration takes seconds; probing at a looser bound comes first."""
FIRST_ROWS = 600
"""Above so many rows no tree is grown under the simple bound: a limit is never to leave none."""
SPLIT_ROWS = 1300
"""Between these the stronger bound has cuts for all pairs; beyond, a step takes too long."""
PATIENT_S = 30.0
"""Longer limits begin with it: it takes 18 s at 1,120 rows, the plain one 11."""
PATIENT_SEARCH = 3
"""How much longer they look for choices first: under noise the best come late (``search.py``)."""
INTERIOR_ROWS = 3500
"""Above so many rows an iteration of the interior point takes a minute, and the simple bound is
all there is."""
ROUNDING = 1e-12
"""Absolute gap that counts as none, relative to the largest term of the objective."""
_BATCH = 64
_NO_CUTS = np.zeros((0, 2), dtype=np.int64)


class Quadratic:
    """One run: the record, the incumbent and the queue of regions.

    Args:
        problem: Budgets already checked one by one (``Problem.check_budgets``).
        control: Goal, limits and callbacks, started. A seed gives one answer when no time limit
            strikes.
    """

    probes_first = True
    """Whether rows are probed under the first bound of a region."""
    first_nodes = TREE_NODES
    """Nodes of the tree under that bound."""

    def __init__(self, problem: Problem, control: Control) -> None:
        self.problem, self.control = problem, control
        # The same problem without constants, and with interchangeable groups in order.
        self.free, self.rounding = folded(problem, control.halt)
        chains = problem.offsets[:0, None].repeat(2, axis=1)
        if self.free.cross is not None and problem.n_rows <= INTERIOR_ROWS:
            chains = interchangeable(problem)
        self.posed = ordered(self.free, chains) if len(chains) else self.free
        self.record = Record(problem=problem, orders=chains)
        self.incumbent = Incumbent(gap=control.options.gap, floor=0.0)
        self.queue: list[tuple[float, int, Region]] = []
        self.current = -math.inf
        """Bound of the region that is being worked on; ``+inf`` between regions."""
        self.relaxed: tuple[Ints, Floats, Floats] = (_NO_CUTS[0:0, 0], np.zeros(0), np.zeros(0))
        self.nodes = 0
        self.iterations = 0
        self.memory = 0
        self.root_bound = -math.inf
        self.splitting: Splitting | None = None

    def run(self, start: Ints | None = None) -> Solution:
        """Solve to the relative gap asked for, or as far as the limits allow. Exact.

        Args:
            start: A choice to begin with; ignored when it is infeasible.
        """
        root = self._begin(start)
        if root is None or not self._undominated(root):
            return self.run_regions([])
        limit = self.control.options.time_limit_s
        patient = limit is None or limit > PATIENT_S
        longer = patient and self._splits(int(root.keep.sum()))
        try:
            self._search(root, times=PATIENT_SEARCH if longer else 1)
            while self._hopeless(root) and self._propagate(root):
                pass
        except Interrupted:
            if self.incumbent.rows is None:
                self._take(found_alone(self.problem, root.keep))
        stopped = self.control.stopped
        self.incumbent.floor = ROUNDING * largest_term(self.problem, root.keep, stopped)
        root.strong = patient and self._splits(int(root.keep.sum()))
        return self.run_regions([root])

    def _begin(self, start: Ints | None) -> Region | None:
        """Return the region of all rows, ``None`` where it has no choice; takes ``start``."""
        root = Region(node=self.record.node(-1, self.problem.allowed), keep=self.problem.allowed)
        self._take(None if start is None else self.problem.rows(start))
        return root if self._propagate(root) else None

    def _take(self, rows: Ints | None) -> None:
        """Offer ``rows``, one of each group, where there are such and they are feasible."""
        if rows is None:
            return
        choice = rows - self.problem.offsets[:-1]
        if self.problem.is_feasible(choice):
            self._offer(self.problem.evaluate(choice), rows)

    def run_regions(self, regions: list[Region]) -> Solution:
        """Prove on ``regions``, all there are, whose nodes are recorded; returns the solution."""
        for region in regions:
            heapq.heappush(self.queue, (region.bound, region.node, region))
        self.current = math.inf
        while self.queue and not self.control.stopped():
            if self.queue[0][0] >= self.incumbent.cutoff:
                break
            _, _, region = heapq.heappop(self.queue)
            self.current = region.bound
            try:
                children = self._work(region)
            except Interrupted:
                children = [region]
            for child in children:
                heapq.heappush(self.queue, (child.bound, child.node, child))
            self.current = math.inf
        return self._solution()

    @property
    def bound(self) -> float:
        """No choice is below it."""
        opened = min(self.current, self.queue[0][0] if self.queue else math.inf)
        return min(opened, self.incumbent.cutoff)

    def _offer(self, objective: float, rows: Ints) -> None:
        if self.incumbent.offer(objective, rows):
            self._tell("incumbent")

    def _tell(self, kind: str, bound: float = -math.inf) -> None:
        self.control.tell(kind, self.incumbent, max(bound, self.bound), self.nodes, self.problem)

    def _propagate(self, region: Region) -> bool:
        """Drop rows by integer reasoning; returns ``False`` when no choice is left."""
        for step in propagate_steps(self.posed, region.keep):
            if step is None:
                self.record.entries[region.node].own = math.inf
                return False
            region.keep = step
            region.node = self.record.node(region.node, step)
        return True

    def _undominated(self, region: Region) -> bool:
        """Drop rows that another one replaces; returns ``False`` when no choice is left."""
        if self.posed.cross is None:  # prices drop these, and more
            return True
        pairs, stop = self.posed.all_forbidden_pairs(), self.control.stopped
        while True:  # by the given terms, as a checker will see it
            left = undominated(self.problem, region.keep, pairs, stop)
            if np.array_equal(left, region.keep):
                return True
            region.keep, region.node = left, self.record.node(region.node, left)
            if not self._propagate(region):
                return False

    def _hopeless(self, region: Region) -> bool:
        """Drop rows that lose more alone than the incumbent does; returns whether any did."""
        if self.control.stopped() or int(region.keep.sum()) > INTERIOR_ROWS:
            return False
        core = self._reduced(region)
        if not core.n_groups or (found := hopeless(core, self.incumbent)) is None:
            return False
        tree, gone = found
        self.record.formula(region.node, tree, self.record.convexify(core, tree.convex))
        region.keep = region.keep.copy()
        region.keep[core.rows[gone]] = False
        region.node = self.record.node(region.node, region.keep)
        return True

    def _reduced(self, region: Region) -> Core:
        return reduce(self.posed, region.keep, self.control.halt, self.rounding)

    def _search(self, region: Region, *, times: int = 1) -> None:
        """Look for a better choice, ``times`` as long as usual."""
        core = reduce(self.free, region.keep, self.control.halt, self.rounding)
        if core.n_groups == 0:
            return
        starts = [] if self.incumbent.rows is None else [core.lower(self.incumbent.rows)]
        if not len(core.C) and not self.control.stopped():
            starts += rounded(core, self._linear(core)[1])
        effort = default_effort(int(region.keep.sum()))
        cur, value = search(
            core,
            effort=replace(effort, restarts=times * effort.restarts),
            seed=self.control.options.seed,
            starts=[s for s in starts if (s >= 0).all()],
            on_better=lambda cur, value: self._offer(value, core.lift(cur)),
            stop=self.control.stopped,
        )
        if cur is not None:
            self._offer(value, core.lift(cur))

    def _work(self, region: Region) -> list[Region]:
        """Bound and search a region; returns what is left of it, split in two.

        Raises:
            Interrupted: A limit struck; the region is as it was, or smaller.
        """
        strong, simple = region.strong, region.bound == -math.inf
        plain_gap, last_gap = math.inf, math.inf
        while (core := self._core(region)) is not None:
            # Bound: the first time by a simple shift, under which small trees often end (it knows
            # nothing of pairs); then by products and cuts, and without them on what these leave,
            # since trees under products are not tight where budget is left unspent.
            simple = simple and 0 < len(core.C) <= INTERIOR_ROWS
            simple &= core.n > FIRST_ROWS or not len(core.pairs)
            plain = not strong or core.n < PLAIN_AGAIN * region.plain_rows
            point = flat_point(core) if simple else self._point(core, region, strong=not plain)
            convex = convexify(core, point)
            index, tree = self.record.convexify(core, convex), Tree(core, convex)
            z = np.clip(point.row_values, 1e-6, None)
            if self._closed(region, tree, index, z, point.multipliers):
                return []
            separable = not len(core.C)
            gap = self.incumbent.objective - float(tree.bound[0])
            weak = core.n > FIRST_ROWS or gap > WEAK * abs(self.incumbent.objective)
            if (separable and self._priced(region, tree)) or (simple and weak):
                simple = False
                continue
            # Fix.
            probes = core.n <= PROBE_ROWS and (strong or self.probes_first)
            dropped = tree.probe(self.incumbent, PROBE_ROUNDS) if probes else []
            if dropped:
                region.keep = region.keep.copy()
                region.keep[core.rows[[d.row for d in dropped]]] = False
                region.node = self.record.probed(
                    region.node, core, dropped, index, self.incumbent.cutoff
                )
                z = tree.point[0].astype(np.float64)
                if self._closed(region, tree, index, z, tree.lam[0]):
                    return []
            # Branch, cheaply.
            most = FIRST_NODES if simple else TREE_NODES if strong else self.first_nodes
            if self._splits(core.n) and not plain:
                most = min(most, SPLIT_NODES)
            self._grow(tree, None if separable else most)
            if self._finished(region, tree, index):
                return [] if tree.done(self.incumbent) else [region]
            if simple:
                simple = False
                continue
            # Bound again where that has paid or was not tried, or split.
            gap = self.incumbent.objective - float(tree.bound[0])
            if not (self._splits(core.n) or (plain and len(region.cuts))):
                region.cuts = next_cuts(core, point)
            if plain:
                region.plain_rows, plain_gap = core.n, gap
            shrunk = len(dropped) > 0.15 * core.n
            if not plain and not shrunk and not gap < 0.75 * last_gap:
                return self._split(region, tree, strong=gap < 0.7 * plain_gap)
            last_gap, strong = last_gap if plain else gap, True
        return []

    def _core(self, region: Region) -> Core | None:
        """Return what is to be decided; ``None`` when that is nothing, which is recorded."""
        if not self._propagate(region):
            return None
        core = self._reduced(region)
        if core.n_groups == 0:
            self._single(region, core)
            return None
        if region.priced and len(core.pairs):
            core.C = np.zeros((core.n, core.n))  # pairs deserve the semidefinite bound
        return core

    def _finished(self, region: Region, tree: Tree, index: int) -> bool:
        """Record what a grown tree proves; returns whether it is done or a limit struck."""
        finished = tree.done(self.incumbent) or self.control.limit is not None
        if finished:
            self.record.attach(region.node, tree, index)
        elif self.memory < SPARE_MEMORY_BYTES and tree.open_bound() > float(tree.bound[0]):
            self.record.spare[region.node] = (index, tree)
        else:
            return False
        self.memory += tree.memory_bytes
        region.bound = max(region.bound, min(tree.open_bound(), self.incumbent.cutoff))
        return finished

    def _priced(self, region: Region, tree: Tree) -> bool:
        """Drop the rows that a separable region's root excludes; returns whether to start anew."""
        core = tree.core
        gone = core.rows[tree.kept[0] == 0]
        if len(gone) > 0.1 * core.n:
            region.keep = region.keep.copy()
            region.keep[gone] = False
            region.node = self.record.node(region.node, region.keep)
            if self._propagate(region):
                self._search(region)
            return True
        large = core.n > PAIR_ROWS or self.problem.n_rows > DENSE_ROWS
        if region.priced or not len(core.pairs) or large:
            return False
        region.priced = True
        return True

    def _closed(self, region: Region, tree: Tree, index: int, z: Floats, lam: Floats) -> bool:
        """Bound a tree's root from ``z`` and ``lam``; returns whether that closes the region."""
        code = tree.root(self.incumbent, z, lam)
        self.nodes += 1
        self.record.formula(region.node, tree, index)
        region.bound = max(region.bound, float(tree.bound[0]))
        self.current = region.bound
        if region.node <= 1 or self.root_bound == -math.inf:
            self.root_bound = max(self.root_bound, min(region.bound, self.incumbent.cutoff))
        if code == SINGLE:
            self._tell("incumbent")
        self._tell("bound")
        return code != OPEN

    def _split(self, region: Region, tree: Tree, *, strong: bool) -> list[Region]:
        g, t = int(tree.group[0]), int(tree.split[0])
        core = tree.core
        children = []
        for lower in (True, False):
            keep = region.keep.copy()
            out = np.arange(t, core.off[g + 1]) if lower else np.arange(core.off[g], t)
            keep[core.rows[out]] = False
            node = self.record.node(region.node, keep)
            children.append(
                Region(
                    node=node, keep=keep, bound=region.bound, strong=strong, cuts=region.cuts,
                    plain_rows=region.plain_rows,
                )
            )  # fmt: skip
        return children

    def _single(self, region: Region, core: Core) -> None:
        """All groups have one row left: the region's value is exact."""
        if not core.feasible:
            self.record.entries[region.node].own = math.inf
            return
        rows = core.lift(np.zeros(0, dtype=np.int64))
        self.record.entries[region.node].own = value_below(self.problem, rows)
        self._offer(core.constant, rows)

    def _linear(self, core: Core) -> tuple[Floats, Floats]:
        """Return prices and weights of a separable core's relaxation, the last one kept."""
        rows, prices, x = self.relaxed
        if not np.array_equal(rows, core.rows):
            prices, x = linear_relaxation(core)
            self.relaxed = core.rows, prices, x
        return prices, x

    def _point(self, core: Core, region: Region, *, strong: bool) -> DualPoint:
        """Return a dual point of the semidefinite bound.

        Raises:
            Interrupted: A limit struck, and a bound is known or too far away.
        """
        if not len(core.C):
            prices, x = self._linear(core)
            return plain_point(core, x, prices)
        if core.n > INTERIOR_ROWS:
            return flat_point(core)
        if core.n > FIRST_ROWS:
            go_on(core.halt)
        # Many rows: cuts for all pairs, without a multiplier of the interior point for each.
        scaled, unit = core.near_one()
        splitting = None
        if strong and self._splits(core.n):
            splitting = self.splitting = continued(self.splitting, scaled)
            lifted = Lifted(splitting.relaxed(), products=False)
        else:
            lifted = Lifted(scaled, products=strong)
            if strong:
                lifted.add_cuts(cuts_between(core, region.cuts))

        # Above every choice the bound only says that there is none, and its dual has no end.
        beyond = abs(scaled.constant) + float(np.abs(scaled.d).sum() + np.abs(scaled.C).sum())

        def enough(value: float) -> bool:
            self._tell("bound")
            closed = value / unit >= self.incumbent.cutoff or value > 2.0 * beyond
            return closed or self.control.stopped()

        tolerance = BOUND_TOLERANCE if core.n <= LARGE_ROWS else LARGE_TOLERANCE
        if splitting is not None:
            tolerance = SPLIT_TOLERANCE
        state, iterations = interior_point(lifted, tolerance=tolerance, stop=enough)
        self.iterations += iterations
        if self.control.limit is not None and self.record.entries[region.node].own > -math.inf:
            raise Interrupted
        point = dual_point(lifted, state)
        if splitting is not None:
            splitting.complete(point)
        return point.times(1.0 / unit)

    def _grow(self, tree: Tree, most_nodes: int | None) -> None:
        control, incumbent = self.control, self.incumbent
        told, before = control.cpu_seconds(), self.nodes
        promising = PROMISING * (incumbent.objective - tree.open_bound())
        while not tree.done(incumbent):
            control.closing_s = max(0.0, CLOSING_S * self.nodes * self.problem.n_rows - 0.1)
            if control.stopped():
                break
            if (most := control.options.node_limit) is not None and self.nodes >= most:
                control.limit = Limit.NODE
                break
            if self.memory + tree.memory_bytes > MEMORY_LIMIT_BYTES:
                control.limit = Limit.MEMORY
                break
            if most_nodes is not None and tree.n_nodes >= most_nodes:
                if not (gap := incumbent.objective - tree.open_bound()) <= promising:
                    break
                most_nodes, promising = 2 * most_nodes, 0.5 * gap
            # A branching makes two nodes.
            left = _BATCH if most is None else max(1, (most - self.nodes) // 2)
            better = tree.grow(incumbent, min(_BATCH, left))
            self.nodes = before + tree.n_nodes
            if better or control.cpu_seconds() - told > 0.2:
                told = control.cpu_seconds()
                self.current = max(self.current, tree.open_bound())
                self._tell("incumbent" if better else "progress")
        self.nodes = before + tree.n_nodes

    def _splits(self, rows: int) -> bool:
        return self.problem.cross is not None and FIRST_ROWS < rows <= SPLIT_ROWS

    def _solution(self) -> Solution:
        incumbent, control, problem = self.incumbent, self.control, self.problem
        certificate = self.record.finish(incumbent.cutoff)
        stats = Stats(
            nodes=self.nodes,
            cpu_seconds=control.cpu_seconds(),
            bound_iterations=self.iterations,
            root_bound=self.root_bound,
        )
        if incumbent.rows is None:
            status = Status.INFEASIBLE if control.limit is None else Status.UNKNOWN
            return Solution(
                status=status,
                limit=control.limit,
                bound=certificate.bound,
                stats=stats,
                certificate=certificate,
            )
        choice = incumbent.rows - problem.offsets[:-1]
        objective = problem.evaluate(choice)
        bound = min(certificate.bound, objective)
        # The certificate rounds down; a gap that is all rounding is no gap.
        # Bounds are rounded down by up to a few floors on top of the gap that pruning used.
        slack = incumbent.gap * abs(objective) * (1.0 + 1e-6) + 4.0 * incumbent.floor + 1e-290
        proved = objective - bound <= slack
        return Solution(
            status=Status.OPTIMAL if proved else Status.FEASIBLE,
            limit=None if proved else (control.limit or Limit.METHOD),
            choice=choice,
            objective=objective,
            bound=bound,
            stats=stats,
            certificate=certificate,
        )

"""Branch and bound over a core, and the record of it that becomes a certificate."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from bitquota.solver import tree_kernels as kernels
from bitquota.solver.convex import Convex, to_certificate
from bitquota.solver.search import penalised
from bitquota.solver.solution import Certificate, Convexification

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bitquota.solver.core import Core
    from bitquota.solver.problem import Problem

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Bools = NDArray[np.bool_]

FIRST_NODES = 1024
RELAX_ROUNDS = 40
ROOT_ROUNDS = 400


@dataclass(slots=True, kw_only=True, eq=False)
class Incumbent:
    """The best choice so far, shared by all stages.

    Attributes:
        gap: Relative gap that is to be proved.
        floor: Absolute gap that always suffices.
        objective: Its value, ``+inf`` without one.
        rows: The problem's chosen rows, or ``None``.
    """

    gap: float
    floor: float
    objective: float = math.inf
    rows: Ints | None = None

    @property
    def cutoff(self) -> float:
        """Bounds from here on prove the gap."""
        if not math.isfinite(self.objective):
            return math.inf
        return self.objective - max(self.gap * abs(self.objective), self.floor)

    def offer(self, objective: float, rows: Ints) -> bool:
        """Take a choice if it is better; returns whether it was."""
        if objective < self.objective:
            self.objective, self.rows = objective, rows.copy()
            return True
        return False


class Tree:
    """The nodes of one core under one convex function, in arrays that kernels fill."""

    def __init__(self, core: Core, convex: Convex) -> None:
        """Allocate room for the first nodes; it doubles on demand."""
        self.core, self.convex = core, convex
        n, m = core.n, len(core.b)
        self.F, self.f = core.A.astype(np.float64), core.b.astype(np.float64)
        self.P = penalised(core)
        self.allowed = np.zeros((FIRST_NODES, n), dtype=np.uint8)
        self.kept = np.zeros((FIRST_NODES, n), dtype=np.uint8)
        self.point = np.zeros((FIRST_NODES, n), dtype=np.float32)
        self.lam = np.zeros((FIRST_NODES, m))
        self.bound = np.full(FIRST_NODES, -np.inf)
        self.parent = np.full(FIRST_NODES, -1, dtype=np.int64)
        self.group = np.full(FIRST_NODES, -1, dtype=np.int64)
        self.split = np.full(FIRST_NODES, -1, dtype=np.int64)
        self.kind = np.zeros(FIRST_NODES, dtype=np.uint8)
        self.keys, self.ids = np.zeros(FIRST_NODES + 1), np.zeros(FIRST_NODES + 1, dtype=np.int64)
        self.counts = np.zeros(4, dtype=np.int64)
        self.closed = math.inf
        """Least bound at which a node was cut off."""

    @property
    def n_nodes(self) -> int:
        """Nodes bounded so far."""
        return int(self.counts[0])

    @property
    def memory_bytes(self) -> int:
        """What the node arrays take."""
        return sum(
            a.nbytes for a in (self.allowed, self.kept, self.point, self.lam, self.keys, self.ids)
        )

    def root(self, incumbent: Incumbent, z: Floats, lam: Floats) -> int:
        """Bound the root from the warm start ``z``, ``lam``; returns the kernel's code."""
        core, c = self.core, self.convex
        self.allowed[0] = 1
        self.lam[0] = lam
        z, s = z.copy(), core.d.copy()
        work, cur = np.zeros(core.n), np.zeros(core.n_groups, dtype=np.int64)
        code = int(
            kernels.evaluate_node(
                c.Q, c.l, c.const, c.error, core.off, core.grp, self.F, self.f, core.A, core.b,
                core.pairs, core.C, core.d, core.constant, 0, self.allowed, self.kept, self.point,
                self.lam, self.bound, self.group, self.split, self.kind, z, s, work, cur,
                incumbent.cutoff, ROOT_ROUNDS,
            )
        )  # fmt: skip
        self.counts[0] = 1
        if code == 1:
            self.keys[0], self.ids[0] = self.bound[0], 0
            self.counts[1] = 1
        elif code == 2:
            incumbent.offer(core.value(cur), core.lift(cur))
        return code

    def grow(self, incumbent: Incumbent, most: int) -> bool:
        """Branch up to ``most`` times; returns whether the incumbent improved."""
        if self.counts[0] + 2 * most + 2 > len(self.bound):
            self._double(int(self.counts[0]) + 2 * most + 2)
        core, c = self.core, self.convex
        best = np.array([incumbent.objective, incumbent.cutoff])
        cur = np.zeros(core.n_groups, dtype=np.int64)
        found = int(self.counts[2])
        kernels.grow(
            c.Q, c.l, c.const, c.error, core.off, core.grp, self.F, self.f, core.A, core.b,
            core.pairs, core.C, self.P, core.d, core.constant, self.allowed, self.kept,
            self.point, self.lam, self.bound, self.parent, self.group, self.split, self.kind,
            self.keys, self.ids, self.counts, best, cur, incumbent.gap, incumbent.floor, most,
            RELAX_ROUNDS,
        )  # fmt: skip
        if int(self.counts[2]) > found:
            return incumbent.offer(core.value(cur), core.lift(cur))
        return False

    def _double(self, least: int) -> None:
        size = max(2 * len(self.bound), least)
        for name in ("allowed", "kept", "point", "lam", "bound", "parent", "group", "split",
                     "kind", "keys", "ids"):  # fmt: skip
            old = getattr(self, name)
            new = np.zeros((size + (name in ("keys", "ids")), *old.shape[1:]), dtype=old.dtype)
            new[: len(old)] = old
            setattr(self, name, new)

    def open_bound(self) -> float:
        """Return the least bound of the open nodes, ``+inf`` when none is open."""
        return float(self.keys[0]) if self.counts[1] else math.inf

    def done(self, incumbent: Incumbent) -> bool:
        """Return whether every open node is cut off."""
        return self.open_bound() >= incumbent.cutoff

    def proved(self) -> Floats:
        """Return what each node proves: its own bound, or what its children prove if more."""
        count = self.n_nodes
        bound = self.bound[:count].copy()
        best = np.full(count, np.inf)
        has = np.zeros(count, dtype=np.bool_)
        for i in range(count - 1, 0, -1):
            own = max(bound[i], best[i]) if has[i] else bound[i]
            parent = int(self.parent[i])
            has[parent] = True
            best[parent] = min(best[parent], own)
        return np.where(has, np.maximum(bound, best), bound)


@dataclass(slots=True, kw_only=True, eq=False)
class Record:
    """What becomes a certificate: a chain of regions, then the tree of the last core."""

    problem: Problem
    convexifications: list[Convexification] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    allowed: list[Bools] = field(default_factory=list)
    convexification: list[int] = field(default_factory=list)
    point: list[NDArray[np.float32]] = field(default_factory=list)
    multipliers: list[Floats] = field(default_factory=list)

    def chain(self, allowed: Bools) -> None:
        """Append a region without a formula of its own below the last node."""
        self._append(len(self.parent) - 1, allowed)

    def _append(self, parent: int, allowed: Bools) -> None:
        self.parent.append(parent)
        self.allowed.append(allowed)
        self.convexification.append(-1)
        self.point.append(np.zeros(self.problem.n_rows, dtype=np.float32))
        self.multipliers.append(np.zeros(len(self.problem.limits)))

    def formula(self, tree: Tree) -> None:
        """Give the last node of the chain the formula of ``tree``'s root."""
        core = tree.core
        self.convexifications.append(to_certificate(self.problem, core, tree.convex.point))
        self.convexification[-1] = len(self.convexifications) - 1
        self.point[-1] = self._lift(core, tree.point[0])
        self.multipliers[-1] = tree.lam[0].copy()

    def _lift(self, core: Core, values: NDArray[np.float32]) -> NDArray[np.float32]:
        full = np.zeros(self.problem.n_rows, dtype=np.float32)
        full[core.rows] = values
        full[core.full[core.full >= 0]] = 1.0
        return full

    def finish(self, bound: float, tree: Tree | None) -> Certificate:
        """Append ``tree`` below the chain's last node (its root) and return the certificate."""
        n, m = self.problem.n_rows, len(self.problem.limits)
        extra = 0 if tree is None else tree.n_nodes - 1
        base = len(self.parent)
        parent = np.concatenate([self.parent, np.zeros(extra)]).astype(np.int64)
        masks = np.zeros((base + extra, n), dtype=np.bool_)
        masks[:base] = self.allowed
        conv = np.concatenate([self.convexification, np.full(extra, -1)]).astype(np.int64)
        point = np.zeros((base + extra, n), dtype=np.float32)
        point[:base] = self.point
        lam = np.zeros((base + extra, m))
        lam[:base] = self.multipliers
        if tree is not None and extra:
            core, count = tree.core, tree.n_nodes
            fixed = core.full[core.full >= 0]
            masks[np.ix_(np.arange(base, base + extra), core.rows)] = tree.allowed[1:count] > 0
            masks[base:, fixed] = True
            parent[base:] = tree.parent[1:count] + base - 1
            formula = tree.kind[1:count] == 1
            conv[base:] = np.where(formula, len(self.convexifications) - 1, -1)
            point[np.ix_(np.arange(base, base + extra), core.rows)] = tree.point[1:count]
            point[base:, fixed] = 1.0
            lam[base:] = tree.lam[1:count]
        return Certificate(
            bound=bound,
            convexifications=tuple(self.convexifications),
            parent=parent,
            allowed=np.packbits(masks, axis=1),
            convexification=conv,
            point=point,
            multipliers=lam,
        )

"""Branch and bound over a core, and the record of it that becomes a certificate.

Design: docs/design/solver.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from bitquota.solver import tree_kernels as kernels
from bitquota.solver.convex import Convex, to_certificate
from bitquota.solver.relaxation_kernels import Relaxed
from bitquota.solver.search import penalised
from bitquota.solver.solution import Certificate, Convexification

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bitquota.solver.core import Core
    from bitquota.solver.problem import Problem

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Bools = NDArray[np.bool_]
    Singles = NDArray[np.float32]

FIRST_NODES = 1024
RELAX_ROUNDS = 40
ROOT_ROUNDS = 400
PROBED_AT_ONCE, PROBING_PAYS = 256, 0.25
"""Rows are probed so many at a time, the lightest first, as long as such a part of them goes."""


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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Probed:
    """A row that was dropped, and the point and multipliers that prove it (zeros: no choice)."""

    row: int
    point: NDArray[np.float32]
    multipliers: Floats


class Tree:
    """The nodes of one core under one convex function, in arrays that kernels fill."""

    def __init__(self, core: Core, convex: Convex) -> None:
        """Allocate room for the first nodes; it doubles on demand."""
        self.core, self.convex = core, convex
        n, m = core.n, len(core.b)
        self.relaxed = Relaxed(
            Q=convex.Q, l=convex.l, const=convex.const, e=convex.error, off=core.off, grp=core.grp,
            F=core.A.astype(np.float64), f=core.b.astype(np.float64), A=core.A, b=core.b,
            pairs=core.pairs, C=core.C, P=penalised(core), d=core.d, constant=core.constant,
            lost=core.e, halt=core.halt,
        )  # fmt: skip
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
        self.ok = np.ones(n, dtype=np.uint8)
        """Rows of the root's region; ``probe`` drops some."""

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

    def root(self, incumbent: Incumbent, z: Floats, lam: Floats, rounds: int = ROOT_ROUNDS) -> int:
        """Bound the root from the warm start ``z``, ``lam``; returns the kernel's code."""
        core = self.core
        self.allowed[0] = self.ok
        self.lam[0] = lam
        z, s = z.copy(), core.d.copy()
        work, cur = np.zeros(core.n), np.zeros(core.n_groups, dtype=np.int64)
        code = int(
            kernels.evaluate_node(
                self.relaxed, self._nodes(), 0, z, s, work, cur, incumbent.cutoff, rounds
            )
        )
        self.counts[0] = 1
        if code == 1:
            self.keys[0], self.ids[0] = self.bound[0], 0
            self.counts[1] = 1
        elif code == 2:
            incumbent.offer(core.value(cur), core.lift(cur))
        return code

    def probe(self, incumbent: Incumbent, rounds: int) -> list[Probed]:
        """Drop rows whose choice alone is cut off from the evaluated root's region.

        Returns what was dropped, in order, with the proofs. Rows that the root's point uses most
        are not tried, nor heavier ones than those of which few went.
        """
        core, c = self.core, self.convex
        n, m = core.n, len(core.b)
        z = self.point[0].astype(np.float64)
        total = np.add.reduceat(z, core.off[:-1])
        z /= total[core.grp]
        s = c.l + c.Q @ z if len(c.Q) else c.l.copy()
        order = np.argsort(z, kind="stable")
        order = order[z[order] < 0.6].astype(np.int64)
        found: list[Probed] = []
        for at in range(0, len(order), PROBED_AT_ONCE):
            rows = order[at : at + PROBED_AT_ONCE]
            removed = np.zeros(n, dtype=np.int64)
            points = np.zeros((len(rows) + 1, n), dtype=np.float32)
            lams = np.zeros((len(rows) + 1, m))
            count = int(
                kernels.probe(
                    self.relaxed, rows, self.ok, z, s, self.lam[0], incumbent.cutoff, rounds,
                    removed, points, lams,
                )
            )  # fmt: skip
            found += [
                Probed(row=int(removed[t]), point=points[t], multipliers=lams[t])
                for t in range(count)
            ]
            if count < PROBING_PAYS * len(rows):
                break
        return found

    def grow(self, incumbent: Incumbent, most: int) -> bool:
        """Branch up to ``most`` times; returns whether the incumbent improved."""
        if self.counts[0] + 2 * most + 2 > len(self.bound):
            self._double(int(self.counts[0]) + 2 * most + 2)
        core = self.core
        best = np.array([incumbent.objective, incumbent.cutoff])
        cur = np.zeros(core.n_groups, dtype=np.int64)
        found = int(self.counts[2])
        kernels.grow(
            self.relaxed, self._nodes(), best, cur, incumbent.gap, incumbent.floor, most,
            RELAX_ROUNDS,
        )  # fmt: skip
        if int(self.counts[2]) > found:
            return incumbent.offer(core.value(cur), core.lift(cur))
        return False

    def _nodes(self) -> kernels.Nodes:
        return kernels.Nodes(*(getattr(self, name) for name in kernels.Nodes._fields))

    def _double(self, least: int) -> None:
        size = max(2 * len(self.bound), least)
        for name in kernels.Nodes._fields[:-1]:  # all but the counts
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


@dataclass(slots=True, kw_only=True, eq=False)
class Entry:
    """A node of the record.

    Attributes:
        parent: Its parent's index, -1 for the root.
        allowed: bool[n of the problem].
        own: What its own formula proves; ``+inf`` for a region that is visibly empty.
        convexification: The formula's convex function; -1 for a node without a formula.
        point: f32[n of the problem], where the formula is computed.
        multipliers: f64[m], likewise.
        w: f64[r], the point of the formula in factor form, in place of all three.
    """

    parent: int
    allowed: Bools
    own: float = -math.inf
    convexification: int = -1
    point: NDArray[np.float32] | None = None
    multipliers: Floats | None = None
    w: Floats | None = None


@dataclass(slots=True, kw_only=True, eq=False)
class Region:
    """Rows that may still be chosen.

    Attributes:
        node: Its node of the record.
        keep: bool[n of the problem].
        bound: No choice of the region is below it.
        strong: Begin with products and cuts.
        cuts: i64[c, 2] in the problem's rows.
        plain_rows: How many were left at the last bound without products and cuts.
        priced: Rows of this separable region that its relaxation excludes are gone.
    """

    node: int
    keep: Bools
    bound: float = -math.inf
    strong: bool = False
    cuts: Ints = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int64))
    plain_rows: int = 0
    priced: bool = False


@dataclass(slots=True, kw_only=True, eq=False)
class Record:
    """What becomes a certificate: a tree of regions, with the trees of their cores below them."""

    problem: Problem
    orders: Ints = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int64))
    joint: bool = False
    """Whether nodes without a convex function are proved by elimination."""
    convexifications: list[Convexification] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    trees: list[tuple[int, int, Tree]] = field(default_factory=list)
    """Node, convex function, and the tree whose root that node is."""
    spare: dict[int, tuple[int, Tree]] = field(default_factory=dict)
    """Unfinished trees of regions that were taken further: used where they prove more."""

    def node(self, parent: int, allowed: Bools, own: float = -math.inf) -> int:
        """Append a region below ``parent``, without a formula of its own; returns its index."""
        self.entries.append(Entry(parent=parent, allowed=allowed, own=own))
        return len(self.entries) - 1

    def convexify(self, core: Core, convex: Convex) -> int:
        """Append a convex function; returns its index."""
        self.convexifications.append(to_certificate(self.problem, core, convex.point))
        return len(self.convexifications) - 1

    def formula(self, node: int, tree: Tree, convexification: int) -> None:
        """Give ``node`` the formula of ``tree``'s root, if that proves more than it has."""
        own, entry = float(tree.bound[0]), self.entries[node]
        if own <= entry.own:
            return
        entry.own = own
        if tree.kind[0] == 1:
            entry.w = None
            entry.convexification = convexification
            entry.point = self._lifted(tree.core, tree.point[0])
            entry.multipliers = tree.lam[0].copy()

    def probed(
        self, node: int, core: Core, dropped: list[Probed], convexification: int, cutoff: float
    ) -> int:
        """Append a leaf for each dropped row; returns the node of the region without them."""
        group = self.problem.group_of_row
        for probe in dropped:
            row = int(core.rows[probe.row])
            here = self.entries[node].allowed
            alone = here & (group != group[row])
            alone[row] = True
            leaf = self.entries[self.node(node, alone, math.inf)]
            if probe.point.any():
                leaf.own, leaf.convexification = cutoff, convexification
                leaf.point = self._lifted(core, probe.point)
                leaf.multipliers = probe.multipliers
            rest = here.copy()
            rest[row] = False
            node = self.node(node, rest)
        return node

    def attach(self, node: int, tree: Tree, convexification: int) -> None:
        """Put the nodes of ``tree`` below ``node``, which is its root."""
        if tree.n_nodes > 1:
            self.trees.append((node, convexification, tree))

    def _compress(self, use: Bools) -> None:
        """Keep the nodes ``use`` only."""
        new = np.cumsum(use) - 1
        self.entries = [entry for entry, used in zip(self.entries, use, strict=True) if used]
        for entry in self.entries:
            entry.parent = int(new[entry.parent]) if entry.parent >= 0 else -1
        self.trees = [(int(new[node]), index, tree) for node, index, tree in self.trees]
        self.spare = {}

    def _settle(self, cutoff: float) -> Bools:
        """Put spare trees where they prove more than the nodes below; returns which are in use.

        A node whose region a spare tree takes over loses its other descendants.
        """
        parent = np.array([entry.parent for entry in self.entries], dtype=np.int64)
        own = np.array([entry.own for entry in self.entries])
        for node, _, tree in self.trees:
            own[node] = max(own[node], min(tree.open_bound(), cutoff))
        use = np.ones(len(parent), dtype=np.bool_)
        value = kernels.settle(parent, own, cutoff)
        for node in sorted(self.spare, reverse=True):
            index, tree = self.spare[node]
            bound = min(tree.open_bound(), cutoff)
            if not use[node] or bound <= value[node]:
                continue
            gone = np.zeros(len(parent), dtype=np.bool_)
            gone[node] = True
            for i in range(node + 1, len(parent)):
                gone[i] = gone[parent[i]]
            gone[node] = False
            use &= ~gone
            self.trees = [t for t in self.trees if not gone[t[0]]]
            self.trees.append((node, index, tree))
            own[node], own[gone], parent[gone] = bound, np.inf, -1
            value = kernels.settle(parent, own, cutoff)
        return use

    def _lift(self, core: Core, points: Singles, full: Singles) -> None:
        """Fill ``full`` [k, n of the problem], of zeros, with ``points`` [k, n of the core]."""
        full[:, core.rows] = points
        full[:, core.full[core.full >= 0]] = 1.0

    def _lifted(self, core: Core, point: Singles) -> Singles:
        """Return one such point."""
        full = np.zeros((1, self.problem.n_rows), dtype=np.float32)
        self._lift(core, point[None], full)
        return full.reshape(-1)

    def finish(self, cutoff: float) -> Certificate:
        """Return the certificate; its bound is what the nodes prove together.

        Args:
            cutoff: What removed rows prove at least.
        """
        n, m = self.problem.n_rows, len(self.problem.limits)
        if self.spare:
            self._compress(self._settle(cutoff))
        base = len(self.entries)
        total = base + sum(tree.n_nodes - 1 for _, _, tree in self.trees)
        parent = np.full(total, -1, dtype=np.int64)
        masks = np.zeros((total, n), dtype=np.bool_)
        own = np.full(total, -np.inf)
        conv = np.full(total, -1, dtype=np.int64)
        point = np.zeros((total, n), dtype=np.float32)
        lam = np.zeros((total, m))
        factor = self.problem.factor
        w = np.zeros((0, 0) if factor is None else (total, factor.shape[1]))
        # The regions.
        for i, entry in enumerate(self.entries):
            parent[i], masks[i], own[i] = entry.parent, entry.allowed, entry.own
            conv[i] = entry.convexification
            if entry.point is not None and entry.multipliers is not None:
                point[i], lam[i] = entry.point, entry.multipliers
            elif entry.w is not None and entry.multipliers is not None:
                lam[i] = entry.multipliers
                if len(w):
                    w[i] = entry.w
        # The nodes of their trees, whose roots are regions.
        at = base
        for node, convexification, tree in self.trees:
            core, inner = tree.core, slice(1, tree.n_nodes)
            new = slice(at, at + tree.n_nodes - 1)
            masks[new, core.rows] = tree.allowed[inner] > 0
            masks[new, core.full[core.full >= 0]] = True
            above = tree.parent[inner]
            parent[new] = np.where(above == 0, node, above + at - 1)
            conv[new] = np.where(tree.kind[inner] == 1, convexification, -1)
            self._lift(core, tree.point[inner], point[new])
            lam[new] = tree.lam[inner]
            own[new] = tree.bound[inner]
            at = new.stop
        point[conv < 0] = 0.0
        if not len(w) and not self.joint:
            lam[conv < 0] = 0.0
        return Certificate(
            bound=float(kernels.settle(parent, own, cutoff)[0]),
            convexifications=tuple(self.convexifications),
            parent=parent,
            allowed=np.packbits(masks, axis=1),
            convexification=conv,
            point=point,
            multipliers=lam,
            orders=self.orders,
            joint=self.joint,
            w=w,
        )

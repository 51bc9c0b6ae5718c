"""What a solver answers: a choice, how good it is at least, and data that proves it.

The certificate
===============
Let ``diagonal``, ``cross``, ``constant`` be those of the problem, and ``x`` any feasible one-hot
vector. For any symmetric block-diagonal ``D`` (one block per group), any symmetric ``Y`` that is
zero inside groups and non-negative (of any sign on pairs of ``Problem.all_forbidden_pairs()``),
any ``μ_k >= 0`` (one vector over the rows per budget), and any ``γ_t >= 0`` for triples
``t = (i, j, k)`` of rows of three groups::

    objective(x) >= q(x) := constant + l·x + ½ xᵀQx
    Q = cross + D - Y + Σ_k (μ_k costs_kᵀ + costs_k μ_kᵀ) + Σ_t γ_t (E_ij + E_ik - E_jk)
    l = diagonal - ½ diag(D) - Σ_k limits_k μ_k - Σ_t γ_t e_i

with ``E_ij = e_i e_jᵀ + e_j e_iᵀ``, because ``xᵀDx = diag(D)·x`` for one-hot ``x``,
``x_i x_j >= 0``, ``x_p (limits_k - costs_k·x) >= 0``, and the triangle inequality
``x_i - x_i x_j - x_i x_k + x_j x_k >= 0``. Let ``A`` be the allowed rows of a region. If
``vᵀQv >= 0`` for every ``v`` that is zero outside ``A`` and sums to zero in every group, then for
**any** point ``z`` that is zero outside the convexification's support and sums to one in every
group, and any multipliers ``λ >= 0``, every feasible ``x`` of the region obeys::

    objective(x) >= q(z) - s·z - λ·limits + Σ_g min_{p in g, allowed} (s_p + Σ_k λ_k costs_kp)
    s = l + Q z

by convexity of ``q`` and weak duality. With ``z`` and ``x`` in the support, ``vᵀQv >= 0`` needs
to hold on the support's rows only. ``z`` is stored in float32 and stands for the exact quotient of
each entry by the sum of its group.

The tree: every node has a region, the rows ``allowed`` at it; that of node 0 is the problem's
``allowed``. A node without children proves its own bound: the formula above, or ``+inf`` when the
region is visibly empty (a group without rows; the cheapest rows exceed a budget in integers; two
groups left with one row each that form a forbidden pair), or the exact objective when every group
has one row and that choice is feasible.

The children of a node keep, in all groups but one (the *branch group*; none when there is one
child), the same rows; call *kept* these rows and the union of the children's rows of the branch
group. A row that is allowed at the node but not kept is *removed*: the region in which that row is
chosen must be proved by the node's own formula with that group reduced to that row (or be visibly
empty, or the row be *dominated* by a kept row ``q`` of its group: ``costs_q <= costs_p`` in every
resource, ``q`` in no forbidden pair that ``p`` is not in, and
``diagonal_q - diagonal_p + Σ_h max_{j in h, allowed} (cross_qj - cross_pj) <= 0`` over the other
groups). A node with children proves the larger of its own bound and the least of what its
children and its removed rows prove.

Symmetry: two groups in no pair can be exchanged when their rows have the same diagonal, costs and
permission, one by one, and the same terms with all other rows, and when ``cross`` between the two
is symmetric. A certificate names such groups as chains ``(g, h), (h, k), …`` in which a group
stands at most once as the first and once as the second, ``g < h``. The best choice can then be
taken to have rows that never fall along a chain, so row ``i`` of ``g`` and row ``j < i`` of ``h``
count as a forbidden pair.

``Certificate.bound`` is never above what node 0 proves.

A separable problem with one budget and no pairs is solved by a recursion over thousands of states
that no tree follows. Its certificate has one node and says ``recursion``: the bound is then the
larger of what the node proves, and of what a recursion of the checker's own proves, which keeps
every partial choice that the node's price ``λ`` does not exclude (``checker_recursion.py``).

A problem in factor form (``cross = U Uᵀ`` outside the groups) has the same certificates, and
another formula for nodes without a convexification: with ``l_p = diagonal_p - ½ ‖U_p‖²``, any
``w`` and any ``λ >= 0``, because ``½ ‖y‖² >= w·y - ½ ‖w‖²`` for ``y = Uᵀx``::

    objective(x) >= constant - ½ ‖w‖² - λ·limits
                    + Σ_g min_{p in g, allowed} (l_p + U_p·w + Σ_k λ_k costs_kp)

A certificate that says ``joint`` has no convexifications and another formula, for terms that join
few groups (those of ``cross``, or ``terms``), alone or beside a factor: with ``l_p = diagonal_p``
(less the half square where there is a factor), any ``w`` and ``λ >= 0``, and the least value over
all one-hot vectors of the allowed rows::

    objective(x) >= constant - ½ ‖w‖² - λ·limits
                    + min_x Σ_p (l_p + U_p·w + Σ_k λ_k costs_kp) x_p + Σ_pq terms_pq x_p x_q

Design: docs/design/certificates.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from bitquota.codec import Document, Form, LowerBound, UpperBound
from bitquota.errors import InvalidProblem


class Status(StrEnum):
    """Why the solver stopped, and what is known."""

    OPTIMAL = "optimal"
    """The choice is within the gap that was asked for of the best possible, proved."""
    FEASIBLE = "feasible"
    """A choice is known; the gap that was asked for is not proved."""
    INFEASIBLE = "infeasible"
    """No choice satisfies all constraints, proved."""
    UNKNOWN = "unknown"
    """No choice was found, and none was excluded."""


class Limit(StrEnum):
    """Which limit stopped the solver before its proof was complete."""

    TIME = "time"
    NODE = "node"
    MEMORY = "memory"
    CANCELLED = "cancelled"
    METHOD = "method"
    """The backend is a heuristic, or cannot prove more for this problem."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What a solution cost.

    Attributes:
        nodes: Branch-and-bound nodes whose relaxation was bounded.
        cpu_seconds: CPU seconds of this process (and of a backend's own processes).
        bound_iterations: Iterations of the semidefinite bound.
        root_bound: Lower bound before branching.
        details: Backend-specific numbers.
    """

    nodes: int = 0
    cpu_seconds: float = 0.0
    bound_iterations: int = 0
    root_bound: float = -math.inf
    details: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Convexification:
    """One ``(D, Y, μ, γ)`` of the module's docstring.

    Attributes:
        support: bool[n], the rows on which ``Q`` is positive semidefinite (on the differences of
            one-hot vectors); nodes that use it allow no others.
        shift: f64[n, B] with B the largest group: ``shift[p, j] = D[p, offsets[g] + j]`` for ``p``
            in group ``g``; zero beyond the group.
        cut_rows: i64[c], cut_columns: i64[c], cut_values: f64[c]: ``Y_ij = Y_ji`` for
            ``i = cut_rows[k] < j = cut_columns[k]``, each pair at most once.
        products: f64[m, n], ``μ``.
        triples: i64[t, 3], rows ``(i, j, k)``; triple_values: f64[t], ``γ``.
    """

    support: NDArray[np.bool_]
    shift: NDArray[np.float64]
    cut_rows: NDArray[np.int64]
    cut_columns: NDArray[np.int64]
    cut_values: NDArray[np.float64]
    products: NDArray[np.float64]
    triples: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 3), dtype=np.int64))
    triple_values: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Certificate:
    """A proof of ``bound`` that can be checked without the solver (see the module).

    Attributes:
        bound: What is proved.
        convexifications: The ``(D, Y, μ)`` that nodes refer to.
        parent: i64[N], the parent's index, below the node's own; -1 for node 0.
        allowed: u8[N, ceil(n/8)], ``numpy.packbits(bool[n])`` of the node's rows.
        convexification: i64[N], index, or -1 for a node without a formula of its own.
        point: f32[N, n], ``z``.
        multipliers: f64[N, m], ``λ >= 0``.
        recursion: Whether the bound needs a recursion over states (see the module).
        orders: i64[k, 2], groups that can be exchanged (see the module).
        w: f64[N, r] for a problem in factor form (see the module), else f64[0, 0].
        joint: Whether nodes without a convexification are proved by elimination (see the module).
    """

    bound: float
    convexifications: tuple[Convexification, ...]
    parent: NDArray[np.int64]
    allowed: NDArray[np.uint8]
    convexification: NDArray[np.int64]
    point: NDArray[np.float32]
    multipliers: NDArray[np.float64]
    recursion: bool = False
    orders: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 2), dtype=np.int64))
    w: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    joint: bool = False

    @property
    def n_nodes(self) -> int:
        """Number of nodes."""
        return len(self.parent)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Solution(Document):
    """The answer to a problem.

    Attributes:
        status: Why the solver stopped.
        limit: The limit that stopped it early, or ``None``.
        choice: i64[G], row index within each group, or ``None`` when there is none.
        objective: Value of ``choice``; ``+inf`` without one.
        bound: No feasible choice is below it; ``+inf`` for an infeasible problem.
        backend: Name of the backend.
        stats: Effort.
        certificate: Proof of (a value close to) ``bound``, or ``None`` from backends without.
    """

    FORM: ClassVar[Form] = Form(
        what="a solution",
        unwritten=("stats", "certificate"),
        derived=("absolute_gap", "relative_gap", "nodes", "cpu_seconds"),
    )

    status: Status
    limit: Limit | None = None
    choice: NDArray[np.int64] | None = None
    objective: UpperBound = math.inf
    bound: LowerBound = -math.inf
    backend: str = "bitquota"
    stats: Stats = field(default_factory=Stats)
    certificate: Certificate | None = None

    def __post_init__(self) -> None:
        """Check that status, choice, objective and bound say the same."""
        found = self.choice is not None
        if found != (self.status in (Status.OPTIMAL, Status.FEASIBLE)):
            msg = f"a solution must hold a choice exactly if it is one; got status {self.status}"
            raise InvalidProblem(msg)
        if self.choice is not None:
            choice = np.array(self.choice, dtype=np.int64)
            choice.flags.writeable = False
            object.__setattr__(self, "choice", choice)
        if found and not self.bound <= self.objective:
            msg = f"a bound must not exceed the objective {self.objective}; got {self.bound}"
            raise InvalidProblem(msg)
        stopped = self.status in (Status.FEASIBLE, Status.UNKNOWN)
        if stopped != (self.limit is not None):
            msg = f"a limit must be named exactly if one stopped the solver; got {self.limit}"
            raise InvalidProblem(msg)

    @property
    def absolute_gap(self) -> UpperBound:
        """``objective - bound``."""
        if self.status is Status.INFEASIBLE:
            return 0.0
        return self.objective - self.bound

    @property
    def relative_gap(self) -> UpperBound:
        """``absolute_gap / |objective|``; infinite for an objective of 0 with a gap."""
        gap = self.absolute_gap
        if gap == 0.0:
            return 0.0
        if not math.isfinite(gap) or self.objective == 0.0:
            return math.inf
        return gap / abs(self.objective)

    @property
    def nodes(self) -> int:
        """Branch-and-bound nodes."""
        return self.stats.nodes

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds that it took."""
        return self.stats.cpu_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What an anytime callback receives: the best known so far.

    Attributes:
        kind: ``incumbent`` (a better choice), ``bound`` (a better bound) or ``progress``.
        objective: Best objective so far.
        bound: Best bound so far.
        nodes: Nodes so far.
        cpu_seconds: CPU seconds so far.
        choice: The best choice, for ``incumbent``.
    """

    kind: str
    objective: float
    bound: float
    nodes: int = 0
    cpu_seconds: float = 0.0
    choice: tuple[int, ...] | None = None

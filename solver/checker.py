"""Independent check of a solver's certificate; shares no code with the solver.

It re-derives everything from the numbers of the problem: the format and the mathematics are those
in the docstring of ``solution.py``. What is proved is proved exactly (small problems: integers over
powers of two) or with outward rounding (large ones; a node that then falls short is repeated
exactly). A certificate that does not hold is an answer here, not an exception.

Design: docs/design/certificates.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from bitquota.codec import Document, LowerBound
from bitquota.errors import InvalidInput
from bitquota.solver.checker_bounds import (
    BadPoint,
    ExactBounds,
    Frame,
    OutwardBounds,
)
from bitquota.solver.checker_factor import FactorBounds, Formula, Value, exact_pairs
from bitquota.solver.checker_joint import Components, JointBounds, priced
from bitquota.solver.checker_recursion import reason_not_proved
from bitquota.solver.checker_regions import Enemies, Regions, blocks, pairs_of_orders
from bitquota.solver.exact import dyadic
from bitquota.solver.outward import UNIT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from bitquota.solver.problem import Problem
    from bitquota.solver.solution import Certificate, Solution

    Ints = NDArray[np.int64]

METHODS = ("auto", "exact", "outward")
_WIDER = UNIT < 2.0**-60
"""Whether the widest float is wider than float64."""
_EXACT_UP_TO_ROWS = 48
_EXACT_UP_TO_WORK = 4_000_000
"""Rows² x nodes up to which ``auto`` checks every node in exact arithmetic."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict(Document):
    """What the checker says.

    Attributes:
        holds: Whether everything claimed was proved.
        proved: The bound that the certificate proves, rounded down; ``-inf`` when it is malformed.
        reason: What is wrong, as a sentence; empty when it holds.
        nodes: Nodes of the certificate.
        exact_nodes: How many of them were bounded in exact arithmetic.
    """

    holds: bool
    proved: LowerBound
    reason: str = ""
    nodes: int = 0
    exact_nodes: int = 0


class _Broken(Exception):
    """The certificate breaks a rule of the format."""


def check_certificate(
    problem: Problem, certificate: Certificate, *, method: str = "auto"
) -> Verdict:
    """Return whether ``certificate`` proves its bound on ``problem``.

    Args:
        problem: The problem as it was handed to the solver.
        certificate: The claim.
        method: ``exact`` (integers only), ``outward`` (verified floating point only) or ``auto``
            (exact when small; otherwise outward, and exact for nodes that fall short).

    Raises:
        InvalidInput: ``method`` is none of these.

    Cost: ``O(N n² + n³)`` for ``N`` nodes and ``n`` rows, times the width of the integers where
    exact.
    """
    if method not in METHODS:
        msg = f"'method' must be one of {', '.join(METHODS)}; got '{method}'"
        raise InvalidInput(msg, method=method)
    # What the nodes prove.
    checker = None
    try:
        checker = _Checker(problem, certificate, method)
        proved = checker.prove()
    except _Broken as broken:
        return Verdict(holds=False, proved=-math.inf, reason=str(broken))
    # Whether that is enough.
    holds = (
        proved >= Fraction(certificate.bound)
        if _finite(certificate.bound)
        else (certificate.bound == -math.inf or proved == math.inf)
    )
    reason = (
        ""
        if holds
        else (
            f"the bound must follow from the nodes; they prove {float(proved):.17g}, "
            f"claimed is {certificate.bound:.17g}"
        )
    )
    return Verdict(
        holds=holds,
        proved=_down(proved),
        reason=reason,
        nodes=len(certificate.parent),
        exact_nodes=checker.exact_nodes,
    )


def check_solution(problem: Problem, solution: Solution, *, method: str = "auto") -> Verdict:
    """Return whether everything ``solution`` says about ``problem`` is true and proved.

    The choice must meet every constraint in integers, its objective must be the problem's within
    the rounding of a sum, and the certificate must prove its own bound. ``solution.bound`` itself
    must not exceed what is proved by more than that rounding.
    """
    # The choice and its value.
    arithmetic = _Arithmetic(problem)
    if solution.choice is not None:
        reason = arithmetic.broken_constraint(solution.choice)
        if reason:
            return Verdict(holds=False, proved=-math.inf, reason=reason)
        exact, rounding = arithmetic.objective(solution.choice)
        if abs(Fraction(solution.objective) - exact) > rounding:
            reason = (
                f"the objective must be that of the choice, {float(exact):.17g}; "
                f"got {solution.objective:.17g}"
            )
            return Verdict(holds=False, proved=-math.inf, reason=reason)
    # The bound.
    if solution.certificate is None:
        holds = solution.bound == -math.inf
        reason = "" if holds else "a bound must come with a certificate to be checked; got none"
        return Verdict(holds=holds, proved=-math.inf, reason=reason)
    verdict = check_certificate(problem, solution.certificate, method=method)
    claim = solution.certificate.bound
    if verdict.holds and str(solution.status) == "infeasible" and claim < math.inf:
        reason = f"that no choice exists must be proved by a bound of +inf; got {claim:.17g}"
        return replace(verdict, holds=False, reason=reason)
    if solution.choice is not None:
        # A bound equal to the objective may differ from it by the rounding of the objective.
        claim = max(claim, min(claim + float(rounding), solution.objective))
    if verdict.holds and solution.bound > claim:
        reason = f"the bound {solution.bound:.17g} must not exceed the proved {claim:.17g}"
        return replace(verdict, holds=False, reason=reason)
    return verdict


class _Arithmetic:
    """The problem's constraints and objective, derived anew."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.offsets: list[int] = problem.offsets.tolist()
        self.n = self.offsets[-1]
        self.enemies = Enemies()
        for a, b in problem.forbidden_pairs.tolist():
            self.enemies.forbid(a, b)
        for a, b in problem.required_pairs.tolist():
            g = int(np.searchsorted(problem.offsets, b, side="right")) - 1
            for q in range(*self.offsets[g : g + 2]):
                if q != b:
                    self.enemies.forbid(a, q)

    def broken_constraint(self, choice: NDArray[np.int64]) -> str:
        """Return which constraint ``choice`` breaks, in words; empty when none."""
        problem = self.problem
        picks: list[int] = choice.tolist()
        counts = [b - a for a, b in zip(self.offsets, self.offsets[1:], strict=False)]
        if len(picks) != len(counts) or any(
            not 0 <= c < k for c, k in zip(picks, counts, strict=True)
        ):
            return f"a choice must hold one row of each of {len(counts)} groups; got {picks}"
        rows = [a + c for a, c in zip(self.offsets, picks, strict=False)]
        for p in rows:
            if not problem.allowed[p]:
                return f"a choice must take allowed rows; got row {p}"
        for name, cost, limit in zip(
            problem.resources, problem.costs.tolist(), problem.limits.tolist(), strict=True
        ):
            spent = sum(cost[p] for p in rows)
            if spent > limit:
                return f"a choice must keep '{name}' within {limit}; it takes {spent}"
        chosen = set(rows)
        for p in rows:
            if met := chosen & self.enemies[p]:
                return f"rows {p} and {min(met)} must not be chosen together"
        return ""

    def objective(self, choice: NDArray[np.int64]) -> tuple[Fraction, Fraction]:
        """Return the exact objective and how far a float64 sum of it may be off."""
        problem = self.problem
        rows = [a + c for a, c in zip(self.offsets, choice.tolist(), strict=False)]
        parts = [np.array([problem.constant]), problem.diagonal[rows]]
        if problem.cross is not None:
            parts.append(problem.cross[np.ix_(rows, rows)][np.triu_indices(len(rows), 1)])
        chosen = np.isin(problem.terms, rows).all(axis=1)
        parts.append(problem.term_values[chosen])
        (terms,), exponent = dyadic(np.concatenate(parts))
        unit = Fraction(2) ** exponent
        total, size = sum(terms) * unit, sum(map(abs, terms)) * unit
        roundings = len(rows) ** 2 + 8
        if problem.factor is not None:
            pairs, pairs_size = exact_pairs(problem, np.array(rows))
            total, size = total + pairs, size + pairs_size
            roundings = 2 * (len(rows) + problem.factor.shape[1]) + 8
        return total, Fraction(size * roundings * Fraction(2) ** -53)


class _Checker:
    """One certificate on one problem."""

    def __init__(self, problem: Problem, certificate: Certificate, method: str) -> None:
        if len(problem.terms) and problem.factor is None and not certificate.joint:
            problem = problem.dense()
        self.problem, self.certificate = problem, certificate
        self.arithmetic = _Arithmetic(problem)
        self.n, self.N = self.arithmetic.n, len(certificate.parent)
        self.w = certificate.w if problem.factor is not None else np.zeros((self.N, 0))
        self.exact_nodes = 0
        self._check_shapes()
        try:
            order_pairs = pairs_of_orders(problem, self.arithmetic.enemies, certificate.orders)
        except ValueError as err:
            raise _Broken(str(err)) from err
        for a, b in order_pairs:
            self.arithmetic.enemies.forbid(a, b)
        packed = np.ascontiguousarray(certificate.allowed, dtype=np.uint8)
        self.masks = np.unpackbits(packed, axis=1, count=self.n).astype(np.bool_)
        if bool((problem.allowed & ~self.masks[0]).any()):
            raise _Broken("node 0 must allow every row that the problem allows")
        frames = []
        for index, shape in enumerate(certificate.convexifications):
            try:
                frames.append(Frame.of(problem, shape, self.arithmetic.enemies))
            except ValueError as err:
                raise _Broken(f"convexification {index}: {err}") from err
        small = self.n <= _EXACT_UP_TO_ROWS and self.n**2 * self.N <= _EXACT_UP_TO_WORK
        self.first_exact = method == "exact" or (method == "auto" and small)
        self.may_repeat = method != "outward"
        # By the index of the convexification; -1 is the formula of problems in factor form.
        self.exact: dict[int, ExactBounds | FactorBounds] = {}
        self.wide: dict[int, OutwardBounds | FactorBounds] = {}
        self.fast: dict[int, OutwardBounds | FactorBounds] = {}
        for index, frame in enumerate(frames):
            self.exact[index] = ExactBounds(problem, frame)
            self.wide[index] = OutwardBounds(problem, frame)
            self.fast[index] = OutwardBounds(problem, frame, np.float64)
        if certificate.joint:
            enemies = self.arithmetic.enemies
            pairs = [(a, b) for a, its in enemies.items() for b in its if a < b]
            listed = priced(problem.listed(), pairs)
            components = Components(listed)
            if pairs and not components.fits:
                listed = problem.listed()
                components = Components(listed)
            if not components.fits:
                raise _Broken("terms must join few groups at a time to be eliminated")
            self.exact[-1] = self.wide[-1] = JointBounds(listed, components)
            self.fast[-1] = JointBounds(listed, components, np.float64)
        elif problem.factor is not None and not len(problem.terms):
            self.exact[-1] = self.wide[-1] = FactorBounds(problem)
            self.fast[-1] = FactorBounds(problem, np.float64)
        for index in sorted({int(c) for c in certificate.convexification if c >= 0}):
            if not self._is_convex(index):
                msg = (
                    f"convexification {index} must be positive semidefinite on its support; "
                    "it could not be proved to be"
                )
                raise _Broken(msg)

    def _is_convex(self, index: int) -> bool:
        wide, exact = self.wide[index], self.exact[index]
        assert isinstance(wide, OutwardBounds)  # noqa: S101  # as its index is not -1
        assert isinstance(exact, ExactBounds)  # noqa: S101
        if not self.first_exact and wide.is_convex():
            return True
        return self.may_repeat and exact.is_convex()

    def _check_shapes(self) -> None:
        c, problem = self.certificate, self.problem
        m = len(problem.limits)
        expected: dict[str, tuple[NDArray[Any], tuple[int, ...]]] = {
            "parent": (c.parent, (self.N,)),
            "allowed": (c.allowed, (self.N, (self.n + 7) // 8)),
            "convexification": (c.convexification, (self.N,)),
            "point": (c.point, (self.N, self.n)),
            "multipliers": (c.multipliers, (self.N, m)),
            "w": (c.w, (0, 0) if problem.factor is None else (self.N, problem.factor.shape[1])),
        }
        for name, (array, shape) in expected.items():
            if tuple(array.shape) != shape:
                raise _Broken(f"'{name}' must have shape {shape}; got {tuple(array.shape)}")
        if self.N == 0:
            raise _Broken("a certificate must hold at least one node; got none")
        if math.isnan(c.bound):
            raise _Broken("'bound' must be a number; got NaN")
        order = np.arange(self.N)
        if c.parent[0] != -1 or bool(((c.parent[1:] < 0) | (c.parent[1:] >= order[1:])).any()):
            raise _Broken("'parent' must be -1 for node 0 and below the node's index elsewhere")
        used = c.convexification
        if bool(((used < -1) | (used >= len(c.convexifications))).any()):
            raise _Broken("'convexification' must be -1 or the index of one")
        if not all(np.isfinite(array).all() for array in (c.point, c.multipliers, c.w)):
            raise _Broken("'point', 'multipliers' and 'w' must be finite")
        if bool((c.multipliers < 0).any()):
            raise _Broken(f"'multipliers' must not be negative; got {float(c.multipliers.min())}")

    def prove(self) -> Value:
        """Return what node 0 proves: an exact fraction, a float, or an infinity."""
        try:
            regions = Regions.of(
                self.problem, self.arithmetic.enemies, self.masks, self.certificate.parent
            )
        except ValueError as err:
            raise _Broken(str(err)) from err
        formulas = self._formulas(regions)
        below: list[Value] = [math.inf] * self.N
        for node in reversed(range(self.N)):
            value = self._node(node, regions, below[node], formulas.get(node))
            if node:
                parent = int(self.certificate.parent[node])
                below[parent] = min(below[parent], value)
        if self.certificate.recursion:
            return max(value, self._recursion(value))
        return value

    def _recursion(self, known: Value) -> Value:
        """Return the claimed bound if a recursion proves it."""
        claim = self.certificate.bound
        if not _finite(claim) or known >= Fraction(claim):
            return -math.inf
        if self.N != 1:
            raise _Broken(f"a certificate by recursion must have one node; got {self.N}")
        price = float(self.certificate.multipliers.sum())
        if reason := reason_not_proved(self.problem, self.masks[0], price, claim):
            raise _Broken(f"node 0: {reason}")
        return Fraction(claim)

    def _formulas(self, regions: Regions) -> dict[int, Formula]:
        """Return what the formula of each node proves, and of each of its open rows chosen."""
        found: dict[int, Formula] = {}
        used = self.certificate.convexification
        for index in self.fast:
            nodes = np.flatnonzero((used == index) & regions.undecided)
            support = self.problem.allowed
            if index >= 0:
                support = self.certificate.convexifications[index].support
            outside = (self.masks[nodes] & ~support).any(axis=1)
            if index >= 0 and outside.any():
                node = int(nodes[np.argmax(outside)])
                raise _Broken(f"node {node} must allow only rows of its convexification's support")
            for block in blocks(nodes, self.n):
                if self.first_exact:
                    found.update((n, self._exactly(n, regions)) for n in block.tolist())
                else:
                    proved = self._outward(self.fast[index], block, regions)
                    found.update(zip(block.tolist(), proved, strict=True))
        return found

    def _outward(
        self, bounds: OutwardBounds | FactorBounds, nodes: Ints, regions: Regions
    ) -> list[Formula]:
        c, rows = self.certificate, [regions.open_rows(node) for node in nodes.tolist()]
        points = self.w if isinstance(bounds, FactorBounds) else c.point
        try:
            return bounds.nodes(self.masks[nodes], points[nodes], c.multipliers[nodes], rows)
        except BadPoint as err:
            raise _Broken(f"node {nodes[err.node]}: {err}") from err

    def _exactly(self, node: int, regions: Regions) -> Formula:
        self.exact_nodes += 1
        c, rows = self.certificate, regions.open_rows(node)
        bounds = self.exact[int(c.convexification[node])]
        points = self.w if isinstance(bounds, FactorBounds) else c.point
        try:
            return bounds.node(self.masks[node], points[node], c.multipliers[node], rows)
        except BadPoint as err:
            raise _Broken(f"node {node}: {err}") from err

    def _node(self, node: int, regions: Regions, below: Value, formula: Formula | None) -> Value:
        """Return what ``node`` proves, whose children prove ``below`` (``inf``: it has none)."""
        if regions.empty[node]:
            return math.inf
        if regions.single[node] and not regions.parents[node]:
            # One row per group and not visibly empty: the choice is feasible.
            rows = np.flatnonzero(self.masks[node])
            return self.arithmetic.objective(rows - self.problem.offsets[:-1])[0]
        if not regions.parents[node]:
            below = -math.inf
        best = self._best(node, regions, below, formula)
        claim = self.certificate.bound
        for again in self._repeats(node, regions, best):
            before, best = best, max(best, self._best(node, regions, below, again))
            if best >= Fraction(claim):
                break
            # A wider float takes nearly all rounding away, but for what guards against underflow:
            # what is missing then is not rounding.
            reach = float(best) + float(best - before) + 1e-290 if _finite(before) else math.inf
            if _WIDER and reach < claim:
                break
        return best

    def _repeats(self, node: int, regions: Regions, best: Value) -> Iterator[Formula]:
        """Yield the formula of a node that falls short in ever finer arithmetic."""
        index, claim = int(self.certificate.convexification[node]), self.certificate.bound
        if index not in self.wide or (index < 0 and not self._has_formula(node)):
            return
        if self.first_exact or not _finite(claim) or best >= Fraction(claim):
            return
        yield self._outward(self.wide[index], np.array([node]), regions)[0]
        if self.may_repeat and not self.certificate.recursion:
            yield self._exactly(node, regions)

    def _has_formula(self, node: int) -> bool:
        return bool(self.certificate.joint or self.certificate.w[node : node + 1].any())

    def _best(self, node: int, regions: Regions, below: Value, formula: Formula | None) -> Value:
        """Return the larger of a node's own bound and the least of children and removed rows.

        A removed row counts for nothing when another row dominates it; only those that would
        lower the result are looked at.
        """
        rows = regions.open_rows(node)
        own, by_row = formula or (-math.inf, [-math.inf] * len(rows))
        for value, row in sorted(zip(by_row, rows, strict=True)):
            if value >= below:
                break
            if not regions.is_dominated(row, node):
                return max(own, value)
        return max(own, below)


def _finite(value: Value) -> bool:
    return isinstance(value, Fraction) or math.isfinite(value)


def _down(value: Value) -> float:
    if not isinstance(value, Fraction):
        return float(value)
    try:
        near = float(value)
    except OverflowError:
        return -math.inf if value < 0 else float(np.finfo(np.float64).max)
    return near if Fraction(near) <= value else math.nextafter(near, -math.inf)

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
from bitquota.solver.checker_bounds import ExactBounds, Frame, OutwardBounds, Value
from bitquota.solver.checker_recursion import reason_not_proved

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bitquota.solver.problem import Problem
    from bitquota.solver.solution import Certificate, Solution

    Bools = NDArray[np.bool_]

METHODS = ("auto", "exact", "outward")
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
    checker = None
    try:
        checker = _Checker(problem, certificate, method)
        proved = checker.prove()
    except _Broken as broken:
        return Verdict(holds=False, proved=-math.inf, reason=str(broken))
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
        self.group = [
            g for g in range(len(self.offsets) - 1) for _ in range(*self.offsets[g : g + 2])
        ]
        self.enemies: list[set[int]] = [set() for _ in range(self.n)]
        """For each row, the rows that it must not meet."""
        for a, b in problem.forbidden_pairs.tolist():
            self._forbid(a, b)
        for a, b in problem.required_pairs.tolist():
            for q in range(*self.offsets[self.group[b] : self.group[b] + 2]):
                if q != b:
                    self._forbid(a, q)

    def _forbid(self, a: int, b: int) -> None:
        self.enemies[a].add(b)
        self.enemies[b].add(a)

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
        terms = [Fraction(float(problem.constant))]
        terms += [Fraction(float(problem.diagonal[p])) for p in rows]
        if problem.cross is not None:
            chosen = problem.cross[np.ix_(rows, rows)].tolist()
            terms += [Fraction(v) / 2 for line in chosen for v in line if v]
        rounding = sum(map(abs, terms)) * (len(rows) ** 2 + 8) * Fraction(2) ** -53
        return sum(terms, Fraction()), Fraction(rounding)


class _Checker:
    """One certificate on one problem."""

    def __init__(self, problem: Problem, certificate: Certificate, method: str) -> None:
        self.problem, self.certificate = problem, certificate
        self.arithmetic = _Arithmetic(problem)
        self.starts = problem.offsets[:-1]
        self.group = np.array(self.arithmetic.group, dtype=np.int64)
        self.n, self.N = self.arithmetic.n, len(certificate.parent)
        self.exact_nodes = 0
        self._check_shapes()
        self.masks = self._masks()
        frames = []
        for index, shape in enumerate(certificate.convexifications):
            try:
                frames.append(Frame.of(problem, shape, self.arithmetic.enemies))
            except ValueError as err:
                raise _Broken(f"convexification {index}: {err}") from err
        small = self.n <= _EXACT_UP_TO_ROWS and self.n**2 * self.N <= _EXACT_UP_TO_WORK
        self.first_exact = method == "exact" or (method == "auto" and small)
        self.may_repeat = method != "outward"
        self.exact = [ExactBounds(problem, frame) for frame in frames]
        self.outward = [OutwardBounds(problem, frame) for frame in frames]
        for index in sorted({int(c) for c in certificate.convexification if c >= 0}):
            if not self._is_convex(index):
                msg = (
                    f"convexification {index} must be positive semidefinite on its support; "
                    "it could not be proved to be"
                )
                raise _Broken(msg)

    def _is_convex(self, index: int) -> bool:
        if not self.first_exact and self.outward[index].is_convex():
            return True
        return self.may_repeat and self.exact[index].is_convex()

    def _check_shapes(self) -> None:
        c, problem = self.certificate, self.problem
        m = len(problem.limits)
        expected: dict[str, tuple[NDArray[Any], tuple[int, ...]]] = {
            "parent": (c.parent, (self.N,)),
            "allowed": (c.allowed, (self.N, (self.n + 7) // 8)),
            "convexification": (c.convexification, (self.N,)),
            "point": (c.point, (self.N, self.n)),
            "multipliers": (c.multipliers, (self.N, m)),
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
        if not (np.isfinite(c.point).all() and np.isfinite(c.multipliers).all()):
            raise _Broken("'point' and 'multipliers' must be finite")
        if bool((c.multipliers < 0).any()):
            raise _Broken(f"'multipliers' must not be negative; got {float(c.multipliers.min())}")

    def _masks(self) -> NDArray[np.bool_]:
        packed = np.ascontiguousarray(self.certificate.allowed, dtype=np.uint8)
        masks = np.unpackbits(packed, axis=1, count=self.n).astype(np.bool_)
        if bool((self.problem.allowed & ~masks[0]).any()):
            raise _Broken("node 0 must allow every row that the problem allows")
        return masks

    def prove(self) -> Value:
        """Return what node 0 proves: an exact fraction, or an infinity."""
        children: list[list[int]] = [[] for _ in range(self.N)]
        for node, parent in enumerate(self.certificate.parent.tolist()):
            if parent >= 0:
                children[parent].append(node)
        proved: list[Value] = [-math.inf] * self.N
        for node in reversed(range(self.N)):
            proved[node] = self._node(node, [(k, proved[k]) for k in children[node]])
        if self.certificate.recursion:
            return max(proved[0], self._recursion(proved[0]))
        return proved[0]

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

    def _node(self, node: int, children: list[tuple[int, Value]]) -> Value:
        mask = self.masks[node]
        if self._is_empty(mask):
            return math.inf
        removed = self._removed(node, mask, [k for k, _ in children])
        below = min((value for _, value in children), default=-math.inf)
        if not children and int(mask.sum()) == len(self.starts):
            # One row per group and not visibly empty: the choice is feasible.
            value, _ = self.arithmetic.objective(np.flatnonzero(mask) - self.starts)
            return value
        best = self._formula(node, mask, removed, below, exact=self.first_exact)
        claim = self.certificate.bound
        if (
            not self.first_exact
            and self.may_repeat
            and not self.certificate.recursion
            and _finite(claim)
            and best < Fraction(claim)
            and self.certificate.convexification[node] >= 0
        ):
            best = max(best, self._formula(node, mask, removed, below, exact=True))
        return best

    def _formula(
        self, node: int, mask: Bools, removed: list[int], below: Value, *, exact: bool
    ) -> Value:
        index = int(self.certificate.convexification[node])
        if index < 0:
            return -math.inf if removed else below
        if bool((mask & ~self.certificate.convexifications[index].support).any()):
            raise _Broken(f"node {node} must allow only rows of its convexification's support")
        self.exact_nodes += exact
        point, multipliers = self.certificate.point[node], self.certificate.multipliers[node]
        bounds = (self.exact if exact else self.outward)[index]
        try:
            own, by_row = bounds.node(mask, point, multipliers, removed)
        except ValueError as err:
            raise _Broken(f"node {node}: {err}") from err
        return max(own, min([below, *by_row]))

    def _least(self, mask: Bools) -> NDArray[np.int64]:
        """Return ``i64[m, G]``: the cheapest allowed cost of every group."""
        costs = np.where(mask, self.problem.costs, np.iinfo(np.int64).max)
        least: NDArray[np.int64] = np.minimum.reduceat(costs, self.starts, axis=1)
        return least

    def _is_empty(self, mask: Bools) -> bool:
        if not np.logical_or.reduceat(mask, self.starts).all():
            return True
        least = self._least(mask)
        if bool((least.sum(axis=1) > self.problem.limits).any()):
            return True
        single = self._single(mask)
        return any(not single.isdisjoint(self.arithmetic.enemies[p]) for p in single)

    def _single(self, mask: Bools) -> set[int]:
        """Return the allowed rows that are alone in their group."""
        alone = np.add.reduceat(mask.astype(np.int64), self.starts) == 1
        return set(np.flatnonzero(mask & alone[self.group]).tolist())

    def _removed(self, node: int, mask: Bools, children: list[int]) -> list[int]:
        """Return the rows that neither a child keeps nor a simple argument excludes."""
        if not children:
            return []
        below = self.masks[children]
        kept: Bools = np.logical_or.reduce(below, axis=0)
        if bool((kept & ~mask).any()):
            raise _Broken(f"the children of node {node} must not allow rows that it does not")
        differ = np.logical_or.reduceat(kept & ~np.logical_and.reduce(below, axis=0), self.starts)
        if int(differ.sum()) > 1:
            raise _Broken(f"the children of node {node} must differ in one group only")
        removed = np.flatnonzero(mask & ~kept)
        if not len(removed):
            return []
        least, single = self._least(mask), self._single(mask)
        total = least.sum(axis=1)
        open_rows = []
        for p in removed.tolist():
            others = total - least[:, self.group[p]]
            if bool((self.problem.costs[:, p] > self.problem.limits - others).any()):
                continue
            if not single.isdisjoint(self.arithmetic.enemies[p]):
                continue
            if self._is_dominated(p, mask, kept):
                continue
            open_rows.append(p)
        return open_rows

    def _is_dominated(self, p: int, mask: Bools, kept: Bools) -> bool:
        problem, g = self.problem, self.group[p]
        for q in range(*problem.offsets[g : g + 2].tolist()):
            if not kept[q] or bool((problem.costs[:, q] > problem.costs[:, p]).any()):
                continue
            if not self.arithmetic.enemies[q] <= self.arithmetic.enemies[p]:
                continue
            worst = Fraction(float(problem.diagonal[q])) - Fraction(float(problem.diagonal[p]))
            if problem.cross is not None:
                a, b = problem.cross[q].tolist(), problem.cross[p].tolist()
                for h, (start, stop) in enumerate(
                    zip(self.starts.tolist(), problem.offsets[1:].tolist(), strict=True)
                ):
                    if h != g:
                        worst += max(
                            Fraction(a[j]) - Fraction(b[j]) for j in range(start, stop) if mask[j]
                        )
            if worst <= 0:
                return True
        return False


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

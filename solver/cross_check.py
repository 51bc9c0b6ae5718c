"""Ask other solvers whether an answer holds.

Design: docs/design/external-solvers.md
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

from bitquota.codec import Document, Form
from bitquota.errors import BitquotaError
from bitquota.solver.backends import BACKENDS, backend_by_name, usable
from bitquota.solver.checker import Verdict, check_solution
from bitquota.solver.control import Control, Options
from bitquota.solver.solution import Solution, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bitquota.solver.problem import Problem

_ROUNDING = 1e-12
"""Relative to the loss terms: what the order of a float sum can change."""


class Outcome(StrEnum):
    """What another solver's answer means for ours."""

    CONFIRMS = "confirms"
    """It proved the same optimum (within both gaps and its tolerance), or infeasibility."""
    CONSISTENT = "consistent"
    """It proved less, and nothing that contradicts."""
    CONTRADICTS = "contradicts"
    """Both answers cannot be true."""
    FAILED = "failed"
    """It gave no answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison(Document):
    """One other solver's answer beside ours.

    Attributes:
        backend: Its name.
        outcome: What its answer means for ours.
        reason: Why, as a sentence.
        solution: Its answer, unless it failed.
    """

    backend: str
    outcome: Outcome
    reason: str
    solution: Solution | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossCheck(Document):
    """An answer, what the independent checker proves of it, and what others say.

    Attributes:
        verdict: Of the certificate checker; ``None`` for an answer without a certificate.
        comparisons: One per other solver, in order of preference.
    """

    FORM: ClassVar[Form] = Form(names={"verdict": "certificate"}, derived=("holds", "confirmed"))

    verdict: Verdict | None
    comparisons: tuple[Comparison, ...]

    @property
    def holds(self) -> bool:
        """Whether the certificate (if any) was verified and nobody contradicts."""
        contradicted = any(c.outcome is Outcome.CONTRADICTS for c in self.comparisons)
        return not contradicted and (self.verdict is None or self.verdict.holds)

    @property
    def confirmed(self) -> bool:
        """Whether it holds and at least one other solver proved the same."""
        return self.holds and any(c.outcome is Outcome.CONFIRMS for c in self.comparisons)


def cross_check(
    problem: Problem,
    solution: Solution,
    backends: Sequence[str] | None = None,
    *,
    options: Options | None = None,
    on_comparison: Callable[[Comparison], None] | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> CrossCheck:
    """Compare ``solution`` with other solvers' answers and check its certificate.

    Each other solver gets the problem as it is: the measured matrix, all constraints. One that
    fails, or does not finish in time, says nothing against ``solution``.

    Args:
        problem: What was solved.
        solution: The answer to check.
        backends: Names; ``None`` for all that are installed and take the problem.
        options: Gap and limits of each of them.
        on_comparison: Called after each.
        cancelled: ``True`` skips the rest.

    Raises:
        InvalidInput: An unknown name.
    """
    options = options or Options()
    names = [backend_by_name(name).name for name in backends or ()]
    if backends is None:
        names = [backend.name for backend in usable(problem) if backend.name != solution.backend]
    # The certificate, then one solver after the other.
    verdict = None if solution.certificate is None else check_solution(problem, solution)
    comparisons = []
    for name in names:
        if cancelled is not None and cancelled():
            break
        try:
            other = BACKENDS[name].solve(problem, Control(options=options, cancelled=cancelled))
        except BitquotaError as err:
            comparison = Comparison(backend=name, outcome=Outcome.FAILED, reason=err.message)
        else:
            outcome, reason = compare(problem, solution, other, gap=options.gap)
            comparison = Comparison(backend=name, outcome=outcome, reason=reason, solution=other)
        comparisons.append(comparison)
        if on_comparison is not None:
            on_comparison(comparison)
    return CrossCheck(verdict=verdict, comparisons=tuple(comparisons))


def compare(
    problem: Problem, ours: Solution, other: Solution, *, gap: float
) -> tuple[Outcome, str]:
    """Return what ``other`` means for ``ours``, and why.

    A bound of a float solver counts less its stated tolerance.
    """
    scale = float(abs(problem.diagonal).max()) * problem.n_groups
    if problem.cross is not None:
        scale += float(abs(problem.cross).max()) * problem.n_groups**2
    scale += float(abs(problem.term_values).max(initial=0.0)) * problem.n_groups**2
    if problem.factor is not None:
        scale += max(float((column**2).max()) for column in problem.factor.T) * problem.n_groups**2
    rounding = _ROUNDING * (scale + abs(problem.constant))
    tolerance = other.stats.details.get("bound_tolerance", 0.0) + rounding
    own_tolerance = ours.stats.details.get("bound_tolerance", 0.0) + rounding
    # Is there a choice at all?
    if other.choice is not None and ours.status is Status.INFEASIBLE:
        return Outcome.CONTRADICTS, "it found a choice where ours says there is none"
    if other.status is Status.INFEASIBLE:
        if ours.choice is not None:
            return Outcome.CONTRADICTS, "it says that there is no choice where ours is one"
        if ours.status is Status.INFEASIBLE:
            return Outcome.CONFIRMS, "both proved that no choice exists"
        return Outcome.CONSISTENT, "it proved that no choice exists; ours did not finish"
    # Does either bound contradict the other's choice?
    if other.objective < ours.bound - own_tolerance:
        return (
            Outcome.CONTRADICTS,
            f"its choice is worth {other.objective:.12g}, below our bound {ours.bound:.12g}",
        )
    if other.bound - tolerance > ours.objective:
        return (
            Outcome.CONTRADICTS,
            f"its bound {other.bound:.12g} is above our choice's {ours.objective:.12g}",
        )
    # Did both prove the same?
    slack = gap * max(abs(ours.objective), abs(other.objective))
    slack += (ours.objective - ours.bound) + tolerance
    if other.status is not Status.OPTIMAL or ours.choice is None:
        return Outcome.CONSISTENT, f"it stopped at its {other.limit} limit" if other.limit else (
            "it finished where ours did not"
        )
    if abs(other.objective - ours.objective) <= slack:
        return Outcome.CONFIRMS, f"it proved {other.objective:.12g}, ours is {ours.objective:.12g}"
    words = f"it proved {other.objective:.12g}, within our bound {ours.bound:.12g}"
    return Outcome.CONSISTENT, f"{words}; ours is {ours.objective:.12g}"

"""What every solver backend is and is told."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bitquota.solver.control import Control
    from bitquota.solver.problem import Problem
    from bitquota.solver.solution import Solution


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend(ABC):
    """One way to solve a problem.

    A backend never answers with a choice that breaks a constraint: choices are checked in integers
    and evaluated on the problem as it was handed in. Without a certificate its bound is a float
    within a tolerance, ``Solution.stats.details["bound_tolerance"]``.

    Attributes:
        name: How users call it.
        extra: The extra of ``bitquota`` that brings its packages, if it needs any.
        counts_nodes: Whether it obeys a node limit.
    """

    name: str
    extra: str | None = None
    counts_nodes: bool = False

    def missing(self) -> str | None:
        """Return the name of a package that it needs and that is not installed, or ``None``."""
        return None

    def refuses(self, problem: Problem) -> str | None:  # noqa: ARG002 - most take all
        """Return why it cannot take ``problem``, as a sentence, or ``None``."""
        return None

    @abstractmethod
    def solve(
        self, problem: Problem, control: Control, start: NDArray[np.int64] | None = None
    ) -> Solution:
        """Solve ``problem``. An infeasible one is a solution of status ``infeasible``.

        Args:
            problem: What to solve.
            control: Goal, limits and callbacks; the time runs from its making.
            start: A choice to begin with; most take none.

        Raises:
            SolverFailed: The backend died or gave an answer that does not hold.
            InvalidProblem: ``refuses`` says no.
        """

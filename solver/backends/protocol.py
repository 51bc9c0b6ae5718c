"""What every solver backend is and is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from bitquota.errors import InvalidProblem

if TYPE_CHECKING:
    from bitquota.solver.problem import Problem
    from bitquota.solver.solution import Event, Solution

OnEvent = Callable[["Event"], None]
Cancelled = Callable[[], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Limits and goal of one run.

    Attributes:
        gap: Relative gap that counts as solved.
        time_limit_s: Seconds of wall clock, start of a child process not counted; ``None`` for
            as long as it takes.
        node_limit: Branch-and-bound nodes, for backends that count them.
        seed: For backends with a random part.
    """

    gap: float = 1e-4
    time_limit_s: float | None = None
    node_limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check that nothing is negative."""
        for name in ("gap", "time_limit_s", "node_limit", "seed"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                msg = f"'{name}' must not be negative; got {value}"
                raise InvalidProblem(msg)


class Backend(Protocol):
    """One way to solve a problem. Its capabilities are attributes.

    A backend never answers with a choice that breaks a constraint: choices are checked in integers
    and evaluated on the problem as it was handed in.
    """

    @property
    def name(self) -> str:
        """How users call it."""

    @property
    def proves(self) -> bool:
        """Whether it can prove optimality and infeasibility, given time."""

    @property
    def certifies(self) -> bool:
        """Whether its solutions carry a certificate; other bounds are floats within a tolerance.

        Such a tolerance is in ``Solution.stats.details["bound_tolerance"]``.
        """

    @property
    def counts_nodes(self) -> bool:
        """Whether it obeys a node limit."""

    @property
    def separate_process(self) -> bool:
        """Whether it runs in a child process, so that its libraries cannot clash or crash us."""

    @property
    def extra(self) -> str | None:
        """The extra of ``bitquota`` that brings its packages, if it needs any."""

    def missing(self) -> str | None:
        """Return the name of a package that it needs and that is not installed, or ``None``."""

    def refuses(self, problem: Problem) -> str | None:
        """Return why it cannot take ``problem``, as a sentence, or ``None``."""

    def solve(
        self,
        problem: Problem,
        options: Options,
        *,
        on_event: OnEvent | None = None,
        cancelled: Cancelled | None = None,
    ) -> Solution:
        """Solve ``problem``. An infeasible one is a solution of status ``infeasible``.

        Raises:
            SolverFailed: The backend died or gave an answer that does not hold.
            InvalidProblem: ``refuses`` says no.
        """

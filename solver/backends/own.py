"""The backends that run in this process: our own solver, and enumeration."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bitquota.errors import Infeasible
from bitquota.solver.backends.backend import Backend
from bitquota.solver.brute_force import LARGEST, enumerate_all, n_choices
from bitquota.solver.native import solve_native
from bitquota.solver.solution import Event, Limit, Solution, Status

if TYPE_CHECKING:
    from bitquota.solver.control import Cancelled, OnEvent, Options
    from bitquota.solver.problem import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Own(Backend):
    """Bitquota's branch and bound: any matrix, any constraint, with a certificate."""

    name: str = "bitquota"
    counts_nodes: bool = True

    def solve(
        self,
        problem: Problem,
        options: Options,
        *,
        on_event: OnEvent | None = None,
        cancelled: Cancelled | None = None,
    ) -> Solution:
        """Solve ``problem``; see ``bitquota.solver.solve``."""
        try:
            return solve_native(problem, options, on_event=on_event, cancelled=cancelled)
        except Infeasible:
            return Solution(status=Status.INFEASIBLE, bound=math.inf, backend=self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class BruteForce(Backend):
    """Every choice, one by one, for small problems."""

    name: str = "brute_force"

    def refuses(self, problem: Problem) -> str | None:
        """Return why there are too many choices, or ``None``."""
        choices = n_choices(problem)
        if choices > LARGEST:
            return (
                f"'{self.name}' takes at most {LARGEST:,} choices; this problem has {choices:,}: "
                "use another solver"
            )
        return None

    def solve(
        self,
        problem: Problem,
        options: Options,
        *,
        on_event: OnEvent | None = None,
        cancelled: Cancelled | None = None,
    ) -> Solution:
        """Enumerate; exact, so that gap and seed do not matter."""
        begin, late = time.monotonic(), False

        def stopped() -> bool:
            nonlocal late
            limit = options.time_limit_s
            late = limit is not None and time.monotonic() - begin >= limit
            return late or (cancelled is not None and cancelled())

        solution = enumerate_all(problem, cancelled=stopped)
        if late and solution.limit is not None:
            solution = replace(solution, limit=Limit.TIME)
        if on_event is not None and solution.choice is not None:
            on_event(Event.of(solution))
        return solution

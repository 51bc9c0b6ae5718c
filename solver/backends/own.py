"""The backends that run in this process: our own solver, and enumeration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitquota.errors import Infeasible
from bitquota.solver.backends.backend import Backend
from bitquota.solver.brute_force import LARGEST, enumerate_all, n_choices
from bitquota.solver.solution import Solution, Status

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bitquota.solver.control import Control
    from bitquota.solver.problem import Problem

    Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Own(Backend):
    """Bitquota's branch and bound: any matrix, any constraint, with a certificate."""

    name: str = "bitquota"
    counts_nodes: bool = True

    def solve(self, problem: Problem, control: Control, start: Ints | None = None) -> Solution:
        """Solve ``problem``; see ``bitquota.solver.solve``."""
        from bitquota.solver.native import solve_native, verified

        try:
            problem.check_budgets()
        except Infeasible:
            return Solution(status=Status.INFEASIBLE, bound=math.inf, backend=self.name)
        return verified(problem, solve_native(problem, control, start))


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
        control: Control,
        start: Ints | None = None,  # noqa: ARG002 - all choices are looked at
    ) -> Solution:
        """Enumerate; exact, so that gap and seed do not matter."""
        solution = enumerate_all(problem, control)
        control.tell_of(solution)
        return solution

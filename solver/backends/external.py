"""Backends that other people's solvers provide, each in a child process.

Design: docs/design/external-solvers.md
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bitquota.errors import InvalidProblem, SolverFailed
from bitquota.solver.backends.backend import Backend
from bitquota.solver.backends.model import Model
from bitquota.solver.backends.process import run_child
from bitquota.solver.solution import Limit, Solution, Stats, Status

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bitquota.solver.backends.process import Outcome
    from bitquota.solver.control import Control, Options
    from bitquota.solver.problem import Problem

    Ints = NDArray[np.int64]

_FACTOR_ROWS = 3500
"""Rows of a factor whose pair terms may become one matrix."""


@dataclass(frozen=True, slots=True, kw_only=True)
class External(Backend):
    """A backend that runs ``optimise`` of the module of its name in a child process.

    Attributes:
        packages: What must be importable.
        largest_products: Products of two rows beyond which it is refused, or ``None``. Such a
            backend writes out each pair of rows.
    """

    packages: tuple[str, ...]
    largest_products: int | None = None

    def missing(self) -> str | None:
        """Return the first package that is not installed, or ``None``."""
        return next((p for p in self.packages if importlib.util.find_spec(p) is None), None)

    def refuses(self, problem: Problem) -> str | None:
        """Return why it cannot take ``problem``, or ``None``."""
        listed = problem.factor is not None or len(problem.terms)
        if listed and problem.n_rows > _FACTOR_ROWS:
            return (
                f"'{self.name}' takes a factor or terms of at most {_FACTOR_ROWS:,} rows, as it "
                f"makes a matrix of all terms; this problem has {problem.n_rows:,}: use 'bitquota'"
            )
        if self.largest_products is None or problem.separable:
            return None
        products = problem.n_rows**2 // 2
        if len(problem.terms) and problem.factor is None:
            products = len(problem.terms)
        if problem.cross is not None:
            products = int(np.count_nonzero(problem.cross)) // 2
        if products > self.largest_products:
            return (
                f"'{self.name}' writes out each pair of rows and takes at most "
                f"{self.largest_products:,}; this problem has {products:,}: use another solver"
            )
        return None

    def solve(
        self,
        problem: Problem,
        control: Control,
        start: Ints | None = None,  # noqa: ARG002 - theirs to find
    ) -> Solution:
        """Solve ``problem`` in a child process; see ``Backend.solve``. Its packages are there.

        Raises:
            InvalidProblem: The problem is larger than it takes.
            SolverFailed: The child died, or its answer does not hold.
        """
        if reason := self.refuses(problem):
            raise InvalidProblem(reason, backend=self.name)
        model = Model.of(problem)
        if model is None or bool((problem.limits < 0).any()):
            return Solution(status=Status.INFEASIBLE, bound=math.inf, backend=self.name)
        # Every choice is checked and valued here, those on the way too.
        best = math.inf

        def on_incumbent(chosen: Ints) -> None:
            nonlocal best
            choice = self._checked(problem, model, chosen)
            objective = problem.evaluate(choice)
            if objective < best:
                best = objective
                control.tell_of(
                    Solution(
                        status=Status.FEASIBLE,
                        limit=Limit.METHOD,
                        choice=choice,
                        objective=objective,
                    )
                )

        outcome = run_child(
            self.name,
            model,
            control.options,
            on_incumbent=on_incumbent,
            cancelled=control.cancelled,
        )
        return self._solution(problem, model, control.options, outcome)

    def _checked(self, problem: Problem, model: Model, chosen: Ints) -> Ints:
        """Return the choice after checking it in integers on the problem itself."""
        if chosen.shape == (model.n_groups,):
            inside = (model.offsets[:-1] <= chosen) & (chosen < model.offsets[1:])
            if inside.all() and problem.is_feasible(model.choice(chosen)):
                return model.choice(chosen)
        msg = (
            f"solver backend '{self.name}' must answer with a choice that meets every constraint; "
            f"got rows {chosen.tolist()!r:.200}; use another solver and report this"
        )
        raise SolverFailed(msg, backend=self.name)

    def _solution(
        self, problem: Problem, model: Model, options: Options, outcome: Outcome
    ) -> Solution:
        answer = outcome.answer
        bound, tolerance = answer.bound / model.scale, answer.tolerance / model.scale
        choice, objective = None, math.inf
        if answer.chosen is not None:
            choice = self._checked(problem, model, answer.chosen)
            objective = problem.evaluate(choice)
            # Above the objective of its own choice, a bound is so by its tolerance only.
            bound = min(bound, objective)
        if answer.status == "infeasible":
            status, bound = Status.INFEASIBLE, math.inf
        elif choice is None:
            status = Status.UNKNOWN
        elif (
            answer.status == "optimal"
            and objective - bound <= options.gap * abs(objective) + tolerance
        ):
            status = Status.OPTIMAL
        else:
            status = Status.FEASIBLE
        loading = outcome.loading_cpu_seconds
        return Solution(
            status=status,
            # Where nothing else stopped it, its own tolerances did: the method's limit.
            limit=Limit(answer.limit or Limit.METHOD)
            if status in {Status.UNKNOWN, Status.FEASIBLE}
            else None,
            choice=choice,
            objective=objective,
            bound=bound,
            backend=self.name,
            stats=Stats(
                nodes=answer.nodes,
                cpu_seconds=outcome.cpu_seconds,
                details=answer.details
                | {"bound_tolerance": tolerance, "loading_cpu_seconds": loading},
            ),
        )

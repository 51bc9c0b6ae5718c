"""A program: one backend's own part against enumeration on random problems, in this process.

``python random_problems.py BACKEND EXAMPLES``; prints a JSON object, exits non-zero on a mismatch.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import TYPE_CHECKING

import hypothesis

from bitquota.solver import Problem, Status
from bitquota.solver.backends.answer import Task
from bitquota.solver.backends.child import solve_with_covers
from bitquota.solver.backends.model import Model
from bitquota.solver.brute_force import enumerate_all
from strategies import any_problems

if TYPE_CHECKING:
    import numpy as np


def main() -> None:
    name, examples = sys.argv[1], int(sys.argv[2])
    optimise = importlib.import_module(f"bitquota.solver.backends.{name}").optimise
    counts = {"problems": 0, "infeasible": 0, "cover_rounds": 0}

    @hypothesis.settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @hypothesis.given(any_problems())
    def equals_brute_force(problem: Problem) -> None:
        counts["problems"] += 1
        best = enumerate_all(problem)
        model = Model.of(problem)
        if model is None:
            assert best.status is Status.INFEASIBLE
            return
        reported: list[np.ndarray] = []
        task = Task(
            model=model,
            gap=1e-6,
            time_limit_s=None,
            node_limit=None,
            seed=0,
            report=reported.append,
        )
        answer = solve_with_covers(optimise, task)
        counts["cover_rounds"] += int(answer.details.get("cover_rounds", 0))
        if best.status is Status.INFEASIBLE:
            counts["infeasible"] += 1
            assert answer.status == "infeasible", answer
            return
        assert answer.status == "optimal", answer
        choice = model.choice(answer.chosen)
        assert problem.is_feasible(choice)
        slack = 1e-6 * abs(best.objective) + answer.tolerance / model.scale
        assert abs(problem.evaluate(choice) - best.objective) <= slack
        assert answer.bound / model.scale <= best.objective + slack
        assert all(problem.is_feasible(model.choice(chosen)) for chosen in reported)

    equals_brute_force()
    print(json.dumps(counts))  # noqa: T201 - a program


if __name__ == "__main__":
    main()

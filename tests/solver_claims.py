"""What must be true of every answer of the solver, as functions of a problem.

Used by the property tests (a few hundred problems) and by ``benchmarks/solver_properties.py``
(ten thousand).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bitquota.errors import Infeasible
from bitquota.solver import Problem, Solution, Status, solve
from bitquota.solver.brute_force import enumerate_all
from bitquota.solver.checker import check_solution
from strategies import HOPELESS

GAP = 1e-6


def answer(problem: Problem, **options: Any) -> Solution:
    """Return what ``solve`` says; a budget below the cheapest rows is infeasible too."""
    try:
        return solve(problem, **{"gap": GAP} | options)
    except Infeasible:
        return Solution(status=Status.INFEASIBLE, bound=np.inf)


def size(problem: Problem) -> float:
    """Return the magnitude that rounding is relative to; a row that diverged is none."""
    diagonal = np.sort(np.abs(problem.diagonal))
    if len(diagonal) > 1 and diagonal[-1] > 0.1 * HOPELESS * diagonal[-2] > 0.0:
        diagonal = diagonal[:-1]
    total = abs(problem.constant) + float(diagonal[-1])
    if problem.cross is not None:
        total += float(np.abs(problem.cross).max(initial=0.0)) * problem.n_groups
    total += float(np.abs(problem.term_values).max(initial=0.0)) * problem.n_groups
    return total * problem.n_groups


def slack(problem: Problem, objective: float, gap: float = GAP) -> float:
    """Return by how much two answers proved within ``gap`` may differ."""
    return 1.01 * gap * abs(objective) + 1e-11 * size(problem) + 1e-300


def assert_equals_brute_force(problem: Problem, *, gap: float = GAP, seed: int = 0) -> Solution:
    """The answer is the optimum, proved, and the independent checker agrees."""
    best = enumerate_all(problem)
    found = answer(problem, gap=gap, seed=seed)
    if best.choice is None:
        assert found.status is Status.INFEASIBLE, found
        assert found.bound == np.inf
    else:
        assert found.status is Status.OPTIMAL, found
        assert found.choice is not None
        assert problem.is_feasible(found.choice)
        room = slack(problem, best.objective, gap)
        assert abs(found.objective - best.objective) <= room, (found, best)
        assert best.objective - room <= found.bound
    assert_bound_is_true(problem, found, best)
    return found


def assert_bound_is_true(problem: Problem, found: Solution, best: Solution) -> None:
    """Whatever stopped the solver: bound ≤ optimum ≤ objective, and the certificate proves it."""
    rounding = 1e-12 * size(problem) + 1e-300
    assert found.bound <= best.objective + rounding, (found, best)
    assert found.objective >= best.objective - rounding, (found, best)
    if found.certificate is not None:
        verdict = check_solution(problem, found)
        assert verdict.holds, verdict
        assert verdict.proved <= best.objective + rounding
        assert found.bound <= verdict.proved + rounding
    else:
        # Only what a glance at single budgets excludes comes without a certificate.
        assert found.status is Status.INFEASIBLE

"""Enumeration agrees with the definition of a problem."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings

from bitquota.errors import InvalidProblem
from bitquota.solver import Limit, Problem, Status
from bitquota.solver.brute_force import enumerate_all, feasible_choices, n_choices
from bitquota.solver.control import Control
from strategies import any_problems, planted_problems


class TestFeasibleChoices:
    @settings(max_examples=100, deadline=None)
    @given(any_problems(max_groups=4, max_rows=3))
    def test_lists_exactly_what_the_problem_calls_feasible(self, problem):
        """Every choice is listed if and only if ``is_feasible`` says so, in order."""
        counts = np.diff(problem.offsets).tolist()
        expected = [c for c in itertools.product(*map(range, counts)) if problem.is_feasible(c)]
        chunks = list(feasible_choices(problem))
        assert expected == [tuple(c) for choices, _ in chunks for c in choices.tolist()]
        values = [v for _, values in chunks for v in values.tolist()]
        assert [problem.evaluate(c) for c in expected] == pytest.approx(values, rel=1e-9, abs=1e-9)

    def test_refuses_too_many(self):
        """The count is in the message."""
        problem = Problem(
            diagonal=np.zeros(60),
            offsets=np.arange(0, 61, 3),
            costs=np.zeros((0, 60), dtype=np.int64),
            limits=np.zeros(0, dtype=np.int64),
        )
        assert n_choices(problem) == 3**20
        with pytest.raises(InvalidProblem, match="3,486,784,401"):
            next(feasible_choices(problem))


class TestEnumerateAll:
    @settings(max_examples=60, deadline=None)
    @given(planted_problems())
    def test_never_worse_than_the_planted_choice(self, planted):
        """The planted choice is feasible, so the optimum is at most its objective."""
        best = enumerate_all(planted.problem)
        assert Status.OPTIMAL == best.status
        assert planted.problem.is_feasible(best.choice)
        assert best.objective <= planted.problem.evaluate(planted.choice) + 1e-12

    def test_proves_infeasibility(self):
        """No choice: infeasible, with an infinite bound."""
        problem = Problem(
            diagonal=np.zeros(2),
            offsets=np.array([0, 2]),
            costs=np.array([[3, 4]]),
            limits=np.array([2]),
        )
        solution = enumerate_all(problem)
        assert Status.INFEASIBLE == solution.status
        assert math.inf == solution.bound

    def test_can_be_cancelled(self):
        """A cancelled enumeration claims nothing."""
        problem = Problem(
            diagonal=np.zeros(2),
            offsets=np.array([0, 2]),
            costs=np.array([[3, 4]]),
            limits=np.array([4]),
        )
        solution = enumerate_all(problem, Control(cancelled=lambda: True))
        assert (Status.UNKNOWN, Limit.CANCELLED) == (solution.status, solution.limit)

"""Frontiers and smallest plans against enumeration."""

from dataclasses import replace

import numpy as np
import pytest

from bitquota.errors import InvalidProblem
from bitquota.solver import Limit, Problem, Status, even_limits, frontier, smallest
from bitquota.solver.brute_force import enumerate_all, feasible_choices
from bitquota.solver.checker import check_solution


def small(seed, *, separable=False):
    """Six groups of three rows with cross terms of both signs."""
    rng = np.random.default_rng(seed)
    cross = rng.normal(size=(18, 18)) * 0.2
    cross = cross + cross.T
    for g in range(6):
        cross[3 * g : 3 * g + 3, 3 * g : 3 * g + 3] = 0
    cost = rng.integers(5, 50, 6).repeat(3) * np.tile([2, 3, 4], 6)
    return Problem(
        diagonal=rng.uniform(0.5, 2, 6).repeat(3) * np.tile([4.0, 2.0, 1.0], 6),
        cross=None if separable else cross,
        offsets=np.arange(7) * 3,
        costs=cost[None, :],
        limits=np.array([int(cost.sum())]),
    )


def best_at(problem, limit):
    return enumerate_all(replace(problem, limits=np.array([limit]))).objective


class TestFrontier:
    @pytest.mark.parametrize("separable", [False, True])
    def test_every_point_is_optimal_and_proved(self, separable):
        """Each point equals enumeration and carries a certificate that holds."""
        problem = small(1, separable=separable)
        points = frontier(problem, even_limits(problem, 9), gap=0.0)
        assert len(points) == 9
        for point in points:
            assert point.solution.status is Status.OPTIMAL
            expected = best_at(problem, point.limit)
            assert point.solution.objective == pytest.approx(expected, abs=1e-12)
            one = replace(problem, limits=np.array([point.limit]))
            assert check_solution(one, point.solution).holds

    def test_larger_budgets_never_hurt(self):
        """Also without proofs, losses do not rise with the budget."""
        problem = small(2)
        points = frontier(problem, even_limits(problem, 25), certify=False)
        values = [p.solution.objective for p in points]
        assert values == sorted(values, reverse=True)
        assert all(p.solution.limit is Limit.METHOD for p in points)

    def test_impossible_budgets_are_points_too(self):
        """A budget below the cheapest choice is an infeasible point, not an error."""
        problem = small(3)
        least = int(even_limits(problem, 2)[0])
        points = frontier(problem, [least - 1, least])
        assert [p.solution.status for p in points] == [Status.INFEASIBLE, Status.OPTIMAL]

    def test_points_are_reported_as_they_finish(self):
        """The callback sees every point in order."""
        problem = small(4)
        seen = []
        points = frontier(problem, even_limits(problem, 5), on_point=seen.append)
        assert tuple(seen) == points

    def test_refuses_an_unknown_resource(self):
        """A resource that does not exist is refused."""
        with pytest.raises(InvalidProblem, match="resource"):
            frontier(small(0), [1], resource=3)


class TestSmallest:
    @pytest.mark.parametrize("seed", range(4))
    def test_equals_enumeration(self, seed):
        """The cheapest choice within a tolerance, to the last unit."""
        problem = small(seed)
        losses, costs = [], []
        for choices, values in feasible_choices(problem):
            losses += values.tolist()
            costs += [int(problem.spent(choice)[0]) for choice in choices]
        tolerance = sorted(losses)[len(losses) // 5]
        within = np.array(losses) <= tolerance
        cheapest = int(np.array(costs)[within].min())
        answer = smallest(problem, tolerance, gap=0.0)
        assert answer.status is Status.OPTIMAL
        assert answer.cost == cheapest == answer.bound
        assert answer.objective <= tolerance

    def test_impossible_tolerance(self):
        """A tolerance that no choice meets is infeasible."""
        answer = smallest(small(1), -1e6)
        assert answer.status is Status.INFEASIBLE
        assert answer.choice is None

    def test_cancelled(self):
        """Cancelled before anything is known, it says so."""
        answer = smallest(small(1), 5.0, cancelled=lambda: True)
        assert answer.limit in (None, Limit.CANCELLED)
        assert answer.status is not Status.INFEASIBLE

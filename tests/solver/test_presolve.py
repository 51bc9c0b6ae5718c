"""What is seen before anything is bounded: constants, symmetry, rows that are never better."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from bitquota.solver import Problem, solve
from bitquota.solver.checker import check_solution
from bitquota.solver.presolve import folded, interchangeable, undominated


def problem_of(diagonal, cross, *, width=3, average=3.37, costs=(2, 4, 8)):
    """Return a problem of equal groups; blocks of ``cross`` inside a group are set to zero."""
    groups = len(diagonal) // width
    group = np.repeat(np.arange(groups), width)
    cross = np.where(group[:, None] == group[None, :], 0.0, cross)
    return Problem(
        diagonal=diagonal,
        cross=cross,
        offsets=np.arange(groups + 1) * width,
        costs=np.tile(costs, groups)[None],
        limits=np.array([int(average * groups)]),
    )


def identical(groups, correlation, scale=None):
    """Return layers whose errors are alike, as they are or each ``scale`` times as large."""
    error = 2.0 ** -np.array([2, 4, 8])
    between = correlation * np.ones((groups, groups)) + (1 - correlation) * np.eye(groups)
    G = np.kron(between, np.outer(error, error))
    if scale is not None:
        G *= np.outer(np.repeat(scale, 3), np.repeat(scale, 3))
    return problem_of(np.diag(G), 2 * G)


def least(problem):
    """Return the least objective, by enumeration."""
    choices = itertools.product(range(3), repeat=problem.n_groups)
    return min(problem.evaluate(c) for c in choices if problem.is_feasible(c))


class TestFolded:
    def test_constant_terms_are_moved_to_the_rest(self):
        """A matrix of equal terms leaves a separable problem of the same objective."""
        problem = problem_of(np.random.default_rng(0).random(12), np.full((12, 12), 0.3))
        small, rounding = folded(problem)
        assert small.cross is None
        for choice in itertools.product(range(3), repeat=4):
            assert pytest.approx(problem.evaluate(choice)) == small.evaluate(choice)
        assert (rounding > 0).all()

    def test_others_stay(self):
        """A block that is not a sum of its margins is left where it is."""
        rng = np.random.default_rng(1)
        C = rng.normal(size=(12, 12))
        problem = problem_of(rng.random(12), C + C.T)
        assert folded(problem)[0] is problem

    def test_zeros_are_no_terms(self):
        """A matrix of zeros makes a separable problem."""
        assert problem_of(np.ones(6), np.zeros((6, 6))).cross is None


class TestClosesAtTheRoot:
    @pytest.mark.parametrize("value", [0.0, 0.3])
    @pytest.mark.parametrize("diagonal", [np.zeros(60), np.ones(60)])
    def test_all_equal_or_zero(self, value, diagonal):
        """Nothing is branched on where all terms are alike."""
        problem = problem_of(diagonal, np.full((60, 60), value))
        solution = solve(problem)
        assert "optimal" == solution.status
        assert solution.nodes <= 1
        assert check_solution(problem, solution).holds

    def test_equal_costs(self):
        """Groups whose rows all cost and lose the same."""
        problem = problem_of(np.ones(60), np.full((60, 60), 0.3), average=3, costs=(3, 3, 3))
        solution = solve(problem)
        assert ("optimal", 77.0) == (solution.status, pytest.approx(solution.objective))
        assert check_solution(problem, solution).holds

    @pytest.mark.parametrize("groups", [12, 20])
    def test_identical_layers(self, groups):
        """Twenty layers that can be exchanged take one region, and a tree of a hundred nodes."""
        problem = identical(groups, 0.5)
        solution = solve(problem)
        assert "optimal" == solution.status
        assert solution.nodes <= 100
        assert groups - 1 == len(solution.certificate.orders)
        assert check_solution(problem, solution).holds

    def test_agrees_with_enumeration(self):
        """Two kinds of layers, each three times."""
        problem = identical(6, 0.4, scale=np.array([1.0, 2.0, 1.0, 2.0, 1.0, 2.0]))
        solution = solve(problem, gap=0.0)
        assert [[0, 2], [1, 3], [2, 4], [3, 5]] == interchangeable(problem).tolist()
        assert pytest.approx(least(problem), rel=1e-12) == solution.objective
        assert check_solution(problem, solution).holds


class TestInterchangeable:
    def test_a_pair_or_a_price_tells_groups_apart(self):
        """Groups in pairs, of another cost, or with another permission are not exchanged."""
        problem = identical(4, 0.5)
        assert 3 == len(interchangeable(problem))
        paired = replace(problem, forbidden_pairs=np.array([[0, 3]]))
        assert [[2, 3]] == interchangeable(paired).tolist()
        costs = problem.costs.copy()
        costs[0, 0] += 1
        assert [[1, 2], [2, 3]] == interchangeable(replace(problem, costs=costs)).tolist()
        allowed = problem.allowed.copy()
        allowed[4] = False
        assert [[0, 2], [2, 3]] == interchangeable(replace(problem, allowed=allowed)).tolist()


class TestUndominated:
    def test_a_row_that_another_replaces_goes(self):
        """More cost for more loss, whatever the others choose; of equal rows the first stays."""
        cross = np.zeros((6, 6))
        cross[0, 3] = cross[3, 0] = 0.1
        problem = problem_of(np.array([3.0, 1.0, 1.5, 3.0, 1.0, 1.0]), cross, costs=(2, 4, 4))
        left = undominated(problem, problem.allowed, problem.all_forbidden_pairs())
        assert [True, True, False, True, True, False] == left.tolist()

    def test_not_where_a_term_could_make_up_for_it(self):
        """A negative term with another group keeps the row."""
        cross = np.zeros((6, 6))
        cross[2, 3] = cross[3, 2] = -0.6
        problem = problem_of(np.array([3.0, 1.0, 1.5, 3.0, 1.0, 0.5]), cross, costs=(2, 4, 4))
        assert undominated(problem, problem.allowed, problem.all_forbidden_pairs())[2]


class TestHopeless:
    @pytest.mark.parametrize("big", [1e6, 1e12, 1e200])
    @pytest.mark.parametrize("seed", [0, 1, 2])
    def test_a_diverged_candidate_sets_no_scale(self, big, seed):
        """What is called optimal beside a huge loss is."""
        rng = np.random.default_rng(seed)
        rows = np.tile(2.0 ** -np.array([2, 4, 8]), 6) * np.repeat(np.exp(rng.normal(size=6)), 3)
        errors = rng.normal(size=(18, 5)) * rows[:, None]
        G = errors @ errors.T
        diagonal, cross = np.diag(G).copy(), 2 * G
        diagonal[6] = big
        cross[6] *= min(np.sqrt(big), 1e9)
        cross[:, 6] *= min(np.sqrt(big), 1e9)
        problem = problem_of(diagonal, cross)
        solution = solve(problem)
        assert "optimal" == solution.status
        assert solution.relative_gap <= 1.01e-4
        assert solution.objective <= least(problem) * (1 + 1.01e-4)
        assert check_solution(problem, solution).holds

    def test_a_separable_one_neither(self):
        """The same without cross terms."""
        problem = problem_of(np.array([1e12, 0.2, 0.1, 0.9, 0.25, 0.1]), np.zeros((6, 6)))
        solution = solve(problem, gap=1e-6)
        assert solution.objective - solution.bound <= 1e-6 * solution.objective
        assert check_solution(problem, solution).holds

    def test_each_step_refers_to_the_rows_before_it(self):
        """Rows that go together must not be each other's reason; the certificate shows them."""
        diagonal = np.array([-4.1, -0.6, 0.25, 6.5, 2.0, 0.04])
        cross = np.zeros((6, 6))
        cross[:3, 3:] = [[-14.3, -2.8, 0.56], [6.0, 5.3, -0.11], [2.0, -0.58, 0.26]]
        problem = replace(
            problem_of(diagonal, cross + cross.T),
            resources=(),
            costs=np.zeros((0, 6), dtype=np.int64),
            limits=np.zeros(0, dtype=np.int64),
        )
        solution = solve(problem)
        assert pytest.approx(-11.9) == solution.objective
        assert check_solution(problem, solution).holds

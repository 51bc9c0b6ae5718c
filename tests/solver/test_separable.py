"""Hulls and exact knapsacks."""

import tracemalloc

import numpy as np
import pytest

from bitquota.errors import InvalidProblem
from bitquota.solver import Limit, Problem, Status, hull, solve
from bitquota.solver.brute_force import enumerate_all
from bitquota.solver.checker import check_solution
from bitquota.solver.core import order_groups, reduce
from bitquota.solver.separable import solve_knapsack


def separable(groups, width, seed, budget=0.4):
    """Random sizes; losses fall by about four per further row."""
    rng = np.random.default_rng(seed)
    loss = np.exp(rng.normal(0, 1.5, (groups, 1))) * 4.0 ** -np.arange(width)
    loss = loss * rng.uniform(0.7, 1.3, (groups, width))
    cost = rng.integers(10, 10**6, (groups, 1)) * (2 + np.arange(width)) + 16
    least, most = int(cost[:, 0].sum()), int(cost[:, -1].sum())
    return Problem(
        diagonal=loss.ravel(),
        offsets=np.arange(groups + 1) * width,
        costs=cost.reshape(1, -1),
        limits=np.array([least + int(budget * (most - least))]),
    )


class TestHull:
    def test_vertices_are_choices(self):
        """Cost and loss of each vertex are those of its choice, and both are monotone."""
        problem = separable(30, 5, seed=1)
        frontier = hull(problem)
        for taken in (0, 7, len(frontier.steps)):
            choice = frontier.choice(problem, taken)
            assert int(problem.spent(choice)[0]) == frontier.cost[taken]
            assert problem.evaluate(choice) == pytest.approx(frontier.loss[taken], rel=1e-12)
        assert (np.diff(frontier.cost) > 0).all()
        assert (np.diff(frontier.loss) < 0).all()
        assert (np.diff(frontier.slope) <= 0).all()

    def test_no_choice_below_a_vertex(self):
        """At a vertex's cost, no choice has less loss."""
        problem = separable(6, 4, seed=2)
        frontier = hull(problem)
        for taken in (2, 5, 9):
            at = Problem(
                diagonal=problem.diagonal,
                offsets=problem.offsets,
                costs=problem.costs,
                limits=frontier.cost[taken : taken + 1],
            )
            best = enumerate_all(at).objective
            assert frontier.loss[taken] == pytest.approx(best, rel=1e-12)

    def test_needs_a_resource(self):
        """A resource that does not exist is refused."""
        with pytest.raises(InvalidProblem, match="resource"):
            hull(separable(3, 2, seed=0), resource=1)


class TestSolveKnapsack:
    @pytest.mark.parametrize("seed", range(20))
    def test_equals_enumeration(self, seed):
        """Exact on problems that can be enumerated."""
        problem = separable(7, 4, seed=seed, budget=0.1 + 0.04 * seed)
        answer = solve_knapsack(problem, gap=0.0)
        assert answer.exact
        assert answer.objective == pytest.approx(enumerate_all(problem).objective, rel=1e-12)
        assert answer.relaxed_bound <= answer.objective

    def test_five_thousand_layers(self):
        """5,000 x 5 is solved exactly, within the budget to the last bit."""
        problem = separable(5000, 5, seed=3)
        solution = solve(problem, gap=0.0)
        assert solution.status is Status.OPTIMAL
        assert problem.is_feasible(solution.choice)
        assert solution.absolute_gap <= 1e-9 * solution.objective
        verdict = check_solution(problem, solution)
        assert verdict.holds, verdict.reason
        assert verdict.proved >= solution.objective * (1 - 1e-9)

    def test_stops_when_told(self):
        """A recursion that is cancelled leaves the relaxation's bound, proved, and says so."""
        problem = separable(200, 5, seed=4)
        solution = solve(problem, gap=0.0, cancelled=lambda: True)
        assert (solution.status, solution.limit) == (Status.FEASIBLE, Limit.CANCELLED)
        assert check_solution(problem, solution).holds

    def test_refuses_cross_terms(self):
        """Problems with cross terms go elsewhere."""
        problem = Problem(
            diagonal=np.ones(2),
            cross=np.array([[0.0, 1.0], [1.0, 0.0]]),
            offsets=np.array([0, 1, 2]),
            costs=np.ones((1, 2), dtype=np.int64),
            limits=np.array([2]),
        )
        with pytest.raises(InvalidProblem, match="separable"):
            solve_knapsack(problem, gap=0.0)

    def test_gap_of_the_choice_that_is_returned(self):
        """The gap is relative to the best choice, not to the worse one that the search began with.

        Found by ``benchmarks/solver_properties.py --seed 20``.
        """
        problem = Problem(
            diagonal=np.array([
                7.88578588e09, 1.08588360e09, 4.13279372e07, 7.12989607e07, 6.16618503e09,
                1.37131728e08, 6.50359434e07, 1.75828511e10, 7.91828758e09, 3.10719442e09,
                6.00415284e08, 7.50428468e07,
            ]),
            offsets=np.array([0, 4, 7, 9, 12]),
            costs=np.array([[48, 72, 96, 192, 64, 96, 128, 56, 84, 18, 27, 36]]),
            limits=np.array([278]),
        )  # fmt: skip
        solution = solve(problem, gap=1e-6)
        assert solution.relative_gap <= 1.0001e-6
        assert check_solution(problem, solution).holds


class TestSeveralBudgets:
    def two_budgets(self, groups, seed):
        """Return a separable problem whose second budget binds as well."""
        first = separable(groups, 4, seed=seed)
        second = separable(groups, 4, seed=seed + 100)
        return Problem(
            diagonal=first.diagonal,
            offsets=first.offsets,
            costs=np.concatenate([first.costs, second.costs]),
            limits=np.concatenate([first.limits, second.limits]),
        )

    @pytest.mark.parametrize("seed", range(4))
    def test_equals_enumeration(self, seed):
        """Two budgets without cross terms: the optimum, proved."""
        problem = self.two_budgets(7, seed)
        solution = solve(problem, gap=0.0)
        assert solution.objective == pytest.approx(enumerate_all(problem).objective, rel=1e-11)
        assert check_solution(problem, solution).holds

    def test_thousands_of_layers_without_a_square_matrix(self):
        """3,000 x 4 rows would be a gigabyte as a matrix; the gap is closed and checked."""
        problem = self.two_budgets(3000, seed=1)
        assert reduce(problem, problem.allowed).C.shape == (0, 0)
        tracemalloc.start()
        solution = solve(problem)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 * problem.n_rows**2 / 3
        assert solution.status is Status.OPTIMAL
        assert all(problem.spent(solution.choice) <= problem.limits)
        assert check_solution(problem, solution).holds
        for k in (0, 1):
            one = Problem(
                diagonal=problem.diagonal,
                offsets=problem.offsets,
                costs=problem.costs[k : k + 1],
                limits=problem.limits[k : k + 1],
            )
            assert solve(one).objective < solution.bound  # both budgets bind

    def test_many_ties_by_pairs(self):
        """Twenty groups tied in fives by pairs: the same as four groups with summed rows."""
        problem = separable(20, 3, seed=6)
        pairs = [
            (3 * (g - 1) + a, 3 * g + b)
            for g in range(20)
            if g % 5
            for a in range(3)
            for b in range(3)
            if a != b
        ]
        tied = Problem(
            diagonal=problem.diagonal,
            offsets=problem.offsets,
            costs=problem.costs,
            limits=problem.limits,
            forbidden_pairs=np.array(pairs),
        )
        merged = Problem(
            diagonal=problem.diagonal.reshape(4, 5, 3).sum(axis=1).ravel(),
            offsets=np.arange(5) * 3,
            costs=problem.costs.reshape(4, 5, 3).sum(axis=1).reshape(1, -1),
            limits=problem.limits,
        )
        solution = solve(tied)
        assert solution.status is Status.OPTIMAL
        assert check_solution(tied, solution).holds
        assert solution.objective == pytest.approx(enumerate_all(merged).objective, rel=1e-4)


class TestOrderGroups:
    """Rows of a group in the order in which branching splits them."""

    def test_equals_a_stable_sort(self):
        """By share, then by falling loss, equal rows as they were."""
        rng = np.random.default_rng(0)
        for _ in range(50):
            n = int(rng.integers(1, 60))
            group = np.sort(rng.integers(0, 8, n))
            share, loss = rng.integers(0, 3, n) * 1.0, rng.integers(-2, 3, n) * 1.0
            rows = np.sort(rng.permutation(n)[: int(rng.integers(1, n + 1))])
            expected = rows[np.lexsort((-loss[rows], share[rows], group[rows]))]
            order_groups(rows, group, share, loss)
            assert expected.tolist() == rows.tolist()

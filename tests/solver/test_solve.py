"""The solver as users call it: limits, events, determinism, hard cases."""

import subprocess
import sys

import numpy as np
import pytest

from bitquota.errors import BudgetTooSmall, InvalidProblem
from bitquota.solver import Limit, Problem, Status, read_problem, solve
from bitquota.solver.brute_force import enumerate_all
from bitquota.solver.checker import check_solution
from bitquota.solver.core import reduce
from bitquota.solver.search import default_effort, search


def gram_problem(groups, width, seed, *, correlation=0.5, noise=0.0, budgets=1, budget=0.45):
    """A problem whose matrix is a Gram of random layer errors, halved for each further row."""
    rng = np.random.default_rng(seed)
    n = groups * width
    errors = rng.normal(size=(n, 3 * groups)) + correlation * rng.normal(size=3 * groups)
    errors *= (2.0 ** -np.arange(width))[np.arange(n) % width, None]
    errors *= np.exp(rng.normal(0, 1, groups)).repeat(width)[:, None]
    gram = errors @ errors.T / groups
    factor = np.triu(rng.normal(size=(n, n)), 1) * noise
    gram *= 1 + factor + factor.T
    cross = 2 * gram
    for g in range(groups):
        cross[g * width : (g + 1) * width, g * width : (g + 1) * width] = 0
    weights = rng.integers(50, 5000, size=(budgets, groups))
    costs = np.repeat(weights, width, axis=1) * (2 + np.arange(n) % width)
    least, most = 2 * weights.sum(axis=1), (1 + width) * weights.sum(axis=1)
    return Problem(
        diagonal=np.diag(gram).copy(),
        cross=(cross + cross.T) / 2,
        offsets=np.arange(groups + 1) * width,
        costs=costs,
        limits=(least + budget * (most - least)).astype(np.int64),
    )


class TestSolve:
    @pytest.mark.parametrize("noise", [0.0, 0.05, 1.0])
    @pytest.mark.parametrize("budgets", [1, 3])
    def test_equals_enumeration(self, noise, budgets):
        """Semidefinite or not, one budget or three: the optimum, with a proof that holds."""
        problem = gram_problem(7, 4, seed=5, noise=noise, budgets=budgets)
        solution = solve(problem, gap=0.0)
        assert solution.status is Status.OPTIMAL
        best = enumerate_all(problem)
        assert solution.objective == pytest.approx(best.objective, rel=1e-12)
        assert check_solution(problem, solution).holds

    @pytest.mark.parametrize("noise", [0.0, 0.3])
    def test_proves_what_enumeration_cannot(self, noise):
        """4^24 choices are proved to the gap, and the independent checker agrees."""
        problem = gram_problem(24, 4, seed=1, noise=noise)
        solution = solve(problem)
        assert solution.status is Status.OPTIMAL
        assert solution.relative_gap <= 1e-4 * (1 + 1e-6)
        verdict = check_solution(problem, solution)
        assert verdict.holds, verdict.reason

    def test_second_budget_binds(self):
        """With a second budget that cuts off the first one's optimum, the answer changes."""
        problem = gram_problem(10, 3, seed=2, budgets=2, budget=0.9)
        alone = Problem(
            diagonal=problem.diagonal,
            cross=problem.cross,
            offsets=problem.offsets,
            costs=problem.costs[:1],
            limits=problem.limits[:1],
        )
        free = solve(alone, gap=0.0)
        tight = int(problem.spent(free.choice)[1]) - 1
        bound = Problem(
            diagonal=problem.diagonal,
            cross=problem.cross,
            offsets=problem.offsets,
            costs=problem.costs,
            limits=np.array([problem.limits[0], tight]),
        )
        solution = solve(bound, gap=0.0)
        assert solution.objective > free.objective
        assert solution.objective == pytest.approx(enumerate_all(bound).objective, rel=1e-12)
        assert check_solution(bound, solution).holds

    def test_at_most_k_groups_at_a_width(self):
        """A row of zeros and ones limits how many groups may use the last row."""
        problem = gram_problem(8, 3, seed=3, budget=0.95)
        last = (np.arange(problem.n_rows) % 3 == 2).astype(np.int64)
        limited = Problem(
            diagonal=problem.diagonal,
            cross=problem.cross,
            offsets=problem.offsets,
            costs=np.vstack([problem.costs, last]),
            limits=np.append(problem.limits, 2),
        )
        solution = solve(limited, gap=0.0)
        assert (solution.choice == 2).sum() <= 2 < (solve(problem).choice == 2).sum()
        assert solution.objective == pytest.approx(enumerate_all(limited).objective, rel=1e-12)

    def test_same_seed_same_answer(self):
        """Two runs agree in choice, bound, node count and proof."""
        problem = gram_problem(16, 4, seed=4, noise=0.1)
        first, second = (solve(problem, seed=7) for _ in range(2))
        assert first.choice.tolist() == second.choice.tolist()
        assert first.bound == second.bound
        assert first.stats.nodes == second.stats.nodes
        assert np.array_equal(first.certificate.point, second.certificate.point)

    def test_renaming_groups_changes_nothing(self):
        """Groups in another order give the same objective."""
        problem = gram_problem(12, 3, seed=6)
        order = np.random.default_rng(0).permutation(12)
        rows = (order[:, None] * 3 + np.arange(3)).ravel()
        shuffled = Problem(
            diagonal=problem.diagonal[rows],
            cross=problem.cross[np.ix_(rows, rows)],
            offsets=problem.offsets,
            costs=problem.costs[:, rows],
            limits=problem.limits,
        )
        expected = solve(problem, gap=0.0).objective
        assert solve(shuffled, gap=0.0).objective == pytest.approx(expected, rel=1e-9)

    def test_node_limit_keeps_a_true_bound(self):
        """Stopped early, the answer says so and its bound still holds."""
        problem = gram_problem(24, 4, seed=8, noise=0.5)
        full = solve(problem)
        part = solve(problem, node_limit=3)
        assert part.limit is Limit.NODE
        assert part.status is Status.FEASIBLE
        assert part.bound <= full.objective
        assert check_solution(problem, part).holds

    def test_cancelled(self):
        """Cancellation at once still returns a choice or says that it has none."""
        solution = solve(gram_problem(24, 4, seed=8), cancelled=lambda: True)
        assert solution.limit is Limit.CANCELLED
        assert solution.status in (Status.FEASIBLE, Status.UNKNOWN)

    def test_time_limit_uses_the_clock_given(self):
        """A clock that jumps stops the solve by time."""
        ticks = iter(range(0, 10**9, 100))
        solution = solve(
            gram_problem(24, 4, seed=8), time_limit_s=50, clock=lambda: float(next(ticks))
        )
        assert solution.limit is Limit.TIME

    def test_events_only_get_better(self):
        """Incumbents fall, each is feasible, and every bound stays below the answer."""
        problem = gram_problem(24, 4, seed=9, noise=0.2)
        events = []
        solution = solve(problem, on_event=events.append)
        values = [e.objective for e in events if e.kind == "incumbent"]
        assert values == sorted(values, reverse=True)
        assert all(problem.is_feasible(e.choice) for e in events if e.kind == "incumbent")
        slack = 1e-4 * abs(solution.objective)
        assert max(e.bound for e in events) <= solution.objective + slack

    def test_start_is_taken(self):
        """A good start is never lost."""
        problem = gram_problem(24, 4, seed=10)
        best = solve(problem)
        again = solve(problem, start=best.choice, node_limit=1)
        assert again.objective <= best.objective

    def test_conflicting_pairs_are_infeasible(self):
        """Every row of one group excludes every row of another: proved infeasible."""
        pairs = np.array([[p, q] for p in (0, 1) for q in (2, 3)])
        problem = Problem(
            diagonal=np.ones(4),
            cross=np.zeros((4, 4)),
            offsets=np.array([0, 2, 4]),
            costs=np.ones((1, 4), dtype=np.int64),
            limits=np.array([10]),
            forbidden_pairs=pairs,
        )
        solution = solve(problem)
        assert solution.status is Status.INFEASIBLE
        assert solution.bound == np.inf
        assert check_solution(problem, solution).holds

    def test_no_budget_at_all(self):
        """Without budgets the best rows still interact."""
        problem = gram_problem(6, 3, seed=11, noise=2.0, budgets=1, budget=5.0)
        free = Problem(
            diagonal=problem.diagonal,
            cross=problem.cross,
            offsets=problem.offsets,
            costs=np.zeros((0, problem.n_rows), dtype=np.int64),
            limits=np.zeros(0, dtype=np.int64),
        )
        solution = solve(free, gap=0.0)
        assert solution.objective == pytest.approx(enumerate_all(free).objective, rel=1e-12)

    def test_budget_too_small(self):
        """The error comes before any work."""
        problem = gram_problem(4, 3, seed=0, budget=-0.1)
        with pytest.raises(BudgetTooSmall):
            solve(problem)

    @pytest.mark.parametrize("option", ["gap", "time_limit_s", "node_limit"])
    def test_negative_limits_are_refused(self, option):
        """A negative limit is an error, not a hang."""
        with pytest.raises(InvalidProblem, match=option):
            solve(gram_problem(2, 2, seed=0), **{option: -1})

    def test_loads_no_torch(self):
        """The solver runs without torch."""
        code = "import sys, bitquota.solver; assert 'torch' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True)

    def test_other_solvers_load_no_kernels(self):
        """Their processes, one for each problem, compute nothing with ours."""
        code = "import sys, bitquota.solver.backends.child; assert 'numba' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.shared_data
class TestPublishedInstances:
    @pytest.mark.parametrize("name", ["L20B3_psd", "L20B3_indef", "real_r20b3_exact_m0"])
    @pytest.mark.parametrize("index", [0, 1, 3])
    def test_proved_and_checked(self, shared_data, name, index):
        """Twenty layers, convex or not: proved to 1e-4 and confirmed by the checker."""
        problem = read_problem(shared_data / "iqp" / f"{name}.npz", budget_index=index)
        solution = solve(problem)
        assert solution.status is Status.OPTIMAL
        assert check_solution(problem, solution).holds

    def test_best_known(self, shared_data):
        """The objectives equal those that other solvers found."""
        known = {"L20B3_psd": 0.17970996944705325, "L53B3_hard": 0.057589576526647646}
        for name, objective in known.items():
            problem = read_problem(shared_data / "iqp" / f"{name}.npz", budget_index=1)
            assert solve(problem).objective == pytest.approx(objective, rel=1e-9)

    @pytest.mark.slow
    def test_noise_at_a_loose_budget(self, shared_data):
        """At 4 bits, where cross terms undo half of the losses, kicks at a price gain 3 %."""
        problem = read_problem(shared_data / "iqp" / "L224B5_indef03.npz", budget_index=3)
        core = reduce(problem, problem.allowed)
        found, value = search(core, effort=default_effort(core.n), seed=0)
        assert problem.is_feasible(core.lift(found) - problem.offsets[:-1])
        assert value < 0.0463

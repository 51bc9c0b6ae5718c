"""What every solver backend must do; a backend's test class is one fixture."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bitquota.solver import Limit, Problem, Status
from bitquota.solver.brute_force import enumerate_all
from bitquota.solver.checker import check_solution
from bitquota.solver.control import Control, Options

OPTIONS = Options(gap=1e-6)


def small(**fields) -> Problem:
    """Return three groups of three rows with an indefinite matrix and one binding budget."""
    given = {
        "diagonal": np.array([4.0, 1.0, 0.2, 6.0, 2.0, 0.1, 5.0, 1.5, 0.3]),
        "cross": _cross(),
        "offsets": np.array([0, 3, 6, 9]),
        "costs": np.array([[2, 4, 8, 4, 8, 16, 2, 4, 8]]),
        "limits": np.array([18]),
    }
    return Problem(**given | fields)


def _cross() -> np.ndarray:
    rng = np.random.default_rng(4)
    cross = rng.normal(size=(9, 9))
    cross = cross + cross.T
    group = np.repeat(np.arange(3), 3)
    cross[group[:, None] == group] = 0.0
    return cross


def tight(scale: int = 1) -> Problem:
    """Return a problem whose tempting choice takes one unit too many of a budget of 3e9."""
    size = 1_000_000_007 * scale
    return Problem(
        diagonal=np.array([5.0, 0.0, 5.0, 0.0, 5.0, 0.0]),
        cross=None,
        offsets=np.array([0, 2, 4, 6]),
        costs=np.array([[0, size, 1, size, 3, size - 2]]),
        limits=np.array([3 * size - 3]),
    )


class SolverBackendContract:
    """Inherit, and provide the fixture ``backend``."""

    certifies = False

    @pytest.fixture
    def backend(self):
        raise NotImplementedError

    def check(self, backend, problem, options=OPTIONS):
        """Solve and compare with enumeration; return the solution."""
        assert backend.missing() is None
        assert backend.refuses(problem) is None
        best = enumerate_all(problem)
        solution = backend.solve(problem, Control(options=options))
        assert best.status == solution.status
        assert backend.name == solution.backend
        if best.status is Status.INFEASIBLE:
            assert math.inf == solution.bound
            return solution
        assert problem.is_feasible(solution.choice)
        assert problem.evaluate(solution.choice) == solution.objective
        slack = options.gap * abs(best.objective) + 1e-9
        assert best.objective == pytest.approx(solution.objective, abs=slack)
        tolerance = solution.stats.details.get("bound_tolerance", 0.0)
        assert solution.bound <= best.objective + tolerance + 1e-12
        assert solution.bound >= best.objective - slack - tolerance
        assert self.certifies == (solution.certificate is not None)
        if self.certifies:
            verdict = check_solution(problem, solution)
            assert verdict.holds, verdict.reason
        return solution

    def test_indefinite_matrix(self, backend):
        """The optimum is that of the measured matrix, not of a convex one nearby."""
        problem = small(constant=-3.0)
        assert np.linalg.eigvalsh(problem.cross).min() < -1
        self.check(backend, problem)

    def test_all_constraints_together(self, backend):
        """Two binding budgets, at most k of a width, forbidden rows, pairs both ways."""
        problem = small(
            costs=np.array(
                [
                    [2, 4, 8, 4, 8, 16, 2, 4, 8],
                    [9, 1, 5, 3, 9, 2, 7, 4, 1],
                    [0, 0, 1, 0, 0, 1, 0, 0, 1],
                ]
            ),
            limits=np.array([24, 12, 2]),
            allowed=np.array([1, 1, 1, 1, 1, 1, 1, 0, 1], dtype=bool),
            forbidden_pairs=np.array([[2, 5]]),
            required_pairs=np.array([[1, 8]]),
        )
        solution = self.check(backend, problem)
        for k in range(3):
            # Each budget binds: one less for it alone would change the answer or end all answers.
            limits = problem.limits.copy()
            limits[k] = problem.spent(solution.choice)[k] - 1
            assert not _with(problem, limits=limits).is_feasible(solution.choice)

    @pytest.mark.parametrize("scale", [1, 10_000])
    def test_budget_holds_in_integers(self, backend, scale):
        """One unit too many of 3e9 (or 3e13) is too many, whatever a float tolerance says."""
        self.check(backend, tight(scale))

    def test_jointly_infeasible(self, backend):
        """Each constraint alone can be met, all together cannot: proved."""
        problem = small(
            costs=np.array([[2, 4, 8, 4, 8, 16, 2, 4, 8], [8, 4, 2, 16, 8, 4, 8, 4, 2]]),
            limits=np.array([9, 9]),
        )
        self.check(backend, problem)

    def test_budget_below_the_cheapest_rows(self, backend):
        """A budget that no choice meets is a proved answer, not a crash."""
        self.check(backend, small(limits=np.array([7])))

    def test_separable_without_budget(self, backend):
        """No cross terms and no budget: the least row of every group."""
        problem = small(
            cross=None, costs=np.zeros((0, 9), dtype=np.int64), limits=np.zeros(0, dtype=np.int64)
        )
        assert [2, 2, 2] == self.check(backend, problem).choice.tolist()

    def test_nothing_to_decide(self, backend):
        """One allowed row per group."""
        problem = small(allowed=np.array([0, 1, 0, 1, 0, 0, 0, 1, 0], dtype=bool))
        assert [1, 0, 1] == self.check(backend, problem).choice.tolist()

    @pytest.mark.parametrize("unit", [1e-9, 1e6])
    def test_scale_of_the_loss_does_not_matter(self, backend, unit):
        """Losses of a billionth or a million give the same choice and the same relative gap."""
        problem = small()
        scaled = small(diagonal=problem.diagonal * unit, cross=problem.cross * unit)
        best = enumerate_all(problem)
        solution = backend.solve(scaled, Control(options=OPTIONS))
        assert Status.OPTIMAL == solution.status
        assert best.choice.tolist() == solution.choice.tolist()
        assert best.objective * unit == pytest.approx(solution.bound, rel=1e-4)

    def test_cancellation(self, backend):
        """Cancelled before it begins: whatever it says names the limit and claims no proof."""
        solution = backend.solve(small(), Control(options=OPTIONS, cancelled=lambda: True))
        assert Limit.CANCELLED == solution.limit
        assert solution.status in {Status.UNKNOWN, Status.FEASIBLE}

    def test_same_seed_same_answer(self, backend):
        """Two runs give one choice."""
        problem, options = small(), Options(gap=1e-6, seed=3)
        first, second = (backend.solve(problem, Control(options=options)) for _ in range(2))
        assert first.choice.tolist() == second.choice.tolist()
        assert first.bound == second.bound


def _with(problem: Problem, **fields) -> Problem:
    given = {name: getattr(problem, name) for name in Problem.__slots__}
    return Problem(**given | fields)

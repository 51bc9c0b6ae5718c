"""The checker's recursion: it proves what is true of separable problems, and nothing else."""

from dataclasses import replace

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from bitquota.solver import Problem, solve
from bitquota.solver.brute_force import enumerate_all
from bitquota.solver.checker import check_certificate
from bitquota.solver.checker_recursion import reason_not_proved


@st.composite
def knapsacks(draw):
    """Build separable problems with one budget; losses and costs may be equal, or far apart."""
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = sum(counts)
    kind = draw(st.sampled_from(["plain", "equal", "wide", "negative"]))
    loss = rng.lognormal(0, 1, n)
    if kind == "equal":
        loss = rng.integers(0, 4, n).astype(float)
    elif kind == "wide":
        loss = 10.0 ** rng.uniform(-12, 6, n)
    elif kind == "negative":
        loss = rng.normal(size=n)
    unit = draw(st.sampled_from([1, 10**6, 2**40]))
    cost = rng.integers(0, 20, (1, n)) * unit
    offsets = np.cumsum([0, *counts])
    least = int(np.minimum.reduceat(cost[0], offsets[:-1]).sum())
    return Problem(
        diagonal=loss,
        offsets=offsets,
        costs=cost,
        limits=np.array([least + draw(st.integers(0, 30)) * unit]),
        constant=draw(st.sampled_from([0.0, -3.5])),
    )


class TestReasonNotProved:
    @hypothesis.given(knapsacks(), st.floats(0, 10))
    @hypothesis.settings(deadline=None, max_examples=150)
    def test_proves_the_optimum_and_nothing_above(self, problem, price):
        """Just below the optimum is proved, just above is not, whatever the price."""
        best = enumerate_all(problem).objective
        size = float(np.abs(problem.diagonal).max()) * problem.n_groups + 4.0
        price /= float(problem.costs.max() + 1)
        everything = problem.allowed
        assert not reason_not_proved(problem, everything, price, best - 1e-13 * size)
        assert "below the bound" in reason_not_proved(
            problem, everything, price, best + 1e-13 * size
        )

    def test_rows_that_are_out_do_not_count(self):
        """With the best row out, the bound of the rest is proved."""
        problem = Problem(
            diagonal=np.array([3.0, 1.0, 2.0, 0.5]),
            offsets=np.array([0, 2, 4]),
            costs=np.array([[1, 2, 1, 2]]),
            limits=np.array([4]),
        )
        without = np.array([True, False, True, True])
        assert reason_not_proved(problem, problem.allowed, 0.0, 3.5)
        assert not reason_not_proved(problem, without, 0.0, 3.5)

    @pytest.mark.parametrize(
        "fields",
        [
            {"cross": np.eye(4)[::-1]},
            {"costs": np.ones((2, 4), dtype=np.int64), "limits": np.array([4, 4])},
            {"forbidden_pairs": np.array([[0, 2]])},
        ],
    )
    def test_other_problems_are_not_proved(self, fields):
        """Cross terms, further budgets and pairs would be ignored: refused."""
        given = {
            "diagonal": np.ones(4),
            "offsets": np.array([0, 2, 4]),
            "costs": np.ones((1, 4), dtype=np.int64),
            "limits": np.array([4]),
        }
        problem = Problem(**given | fields)
        assert "one budget" in reason_not_proved(problem, problem.allowed, 0.0, -9.0)


class TestCertificate:
    @hypothesis.given(knapsacks())
    @hypothesis.settings(deadline=None, max_examples=60)
    def test_the_solvers_own_hold(self, problem):
        """What the solver claims at gap 0 is proved; a bound above the optimum is not."""
        solution = solve(problem, gap=0.0)
        certificate = solution.certificate
        assert check_certificate(problem, certificate).holds
        size = float(np.abs(problem.diagonal).max()) * problem.n_groups + 4.0
        forged = replace(certificate, bound=solution.objective + 1e-9 * size, recursion=True)
        assert not check_certificate(problem, forged).holds

    def test_one_node_only(self):
        """A recursion belongs to the whole problem, not to a tree."""
        problem = Problem(
            diagonal=np.array([3.0, 1.0, 2.0, 0.5]),
            offsets=np.array([0, 2, 4]),
            costs=np.array([[1, 2, 1, 2]]),
            limits=np.array([3]),
        )
        certificate = solve(problem, gap=0.0).certificate
        twice = replace(
            certificate,
            bound=3.4,
            recursion=True,
            parent=np.array([-1, 0]),
            **{
                name: np.repeat(getattr(certificate, name), 2, axis=0)
                for name in ("allowed", "convexification", "point", "multipliers")
            },
        )
        verdict = check_certificate(problem, twice)
        assert "one node" in verdict.reason

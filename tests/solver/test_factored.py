"""Problems in factor form: against enumeration, against the dense form, and never made dense."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.strategies import changed, planted_problems

from bitquota.errors import InvalidProblem
from bitquota.solver import Limit, Problem, Status, solve
from bitquota.solver.archive import (
    certificate_from_bytes,
    certificate_to_bytes,
    problem_from_bytes,
    problem_to_bytes,
)
from bitquota.solver.brute_force import enumerate_all
from bitquota.solver.checker import check_certificate, check_solution
from bitquota.solver.explain import explain, group_accounts
from bitquota.solver.frontiers import even_limits, frontier
from bitquota.solver.presolve import largest_term
from solver_claims import assert_equals_brute_force


def drawn(groups: int, rows: int, rank: int, seed: int, *, budgets: int = 1) -> Problem:
    """Return a problem of layers whose errors fall with their bits, budgets binding."""
    rng = np.random.default_rng(seed)
    bits = np.arange(2, 2 + rows)
    loss = np.exp(rng.normal(0, 1, (groups, 1)) + rng.normal(0, 0.1, (groups, rows))) * 4.0**-bits
    directions = rng.normal(size=(groups, 1, rank)) + 0.3 * rng.normal(size=(groups, rows, rank))
    directions /= np.linalg.norm(directions, axis=2, keepdims=True)
    factor = (np.sqrt(loss)[:, :, None] * directions).reshape(-1, rank)
    costs = rng.integers(1, 9, (budgets, groups, 1)) * bits
    middle = costs[:, :, rows // 2].sum(axis=1)
    return Problem(
        diagonal=loss.ravel(),
        factor=factor,
        offsets=np.arange(groups + 1) * rows,
        costs=costs.reshape(budgets, -1),
        limits=middle,
    )


def dense(problem: Problem) -> Problem:
    """Return the same problem with its pair terms as a matrix."""
    return replace(problem, factor=None, cross=problem.pair_terms(np.arange(problem.n_rows)))


@given(planted_problems(), st.integers(1, 5), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_agrees_with_enumeration(planted: object, rank: int, seed: int) -> None:
    """Whatever the budgets and pairs, the optimum is found, and its bound proved exactly."""
    given_problem = planted.problem  # type: ignore[attr-defined]
    factor = np.random.default_rng(seed).normal(size=(given_problem.n_rows, rank))
    problem = changed(given_problem, cross=None, factor=factor)
    expected = enumerate_all(problem)
    found = solve(problem, gap=0.0)
    assert found.status is Status.OPTIMAL
    size = 1.0 + np.abs(problem.diagonal).sum() + (np.abs(factor).sum(axis=0) ** 2).sum()
    assert found.objective == pytest.approx(expected.objective, rel=0, abs=1e-11 * size)
    for method in ("exact", "outward", "auto"):
        assert check_solution(problem, found, method=method).holds


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_dense_form(seed: int) -> None:
    """Both forms have one optimum; the factor's certificate is about the factor."""
    problem = drawn(24, 3, 6, seed, budgets=1 + seed % 2)
    ours, theirs = solve(problem, gap=1e-6), solve(dense(problem), gap=1e-6)
    assert ours.status is theirs.status is Status.OPTIMAL
    assert ours.objective == pytest.approx(theirs.objective, rel=2e-6)
    assert ours.choice is not None
    assert problem.evaluate(ours.choice) == pytest.approx(dense(problem).evaluate(ours.choice))
    assert check_solution(problem, ours).holds


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_diverged_candidate(seed: int, far: bool) -> None:
    """A row of 1e12 to 1e22, with its row of the factor or without, sets no scale."""
    problem = drawn(6, 3, 3, seed)
    row = seed % problem.n_rows
    diagonal, factor = problem.diagonal.copy(), problem.factor.copy()  # type: ignore[union-attr]
    diagonal[row] = 10.0 ** (12 + 3 * seed)
    if far:
        factor[row] *= np.sqrt(diagonal[row])
    assert_equals_brute_force(replace(problem, diagonal=diagonal, factor=factor))


class TestLarge:
    """Problems whose pair terms would not fit."""

    problem = drawn(3000, 4, 12, 5)

    def test_never_dense(self) -> None:
        """12,000 rows are solved and checked in a tenth of what their pair terms would take."""
        solve(drawn(12, 3, 4, 0))
        tracemalloc.start()
        found = solve(self.problem)
        verdict = check_certificate(self.problem, found.certificate)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 * 12000**2 / 10
        assert verdict.holds
        assert found.relative_gap < 2e-3
        assert self.problem.is_feasible(found.choice)

    def test_nothing_above_its_bound_is_proved(self) -> None:
        """The certificate holds at its bound and not visibly above it."""
        found = solve(self.problem)
        higher = found.certificate.bound * (1 + 1e-6)
        claimed = replace(found.certificate, bound=higher)
        assert check_certificate(self.problem, found.certificate).holds
        assert not check_certificate(self.problem, claimed).holds

    def test_tampered_points(self) -> None:
        """Other numbers prove other bounds, or none."""
        certificate = solve(self.problem).certificate
        for name, value in (("w", certificate.w * 1.5), ("multipliers", -certificate.multipliers)):
            assert not check_certificate(self.problem, replace(certificate, **{name: value})).holds
        shorter = replace(certificate, w=certificate.w[:, :-1])
        assert "'w' must have shape" in check_certificate(self.problem, shorter).reason

    def test_several_budgets(self) -> None:
        """Two budgets bind, and the gap stays small."""
        problem = drawn(1200, 4, 6, 7, budgets=2)
        found = solve(problem)
        assert found.relative_gap < 5e-3
        assert problem.is_feasible(found.choice)
        assert (found.certificate.multipliers[0] > 0).all()

    def test_limits(self) -> None:
        """A limit of nothing and a cancellation still leave a bound that holds."""
        for wish in ({"time_limit_s": 0.0}, {"cancelled": lambda: True}):
            found = solve(self.problem, **wish)
            assert found.limit in (Limit.TIME, Limit.CANCELLED)
            assert np.isfinite(found.bound)
            assert check_solution(self.problem, found).holds

    def test_pairs(self) -> None:
        """Pairs that the best choice would break are kept, and cost next to nothing."""
        free = solve(self.problem, seed=1)
        rows = self.problem.rows(free.choice)  # type: ignore[arg-type]
        problem = replace(self.problem, forbidden_pairs=rows[:40].reshape(20, 2))
        found = solve(problem)
        assert found.choice is not None
        assert problem.is_feasible(found.choice)
        assert free.bound <= found.bound <= found.objective <= 1.02 * free.objective
        assert found.relative_gap < 5e-3
        assert check_solution(problem, found).holds

    def test_explanations_are_refused(self) -> None:
        """What would take hours ends in a sentence."""
        rows = np.zeros(400_000)
        problem = Problem(
            diagonal=rows,
            offsets=np.arange(200_001) * 2,
            costs=rows.astype(np.int64)[None],
            limits=np.array([1]),
        )
        with pytest.raises(InvalidProblem, match="solve at two budgets"):
            explain(problem, solve(problem))

    def test_frontier(self) -> None:
        """More budget, less loss; every point has a bound."""
        problem = drawn(900, 4, 5, 3)
        points = frontier(problem, even_limits(problem, 5)[1:4])
        losses = [point.solution.objective for point in points]
        assert losses == sorted(losses, reverse=True)
        assert all(point.solution.relative_gap < 0.05 for point in points)


class TestProblem:
    """What a problem in factor form must be, and what it is worth."""

    def test_both_forms(self) -> None:
        """A matrix beside a factor is refused."""
        problem = drawn(4, 2, 2, 0)
        with pytest.raises(InvalidProblem, match="not both"):
            replace(problem, cross=dense(problem).cross)

    @pytest.mark.parametrize(
        ("factor", "must"),
        [
            (np.ones((7, 2)), r"shape \[8, r\]"),
            (np.ones(8), r"shape \[8, r\]"),
            (np.full((8, 2), np.inf), "finite"),
            (np.full((8, 2), 1e200), "must sum to less"),
        ],
    )
    def test_bad_factor(self, factor: np.ndarray, must: str) -> None:
        """Shapes, infinities and overflow end in a sentence."""
        with pytest.raises(InvalidProblem, match=must):
            replace(drawn(4, 2, 2, 0), factor=factor)

    def test_evaluate(self) -> None:
        """The objective is that of the pair terms, which vanish inside groups."""
        problem = drawn(5, 3, 2, 1)
        rows = problem.rows([0, 1, 2, 1, 0])
        U = problem.factor[rows]
        pairs = sum(float(U[i] @ U[j]) for i in range(5) for j in range(i))
        expected = problem.diagonal[rows].sum() + pairs
        assert problem.evaluate([0, 1, 2, 1, 0]) == pytest.approx(expected)
        assert largest_term(problem, problem.allowed) > 0

    def test_archive(self) -> None:
        """Problem and certificate survive their files."""
        problem = drawn(6, 3, 2, 2)
        again = problem_from_bytes(problem_to_bytes(problem))
        found = solve(problem)
        kept = certificate_from_bytes(certificate_to_bytes(found.certificate))
        assert np.array_equal(again.factor, problem.factor)
        assert check_certificate(again, kept).holds

    def test_accounts(self) -> None:
        """What other rows would change is what the dense form says."""
        problem = drawn(5, 3, 2, 3)
        choice = solve(problem).choice
        for ours, theirs in zip(
            group_accounts(problem, choice), group_accounts(dense(problem), choice), strict=True
        ):
            assert ours.bought == pytest.approx(theirs.bought)

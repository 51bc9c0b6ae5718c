"""Costs of pairs as a budget: exact against enumeration, in chains and over several budgets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bitquota.errors import InvalidProblem
from bitquota.solver import Problem, solve
from bitquota.solver.checker import check_solution
from bitquota.solver.pair_costs import completed, with_pair_costs
from refusals import refused


def drawn(seed):
    """Return a random problem without limits, and random pair costs of its two budgets."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 4, int(rng.integers(2, 5)))
    offsets = np.cumsum([0, *counts])
    n, group = int(offsets[-1]), np.repeat(np.arange(len(counts)), counts)
    cross = None
    if seed % 2:
        cross = rng.normal(size=(n, n))
        cross += cross.T
        cross[group[:, None] == group[None, :]] = 0.0
    costs = rng.integers(0, 20, (2, n))
    terms = {
        k: {
            (p, q): max(int(rng.integers(-10, 15)), -int(costs[k, p] + costs[k, q]))
            for p, q in itertools.combinations(range(n), 2)
            if group[p] != group[q] and rng.random() < 0.5
        }
        for k in range(2)
    }
    problem = Problem(
        diagonal=rng.normal(size=n), cross=cross, offsets=offsets, costs=costs,
        limits=np.array([10**6, 10**6]),
    )  # fmt: skip
    return problem, terms


def spent(problem, terms, k, rows):
    """Return what rows take of budget ``k``, their pairs included."""
    pairs = itertools.combinations(rows.tolist(), 2)
    return int(problem.costs[k, rows].sum()) + sum(terms[k].get(pair, 0) for pair in pairs)


class TestWithPairCosts:
    @pytest.mark.parametrize("seed", range(24))
    def test_equals_enumeration(self, seed):
        """The best choice, and for every choice whether it fits, to the last unit."""
        problem, terms = drawn(seed)
        counts = np.diff(problem.offsets)
        every = [problem.offsets[:-1] + np.array(c) for c in itertools.product(*map(range, counts))]
        middle = every[len(every) // 2]
        limits = np.array([spent(problem, terms, k, middle) + seed % 4 for k in range(2)])
        problem = problem.within(0, limits[0]).within(1, limits[1])
        fits = [all(spent(problem, terms, k, r) <= limits[k] for k in range(2)) for r in every]
        extended = with_pair_costs(problem, terms)

        solution = solve(extended, gap=1e-9)
        best = min(
            problem.evaluate(r - problem.offsets[:-1])
            for r, fit in zip(every, fits, strict=True)
            if fit
        )
        assert pytest.approx(best, abs=1e-9) == solution.objective
        assert check_solution(extended, solution).holds
        assert fits == [
            extended.is_feasible(completed(extended, r - problem.offsets[:-1])) for r in every
        ]

    def test_a_fusion_is_what_lets_both_in(self):
        """Two layers at 4 bits fit because their kernel is shared; the user's units stay."""
        problem = Problem(
            diagonal=np.array([1.0, 0.1, 1.0, 0.1]), offsets=np.array([0, 2, 4]),
            costs=np.array([[50, 90, 50, 90]]), limits=np.array([150]), resources=("ns",),
        )  # fmt: skip
        fused = with_pair_costs(problem, {0: {(1, 3): -40}})
        solution = solve(fused)
        assert [1, 1] == solution.choice[:2].tolist()
        assert [140] == fused.spent(solution.choice).tolist()
        assert ("ns",) == fused.resources
        assert [150] == fused.limits.tolist()

    def test_a_chain_of_six(self):
        """Every neighbour may be fused with the next."""
        n = 6
        problem = Problem(
            diagonal=np.tile([1.0, 0.0], n), offsets=np.arange(n + 1) * 2,
            costs=np.tile([10, 20], n)[None], limits=np.array([100]),
        )  # fmt: skip
        chain = {0: {(2 * g + 1, 2 * g + 3): -5 for g in range(n - 1)}}
        # k neighbours at 20 save 5 (k - 1): 20 k - 5 (k - 1) + 10 (6 - k) <= 100 up to k = 6.
        assert pytest.approx(0.0) == solve(with_pair_costs(problem, chain)).objective
        assert pytest.approx(2.0) == solve(problem).objective

    @pytest.mark.parametrize("pairs", [{(0, 1): 3}, {(1, 3): -200}, {(1, 3): 2**62}])
    def test_refused(self, pairs):
        """A pair within a group, two rows that cost less than nothing, sums beyond 64 bits."""
        problem = Problem(
            diagonal=np.zeros(4), offsets=np.array([0, 2, 4]), costs=np.array([[50, 90, 50, 90]]),
            limits=np.array([150]),
        )  # fmt: skip
        with refused(InvalidProblem):
            with_pair_costs(problem, {0: pairs})

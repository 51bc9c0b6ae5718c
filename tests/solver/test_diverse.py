"""The best plans that differ."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitquota.errors import BudgetTooSmall, InvalidProblem
from bitquota.solver import solve
from bitquota.solver.brute_force import feasible_choices
from bitquota.solver.checker import check_solution
from bitquota.solver.diverse import alternatives, excluding, top_k
from bitquota.solver.solution import Limit
from contracts.solver_backend import small
from strategies import problems

GAP = 1e-7


def ranked(problem):
    pairs = [
        (float(v), tuple(c))
        for choices, values in feasible_choices(problem)
        for c, v in zip(choices.tolist(), values, strict=True)
    ]
    return sorted(pairs)


class TestTopK:
    @settings(max_examples=30)
    @given(problems(max_groups=4, max_rows=3), st.integers(1, 6))
    def test_distance_one_lists_the_best_choices(self, problem, count):
        """The k best objectives of all choices, each choice once, in order."""
        best = ranked(problem)[:count]
        found = top_k(problem, count, gap=GAP)
        assert len(best) == len(found)
        scale = float(np.abs(problem.diagonal).max()) * 10 + 1
        assert [v for v, _ in best] == pytest.approx(
            [s.objective for s in found], rel=1e-6, abs=1e-7 * scale
        )
        assert len(found) == len({tuple(s.choice.tolist()) for s in found})

    @settings(max_examples=30)
    @given(problems(max_groups=5, max_rows=3), st.integers(2, 3), st.data())
    def test_each_is_the_best_that_differs_enough(self, problem, distance, data):
        """Weighted distances hold, and no choice at that distance is better."""
        weights = [data.draw(st.integers(0, 3)) for _ in range(problem.n_groups)]
        before: list[np.ndarray] = []
        scale = float(np.abs(problem.diagonal).max()) * 10 + 1
        for solution in top_k(problem, 3, distance=distance, weights=weights, gap=GAP):
            for other in before:
                differ = solution.choice != other
                assert int(np.array(weights)[differ].sum()) >= distance
            apart = [
                v
                for v, c in ranked(problem)
                if all(
                    sum(w for w, a, b in zip(weights, c, o, strict=True) if a != b) >= distance
                    for o in before
                )
            ]
            assert min(apart) == pytest.approx(solution.objective, rel=1e-6, abs=1e-7 * scale)
            rest = excluding(problem, before, distance=distance, weights=weights)
            assert check_solution(rest, solution).holds
            before.append(solution.choice)

    def test_ends_when_nothing_is_left(self):
        """Two choices in all: two solutions, however many are asked for."""
        allowed = np.array([1, 1, 0, 1, 0, 0, 1, 0, 0], dtype=bool)
        assert 2 == len(top_k(small(allowed=allowed), 5))

    def test_infeasible_problem_says_so(self):
        """A problem without solution is told as by ``solve``."""
        with pytest.raises(BudgetTooSmall):
            top_k(small(limits=np.array([1])), 2)
        jointly = small(
            costs=np.array([[2, 4, 8, 4, 8, 16, 2, 4, 8], [8, 4, 2, 16, 8, 4, 8, 4, 2]]),
            limits=np.array([9, 9]),
        )
        assert () == top_k(jointly, 2)

    @pytest.mark.parametrize(
        ("options", "word"),
        [
            ({"k": 0}, "'k'"),
            ({"k": 2, "distance": 0}, "distance"),
            ({"k": 2, "weights": [1, 2]}, "weights"),
            ({"k": 2, "weights": [1, 2, -1]}, "weights"),
        ],
    )
    def test_bad_options_are_named(self, options, word):
        """The message names the option."""
        with pytest.raises(InvalidProblem, match=word):
            top_k(small(), options.pop("k"), **options)

    def test_time_is_for_all(self):
        """Time is shared: once it is used up no further solution is sought."""
        ticks = iter(range(10_000))
        found = top_k(small(), 5, time_limit_s=0.5, clock=lambda: float(next(ticks)))
        assert len(found) <= 1

    def test_known_answer_is_not_sought_again(self):
        """With the first given, the rest is what it would be; a limit after it is named."""
        problem = small()
        known = solve(problem)
        found = alternatives(problem, 3, first=known)
        assert known is found[0]
        assert [s.objective for s in top_k(problem, 3)] == [s.objective for s in found]
        ticks = iter(range(10_000))
        cut = alternatives(
            problem, 3, first=known, time_limit_s=0.0, clock=lambda: float(next(ticks))
        )
        assert len(cut) == 2
        assert Limit.TIME is cut[1].limit

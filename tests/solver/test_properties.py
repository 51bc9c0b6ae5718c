"""Properties that every answer has, on random problems with random mixes of constraints."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bitquota.solver import Limit, Problem, Status, solve
from bitquota.solver.brute_force import enumerate_all
from solver_claims import (
    answer,
    assert_bound_is_true,
    assert_equals_brute_force,
    slack,
)
from strategies import any_problems, changed, permuted, planted_problems, problems


class TestSolve:
    @settings(max_examples=300)
    @given(any_problems(), st.sampled_from([1e-6, 1e-4, 1e-2]), st.integers(0, 3), st.booleans())
    def test_equals_brute_force_and_the_checker_agrees(self, problem, gap, seed, listed):
        """All families, all constraints, feasible or not, terms as a matrix and as a list."""
        assert_equals_brute_force(problem.listed() if listed else problem, gap=gap, seed=seed)

    @settings(max_examples=100)
    @given(problems(max_groups=8, max_rows=3, kinds=("indefinite", "wide", "negative")))
    def test_equals_brute_force_on_deeper_trees(self, problem):
        """More groups, indefinite matrices: bounds are loose, so the tree has to close the gap."""
        assert_equals_brute_force(problem)

    @settings(max_examples=100)
    @given(any_problems(max_groups=6), st.integers(0, 4))
    def test_stopped_answers_are_true(self, problem, nodes):
        """With a node limit, without time, or cancelled: the bound holds and is proved."""
        best = enumerate_all(problem)
        for options in (
            {"node_limit": nodes},
            {"time_limit_s": 0.0},
            {"cancelled": lambda: True},
        ):
            found = answer(problem, **options)
            assert_bound_is_true(problem, found, best)
            assert found.limit in {None, Limit.NODE, Limit.TIME, Limit.CANCELLED}

    @settings(max_examples=100)
    @given(problems(), st.integers(0, 2), st.integers(1, 10_000))
    def test_larger_budget_never_hurts(self, problem, k, more):
        """What fits a budget fits a larger one."""
        if not len(problem.limits):
            return
        limits = problem.limits.copy()
        limits[k % len(limits)] += more
        before, after = answer(problem), answer(changed(problem, limits=limits))
        assert after.objective <= before.objective + slack(problem, before.objective)

    @settings(max_examples=100)
    @given(any_problems(), st.randoms(use_true_random=False))
    def test_order_and_names_of_groups_change_nothing(self, problem, random):
        """Groups in another order under other names: the same optimum, the choice reordered."""
        order = list(range(problem.n_groups))
        random.shuffle(order)
        other, rows = permuted(problem, order)
        before, after = answer(problem), answer(other)
        assert before.status == after.status
        if after.choice is None:
            return
        room = slack(problem, before.objective)
        assert abs(before.objective - after.objective) <= room
        back = np.sort(rows[other.rows(after.choice)]) - problem.offsets[:-1]
        assert problem.is_feasible(back)
        assert abs(problem.evaluate(back) - after.objective) <= room

    @settings(max_examples=60)
    @given(problems(), st.floats(-100, 100))
    def test_constant_shifts_the_objective(self, problem, constant):
        """A constant added to the problem is added to the optimum."""
        shifted = changed(problem, constant=problem.constant + constant)
        before, after = answer(problem), answer(shifted)
        room = slack(problem, before.objective) + slack(shifted, after.objective)
        assert abs(before.objective + constant - after.objective) <= room

    @settings(max_examples=60)
    @given(problems(), st.integers(-20, 20))
    def test_unit_of_the_loss_does_not_matter(self, problem, power):
        """A power of two on every number of the objective comes out again."""
        factor = 2.0**power
        cross = None if problem.cross is None else problem.cross * factor
        scaled = changed(
            problem,
            diagonal=problem.diagonal * factor,
            cross=cross,
            constant=problem.constant * factor,
        )
        before, after = answer(problem), answer(scaled)
        room = slack(scaled, after.objective)
        assert Status.OPTIMAL == after.status
        assert abs(before.objective * factor - after.objective) <= room

    @settings(max_examples=60)
    @given(problems(), st.data())
    def test_excluding_an_unused_row_changes_nothing(self, problem, data):
        """A row that the optimum does not use may go; another exclusion never improves it."""
        best = answer(problem)
        used = problem.rows(best.choice)
        row = data.draw(st.integers(0, problem.n_rows - 1))
        allowed = problem.allowed.copy()
        allowed[row] = False
        after = answer(changed(problem, allowed=allowed))
        room = slack(problem, best.objective)
        assert after.objective >= best.objective - room
        if row not in used:
            assert after.objective <= best.objective + room

    @settings(max_examples=60)
    @given(problems(constraints=False), st.integers(0, 10**6))
    def test_tie_by_pairs_equals_merged_groups(self, problem, seed):
        """Two groups whose rows require one another are the merged group."""
        counts = np.diff(problem.offsets)
        twins = [
            (g, h) for h in range(problem.n_groups) for g in range(h) if counts[g] == counts[h] > 1
        ]
        if not twins:
            return
        g, h = twins[seed % len(twins)]
        a = np.arange(problem.offsets[g], problem.offsets[g + 1])
        b = np.arange(problem.offsets[h], problem.offsets[h + 1])
        tied = changed(
            problem,
            required_pairs=np.concatenate([np.stack([a, b], 1), np.stack([b, a], 1)]),
        )
        apart, merged = answer(tied), answer(_merged(problem, a, b))
        assert apart.status == merged.status
        if merged.choice is not None:
            assert apart.choice[g] == apart.choice[h]
            room = slack(problem, merged.objective)
            assert abs(apart.objective - merged.objective) <= room

    @settings(max_examples=60)
    @given(planted_problems())
    def test_start_is_never_lost(self, planted):
        """With a feasible start and no time, the answer is at least as good as the start."""
        found = solve(planted.problem, start=planted.choice, cancelled=lambda: True)
        assert found.choice is not None
        assert found.objective <= planted.problem.evaluate(planted.choice)

    @settings(max_examples=40)
    @given(any_problems(max_groups=6), st.integers(0, 3))
    def test_same_seed_same_answer(self, problem, seed):
        """Choice, bound, nodes and certificate are equal, bit for bit."""
        first, second = (answer(problem, seed=seed) for _ in range(2))
        assert first.to_json() | {"cpu_seconds": 0} == second.to_json() | {"cpu_seconds": 0}
        if first.certificate is not None:
            assert np.array_equal(first.certificate.allowed, second.certificate.allowed)
            assert np.array_equal(first.certificate.point, second.certificate.point)

    @settings(max_examples=60)
    @given(any_problems(max_groups=6))
    def test_events_tell_the_truth(self, problem):
        """Objectives fall, bounds stay below the optimum, every incumbent is feasible."""
        best = enumerate_all(problem)
        events = []
        answer(problem, on_event=events.append)
        incumbents = [e for e in events if e.choice is not None]
        for event in incumbents:
            assert problem.is_feasible(event.choice)
            assert abs(problem.evaluate(event.choice) - event.objective) <= slack(problem, 0.0)
        values = [e.objective for e in incumbents]
        assert values == sorted(values, reverse=True)
        room = slack(problem, best.objective) if best.choice is not None else 0.0
        assert all(e.bound <= best.objective + room for e in events)


def _merged(problem: Problem, a: np.ndarray, b: np.ndarray) -> Problem:
    """Return ``problem`` with the group of rows ``b`` merged into that of rows ``a``."""
    n = problem.n_rows
    keep = np.setdiff1d(np.arange(n), b)
    diagonal, costs = problem.diagonal.copy(), problem.costs.copy()
    diagonal[a] += diagonal[b]
    costs[:, a] += costs[:, b]
    cross = None
    if problem.cross is not None:
        cross = problem.cross.copy()
        diagonal[a] += cross[a, b]
        cross[a] += cross[b]
        cross[:, a] += cross[:, b]
        cross[np.ix_(a, a)] = 0.0
        cross = cross[np.ix_(keep, keep)]
    group = problem.group_of_row[keep]
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    return Problem(
        diagonal=diagonal[keep],
        cross=cross,
        offsets=np.append(starts, len(keep)),
        costs=costs[:, keep],
        limits=problem.limits,
        constant=problem.constant,
    )

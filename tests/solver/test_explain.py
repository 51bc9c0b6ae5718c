"""What bits cost and buy."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitquota.errors import InvalidProblem
from bitquota.solver import Solution, Status, solve
from bitquota.solver.brute_force import enumerate_all
from bitquota.solver.explain import default_step, explain, group_accounts, next_upgrade
from contracts.solver_backend import small
from strategies import changed, problems


class TestExplain:
    @settings(max_examples=40)
    @given(problems(max_groups=4, max_rows=3), st.integers(1, 50))
    def test_price_is_what_one_more_unit_avoids(self, problem, step):
        """By enumeration at the enlarged and the reduced limit; the bounds enclose it."""
        solution = solve(problem, gap=1e-7)
        account = explain(problem, solution, gap=1e-7, steps=dict.fromkeys(problem.resources, step))
        scale = float(np.abs(problem.diagonal).max()) * 10 + 1
        close = {"rel": 1e-6, "abs": 1e-6 * scale}
        for k, budget in enumerate(account.budgets):
            limits = problem.limits.copy()
            limits[k] += step
            more = enumerate_all(changed(problem, limits=limits))
            assert more.objective == pytest.approx(budget.more.objective, **close)
            gain = (enumerate_all(problem).objective - more.objective) / step
            assert gain == pytest.approx(budget.price, **close)
            assert budget.price_low - 1e-9 * scale <= gain <= budget.price_high + 1e-9 * scale
            limits[k] -= 2 * step
            less = enumerate_all(changed(problem, limits=limits))
            if less.choice is None:
                assert math.inf == budget.less.objective
            else:
                assert less.objective == pytest.approx(budget.less.objective, **close)
            assert int(problem.spent(solution.choice)[k]) == budget.spent
            assert budget.limit - budget.spent == budget.slack >= 0

    def test_says_where_the_next_bits_go(self):
        """One more unit group by group: the moves turn one choice into the other."""
        problem = small(cross=None, labels=("W2", "W4", "W8") * 3, groups=("a", "b", "c"))
        solution = solve(problem)
        (budget,) = explain(problem, solution, steps={"resource0": 4}).budgets
        assert budget.more.moves
        assert 0 < sum(m.cost_changes[0] for m in budget.more.moves) <= 4 + budget.slack
        assert budget.price > 0
        assert {m.group for m in budget.more.moves} <= {"a", "b", "c"}

    def test_budget_with_room_has_no_price(self):
        """A budget that nothing exceeds is free."""
        problem = small(limits=np.array([1000]))
        (budget,) = explain(problem, solve(problem), steps={"resource0": 10}).budgets
        assert 0.0 == budget.price
        assert () == budget.more.moves
        assert budget.next_upgrade is None

    def test_is_plain_json(self):
        """No infinities, no arrays."""
        problem = small(limits=np.array([8]))
        told = explain(problem, solve(problem), steps={"resource0": 1}).to_json()
        assert told == json.loads(json.dumps(told, allow_nan=False))
        assert told["budgets"][0]["less"]["objective"] is None

    @pytest.mark.parametrize("steps", [{"resource0": 0}, {"bytes": 3}])
    def test_bad_step_is_named(self, steps):
        """The message says which budgets there are."""
        problem = small()
        with pytest.raises(InvalidProblem, match="resource0"):
            explain(problem, solve(problem), steps=steps)

    def test_needs_a_choice(self):
        """Nothing can be said of a solution without one."""
        nothing = Solution(status=Status.INFEASIBLE, bound=math.inf)
        with pytest.raises(InvalidProblem, match="infeasible"):
            explain(small(), nothing)


class TestGroupAccounts:
    @settings(max_examples=40)
    @given(problems(max_groups=4, max_rows=3))
    def test_alternatives_are_evaluated_exactly(self, problem):
        """Each alternative's loss, costs and feasibility are those of the changed choice."""
        choice = enumerate_all(problem).choice
        value, spent = problem.evaluate(choice), problem.spent(choice)
        for g, account in enumerate(group_accounts(problem, choice)):
            start, stop = problem.offsets[g : g + 2].tolist()
            others = [
                p for p in range(start, stop) if problem.allowed[p] and p - start != choice[g]
            ]
            assert [problem.labels[p] for p in others] == [a.label for a in account.alternatives]
            for p, alternative in zip(others, account.alternatives, strict=True):
                changed_choice = choice.copy()
                changed_choice[g] = p - start
                assert problem.evaluate(changed_choice) - value == alternative.loss_change
                assert problem.is_feasible(changed_choice) == alternative.feasible
                extra = problem.spent(changed_choice) - spent
                assert tuple(extra.tolist()) == alternative.cost_changes
            if len(problem.limits):
                assert account.paid[0] >= 0

    def test_cheapest_row_bought_nothing(self):
        """A group at its cheapest row paid and bought nothing; another did both."""
        problem = small(cross=None)
        first, second, _ = group_accounts(problem, [0, 2, 1])
        assert (0.0, (0,)) == (first.bought, first.paid)
        assert (pytest.approx(5.9), (12,)) == (second.bought, second.paid)


class TestNextUpgrade:
    @settings(max_examples=40)
    @given(problems(max_groups=4, max_rows=3))
    def test_is_the_best_single_change_out_of_reach(self, problem):
        """By trying all: it lowers the loss, and lacks exactly what is stated of one budget."""
        solution = enumerate_all(problem)
        for k in range(len(problem.limits)):
            upgrade = next_upgrade(problem, solution.choice, k)
            rates = []
            for g in range(problem.n_groups):
                for local in range(int(np.diff(problem.offsets)[g])):
                    other = solution.choice.copy()
                    other[g] = local
                    limits = problem.limits.copy()
                    needed = int(problem.spent(other)[k] - limits[k])
                    limits[k] += max(needed, 0)
                    change = problem.evaluate(other) - solution.objective
                    if needed > 0 > change and changed(problem, limits=limits).is_feasible(other):
                        rates.append(change / needed)
            if upgrade is None:
                assert not rates
            else:
                rate = upgrade.loss_change / upgrade.needed_more
                assert min(rates) == pytest.approx(rate, rel=1e-9)


class TestDefaultStep:
    def test_bits_change_by_a_kibibyte(self):
        """Resources in bits by 1 KiB, others by a hundredth."""
        assert 8192 == default_step("size_bits", 10**9)
        assert 10**7 == default_step("bit_ops", 10**9)
        assert 1 == default_step("latency_ns", 5)

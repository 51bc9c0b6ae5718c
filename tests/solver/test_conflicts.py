"""Why a problem has no solution, and what would give it one."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings

from bitquota.errors import InvalidProblem
from bitquota.solver import Limit, Problem, Solution, Status, conflicts
from bitquota.solver.brute_force import enumerate_all, feasible_choices
from bitquota.solver.conflicts import Constraint, Kind, constraints_of, explain_infeasible
from contracts.solver_backend import small
from strategies import any_problems, changed


def keeping(problem: Problem, constraints: tuple[Constraint, ...]) -> Problem:
    """Return ``problem`` with only some of its constraints."""
    index = {kind: [c.index for c in constraints if c.kind is kind] for kind in Kind}
    free = ~np.isin(problem.group_of_row, index[Kind.FORBIDDEN_ROWS])
    budgets = index[Kind.BUDGET]
    return changed(
        problem,
        allowed=problem.allowed | free,
        costs=problem.costs[budgets],
        limits=problem.limits[budgets],
        resources=tuple(problem.resources[k] for k in budgets),
        forbidden_pairs=problem.forbidden_pairs[index[Kind.FORBIDDEN_PAIR]],
        required_pairs=problem.required_pairs[index[Kind.REQUIRED_PAIR]],
    )


def has_choice(problem: Problem) -> bool:
    return any(len(values) for _, values in feasible_choices(problem))


class TestExplainInfeasible:
    @settings(max_examples=120)
    @given(any_problems(max_groups=4, max_rows=3))
    def test_set_conflicts_and_each_member_is_needed(self, problem):
        """By enumeration: together impossible, without any one of them possible."""
        if has_choice(problem):
            with pytest.raises(InvalidProblem, match="has a solution"):
                explain_infeasible(problem)
            return
        conflict = explain_infeasible(problem)
        assert conflict.exact
        assert conflict.constraints
        assert not has_choice(keeping(problem, conflict.constraints))
        for left_out in conflict.constraints:
            rest = tuple(c for c in conflict.constraints if c is not left_out)
            assert has_choice(keeping(problem, rest)), left_out

    @settings(max_examples=120)
    @given(any_problems(max_groups=4, max_rows=3))
    def test_raised_budgets_are_the_least(self, problem):
        """A raised limit admits a choice, one less admits none, all else unchanged."""
        if has_choice(problem):
            return
        conflict = explain_infeasible(problem)
        for proposal in conflict.raises:
            limits = problem.limits.copy()
            index = [problem.resources.index(name) for name in proposal.resources]
            limits[index] = proposal.limits
            assert changed(problem, limits=limits).is_feasible(proposal.choice)
            assert proposal.exact
            if len(index) == 1:
                (k,) = index
                least = self.least_limit(problem, k)
                assert (least,) == proposal.limits
                assert (least - int(problem.limits[k]),) == proposal.needed_more
        alone = [self.least_limit(problem, k) for k in range(len(problem.limits))]
        single = [p for p in conflict.raises if len(p.resources) == 1]
        if any(least is not None for least in alone):
            assert sum(least is not None for least in alone) == len(single)

    def least_limit(self, problem: Problem, k: int) -> int | None:
        limits = problem.limits.copy()
        limits[k] = np.iinfo(np.int64).max
        free = changed(problem, limits=limits)
        spent = [int(free.spent(c)[k]) for choices, _ in feasible_choices(free) for c in choices]
        return min(spent, default=None)

    def test_names_the_budgets_that_conflict(self):
        """Two budgets that cannot be met together; a third has no part in it."""
        problem = small(
            costs=np.array(
                [
                    [2, 4, 8, 4, 8, 16, 2, 4, 8],
                    [1, 1, 1, 1, 1, 1, 1, 1, 1],
                    [8, 4, 2, 16, 8, 4, 8, 4, 2],
                ]
            ),
            limits=np.array([9, 3, 9]),
            resources=("size_bits", "kernels", "latency_ns"),
        )
        conflict = explain_infeasible(problem)
        assert {"size_bits at most 9", "latency_ns at most 9"} == {
            c.text for c in conflict.constraints
        }
        assert {("size_bits",), ("latency_ns",)} == {r.resources for r in conflict.raises}
        assert json.loads(json.dumps(conflict.to_json())) == conflict.to_json()

    def test_names_pairs_and_rows(self):
        """Fixed rows that a fusion rule forbids: no budget has a part in it."""
        problem = small(
            allowed=np.array([0, 0, 1, 0, 0, 1, 1, 1, 1], dtype=bool),
            required_pairs=np.array([[2, 3]]),
            limits=np.array([40]),
            groups=("q", "k", "v"),
            labels=("W2", "W4", "W8") * 3,
        )
        conflict = explain_infeasible(problem)
        assert {
            "q=W8 requires k=W2",
            "q must not be W2 or W4",
            "k must not be W2 or W4",
        } == {c.text for c in conflict.constraints}
        assert () == conflict.raises

    def test_enlarges_all_budgets_when_none_alone_helps(self):
        """Both budgets are below the cheapest rows: only both together help."""
        problem = small(
            costs=np.array([[20, 40, 80, 40, 80, 160, 20, 40, 80]] * 2), limits=np.array([70, 60])
        )
        (proposal,) = explain_infeasible(problem).raises
        assert ("resource0", "resource1") == proposal.resources
        # 80 of each are needed: 60 + ceil(60 · 317/1000), and 70 grows in proportion.
        assert (93, 80) == proposal.limits
        assert (23, 20) == proposal.needed_more
        assert proposal.exact

    def test_undecided_is_said(self, monkeypatch):
        """A solver that runs out of time proves nothing, so nothing is explained."""
        undecided = Solution(status=Status.UNKNOWN, limit=Limit.TIME)
        monkeypatch.setattr(conflicts, "solve", lambda *_, **__: undecided)
        with pytest.raises(InvalidProblem, match="decided in time"):
            explain_infeasible(small())

    def test_undecided_step_keeps_the_constraint(self, monkeypatch):
        """Where dropping a constraint was not decided it stays, and the set is not called exact."""
        problem = small(
            costs=np.array([[2, 4, 8, 4, 8, 16, 2, 4, 8], [8, 4, 2, 16, 8, 4, 8, 4, 2]]),
            limits=np.array([9, 9]),
            forbidden_pairs=np.array([[0, 5]]),
        )

        def tired(part, **_):
            if len(part.limits) == 2 and not len(part.forbidden_pairs):
                return Solution(status=Status.UNKNOWN, limit=Limit.TIME)
            return enumerate_all(part)

        monkeypatch.setattr(conflicts, "solve", tired)
        conflict = explain_infeasible(problem)
        assert not conflict.exact
        assert 3 == len(conflict.constraints)


class TestConstraintsOf:
    def test_lists_everything_once(self):
        """Pairs, groups with forbidden rows, budgets."""
        problem = small(
            allowed=np.array([1, 0, 1, 1, 1, 1, 1, 1, 1], dtype=bool),
            forbidden_pairs=np.array([[0, 3]]),
            required_pairs=np.array([[1, 4]]),
        )
        assert [
            Kind.FORBIDDEN_PAIR,
            Kind.REQUIRED_PAIR,
            Kind.FORBIDDEN_ROWS,
            Kind.BUDGET,
        ] == [c.kind for c in constraints_of(problem)]

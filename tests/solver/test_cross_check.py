"""Other solvers' word on our answer."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings

from bitquota.errors import InvalidInput, SolverFailed
from bitquota.solver import Limit, Solution, Stats, Status, solve
from bitquota.solver.backends import BACKENDS
from bitquota.solver.backends.own import BruteForce
from bitquota.solver.brute_force import enumerate_all
from bitquota.solver.cross_check import Outcome, compare, cross_check
from contracts.solver_backend import small
from strategies import any_problems

GAP = 1e-4


def claim(problem, choice, bound=None, status=Status.OPTIMAL, **fields) -> Solution:
    value = problem.evaluate(choice)
    return Solution(
        status=status,
        choice=np.array(choice),
        objective=value,
        bound=value if bound is None else bound,
        **fields,
    )


NOTHING = Solution(status=Status.INFEASIBLE, bound=math.inf)


class TestCrossCheck:
    @pytest.mark.slow
    def test_solvers_agree(self):
        """The certificate holds, and a convex, an integer and an exhaustive solver confirm."""
        problem = small()
        heard = []
        check = cross_check(
            problem,
            solve(problem),
            ["cvxpy_scip", "cp_sat", "brute_force"],
            on_comparison=heard.append,
        )
        assert check.holds
        assert check.confirmed
        assert check.verdict.holds
        assert [Outcome.CONFIRMS] * 3 == [c.outcome for c in check.comparisons]
        assert list(check.comparisons) == heard
        assert json.loads(json.dumps(check.to_json(), allow_nan=False)) == check.to_json()

    def test_wrong_optimum_is_found_out(self):
        """A worse choice passed off as optimal is contradicted."""
        problem = small()
        best = enumerate_all(problem)
        worse = [0, 0, 0]
        assert problem.evaluate(worse) > best.objective
        check = cross_check(problem, claim(problem, worse), ["brute_force"])
        assert not check.holds
        assert Outcome.CONTRADICTS == check.comparisons[0].outcome
        assert "below our bound" in check.comparisons[0].reason

    def test_broken_certificate_does_not_hold(self):
        """Others may confirm the optimum: a certificate that proves less still fails."""
        problem = small()
        solution = solve(problem)
        lying = replace(solution.certificate, bound=solution.objective + 1.0)
        check = cross_check(problem, replace(solution, certificate=lying), ["brute_force"])
        assert not check.holds
        assert not check.verdict.holds

    def test_failure_says_nothing(self, monkeypatch):
        """A solver that dies neither confirms nor contradicts."""

        class Dead(BruteForce):
            def solve(self, *_, **__):
                raise SolverFailed("it died", backend="brute_force")

        monkeypatch.setitem(BACKENDS, "brute_force", Dead())
        problem = small()
        check = cross_check(problem, solve(problem), ["brute_force"])
        assert check.holds
        assert not check.confirmed
        assert ("it died", Outcome.FAILED) == (
            check.comparisons[0].reason,
            check.comparisons[0].outcome,
        )

    def test_all_installed_by_default(self, monkeypatch):
        """Every usable backend but the one that answered."""
        for name in [n for n in BACKENDS if n not in {"bitquota", "brute_force"}]:
            monkeypatch.delitem(BACKENDS, name)
        problem = small()
        check = cross_check(problem, solve(problem))
        assert ["brute_force"] == [c.backend for c in check.comparisons]

    def test_cancelled_skips_the_rest(self):
        """Nothing is compared after cancellation."""
        problem = small()
        assert () == cross_check(problem, solve(problem), cancelled=lambda: True).comparisons

    def test_unknown_name(self):
        """As ``backend_by_name`` says."""
        with pytest.raises(InvalidInput, match="cplex"):
            cross_check(small(), NOTHING, ["cplex"])


class TestCompare:
    @settings(max_examples=60)
    @given(any_problems(max_groups=4, max_rows=3))
    def test_truth_is_never_contradicted(self, problem):
        """Two correct answers are never called contradictory, in either order."""
        truth = enumerate_all(problem)
        try:
            ours = solve(problem, gap=GAP)
        except ValueError:  # one budget alone cannot be met
            ours = NOTHING
        for a, b in ((ours, truth), (truth, ours)):
            outcome, reason = compare(problem, a, b, gap=GAP)
            assert Outcome.CONFIRMS == outcome, reason

    def test_infeasible_against_a_choice(self):
        """One says there is none, the other shows one."""
        problem = small()
        shown = claim(problem, [0, 0, 0])
        assert Outcome.CONTRADICTS == compare(problem, NOTHING, shown, gap=GAP)[0]
        assert Outcome.CONTRADICTS == compare(problem, shown, NOTHING, gap=GAP)[0]
        assert Outcome.CONFIRMS == compare(problem, NOTHING, NOTHING, gap=GAP)[0]

    def test_bound_above_our_choice(self):
        """A bound above our objective contradicts, unless its tolerance explains it."""
        problem = small()
        best = enumerate_all(problem)
        high = Solution(
            status=Status.UNKNOWN, limit=Limit.TIME, bound=best.objective + 1e-3, backend="x"
        )
        assert Outcome.CONTRADICTS == compare(problem, best, high, gap=GAP)[0]
        loose = replace(high, stats=Stats(details={"bound_tolerance": 2e-3}))
        assert Outcome.CONSISTENT == compare(problem, best, loose, gap=GAP)[0]

    def test_unfinished_is_consistent(self):
        """A worse choice with a lower bound, stopped by time: no contradiction."""
        problem = small()
        best = enumerate_all(problem)
        slow = claim(problem, [0, 0, 0], bound=-100.0, status=Status.FEASIBLE, limit=Limit.TIME)
        outcome, reason = compare(problem, best, slow, gap=GAP)
        assert Outcome.CONSISTENT == outcome
        assert "time" in reason

    def test_better_choice_within_our_gap(self):
        """Ours stopped early; theirs is better but not below our bound."""
        problem = small()
        best = enumerate_all(problem)
        early = claim(
            problem, [0, 0, 0], bound=best.objective - 1.0, status=Status.FEASIBLE, limit=Limit.TIME
        )
        outcome, _ = compare(problem, early, best, gap=GAP)
        assert outcome in {Outcome.CONSISTENT, Outcome.CONFIRMS}

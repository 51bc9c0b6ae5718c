"""Child processes that die, hang, babble or are cancelled."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from bitquota.errors import SolverFailed
from bitquota.solver import Limit, Status
from bitquota.solver.backends import external, process
from bitquota.solver.backends.answer import Answer
from bitquota.solver.backends.external import External
from bitquota.solver.backends.model import Model
from bitquota.solver.backends.process import run_child
from bitquota.solver.control import Control, Options
from contracts.solver_backend import small

ANSWER = Answer(status="optimal", chosen=np.array([0, 3, 6]), bound=1.5, tolerance=0.25, nodes=7)


def run(program: str, *, limit: float | None = None, grace: float = 60.0, **more):
    return run_child(
        "cp_sat",
        Model.of(small()),
        Options(time_limit_s=limit),
        command=(sys.executable, "-c", program),
        grace_s=grace,
        **more,
    )


def say(*messages: object) -> str:
    lines = "".join(json.dumps(m) + "\n" for m in messages)
    return f"import sys; sys.stdin.read(); sys.stdout.write({lines!r}); sys.stdout.flush()\n"


class TestRunChild:
    def test_returns_the_answer(self):
        """The last line is the answer; incumbents come before it."""
        heard = []
        outcome = run(
            say({"incumbent": [1, 3, 6]}, {"answer": ANSWER.to_json(), "cpu_seconds": 0.5}),
            on_incumbent=heard.append,
        )
        assert ANSWER.to_json() == outcome.answer.to_json()
        assert [[1, 3, 6]] == [h.tolist() for h in heard]
        assert (None, 0.5) == (outcome.answer.limit, outcome.cpu_seconds)

    def test_child_that_is_killed(self):
        """A signal is named, with what the child said last."""
        program = (
            "import os, sys; print('out of luck', file=sys.stderr, flush=True); "
            "os.kill(os.getpid(), 9)"
        )
        with pytest.raises(SolverFailed, match=r"signal 9.*out of luck") as caught:
            run(program)
        assert "cp_sat" == caught.value.details["backend"]

    def test_child_that_raises(self):
        """An exception in the child is an error here, with its text."""
        with pytest.raises(SolverFailed, match=r"exit code 1: ValueError: no licence;") as caught:
            run("raise ValueError('no licence')")
        assert "Traceback" in caught.value.details["stderr"]

    def test_child_without_an_answer(self):
        """Ending well without an answer is a failure too."""
        with pytest.raises(SolverFailed, match="exit code 0"):
            run(say({"incumbent": [0, 3, 6]}))

    @pytest.mark.parametrize("line", ["SCIP> hello", "[1, 2]"])
    def test_child_that_babbles(self, line):
        """Anything but JSON objects is refused, and the child does not outlive it."""
        with pytest.raises(SolverFailed, match="JSON objects"):
            run(f"print({line!r}, flush=True)\nimport time; time.sleep(600)")

    @pytest.mark.parametrize("answer", [7, {"status": "great"}, {"status": "optimal"}])
    def test_answer_that_is_none(self, answer):
        """An answer without its fields is refused."""
        with pytest.raises(SolverFailed, match="must write an answer; an answer"):
            run(say({"answer": answer}))

    def test_child_that_overruns(self):
        """A child that ignores its limit is killed; what it reported is kept."""
        program = say({"ready": True}, {"incumbent": [1, 3, 6]}) + "import time; time.sleep(600)"
        ticks = iter(range(0, 100_000, 1))
        heard = []

        def clock() -> float:
            # Time stands still until the child has reported.
            return float(next(ticks)) if heard else 0.0

        outcome = run(program, limit=1.0, grace=2.0, clock=clock, on_incumbent=heard.append)
        assert ("time", "feasible") == (outcome.answer.limit, outcome.answer.status)
        assert [1, 3, 6] == outcome.answer.chosen.tolist()

    def test_child_that_never_gets_ready(self):
        """Loading libraries does not count, but has a limit of its own."""
        ticks = iter(range(0, 100_000, 10))
        outcome = run(
            "import time; time.sleep(600)", limit=1.0, grace=2.0, clock=lambda: float(next(ticks))
        )
        assert ("time", "unknown") == (outcome.answer.limit, outcome.answer.status)
        assert next(ticks) > process.START_S

    def test_cancelled_while_it_runs(self):
        """Cancellation is noticed while the child is silent."""
        heard = []
        outcome = run(
            say({"incumbent": [1, 3, 6]}) + "import time; time.sleep(600)",
            on_incumbent=heard.append,
            cancelled=lambda: bool(heard),
        )
        assert "cancelled" == outcome.answer.limit

    def test_callback_that_raises_ends_the_child(self):
        """An exception in a callback comes through, and no child is left behind."""

        def fail(_: object) -> None:
            raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            run(say({"incumbent": [1]}) + "import time; time.sleep(600)", on_incumbent=fail)

    def test_large_problems_do_not_block(self):
        """A child that never reads its input cannot hold us up."""
        outcome = run(
            f"print({json.dumps({'answer': ANSWER.to_json()})!r})",
        )
        assert "optimal" == outcome.answer.status


class TestExternal:
    """What the parent makes of outcomes, without a solver."""

    BACKEND = External(name="cp_sat", packages=("numpy",))

    def solve(self, monkeypatch, outcome, **fields):
        monkeypatch.setattr(external, "run_child", lambda *_, **__: outcome)
        return self.BACKEND.solve(small(**fields), Control(options=Options(gap=1e-3)))

    def outcome(self, answer):
        return process.Outcome(answer=answer, cpu_seconds=1.0)

    def test_broken_budget_is_a_failure(self, monkeypatch):
        """A choice over budget never leaves, whatever the child says."""
        bad = Answer(status="optimal", chosen=np.array([2, 5, 8]), bound=0.0)
        with pytest.raises(SolverFailed, match="every constraint"):
            self.solve(monkeypatch, self.outcome(bad))

    @pytest.mark.parametrize("rows", [[0, 3], [0, 0, 6], [0, 3, 99]])
    def test_rows_of_wrong_groups_are_a_failure(self, monkeypatch, rows):
        """One row of every group, in order."""
        with pytest.raises(SolverFailed, match="every constraint"):
            self.solve(monkeypatch, self.outcome(Answer(status="feasible", chosen=np.array(rows))))

    def test_objective_is_our_own(self, monkeypatch):
        """The value comes from the problem; a bound above it is cut to it."""
        scale = Model.of(small()).scale
        answer = Answer(status="optimal", chosen=np.array([0, 3, 6]), bound=1e9 * scale)
        solution = self.solve(monkeypatch, self.outcome(answer))
        assert small().evaluate([0, 0, 0]) == solution.objective == solution.bound
        assert Status.OPTIMAL == solution.status

    def test_weak_bound_is_not_optimal(self, monkeypatch):
        """'Optimal' with a gap larger than asked for is 'feasible', by the method's limit."""
        answer = Answer(status="optimal", chosen=np.array([0, 3, 6]), bound=-1e9)
        solution = self.solve(monkeypatch, self.outcome(answer))
        assert (Status.FEASIBLE, Limit.METHOD) == (solution.status, solution.limit)

    @pytest.mark.parametrize("stopped", ["time", "cancelled"])
    def test_stopped_child_keeps_its_incumbent(self, monkeypatch, stopped):
        """The last reported choice is the answer, without a bound."""
        solution = self.solve(
            monkeypatch,
            self.outcome(Answer(status="feasible", limit=stopped, chosen=np.array([0, 3, 6]))),
        )
        assert (Status.FEASIBLE, stopped) == (solution.status, str(solution.limit))
        assert [0, 0, 0] == solution.choice.tolist()
        assert -np.inf == solution.bound

    def test_stopped_child_without_incumbent(self, monkeypatch):
        """Nothing known is status 'unknown'."""
        solution = self.solve(monkeypatch, self.outcome(Answer(status="unknown", limit="time")))
        assert (Status.UNKNOWN, Limit.TIME) == (solution.status, solution.limit)

    def test_incumbents_are_events(self, monkeypatch):
        """Only better choices are told, each checked and valued here."""
        events = []

        def child(*_, on_incumbent, **__):
            for rows in ([1, 3, 6], [0, 3, 6], [1, 3, 6]):
                on_incumbent(np.array(rows))
            last = Answer(status="feasible", limit="time", chosen=np.array([1, 3, 6]))
            return self.outcome(last)

        monkeypatch.setattr(external, "run_child", child)
        self.BACKEND.solve(small(), Control(on_event=events.append))
        values = [small().evaluate(e.choice) for e in events]
        assert values == [e.objective for e in events]
        assert values == sorted(values, reverse=True)
        assert len(set(values)) == len(values) > 0

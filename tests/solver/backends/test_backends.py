"""Every backend keeps the contract; the choosing between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bitquota.errors import InvalidInput, InvalidProblem, MissingDependency
from bitquota.request import FORMER_SOLVERS, SOLVERS
from bitquota.solver import Limit, Problem, Status, solve
from bitquota.solver.backends import (
    BACKENDS,
    backend_by_name,
    usable,
)
from bitquota.solver.backends.external import External
from bitquota.solver.control import Control
from contracts.solver_backend import SolverBackendContract, small

TESTS = Path(__file__).resolve().parents[2]


class _External(SolverBackendContract):
    """The contract, and many random problems in one process: each solve starts one."""

    pytestmark = pytest.mark.slow
    name = ""

    @pytest.fixture
    def backend(self):
        backend = BACKENDS[self.name]
        if package := backend.missing():
            pytest.skip(f"'{package}' is not installed")
        return backend

    def test_equals_brute_force_on_random_problems(self, backend):
        """Random constraint mixes; one child process for all of them, for speed."""
        path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
        program = TESTS / "solver" / "backends" / "random_problems.py"
        done = subprocess.run(
            [sys.executable, str(program), backend.name, "30"],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout.splitlines()[-1])["problems"] >= 30


class TestOwn(SolverBackendContract):
    certifies = True

    @pytest.fixture
    def backend(self):
        return BACKENDS["bitquota"]


class TestBruteForce(SolverBackendContract):
    @pytest.fixture
    def backend(self):
        return BACKENDS["brute_force"]

    def test_refuses_what_it_cannot_enumerate(self, backend):
        """The sentence says how many choices there are."""
        assert "3,486,784,401 choices" not in (backend.refuses(small()) or "")
        assert "3,486,784,401" in backend.refuses(_large())
        with pytest.raises(InvalidProblem, match="enumeration"):
            backend.solve(_large(), Control())


class TestGurobi(_External):
    name = "gurobi"


class TestCvxpyScip(_External):
    name = "cvxpy_scip"


class TestCpSat(_External):
    name = "cp_sat"


class TestBackendByName:
    def test_auto_is_our_own(self):
        """The first in order of preference."""
        assert "bitquota" == backend_by_name("auto").name

    def test_unknown_name_lists_the_known(self):
        """The message names every backend."""
        with pytest.raises(InvalidInput, match="cp_sat, brute_force"):
            backend_by_name("cplex")

    @pytest.mark.parametrize("name", list(FORMER_SOLVERS))
    def test_former_name_says_what_to_use_instead(self, name):
        """Solvers that only the benchmarks run are named with one that is offered."""
        with pytest.raises(InvalidInput) as caught:
            solve(small(), backend=name)
        assert caught.value.details["instead"] in BACKENDS

    def test_each_name_is_its_key(self):
        """The map's keys are the backends' own names."""
        assert {name: name for name in BACKENDS} == {n: b.name for n, b in BACKENDS.items()}

    def test_requests_name_them_all(self):
        """The list that a request is held to without loading a solver is this one."""
        assert SOLVERS == ("auto", *BACKENDS)


class TestSolve:
    """``solve`` by the backend that is asked for."""

    def test_node_limit_is_refused_where_nodes_are_not_counted(self):
        """The message names the solvers that keep one; the others obey it or end before."""
        for name, backend in BACKENDS.items():
            if backend.missing() is None and not backend.counts_nodes:
                with pytest.raises(InvalidInput, match="does not count nodes; .* bitquota"):
                    solve(small(), backend=name, node_limit=3)
        assert solve(small(), backend="bitquota", node_limit=0).limit in {None, Limit.NODE}

    @pytest.mark.parametrize(
        "name", ["brute_force", pytest.param("cp_sat", marks=pytest.mark.slow)]
    )
    def test_solve_passes_everything_on(self, name):
        """Through the front door: cancellation, a time limit of nothing, and events."""
        if BACKENDS[name].missing() is not None:
            pytest.skip(f"'{name}' is not installed")
        stopped = solve(small(), backend=name, cancelled=lambda: True)
        assert stopped.limit is Limit.CANCELLED
        late = solve(small(), backend=name, time_limit_s=0.0)
        assert late.status is Status.OPTIMAL or late.limit is Limit.TIME
        events = []
        solution = solve(small(), backend=name, on_event=events.append)
        assert solution.status is Status.OPTIMAL
        assert all(event.objective >= solution.objective for event in events)
        if name == "brute_force":
            assert events[-1].choice == tuple(solution.choice.tolist())

    def test_missing_package_names_the_extra(self, monkeypatch):
        """The error says what to install."""
        absent = External(name="cp_sat", packages=("no_such_package",), extra="worker")
        monkeypatch.setitem(BACKENDS, "cp_sat", absent)
        with pytest.raises(MissingDependency, match=r"bitquota\[worker\]"):
            solve(small(), backend="cp_sat")
        assert "cp_sat" not in {b.name for b in usable(small())}


class TestUsable:
    def test_leaves_out_what_refuses(self):
        """Enumeration is no option for 3^20 choices."""
        assert "brute_force" in {b.name for b in usable(small())}
        assert "brute_force" not in {b.name for b in usable(_large())}

    def test_products_have_a_limit(self):
        """A backend that writes out products says how many are too many."""
        few = External(name="cp_sat", packages=("ortools",), largest_products=3)
        assert "at most 3" in few.refuses(small())
        with pytest.raises(InvalidProblem, match="at most 3"):
            few.solve(small(), Control())


def _large() -> Problem:
    import numpy as np

    return Problem(
        diagonal=np.zeros(60),
        offsets=np.arange(0, 61, 3),
        costs=np.zeros((0, 60), dtype=np.int64),
        limits=np.zeros(0, dtype=np.int64),
    )

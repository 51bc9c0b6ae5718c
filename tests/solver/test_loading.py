"""Kernels are loaded before the time of a solve counts, for every type that they meet."""

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba.core.dispatcher import Dispatcher

import bitquota.solver
from bitquota.solver import Problem, solve
from bitquota.solver.control import Control, Options
from bitquota.solver.loading import METHODS, kernels_loaded, load_kernels

_GROUPS = 9
_INTERPRETED = """
import json, sys
from bitquota.solver.loading import load_kernels
ran = set()

def note(frame, event, arg):
    if event == "call":
        ran.add((frame.f_globals.get("__name__", ""), frame.f_code.co_name))

sys.setprofile(note)
load_kernels()
sys.setprofile(None)
print(json.dumps([name for name in ran if name[0].startswith("bitquota.solver.")]))
"""


def signatures():
    """Return by kernel the types that it is compiled for."""
    found = {}
    for info in pkgutil.iter_modules(bitquota.solver.__path__):
        module = importlib.import_module(f"bitquota.solver.{info.name}")
        for name, value in vars(module).items():
            if isinstance(value, Dispatcher):
                found[value.py_func.__module__, name] = [str(s) for s in value.signatures]
    return found


def posed(unit=1.0, budgets=1, **more):
    """Return a problem of nine groups of three rows."""
    n = 3 * _GROUPS
    costs = np.tile([2, 4, 8], _GROUPS) * (1 + np.arange(budgets)[:, None] * (np.arange(n) // 3))
    return Problem(
        diagonal=unit * np.tile([4.0, 2.0, 1.0], _GROUPS) * (1 + np.arange(n) % 5),
        offsets=np.arange(_GROUPS + 1) * 3,
        costs=costs,
        limits=costs[:, 1::3].sum(axis=1),
        **more,
    )


def cross(every=True):
    """Return terms between all groups, or only those beside each other."""
    rng = np.random.default_rng(0)
    terms = rng.normal(size=(3 * _GROUPS, 3 * _GROUPS))
    apart = np.abs(np.subtract.outer(np.arange(_GROUPS), np.arange(_GROUPS)))
    joined = (apart > 0) & (every | (apart == 1))
    return (terms + terms.T) * np.kron(joined, np.ones((3, 3)))


def factor():
    return np.random.default_rng(1).normal(size=(3 * _GROUPS, 4))


PROBLEMS = {
    "separable": posed,
    "without budgets": lambda: posed(budgets=0, cross=cross()),
    "several budgets": lambda: posed(budgets=3, forbidden_pairs=np.array([[2, 5]])),
    "matrix": lambda: posed(cross=cross()),
    "matrix and pairs": lambda: posed(
        budgets=2, cross=cross(), forbidden_pairs=np.array([[2, 5]]),
        required_pairs=np.array([[0, 3]]),
    ),
    "sparse matrix": lambda: posed(cross=cross(every=False)),
    "factor": lambda: posed(factor=factor()),
    "factor of tiny numbers": lambda: posed(unit=1e-100, factor=1e-50 * factor()),
    "terms": lambda: posed(terms=np.array([[0, 3], [1, 5]]), term_values=np.array([3.0, -2.0])),
    "terms beside a factor": lambda: posed(
        factor=factor(), terms=np.array([[0, 3]]), term_values=np.array([3.0])
    ),
}  # fmt: skip


class TestLoadKernels:
    @pytest.mark.parametrize("kind", PROBLEMS)
    def test_all_types(self, kind):
        """No solve afterwards compiles anything, whatever the problem is."""
        load_kernels()
        before = signatures()
        problem = PROBLEMS[kind]()
        for gap, limit in ((0, None), (1e-4, 1e-9), (0.0, 60.0)):
            solve(problem, gap=gap, time_limit_s=limit)
        assert before == signatures()

    def test_every_kernel_is_reached(self):
        """Without a compiler: so calls from kernel to kernel are seen, and nothing lies on disk."""
        said = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _INTERPRETED], check=True, capture_output=True,
            env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, text=True,
        ).stdout  # fmt: skip
        ran = {tuple(name) for name in json.loads(said)}
        folder = Path(next(iter(bitquota.solver.__path__)))
        kernels = {
            (f"bitquota.solver.{source.stem}", kernel)
            for source in folder.glob("*.py")
            for kernel in re.findall(r"^@compiled\ndef (\w+)", source.read_text(), re.MULTILINE)
        }
        assert len(kernels) > 50
        assert kernels <= ran

    def test_by_method(self):
        """What was loaded is not loaded again."""
        load_kernels("knapsack")
        assert kernels_loaded("knapsack")
        load_kernels()
        assert kernels_loaded(*METHODS)


class TestUncounted:
    def test_time_goes_on_afterwards(self):
        """What passes meanwhile is none of the limit's."""
        now = [0.0]
        control = Control(options=Options(time_limit_s=5.0), clock=lambda: now[0])
        now[0] = 2.0
        with control.uncounted():
            now[0] = 40.0
        now[0] = 42.0
        assert (4.0, False) == (control.elapsed(), control.stopped())
        now[0] = 43.5
        assert control.stopped()

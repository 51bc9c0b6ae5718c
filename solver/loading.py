"""The kernels of a method, loaded before the time of a solve begins to count.

Whoever calls a kernel first in a process waits while it is loaded (.3 CPU s for the first one, a
few thousandths for each other), and on a machine's first solves while it is compiled (up to half a
minute). A limit of a tenth of a second would be over by then. So a tiny problem of each kind is
solved first, which calls every kernel of its method with the types that it will always have.

Design: docs/design/solver.md
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from bitquota.solver.branch import Incumbent, Tree
from bitquota.solver.control import Control, Options
from bitquota.solver.convex import convexify
from bitquota.solver.core import reduce
from bitquota.solver.elimination import eliminated, tables
from bitquota.solver.joint import Jointly
from bitquota.solver.lifted import Lifted
from bitquota.solver.linear_relaxation import linear_relaxation
from bitquota.solver.one_thread import one_thread
from bitquota.solver.problem import Problem
from bitquota.solver.quadratic import Quadratic
from bitquota.solver.search import Effort, search
from bitquota.solver.semidefinite import flat_point, interior_point
from bitquota.solver.separable import solve_knapsack
from bitquota.solver.splitting import Splitting
from bitquota.solver.tree_kernels import settle

if TYPE_CHECKING:
    from collections.abc import Callable

_lock = threading.Lock()
_loaded: set[str] = set()


def kernels_loaded(*methods: str) -> bool:
    """Return whether nothing is to be loaded for ``methods`` of ``METHODS``."""
    return _loaded.issuperset(methods)


def load_kernels(*methods: str) -> None:
    """Load the kernels of ``methods``, all of ``METHODS`` by default; waits for other threads.

    Cost: a few hundredths of a CPU second each where they are on disk, up to half a minute where
    they have to be compiled.
    """
    with _lock, one_thread():
        for method in methods or METHODS:
            if method not in _loaded:
                METHODS[method]()
                _loaded.add(method)


def _sample(groups: int, budgets: int = 1) -> Problem:
    """Return separable groups of three rows whose budgets all bind."""
    n = 3 * groups
    size = 2.0 ** -np.tile(np.arange(3), groups)
    costs = np.tile([100, 205, 309], groups) + np.arange(budgets)[:, None] + 7 * np.arange(n) % 11
    return Problem(
        diagonal=size * (1.5 + np.cos(np.arange(n))),
        offsets=np.arange(groups + 1) * 3,
        costs=costs,
        limits=costs.reshape(budgets, -1, 3)[:, :, 1].sum(axis=1),
    )


def _options() -> Options:
    return Options(gap=0.0)


def _knapsack() -> None:
    solve_knapsack(_sample(12), gap=0.0)


def _entangled() -> Problem:
    """Return groups of which each has terms with every other one."""
    plain = _sample(6)
    at = np.arange(plain.n_rows)
    cross = 0.1 * np.cos(np.add.outer(at, at) ** 2) * np.kron(1.0 - np.eye(6), np.ones((3, 3)))
    return replace(plain, cross=cross)


def _search() -> None:
    """Relax and search, as for factors of many rows, which get no tree."""
    problem, several = _entangled(), _sample(6, 2)
    search(reduce(problem, problem.allowed), effort=Effort(restarts=1), seed=0)
    linear_relaxation(reduce(several, several.allowed))
    settle(np.full(1, -1), np.zeros(1), 0.0)


def _matrix() -> None:
    """Solve a matrix, with what such a small one leaves out."""
    problem = _entangled()
    Quadratic(problem, Control(options=_options())).run()
    core = reduce(problem, problem.allowed)
    interior_point(Lifted(core, products=True), tolerance=1.0, stop=lambda _value: True)
    point = flat_point(core)
    tree, incumbent = Tree(core, convexify(core, point)), Incumbent(gap=0.0, floor=0.0)
    tree.root(incumbent, point.row_values, point.multipliers)
    tree.probe(incumbent, 1)
    tree.grow(incumbent, 1)
    run = Splitting(core)
    run.triples, run.held = np.array([[0, 3, 6]]), np.zeros(1)
    run.run(1)
    run.separate()


def _terms() -> None:
    """Solve a chain beside a factor."""
    plain = _sample(5)
    pairs = [(3 * g + i, 3 * g + 3 + j) for g in range(4) for i, j in ((0, 1), (1, 0))]
    problem = replace(
        plain, factor=0.1 * plain.diagonal[:, None], terms=np.array(pairs),
        term_values=0.1 * np.cos(np.arange(8.0)),
    )  # fmt: skip
    found = eliminated(problem)
    assert found is not None  # noqa: S101 - a chain always fits
    Jointly(problem, Control(options=_options()), tables(problem, found)).run()


METHODS: dict[str, Callable[[], None]] = {
    "knapsack": _knapsack,
    "search": _search,
    "matrix": _matrix,
    "terms": _terms,
}
"""What solves a tiny problem, by the method whose kernels it calls."""

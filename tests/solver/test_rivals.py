"""The other solvers that the benchmark times answer the question that ours does."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rivals(repository):
    """Return the benchmark's module."""
    sys.path.insert(0, str(repository / "benchmarks"))
    try:
        return importlib.import_module("solver_rivals")
    finally:
        sys.path.pop(0)


def instance():
    """Return a Gram matrix of 4 layers x 3 rows, sizes and a binding limit, and the best choice."""
    rng = np.random.default_rng(3)
    errors = rng.normal(size=(12, 5)) * np.tile([1.0, 0.5, 0.2], 4)[:, None]
    G = errors @ errors.T
    sizes = rng.integers(1000, 9000, (4, 1)) * np.array([2, 3, 4])
    limit = int(0.8 * sizes[:, 2].sum())
    best = min(
        (c for c in itertools.product(range(3), repeat=4) if sizes[range(4), c].sum() <= limit),
        key=lambda c: G[np.ix_(*[np.arange(4) * 3 + c] * 2)].sum(),
    )
    assert best != (2, 2, 2, 2)
    return G, sizes, limit, list(best)


@pytest.mark.parametrize("name", ["gurobi", "cvxpy_scip", "mathopt", "highs_rlt"])
def test_route_finds_the_optimum(rivals, name):
    """The choice that enumeration finds best."""
    for library in rivals.LIBRARIES[name]:
        if importlib.util.find_spec(library.partition(".")[0]) is None:
            pytest.skip(f"'{library}' is not installed")
    G, sizes, limit, best = instance()
    answer = rivals.ask(name, G, sizes, limit, 60.0)
    assert answer.finished, answer.status
    assert best == answer.choice

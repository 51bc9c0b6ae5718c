"""Solver backends behind one Protocol: ours, and other people's for comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitquota.errors import InvalidInput, MissingDependency
from bitquota.solver.backends.external import External
from bitquota.solver.backends.own import BruteForce, Own
from bitquota.solver.backends.protocol import Backend, Options

if TYPE_CHECKING:
    from bitquota.solver.backends.protocol import Cancelled, OnEvent
    from bitquota.solver.problem import Problem
    from bitquota.solver.solution import Solution

__all__ = [
    "BACKENDS",
    "Backend",
    "Options",
    "backend_by_name",
    "installed_backend",
    "solve_with",
    "usable",
]

BACKENDS: dict[str, Backend] = {
    "bitquota": Own(),
    "gurobi": External(name="gurobi", packages=("gurobipy",)),
    "cvxpy_scip": External(name="cvxpy_scip", packages=("cvxpy", "pyscipopt"), extra="worker"),
    "mathopt": External(name="mathopt", packages=("ortools",), extra="worker"),
    "highs_rlt": External(name="highs_rlt", packages=("scipy",), largest_products=60_000),
    "cp_sat": External(
        name="cp_sat",
        packages=("ortools",),
        extra="worker",
        largest_products=200_000,
        counts_nodes=False,
    ),
    "brute_force": BruteForce(),
}
"""All backends by name, in order of preference."""


def backend_by_name(name: str) -> Backend:
    """Return the backend that users call ``name``; ``auto`` is the first that is installed.

    Raises:
        InvalidInput: No such backend.
    """
    if name == "auto":
        return next(b for b in BACKENDS.values() if b.missing() is None)
    if name not in BACKENDS:
        msg = f"a solver must be 'auto' or one of {', '.join(BACKENDS)}; got '{name}'"
        raise InvalidInput(msg, solver=name)
    return BACKENDS[name]


def installed_backend(name: str) -> Backend:
    """Return the backend called ``name``.

    Raises:
        InvalidInput: No such backend.
        MissingDependency: Its packages are not installed.
    """
    backend = backend_by_name(name)
    if package := backend.missing():
        how = f"install bitquota[{backend.extra}]" if backend.extra else f"install '{package}'"
        msg = f"solver '{name}' needs the package '{package}'; {how}, or use another solver"
        raise MissingDependency(msg, backend=name, package=package)
    return backend


def usable(problem: Problem) -> tuple[Backend, ...]:
    """Return the installed backends that take ``problem``, in order of preference."""
    return tuple(b for b in BACKENDS.values() if b.missing() is None and b.refuses(problem) is None)


def solve_with(
    name: str,
    problem: Problem,
    *,
    gap: float = 1e-4,
    time_limit_s: float | None = None,
    node_limit: int | None = None,
    seed: int = 0,
    on_event: OnEvent | None = None,
    cancelled: Cancelled | None = None,
) -> Solution:
    """Solve ``problem`` by the backend called ``name``.

    Raises:
        InvalidInput: No such backend, a negative limit, a node limit that it cannot keep, or a
            problem that it does not take.
        MissingDependency: The backend's packages are not installed.
        SolverFailed: The backend died, or its answer does not hold.
    """
    backend = installed_backend(name)
    if node_limit is not None and not backend.counts_nodes:
        msg = (
            f"solver '{name}' cannot keep a node limit: it does not count nodes; use a time limit, "
            f"or one of {', '.join(n for n, b in BACKENDS.items() if b.counts_nodes)}"
        )
        raise InvalidInput(msg, solver=name, node_limit=node_limit)
    options = Options(gap=gap, time_limit_s=time_limit_s, node_limit=node_limit, seed=seed)
    return backend.solve(problem, options, on_event=on_event, cancelled=cancelled)

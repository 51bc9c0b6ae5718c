"""Solver backends behind one interface: ours, and other people's for comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitquota.errors import MissingDependency
from bitquota.request import check_solver
from bitquota.solver.backends.backend import Backend
from bitquota.solver.backends.external import External
from bitquota.solver.backends.own import BruteForce, Own

if TYPE_CHECKING:
    from bitquota.solver.problem import Problem

__all__ = ["BACKENDS", "Backend", "backend_by_name", "installed_backend", "usable"]

BACKENDS: dict[str, Backend] = {
    "bitquota": Own(),
    "gurobi": External(name="gurobi", packages=("gurobipy",), counts_nodes=True),
    "cvxpy_scip": External(
        name="cvxpy_scip", packages=("cvxpy", "pyscipopt"), extra="worker", counts_nodes=True
    ),
    "cp_sat": External(
        name="cp_sat", packages=("ortools",), extra="worker", largest_products=200_000
    ),
    "brute_force": BruteForce(),
}
"""All backends by name, in order of preference."""


def backend_by_name(name: str) -> Backend:
    """Return the backend that users call ``name``; ``auto`` is our own.

    Raises:
        InvalidInput: No such backend.
    """
    check_solver(name)
    return BACKENDS["bitquota" if name == "auto" else name]


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

"""The solver: a problem in, the best choice and a proof of how good it is out.

The names below are loaded on first use, so that a certificate can be checked without the solver's
compiled kernels.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bitquota.solver.build import build_problem
    from bitquota.solver.dispatch import solve
    from bitquota.solver.diverse import top_k
    from bitquota.solver.files import read_problem
    from bitquota.solver.frontiers import (
        FrontierPoint,
        Smallest,
        even_limits,
        frontier,
        smallest,
    )
    from bitquota.solver.problem import Problem
    from bitquota.solver.separable import Hull, hull
    from bitquota.solver.solution import (
        Certificate,
        Convexification,
        Event,
        Limit,
        Solution,
        Stats,
        Status,
    )

_HOME = {
    "Certificate": "solution",
    "Convexification": "solution",
    "Event": "solution",
    "FrontierPoint": "frontiers",
    "Hull": "separable",
    "Limit": "solution",
    "Problem": "problem",
    "Smallest": "frontiers",
    "Solution": "solution",
    "Stats": "solution",
    "Status": "solution",
    "build_problem": "build",
    "even_limits": "frontiers",
    "frontier": "frontiers",
    "hull": "separable",
    "read_problem": "files",
    "smallest": "frontiers",
    "solve": "dispatch",
    "top_k": "diverse",
}

__all__ = [
    "Certificate",
    "Convexification",
    "Event",
    "FrontierPoint",
    "Hull",
    "Limit",
    "Problem",
    "Smallest",
    "Solution",
    "Stats",
    "Status",
    "build_problem",
    "even_limits",
    "frontier",
    "hull",
    "read_problem",
    "smallest",
    "solve",
    "top_k",
]


def __getattr__(name: str) -> object:
    """Import the module that defines ``name``."""
    if name not in _HOME:
        msg = f"module '{__name__}' has no attribute '{name}'"
        raise AttributeError(msg)
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)

"""The solver: a problem in, the best choice and a proof of how good it is out."""

from bitquota.solver.build import build_problem
from bitquota.solver.files import read_problem
from bitquota.solver.problem import Problem
from bitquota.solver.solution import (
    Certificate,
    Convexification,
    Event,
    Limit,
    Solution,
    Stats,
    Status,
)
from bitquota.solver.solve import solve

__all__ = [
    "Certificate",
    "Convexification",
    "Event",
    "Limit",
    "Problem",
    "Solution",
    "Stats",
    "Status",
    "build_problem",
    "read_problem",
    "solve",
]

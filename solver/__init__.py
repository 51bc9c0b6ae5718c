"""The solver: a problem in, the best choice and a proof of how good it is out."""

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

__all__ = [
    "Certificate",
    "Convexification",
    "Event",
    "Limit",
    "Problem",
    "Solution",
    "Stats",
    "Status",
]

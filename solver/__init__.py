"""The solver: a problem in, the best choice and a proof of how good it is out."""

from bitquota.solver.build import build_problem
from bitquota.solver.diverse import top_k
from bitquota.solver.files import read_problem
from bitquota.solver.frontier import FrontierPoint, Smallest, even_limits, frontier, smallest
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
from bitquota.solver.solve import solve

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

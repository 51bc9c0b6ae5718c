"""CVXPY with SCIP: the published route to this problem, without its change of the question.

CVXPY accepts a quadratic objective only when it is convex. The matrix is shifted on its diagonal,
which is a constant on one-hot vectors (``convex_shift``), and never projected. Loaded in the child
process only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cvxpy as cp
import numpy as np
import pyscipopt  # noqa: F401 - CVXPY would load it within the time limit

from bitquota.solver.backends.answer import Answer
from bitquota.solver.backends.linear import constraints, objective_tolerance
from bitquota.solver.backends.shift import convex_shift

if TYPE_CHECKING:
    from bitquota.solver.backends.answer import Task

_LIMITS = {"timelimit": "time", "nodelimit": "node", "totalnodelimit": "node", "memlimit": "memory"}


def optimise(task: Task) -> Answer:
    """Solve one task."""
    model = task.model
    # Constraints and objective.
    shift = convex_shift(model.cross, model.diagonal)
    x = cp.Variable(model.n_rows, boolean=True)
    objective = (model.diagonal - shift / 2) @ x
    if model.cross.any():
        Q = model.cross + np.diag(shift)
        objective += 0.5 * cp.quad_form(x, cp.psd_wrap(Q))
    one_each, matrix, limits = constraints(task)
    rules = [one_each @ x == 1]
    if len(limits):
        rules.append(matrix @ x <= limits)
    # Goal and limits.
    parameters: dict[str, float] = {
        "limits/gap": task.gap,
        "randomization/randomseedshift": task.seed % 2**31,
        "lp/threads": 1,
    }
    if task.time_limit_s is not None:
        parameters["limits/time"] = task.time_limit_s
    if task.node_limit is not None:
        parameters["limits/totalnodes"] = task.node_limit
    problem = cp.Problem(cp.Minimize(objective), rules)
    try:
        problem.solve(solver=cp.SCIP, scip_params=parameters)
    except cp.SolverError:
        # CVXPY's word for "stopped without a solution".
        return Answer(status="unknown", limit="time" if task.node_limit is None else "node")
    # What it says.
    scip = problem.solver_stats.extra_stats["model"]
    said, nodes = scip.getStatus(), int(scip.getNTotalNodes())
    if said in {"infeasible", "inforunbd"}:
        return Answer(status="infeasible", nodes=nodes)  # never unbounded: all is binary
    chosen = None if x.value is None else model.pick(np.asarray(x.value))
    done = said in {"optimal", "gaplimit"}
    return Answer(
        status="optimal" if done else ("unknown" if chosen is None else "feasible"),
        limit=_LIMITS.get(said),
        chosen=chosen,
        # CVXPY's objective has no constant: ours is added here.
        bound=float(scip.getDualbound()) + model.constant,
        tolerance=objective_tolerance(model) + 1e-6 * float(shift.max(initial=0.0)),
        nodes=nodes,
    )

"""Gurobi, where the user has it: the objective as it was measured, convex or not.

Loaded in the child process only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import gurobipy as gp
import numpy as np
import scipy.sparse as sp

from bitquota.solver.backends.answer import Answer
from bitquota.solver.backends.linear import constraints, objective_tolerance

if TYPE_CHECKING:
    from bitquota.solver.backends.answer import Task

_LIMITS = {gp.GRB.TIME_LIMIT: "time", gp.GRB.NODE_LIMIT: "node", gp.GRB.MEM_LIMIT: "memory"}


def optimise(task: Task) -> Answer:
    """Solve one task."""
    model = task.model
    with gp.Env(empty=True) as env:
        env.setParam("OutputFlag", 0)
        env.start()
        with gp.Model(env=env) as grb:
            # Constraints and objective.
            x = grb.addMVar(model.n_rows, vtype=gp.GRB.BINARY)
            one_each, matrix, limits = constraints(task)
            grb.addConstr(one_each @ x == 1)
            if len(limits):
                grb.addConstr(matrix @ x <= limits)
            objective = model.diagonal @ x + model.constant
            if model.cross.any():
                objective += 0.5 * (x @ sp.csr_matrix(model.cross) @ x)
            grb.setObjective(objective, gp.GRB.MINIMIZE)
            # Goal and limits.
            grb.Params.Threads = 1
            grb.Params.NonConvex = 2
            grb.Params.MIPGap = task.gap
            grb.Params.MIPGapAbs = 0.0
            grb.Params.FeasibilityTol = 1e-9
            grb.Params.IntFeasTol = 1e-9
            grb.Params.Seed = task.seed % 2_000_000_000
            if task.time_limit_s is not None:
                grb.Params.TimeLimit = task.time_limit_s
            if task.node_limit is not None:
                grb.Params.NodeLimit = task.node_limit
            grb.optimize()
            # What it says.
            nodes = int(grb.NodeCount)
            if grb.Status in {gp.GRB.INFEASIBLE, gp.GRB.INF_OR_UNBD}:
                return Answer(status="infeasible", nodes=nodes)
            chosen = model.pick(np.asarray(x.X)) if grb.SolCount else None
            done = grb.Status == gp.GRB.OPTIMAL
            return Answer(
                status="optimal" if done else ("unknown" if chosen is None else "feasible"),
                limit=_LIMITS.get(grb.Status),
                chosen=chosen,
                bound=float(grb.ObjBound),
                tolerance=objective_tolerance(model),
                nodes=nodes,
            )

"""Gurobi, where the user has it: the objective as it was measured, convex or not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bitquota.solver.backends.answer import Answer
from bitquota.solver.backends.linear import RowList, objective_tolerance

if TYPE_CHECKING:
    from bitquota.solver.backends.answer import Task


def optimise(task: Task) -> Answer:
    """Solve one task; called in the child process."""
    import gurobipy as gp
    import scipy.sparse as sp

    model = task.model
    with gp.Env(empty=True) as env:
        env.setParam("OutputFlag", 0)
        env.start()
        with gp.Model(env=env) as grb:
            x = grb.addMVar(model.n_rows, vtype=gp.GRB.BINARY)
            rows = RowList.of(task, None)
            matrix, lower, upper = rows.matrix(model.n_rows), np.array(rows.lower), rows.upper
            limits = np.array(upper)
            equal = lower == limits
            grb.addConstr(matrix[equal] @ x == limits[equal])
            if not equal.all():
                grb.addConstr(matrix[~equal] @ x <= limits[~equal])
            objective = model.diagonal @ x + model.constant
            if model.cross.any():
                objective += 0.5 * (x @ sp.csr_matrix(model.cross) @ x)
            grb.setObjective(objective, gp.GRB.MINIMIZE)
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
            nodes = int(grb.NodeCount)
            if grb.Status in {gp.GRB.INFEASIBLE, gp.GRB.INF_OR_UNBD}:
                return Answer(status="infeasible", nodes=nodes)
            chosen = model.pick(np.asarray(x.X)) if grb.SolCount else None
            limits_of = {
                gp.GRB.TIME_LIMIT: "time",
                gp.GRB.NODE_LIMIT: "node",
                gp.GRB.MEM_LIMIT: "memory",
            }
            done = grb.Status == gp.GRB.OPTIMAL
            return Answer(
                status="optimal" if done else ("unknown" if chosen is None else "feasible"),
                limit=limits_of.get(grb.Status),
                chosen=chosen,
                bound=float(grb.ObjBound),
                tolerance=objective_tolerance(model),
                nodes=nodes,
            )

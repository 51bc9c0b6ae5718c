"""HiGHS through SciPy, on the products of rows (first level of the reformulation-linearisation).

``y_pq`` stands for ``x_p x_q``; the product of each "one row per group" with each row gives
``Σ_{q in h} y_pq = x_p``. Convexity plays no part, so an indefinite matrix is as good as any.

References:
    [SA90] H. D. Sherali, W. P. Adams: A hierarchy of relaxations between the continuous and convex
        hull representations for zero-one programming problems, 1990.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from bitquota.solver.backends.answer import Answer
from bitquota.solver.backends.linear import RowList, objective_tolerance
from bitquota.solver.backends.model import Products

if TYPE_CHECKING:
    from bitquota.solver.backends.answer import AnswerStatus, Task


def optimise(task: Task) -> Answer:
    """Solve one task; called in the child process."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    model, products = task.model, Products.of(task.model)
    n, k = model.n_rows, len(products.left)
    rows = RowList.of(task, products)
    # One last variable, fixed at 1, carries the constant, so that the gap is relative to all.
    cost = np.concatenate([products.linear, products.weight, [products.constant]])
    lower = np.zeros(n + k + 1)
    lower[-1] = 1.0
    options = {"mip_rel_gap": task.gap, "presolve": True}
    if task.time_limit_s is not None:
        options["time_limit"] = task.time_limit_s
    if task.node_limit is not None:
        options["node_limit"] = task.node_limit
    result = milp(
        cost,
        integrality=np.concatenate([np.ones(n), np.zeros(k + 1)]),
        bounds=Bounds(lower, np.ones(n + k + 1)),
        constraints=LinearConstraint(rows.matrix(n + k + 1), rows.lower, rows.upper),
        options=options,
    )
    bound = getattr(result, "mip_dual_bound", None)
    nodes = getattr(result, "mip_node_count", None)
    chosen = None if result.x is None else model.pick(result.x[:n])
    if result.status == 2:
        return Answer(status="infeasible", nodes=int(nodes or 0))
    status: AnswerStatus
    status = "optimal" if result.status == 0 else ("unknown" if chosen is None else "feasible")
    limit = None
    if result.status == 1:
        # SciPy has one status for all limits.
        full = task.node_limit is not None and (nodes or 0) >= task.node_limit
        limit = "node" if full or task.time_limit_s is None else "time"
    return Answer(
        status=status,
        limit=limit,
        chosen=chosen,
        bound=-math.inf if bound is None else float(bound),
        tolerance=objective_tolerance(model),
        nodes=int(nodes or 0),
    )

"""Other routes to the published instances, as their users take them: the whole matrix, in floats.

Our own backends ask the other solvers our question: no terms inside a layer, all constraints,
integer budgets. A user who has Gurobi, or follows the published CVXPY route, hands over the matrix
``G`` as it was measured, terms inside layers included. They never count, but they make a Gram
positive semidefinite, which is worth a lot to these solvers. So they are timed here on ``G``, in a
process of their own::

    python benchmarks/solver_rivals.py gurobi FILE.npz 1 --limit 60

``cvxpy_scip`` projects an indefinite matrix as the published code does, and so answers another
question. ``mathopt`` and ``highs_rlt`` are here only: no user needs them beside those that
``bitquota solve --solver`` offers. Seconds are CPU of the process, from when its libraries are
loaded.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

GAP = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What another solver said.

    Attributes:
        status: Its word for it.
        finished: Whether it says that it proved its answer.
        seconds: CPU seconds from loaded libraries to the answer.
        choice: Index within each layer, or ``None``.
        nodes: Nodes it counted.
    """

    status: str
    finished: bool
    seconds: float
    choice: list[int] | None
    nodes: int = 0


def ask(name: str, G: Floats, sizes: NDArray[np.int64], limit: int, limit_s: float) -> Answer:
    """Run route ``name`` in a process of its own.

    Raises:
        RuntimeError: The process failed, for instance for want of a licence.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "instance.npz"
        np.savez(path, G=G, sizes=sizes, budgets=np.array([limit]))
        command = [sys.executable, __file__, name, str(path), "0", "--limit", str(limit_s)]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=20 * limit_s + 120
        )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"exit code {done.returncode}")
    return Answer(**json.loads(done.stdout.splitlines()[-1]))


def gurobi(G: Floats, sizes: Floats, limit: float, limit_s: float) -> Answer:
    """Minimise ``xᵀGx`` by Gurobi, one thread, its own defaults otherwise.

    The last option of every layer is one less the others, so a layer takes one binary less: its
    free licence, which ends at 2,000 variables and 200 of them in a quadratic term, takes 74 x 3.
    """
    import gurobipy as gp

    begin = time.process_time()
    layers, width = sizes.shape
    # x = last + R z, with z one-hot or zero in every layer.
    last = np.zeros(sizes.size)
    last[width - 1 :: width] = 1.0
    R = np.kron(np.eye(layers), np.vstack([np.eye(width - 1), -np.ones(width - 1)]))
    Q = 0.5 * (G + G.T)
    reduced, linear, constant = R.T @ Q @ R, 2 * R.T @ (Q @ last), float(last @ Q @ last)
    cost = R.T @ sizes.ravel()
    with gp.Env(empty=True) as env:
        env.setParam("OutputFlag", 0)
        env.start()
        with gp.Model(env=env) as model:
            z = model.addMVar(layers * (width - 1), vtype=gp.GRB.BINARY)
            if width > 2:
                for g in range(layers):
                    model.addConstr(z[g * (width - 1) : (g + 1) * (width - 1)].sum() <= 1)
            model.addConstr(cost @ z <= limit - float(sizes.ravel() @ last))
            model.setObjective(z @ reduced @ z + linear @ z + constant)
            model.Params.Threads = 1
            model.Params.NonConvex = 2
            model.Params.MIPGap = GAP
            model.Params.TimeLimit = limit_s
            model.optimize()
            choice = None
            if model.SolCount > 0:
                others = z.X.reshape(layers, width - 1)
                choice = np.argmax(np.column_stack([others, 1 - others.sum(axis=1)]), axis=1)
            return Answer(
                status=str(model.Status),
                finished=model.Status == gp.GRB.OPTIMAL,
                seconds=time.process_time() - begin,
                choice=None if choice is None else choice.tolist(),
                nodes=int(model.NodeCount),
            )


def cvxpy_scip(G: Floats, sizes: Floats, limit: float, limit_s: float) -> Answer:
    """Project ``G`` where it is indefinite and solve it by CVXPY and SCIP."""
    import cvxpy as cp
    import pyscipopt  # noqa: F401 - loaded before the clock starts

    begin = time.process_time()
    layers, width = sizes.shape
    values, vectors = np.linalg.eigh(0.5 * (G + G.T))
    projected = (vectors * np.maximum(values, 0.0)) @ vectors.T
    x = cp.Variable(sizes.size, boolean=True)
    constraints = [sizes.ravel() @ x <= limit]
    constraints += [cp.sum(x[g * width : (g + 1) * width]) == 1 for g in range(layers)]
    problem = cp.Problem(cp.Minimize(cp.quad_form(x, cp.psd_wrap(projected))), constraints)
    status = "no solution"
    try:
        problem.solve(
            solver=cp.SCIP, scip_params={"limits/gap": GAP, "limits/time": limit_s, "lp/threads": 1}
        )
        status = problem.solver_stats.extra_stats["model"].getStatus()
    except cp.SolverError as error:
        status = str(error)
    chosen = None if x.value is None else np.argmax(x.value.reshape(sizes.shape), axis=1).tolist()
    return Answer(
        status=status,
        finished=status in {"optimal", "gaplimit"},
        seconds=time.process_time() - begin,
        choice=chosen,
    )


def mathopt(G: Floats, sizes: Floats, limit: float, limit_s: float) -> Answer:
    """Minimise ``xᵀGx`` by OR-Tools MathOpt with its built-in SCIP."""
    from ortools.math_opt.python import mathopt as mo

    begin = time.process_time()
    model = mo.Model()
    x = [model.add_binary_variable() for _ in range(sizes.size)]
    for layer in np.array(x).reshape(sizes.shape):
        model.add_linear_constraint(mo.fast_sum(layer) == 1)
    model.add_linear_constraint(sizes.ravel() @ np.array(x) <= limit)
    model.minimize(mo.fast_sum(G[p, q] * x[p] * x[q] for p, q in np.argwhere(G)))
    parameters = mo.SolveParameters(
        threads=1, relative_gap_tolerance=GAP, time_limit=dt.timedelta(seconds=limit_s)
    )
    result = mo.solve(model, mo.SolverType.GSCIP, params=parameters)
    choice = None
    if result.has_primal_feasible_solution():
        values = np.array(result.variable_values(x)).reshape(sizes.shape)
        choice = np.argmax(values, axis=1).tolist()
    return Answer(
        status=result.termination.reason.name,
        finished=result.termination.reason == mo.TerminationReason.OPTIMAL,
        seconds=time.process_time() - begin,
        choice=choice,
        nodes=int(result.solve_stats.node_count),
    )


def highs_rlt(G: Floats, sizes: Floats, limit: float, limit_s: float) -> Answer:
    """Minimise a linear function of products ``y_pq = x_p x_q`` by HiGHS.

    The product of each "one row per layer" with each row gives ``Σ_{q in h} y_pq = x_p``, the first
    level of the reformulation-linearisation [SA90]. Convexity plays no part.

    References:
        [SA90] H. D. Sherali, W. P. Adams: A hierarchy of relaxations between the continuous and
            convex hull representations for zero-one programming problems, 1990.
    """
    import scipy.sparse as sp
    from scipy.optimize import Bounds, LinearConstraint, milp

    begin = time.process_time()
    (layers, width), n = sizes.shape, sizes.size
    layer = np.arange(n) // width
    p, q = np.nonzero(layer[:, None] < layer[None, :])
    y = n + np.arange(len(p))
    # Line p * layers + h says: the products of row p with the rows of layer h add up to x_p.
    line = np.concatenate([p * layers + layer[q], q * layers + layer[p]])
    rows, others = np.repeat(np.arange(n), layers), np.tile(np.arange(layers), n)
    apart = layer[rows] != others
    at = np.concatenate([line, (rows * layers + others)[apart]])
    to = np.concatenate([y, y, rows[apart]])
    entries = np.concatenate([np.ones(2 * len(y)), -np.ones(int(apart.sum()))])
    products = sp.csr_matrix((entries, (at, to)), shape=(n * layers, n + len(y)))
    one_each = sp.csr_matrix((np.ones(n), (layer, np.arange(n))), shape=(layers, n + len(y)))
    size = sp.csr_matrix((sizes.ravel(), (np.zeros(n), np.arange(n))), shape=(1, n + len(y)))
    result = milp(
        np.concatenate([np.diag(G), G[p, q] + G[q, p]]),
        integrality=np.concatenate([np.ones(n), np.zeros(len(y))]),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(products, 0, 0),
            LinearConstraint(size, -np.inf, limit),
        ],
        options={"mip_rel_gap": GAP, "time_limit": limit_s},
    )
    found = result.x is not None
    return Answer(
        status=result.message,
        finished=result.status == 0,
        seconds=time.process_time() - begin,
        choice=np.argmax(result.x[:n].reshape(sizes.shape), axis=1).tolist() if found else None,
        nodes=int(result.mip_node_count or 0),
    )


ROUTES = {"gurobi": gurobi, "cvxpy_scip": cvxpy_scip, "mathopt": mathopt, "highs_rlt": highs_rlt}
LIBRARIES = {
    "gurobi": ("gurobipy", "scipy.sparse"),
    "cvxpy_scip": ("cvxpy", "pyscipopt"),
    "mathopt": ("ortools.math_opt.python.mathopt",),
    "highs_rlt": ("scipy.optimize", "scipy.sparse"),
}


def main() -> None:
    """Run one route on one instance; prints its answer as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(ROUTES))
    parser.add_argument("file", type=Path)
    parser.add_argument("index", type=int)
    parser.add_argument("--limit", type=float, default=60.0)
    given = parser.parse_args()
    with np.load(given.file, allow_pickle=False) as archive:
        arrays: dict[str, Any] = {name: archive[name] for name in ("G", "sizes", "budgets")}
    for library in LIBRARIES[given.name]:
        __import__(library)
    limit = float(np.floor(arrays["budgets"][given.index]))
    # Sizes in the thousands: a feasibility tolerance of 1e-6 is then a few bytes of the budget.
    unit = 2.0 ** np.floor(np.log2(limit / 1000))
    answer = ROUTES[given.name](
        arrays["G"], arrays["sizes"].astype(np.float64) / unit, limit / unit, given.limit
    )
    print(json.dumps(asdict(answer)))


if __name__ == "__main__":
    main()

"""Other routes to the published instances, as their users take them: the whole matrix, in floats.

Our own backends ask the other solvers our question: no terms inside a layer, all constraints,
integer budgets. A user who has Gurobi, or follows the published CVXPY route, hands over the matrix
``G`` as it was measured, terms inside layers included. They never count, but they make a Gram
positive semidefinite, which is worth a lot to these solvers. So they are timed here on ``G``, in a
process of their own::

    python benchmarks/solver_rivals.py gurobi FILE.npz 1 --limit 60

``cvxpy_scip`` projects an indefinite matrix as the published code does, and so answers another
question. Seconds are CPU of the process, from when its libraries are loaded.
"""

from __future__ import annotations

import argparse
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
    """Minimise ``xᵀGx`` by Gurobi, one thread, its own defaults otherwise."""
    import gurobipy as gp

    begin = time.process_time()
    layers, width = sizes.shape
    with gp.Env(empty=True) as env:
        env.setParam("OutputFlag", 0)
        env.start()
        with gp.Model(env=env) as model:
            x = model.addMVar(sizes.size, vtype=gp.GRB.BINARY)
            for g in range(layers):
                model.addConstr(x[g * width : (g + 1) * width].sum() == 1)
            model.addConstr(sizes.ravel() @ x <= limit)
            model.setObjective(x @ (0.5 * (G + G.T)) @ x)
            model.Params.Threads = 1
            model.Params.NonConvex = 2
            model.Params.MIPGap = GAP
            model.Params.TimeLimit = limit_s
            model.optimize()
            found = model.SolCount > 0
            return Answer(
                status=str(model.Status),
                finished=model.Status == gp.GRB.OPTIMAL,
                seconds=time.process_time() - begin,
                choice=np.argmax(x.X.reshape(sizes.shape), axis=1).tolist() if found else None,
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


ROUTES = {"gurobi": gurobi, "cvxpy_scip": cvxpy_scip}
LIBRARIES = {"gurobi": ("gurobipy", "scipy.sparse"), "cvxpy_scip": ("cvxpy", "pyscipopt")}


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

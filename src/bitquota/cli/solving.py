"""Commands that solve a stored problem: ``solve``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitquota.cli import options as opt
from bitquota.cli import output
from bitquota.errors import Infeasible

if TYPE_CHECKING:
    from bitquota.canonical import JsonObject
    from bitquota.solver import Problem, Solution

File = Annotated[
    Path,
    typer.Argument(help="Matrix of 'bitquota measure', or a plain .npz with G, sizes and budgets."),
]
BudgetText = Annotated[
    str | None,
    typer.Option("--budget", "-b", help="'3 bits', '3.6 bpw', '96 KiB of weights', …"),
]
BudgetIndex = Annotated[
    int | None, typer.Option("--budget-index", help="Which of the file's own budgets; from 0.")
]


def solve_file(
    file: File,
    budget: BudgetText = None,
    budget_index: BudgetIndex = None,
    gap: opt.Gap = 1e-4,
    time_limit: opt.TimeLimit = None,
    solver: opt.SolverName = "auto",
    seed: opt.Seed = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Solve the allocation problem of FILE for one budget, with a bound on the best possible."""
    from bitquota.solver import solve
    from bitquota.solver.files import read_problem

    problem = read_problem(file, budget_index=budget_index, budget=budget)
    solution = solve(problem, backend=solver, gap=gap, time_limit_s=time_limit, seed=seed)
    if as_json:
        output.print_json(solution_json(problem, solution))
    if solution.choice is None:
        msg = (
            f"some choice must satisfy all constraints; the solver ended '{solution.status}'"
            + (f" at its {solution.limit} limit" if solution.limit else "")
            + "; raise the budget, or give it more time"
        )
        raise Infeasible(msg, status=str(solution.status))
    if not as_json:
        output.print_rows(
            [
                {"group": problem.groups[g], "candidate": problem.labels[row]}
                for g, row in enumerate(problem.rows(solution.choice))
            ]
        )
        output.console.print(
            f"{solution.status}: objective {solution.objective:.6g}, no choice is below "
            f"{solution.bound:.6g} (gap {solution.absolute_gap:.3g}, "
            f"{100 * solution.relative_gap:.3g} %); {solution.backend}, "
            f"{solution.stats.nodes} nodes, {solution.stats.cpu_seconds:.2f} CPU seconds"
        )


def solution_json(problem: Problem, solution: Solution) -> JsonObject:
    """Return what ``bitquota solve --json`` prints; infinite numbers become ``null``."""

    def finite(value: float) -> float | None:
        return value if abs(value) != float("inf") else None

    chosen = None if solution.choice is None else [int(c) for c in solution.choice]
    return {
        "status": str(solution.status),
        "limit": None if solution.limit is None else str(solution.limit),
        "choice": chosen,
        "objective": finite(solution.objective),
        "bound": finite(solution.bound),
        "absolute_gap": finite(solution.absolute_gap),
        "relative_gap": finite(solution.relative_gap),
        "backend": solution.backend,
        "nodes": solution.stats.nodes,
        "cpu_seconds": solution.stats.cpu_seconds,
        "spent": (
            None
            if solution.choice is None
            else dict(zip(problem.resources, map(int, problem.spent(solution.choice)), strict=True))
        ),
        "limits": dict(zip(problem.resources, map(int, problem.limits), strict=True)),
    }

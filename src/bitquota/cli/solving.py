"""Commands that solve a stored problem: ``solve`` and ``frontier``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitquota.cli import options as opt
from bitquota.cli import output
from bitquota.errors import GateFailed, Infeasible, InvalidInput

if TYPE_CHECKING:
    from bitquota.canonical import JsonObject
    from bitquota.solver import FrontierPoint, Problem, Smallest, Solution

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
NodeLimit = Annotated[
    int | None,
    typer.Option("--node-limit", help="Branch-and-bound nodes; unlike seconds, reproducible."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def solve_file(
    file: File,
    budget: BudgetText = None,
    budget_index: BudgetIndex = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            help="Instead of the best loss: the smallest size with at most this loss.",
        ),
    ] = None,
    gap: opt.Gap = 1e-4,
    time_limit: opt.TimeLimit = None,
    node_limit: NodeLimit = None,
    solver: opt.SolverName = "auto",
    seed: opt.Seed = 0,
    top: Annotated[
        int, typer.Option("--top", help="Also list this many different choices, best first.")
    ] = 1,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Price of each budget, and what each group's bits buy."),
    ] = False,
    cross_check: Annotated[
        bool,
        typer.Option(
            "--cross-check", help="Verify the certificate and ask every other solver here."
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Solve the allocation problem of FILE for one budget, with a bound on the best possible."""
    from bitquota.solver import read_problem, smallest, solve, top_k

    problem = read_problem(file, budget_index=budget_index, budget=budget)
    if tolerance is not None:
        found = smallest(problem, tolerance, gap=gap, time_limit_s=time_limit, seed=seed)
        _print_smallest(problem, found, tolerance, as_json=as_json)
        return
    solution = solve(
        problem,
        backend=solver,
        gap=gap,
        time_limit_s=time_limit,
        node_limit=node_limit,
        seed=seed,
    )
    document = solution_json(problem, solution)
    if solution.choice is None:
        _fail_without_choice(problem, solution, document, as_json=as_json)
    if top > 1:
        others = top_k(problem, top, gap=gap, time_limit_s=time_limit, seed=seed)
        document["top"] = [solution_json(problem, other) for other in others]
    if explain:
        from bitquota.solver.explain import explain as explained

        document["explanation"] = explained(problem, solution).to_json()
    if cross_check:
        from bitquota.solver.cross_check import cross_check as checked

        document["cross_check"] = checked(problem, solution).to_json()
    if as_json:
        output.print_json(document)
    else:
        _print_solution(problem, solution, document)
    if cross_check and not document["cross_check"]["holds"]:
        msg = (
            "a certificate must hold and no other solver may contradict it; see the comparison: "
            "please report this problem file"
        )
        raise GateFailed(msg)


def frontier(
    file: File,
    points: Annotated[
        int, typer.Option("--points", help="Budgets between smallest and largest.")
    ] = 16,
    budget: BudgetText = None,
    budget_index: BudgetIndex = None,
    certify: Annotated[
        bool, typer.Option("--certify/--heuristic", help="Prove a bound for every point.")
    ] = True,
    gap: opt.Gap = 1e-4,
    time_limit: opt.TimeLimit = None,
    node_limit: NodeLimit = None,
    seed: opt.Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Solve FILE at many budgets: the whole curve of size against predicted loss.

    Which resource varies is that of --budget (by default average bits).
    """
    from bitquota.solver import even_limits, read_problem
    from bitquota.solver import frontier as solve_frontier

    if points < 2:
        msg = f"a frontier must have at least 2 points; got {points}"
        raise InvalidInput(msg, points=points)
    if budget is None and budget_index is None:
        budget = "32 bits"
    problem = read_problem(file, budget_index=budget_index, budget=budget)
    found = solve_frontier(
        problem,
        even_limits(problem, points),
        certify=certify,
        gap=gap,
        time_limit_s=time_limit,
        node_limit=node_limit,
        seed=seed,
    )
    if as_json:
        output.print_json([_point_json(problem, point) for point in found])
        return
    output.print_rows([_point_row(problem, point) for point in found], title=f"Frontier of {file}")


def _point_json(problem: Problem, point: FrontierPoint) -> JsonObject:
    return {"limit": point.limit} | solution_json(problem, point.solution)


def _point_row(problem: Problem, point: FrontierPoint) -> dict[str, str]:
    solution = point.solution
    spent = "" if solution.choice is None else f"{int(problem.spent(solution.choice)[0]):,}"
    finite = solution.bound != -float("inf")
    return {
        problem.resources[0]: f"{point.limit:,}",
        "spent": spent,
        "objective": f"{solution.objective:.6g}",
        "bound": f"{solution.bound:.6g}" if finite else "",
        "gap": f"{100 * solution.relative_gap:.3g} %" if finite else "",
        "status": str(solution.status),
    }


def _fail_without_choice(
    problem: Problem, solution: Solution, document: JsonObject, *, as_json: bool
) -> None:
    """Say why there is no choice: what conflicts, and how far which budget must be raised."""
    from bitquota.solver import Status

    advice = "raise a budget, or give the solver more time"
    if solution.status is Status.INFEASIBLE:
        from bitquota.solver.conflicts import explain_infeasible

        conflict = explain_infeasible(problem)
        document["conflict"] = conflict.to_json()
        texts = "; ".join(c.text for c in conflict.constraints)
        raised = [
            f"{name} to {limit:,}"
            for r in conflict.raises
            for name, limit in zip(r.resources, r.limits, strict=True)
        ]
        advice = f"these conflict: {texts}" + (f"; raise {' or '.join(raised)}" if raised else "")
    if as_json:
        output.print_json(document)
    msg = (
        f"some choice must satisfy all constraints; the solver ended '{solution.status}': {advice}"
    )
    raise Infeasible(msg, status=str(solution.status))


def _print_solution(problem: Problem, solution: Solution, document: JsonObject) -> None:
    assert solution.choice is not None  # noqa: S101  # its caller asked
    rows = problem.rows(solution.choice)
    chosen = [
        {"group": problem.groups[g], "candidate": problem.labels[row]} for g, row in enumerate(rows)
    ]
    if "explanation" in document:
        for row, account in zip(chosen, document["explanation"]["groups"], strict=True):
            row["buys (loss avoided)"] = f"{account['bought']:.4g}"
            row["for"] = ", ".join(f"{paid:,}" for paid in account["paid"])
    output.print_rows(chosen)
    output.console.print(
        f"{solution.status}: objective {solution.objective:.6g}, no choice is below "
        f"{solution.bound:.6g} (gap {solution.absolute_gap:.3g}, "
        f"{100 * solution.relative_gap:.3g} %); {solution.backend}, "
        f"{solution.stats.nodes} nodes, {solution.stats.cpu_seconds:.2f} CPU seconds"
    )
    for account in document.get("explanation", {}).get("budgets", []):
        line = (
            f"{account['resource']}: {account['spent']:,} of {account['limit']:,} spent; one unit "
            f"more is worth about {account['price']:.3g}"
        )
        output.console.print(line, highlight=False)
    for k, other in enumerate(document.get("top", [])):
        output.console.print(
            f"{k + 1}. objective {other['objective']:.6g}: {' '.join(other['labels'])}",
            highlight=False,
        )
    if "cross_check" in document:
        checked = document["cross_check"]
        verdict = checked["certificate"]
        if verdict is not None:
            holds = "holds" if verdict["holds"] else f"DOES NOT HOLD: {verdict['reason']}"
            output.console.print(
                f"certificate {holds}, checked in other arithmetic: nothing is below "
                f"{verdict['proved']:.6g} ({verdict['nodes']} nodes)",
                highlight=False,
            )
        output.print_rows(
            [
                {"solver": c["backend"], "outcome": c["outcome"], "reason": c["reason"]}
                for c in checked["comparisons"]
            ],
            title="Other solvers",
        )


def _print_smallest(problem: Problem, found: Smallest, tolerance: float, *, as_json: bool) -> None:
    document: JsonObject = {
        "status": str(found.status),
        "limit": None if found.limit is None else str(found.limit),
        "choice": None if found.choice is None else [int(c) for c in found.choice],
        "cost": found.cost,
        "bound": found.bound,
        "objective": found.objective if found.choice is not None else None,
        "resource": problem.resources[0],
    }
    if as_json:
        output.print_json(document)
    if found.choice is None:
        msg = (
            f"some choice within the budget must lose at most {tolerance:g}; none was found "
            f"('{found.status}'): raise the tolerance or the budget"
        )
        raise Infeasible(msg, tolerance=tolerance)
    if not as_json:
        rows = problem.rows(found.choice)
        output.print_rows(
            [
                {"group": problem.groups[g], "candidate": problem.labels[row]}
                for g, row in enumerate(rows)
            ]
        )
        output.console.print(
            f"{found.status}: {problem.resources[0]} {found.cost:,} for a predicted loss of "
            f"{found.objective:.6g}; no choice below {found.bound:,} stays within {tolerance:g}"
        )


def solution_json(problem: Problem, solution: Solution) -> JsonObject:
    """Return what ``bitquota solve --json`` prints; infinite numbers become ``null``."""

    def finite(value: float) -> float | None:
        return value if abs(value) != float("inf") else None

    chosen = None if solution.choice is None else [int(c) for c in solution.choice]
    labels = spent = None
    if solution.choice is not None:
        labels = [problem.labels[row] for row in problem.rows(solution.choice)]
        spent = [int(amount) for amount in problem.spent(solution.choice)]
    return {
        "status": str(solution.status),
        "limit": None if solution.limit is None else str(solution.limit),
        "choice": chosen,
        "labels": labels,
        "objective": finite(solution.objective),
        "bound": finite(solution.bound),
        "absolute_gap": finite(solution.absolute_gap),
        "relative_gap": finite(solution.relative_gap),
        "backend": solution.backend,
        "nodes": solution.stats.nodes,
        "cpu_seconds": solution.stats.cpu_seconds,
        "spent": spent and dict(zip(problem.resources, spent, strict=True)),
        "limits": dict(zip(problem.resources, map(int, problem.limits), strict=True)),
    }

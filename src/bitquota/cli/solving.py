"""Commands that solve a stored problem, or check a proof: ``solve``, ``frontier``, ``verify``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitquota.candidates.budget import LARGEST_LIMIT, Budget
from bitquota.candidates.cost_table import CostTable
from bitquota.canonical import read_json, write_whole
from bitquota.cli import importing, output, remote
from bitquota.cli import options as opt
from bitquota.cli.written import Written, former_certificate
from bitquota.errors import GateFailed, Infeasible, InvalidInput
from bitquota.matrix import SensitivityMatrix
from bitquota.plan import SCHEMA, Plan

if TYPE_CHECKING:
    from bitquota.canonical import JsonObject
    from bitquota.solver.solution import Certificate

File = Annotated[
    Path,
    typer.Argument(
        help="Problem .json (see --schema), matrix of 'bitquota measure', a plain .npz with G, "
        "sizes and budgets, or a measurement .json of exllamav2, exllamav3 or ModelOpt."
    ),
]
BudgetText = Annotated[
    str | None,
    typer.Option("--budget", "-b", help="'3 bits', '3.6 bpw', '96 KiB of weights', …"),
]
BudgetIndex = Annotated[
    int | None,
    typer.Option("--budget-index", help="Use this one of the file's own budgets (counted from 0)."),
]
NodeLimit = Annotated[
    int | None,
    typer.Option(
        "--node-limit",
        help="Limit on branch-and-bound nodes; unlike a time limit, it is reproducible.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _print_schema(wanted: bool) -> None:  # Typer calls it with the flag
    if wanted:
        from bitquota.json_schema import json_schema
        from bitquota.solver.problem_document import ProblemDocument

        output.print_json(json_schema(ProblemDocument, title="Bitquota problem"))
        raise typer.Exit


def solve_file(
    file: File,
    budget: BudgetText = None,
    budget_index: BudgetIndex = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            help="Find the smallest size with at most this loss, instead of the lowest loss.",
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
        typer.Option(
            "--explain", help="Show the price of each budget and what the bits of each group buy."
        ),
    ] = False,
    cross_check: Annotated[
        bool,
        typer.Option(
            "--cross-check",
            help="Verify the certificate and compare with every other installed solver.",
        ),
    ] = False,
    server: opt.Server = None,
    api_key: opt.ApiKey = None,
    robust: opt.Robust = 0.0,
    certificate: Annotated[
        Path | None,
        typer.Option("--certificate", help="Also write the proof of the bound, for 'verify'."),
    ] = None,
    as_json: AsJson = False,
    schema: Annotated[  # noqa: ARG001  # Typer needs the parameter; the callback acts on it
        bool,
        typer.Option(
            "--schema",
            callback=_print_schema,
            is_eager=True,
            help="Print the JSON Schema of problem files: several budgets, costs of pairs, "
            "forbidden and required candidates, limits on numbers of layers.",
        ),
    ] = False,
) -> None:
    """Solve the allocation problem of FILE for its budgets, with a bound on the optimum."""
    # What is asked for: the best loss within a budget, or the smallest size within a loss.
    request: JsonObject = {
        "budget": budget, "budget_index": budget_index, "gap": gap, "time_limit_s": time_limit,
        "seed": seed,
    }  # fmt: skip
    if robust:
        request["robust"] = robust
    if tolerance is not None:
        ignored = {
            "--solver": solver not in {"auto", "bitquota"}, "--node-limit": node_limit is not None,
            "--top": top > 1, "--explain": explain, "--cross-check": cross_check,
            "--certificate": certificate is not None,
        }  # fmt: skip
        if any(ignored.values()):
            names = ", ".join(name for name, given in ignored.items() if given)
            msg = (
                f"--tolerance cannot be combined with {names}: our own solver looks for the "
                "smallest size "
                "by several proofs; solve again at the size found for these"
            )
            raise InvalidInput(msg, options=names)
        request["tolerance"] = tolerance
    else:
        request |= {
            "solver": solver, "node_limit": node_limit, "top": top, "explain": explain,
            "cross_check": cross_check,
        }  # fmt: skip

    # Solve, here or on a server, and keep the certificate.
    kept = None
    if certificate is not None:
        if solver not in {"auto", "bitquota"}:
            msg = (
                f"--certificate cannot be combined with --solver {solver}: only the built-in "
                "solver issues certificates"
            )
            raise InvalidInput(msg)
        kept = Written.at(certificate, "--certificate", former=former_certificate)
    if server:
        document, proof = remote.solution(
            file, request, server, api_key, certified=kept is not None
        )
    else:
        document, proof = _solve_here(file, request, certified=kept is not None)
    if kept is not None and proof is not None:
        kept.save(partial(write_whole, data=proof))
    if as_json:
        output.print_json(document)

    # Tell what was found, and fail where nothing was.
    if document["choice"] is None:
        _fail_without_choice(document, tolerance)
    if not as_json:
        if tolerance is not None:
            _print_smallest(document, tolerance)
        else:
            _print_solution(document)
        if (imported := document.get("imported")) is not None:
            output.console.print(importing.summary(imported), markup=False, highlight=False)
    if cross_check and not document["cross_check"]["holds"]:
        msg = (
            "a certificate must hold and no other solver may contradict it; see the comparison: "
            "please report this problem file"
        )
        raise GateFailed(msg)


def _solve_here(
    file: Path, request: JsonObject, *, certified: bool
) -> tuple[JsonObject, bytes | None]:
    from bitquota.solver.archive import certificate_file
    from bitquota.solver.document import plain_problem, smallest_document, solve_document
    from bitquota.solver.files import matrix_digest

    options = dict(request)
    robust = options.pop("robust", 0.0)
    asked = importing.read_any_problem(
        file, budget_index=options.pop("budget_index"), budget=options.pop("budget"), robust=robust
    )
    proofs: list[Certificate] = []
    if "tolerance" in options:
        document = smallest_document(plain_problem(asked, "--tolerance"), **options)
    else:
        document = solve_document(asked, **options, on_certificate=proofs.append)
    if robust := robust or asked.robust:
        document["robust"] = robust
    if (imported := importing.chosen_options(file, document)) is not None:
        document |= {"imported": imported}
    if not certified or not proofs:
        return document, None
    if file.suffix == ".json":
        matrix = None if asked.matrix is None else asked.matrix.digest()
    else:
        matrix = matrix_digest(file, robust)
    return document, certificate_file(proofs[0], asked.problem, matrix)


def verify(
    made: Annotated[
        Path,
        typer.Argument(
            metavar="PLAN", help="Plan of 'bitquota plan', or answer of 'bitquota solve --json'."
        ),
    ],
    matrix: Annotated[
        Path, typer.Argument(help="The matrix it was made from ('plan --matrix'), or problem file.")
    ],
    certificate: Annotated[
        Path, typer.Argument(help="plan.certificate.npz, or the file of 'solve --certificate'.")
    ],
    as_json: AsJson = False,
) -> None:
    """Check the bound of PLAN by its CERTIFICATE, and say what is proved and what is not.

    The check needs neither the model nor the solver, whose answer it does not trust.
    """
    from bitquota.solver.verify import verify_plan, verify_solution

    advice = "name a file of 'bitquota plan' or of 'bitquota solve --json'"
    document = read_json(made, "a plan or solution", advice, InvalidInput)
    if not certificate.is_file():
        msg = f"a certificate must be a file; there is none at '{certificate}'"
        raise InvalidInput(msg, path=str(certificate))
    data = certificate.read_bytes()
    if isinstance(document, dict) and document.get("schema") == SCHEMA:
        plan = Plan.from_json(document)
        found = verify_plan(plan, SensitivityMatrix.load(matrix), data)
    else:
        if not isinstance(document, dict) or not isinstance(document.get("limits"), dict):
            msg = f"only a plan or a solution is verified; '{made}' is neither: {advice}"
            raise InvalidInput(msg, path=str(made))
        robust = document.get("robust", 0.0)
        if not isinstance(robust, int | float):
            msg = f"'robust' of a solution must be a number; got {robust!r}"
            raise InvalidInput(msg, path=str(made))
        problem, source = importing.problem_within(matrix, document["limits"], robust)
        found = verify_solution(document, problem, source, data)
    if as_json:
        output.print_json(found.to_json())
        return
    for title, sentences in (("Proved", found.proved()), ("Not proved", found.not_proved())):
        output.console.print(f"{title}:", markup=False, highlight=False)
        for sentence in sentences:
            output.console.print(f"- {sentence}", markup=False, highlight=False, soft_wrap=True)


def frontier(
    file: File,
    points: Annotated[
        int,
        typer.Option("--points", help="Number of budgets between the smallest and the largest."),
    ] = 16,
    budget: BudgetText = None,
    budget_index: BudgetIndex = None,
    table: Annotated[
        Path | None,
        typer.Option("--table", help="Cost table: its time or energy varies instead of the size."),
    ] = None,
    certify: Annotated[
        bool, typer.Option("--certify/--heuristic", help="Prove a bound for every point.")
    ] = True,
    gap: opt.Gap = 1e-4,
    time_limit: opt.TimeLimit = None,
    node_limit: NodeLimit = None,
    seed: opt.Seed = 0,
    server: opt.Server = None,
    api_key: opt.ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Solve FILE at many budgets: the whole curve of size against predicted loss.

    --budget selects the resource that varies (by default average bits), or --table does.
    """
    if table is not None and (server or budget or budget_index is not None):
        msg = "--table says what varies, on this machine; leave --budget and --server out, or it"
        raise InvalidInput(msg)
    if table is None and budget is None and budget_index is None:
        budget = importing.default_budget(file)
    request: JsonObject = {
        "points": points, "budget": budget, "budget_index": budget_index, "certify": certify,
        "gap": gap, "time_limit_s": time_limit, "node_limit": node_limit, "seed": seed,
    }  # fmt: skip
    found = (
        remote.frontier(file, request, server, api_key)
        if server
        else _frontier_here(file, request, None if table is None else CostTable.load(table))
    )
    if as_json:
        output.print_json(found)
        return
    output.print_rows([_point_row(point) for point in found], title=f"Frontier of {file}")


def _frontier_here(file: Path, request: JsonObject, table: CostTable | None) -> list[JsonObject]:
    from bitquota.solver import build_problem
    from bitquota.solver.document import frontier_document, plain_problem

    options = dict(request)
    if table is not None:
        del options["budget"], options["budget_index"]
        whole = table.with_whole_sums()
        varied = Budget(resource=table.resource, limit=LARGEST_LIMIT - 1, prices=whole)
        return frontier_document(build_problem(SensitivityMatrix.load(file), [varied]), **options)
    asked = importing.read_any_problem(
        file, budget_index=options.pop("budget_index"), budget=options.pop("budget")
    )
    return frontier_document(plain_problem(asked, "a frontier"), **options)


def _point_row(point: JsonObject) -> dict[str, str]:
    resource = next(iter(point["limits"]))
    bound, gap = point["bound"], point["relative_gap"]
    return {
        resource: f"{point['limits'][resource]:,}",
        "spent": "" if point["spent"] is None else f"{point['spent'][resource]:,}",
        "objective": "inf" if point["objective"] is None else f"{point['objective']:.6g}",
        "bound": "" if bound is None else f"{bound:.6g}",
        "gap": "" if gap is None or bound is None else f"{100 * gap:.3g} %",
        "status": point["status"],
    }


def _fail_without_choice(document: JsonObject, tolerance: float | None) -> None:
    """Say why there is no choice: what conflicts, and how far which budget must be raised."""
    if tolerance is not None:
        msg = (
            f"some choice within the budget must lose at most {tolerance:g}; none was found "
            f"('{document['status']}'): raise the tolerance or the budget"
        )
        raise Infeasible(msg, tolerance=tolerance)
    advice = "raise a budget, or give the solver more time"
    if conflict := document.get("conflict"):
        texts = "; ".join(c["text"] for c in conflict["constraints"])
        raised = [
            f"{name} to {limit:,}"
            for r in conflict["raises"]
            for name, limit in zip(r["resources"], r["limits"], strict=True)
        ]
        advice = f"these conflict: {texts}" + (f"; raise {' or '.join(raised)}" if raised else "")
    msg = (
        "some choice must satisfy all constraints; the solver ended "
        f"'{document['status']}': {advice}"
    )
    raise Infeasible(msg, status=document["status"])


def _chosen(document: JsonObject) -> list[dict[str, str]]:
    pairs = zip(document["groups"], document["labels"], strict=True)
    return [{"group": group, "candidate": label} for group, label in pairs]


def _print_solution(document: JsonObject) -> None:
    chosen = _chosen(document)
    if "explanation" in document:
        for row, account in zip(chosen, document["explanation"]["groups"], strict=True):
            row["buys (loss avoided)"] = f"{account['bought']:.4g}"
            row["for"] = ", ".join(f"{paid:,}" for paid in account["paid"])
    output.print_rows(chosen)
    output.console.print(
        f"{document['status']}: objective {document['objective']:.6g}, no choice is below "
        f"{_number(document['bound'], '-inf')} (gap {_number(document['absolute_gap'], 'inf', 3)}, "
        f"{_number(document['relative_gap'], 'inf', 3, 100)} %); {document['backend']}, "
        f"{document['nodes']} nodes, {document['cpu_seconds']:.2f} CPU seconds"
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
    if document.get("top_limit"):
        output.console.print(
            f"further choices were not found within the {document['top_limit']} limit"
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


def _number(value: float | None, infinite: str, digits: int = 6, scale: float = 1.0) -> str:
    return infinite if value is None else f"{scale * value:.{digits}g}"


def _print_smallest(document: JsonObject, tolerance: float) -> None:
    output.print_rows(_chosen(document))
    output.console.print(
        f"{document['status']}: {document['resource']} {document['cost']:,} for a predicted loss "
        f"of {document['objective']:.6g}; no choice below {document['bound']:,} stays within "
        f"{tolerance:g}"
    )

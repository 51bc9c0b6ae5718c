"""``solve``: the best choice for one budget of a stored matrix, with everything about it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from bitquota.canonical import canonical_json
from bitquota.errors import InvalidBudget
from bitquota.request import check_solver
from bitquota.service.jobs.kinds.kind import MATRIX, JobKind, Result
from bitquota.service.jobs.kinds.results import CERTIFICATES, check_object
from bitquota.service.jobs.kinds.solving_request import SolvingRequest, problem_of
from bitquota.solver.archive import certificate_file
from bitquota.solver.files import matrix_digest

if TYPE_CHECKING:
    from bitquota.canonical import JsonObject
    from bitquota.service.jobs.work import Work
    from bitquota.solver.solution import Certificate

_OF_A_SOLVE = ("solver", "node_limit", "top", "explain", "cross_check")


class SolveRequest(SolvingRequest):
    """One budget and what to say about its answer."""

    tolerance: float | None = Field(
        default=None,
        description="Instead of the best loss: the smallest size with at most this loss.",
    )
    solver: str = Field(default="auto", max_length=40, description="Solver backend.")
    top: int = Field(default=1, ge=1, le=100, description="Also this many different choices.")
    explain: bool = Field(default=False, description="Price of each budget and of each group.")
    cross_check: bool = Field(default=False, description="Ask every other solver too.")
    robust: float = Field(
        default=0.0,
        ge=0,
        le=100,
        description="Standard errors that are added to every term of the matrix.",
    )


def run(work: Work) -> None:
    """Hand over the document that ``bitquota solve --json`` prints."""
    from bitquota.solver.document import smallest_document, solve_document

    problem = problem_of(work)
    options = {
        k: v for k, v in work.request.items() if k not in {"budget", "budget_index", "robust"}
    }
    tolerance, robust = options.pop("tolerance"), work.request.get("robust", 0.0)
    work.say("solve")
    if tolerance is None:

        def give(certificate: Certificate) -> None:
            digest = matrix_digest(work.paths("matrix")[0], robust)
            work.give("certificate", certificate_file(certificate, problem, digest))

        document = solve_document(problem, **options, cancelled=work.cancelled, on_certificate=give)
    else:
        for name in _OF_A_SOLVE:
            del options[name]
        document = smallest_document(problem, tolerance, **options)
    if robust:
        document["robust"] = robust
    work.give("solution", canonical_json(document).encode())


def accept(request: JsonObject) -> JsonObject:
    """Return the request.

    Raises:
        InvalidBudget: It does not name exactly one budget.
        InvalidInput: There is no such solver.
    """
    if (request["budget"] is None) == (request["budget_index"] is None):
        msg = "a solve job needs either a budget or a budget index, and not both"
        raise InvalidBudget(msg)
    check_solver(request["solver"])
    # Requests without it keep the bytes that they always had.
    return request if request["robust"] else {k: v for k, v in request.items() if k != "robust"}


KIND = JobKind(
    name="solve",
    summary="Solve a stored matrix for one budget, with bound, alternatives and explanation.",
    inputs=(MATRIX,),
    request=SolveRequest,
    example={
        "matrix": "sha256:" + "2" * 64,
        "request": {"budget": "3.5 bits", "explain": True, "node_limit": 10000},
    },
    results=(
        Result(
            name="solution",
            text="The choice, its bound, and what else was asked for.",
            check=check_object,
            path="solution",
        ),
        replace(
            CERTIFICATES,
            name="certificate",
            text="The certificate of the bound, which `bitquota verify` checks.",
            many=False,
        ),
    ),
    run=run,
    accept=accept,
)

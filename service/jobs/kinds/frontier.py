"""``frontier``: a stored matrix solved at many budgets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from bitquota.canonical import canonical_json
from bitquota.service.jobs.kinds.kind import MATRIX, JobKind, Result
from bitquota.service.jobs.kinds.results import check_rows
from bitquota.service.jobs.kinds.solving_request import SolvingRequest, problem_of

if TYPE_CHECKING:
    from bitquota.canonical import JsonObject
    from bitquota.service.jobs.work import Work
    from bitquota.solver import FrontierPoint

_WIDEST = "32 bits"
"""Beyond every candidate: which resource varies is all that the budget of a frontier says."""


class FrontierRequest(SolvingRequest):
    """How many budgets, and of which resource."""

    points: int = Field(default=16, ge=2, le=1000, description="Budgets, evenly spaced.")
    certify: bool = Field(default=True, description="Prove a bound for every point.")


def run(work: Work) -> None:
    """Hand over the rows that ``bitquota frontier --json`` prints."""
    from bitquota.solver.document import frontier_document

    problem = problem_of(work)
    context = work.context
    options = {k: v for k, v in work.request.items() if k not in {"budget", "budget_index"}}
    points, done = options["points"], 0

    def on_point(_point: FrontierPoint) -> None:
        nonlocal done
        done += 1
        context.report("frontier", done, points)

    rows = frontier_document(problem, **options, on_point=on_point, cancelled=work.cancelled)
    work.give("frontier", canonical_json(rows).encode())


def accept(request: JsonObject) -> JsonObject:
    """Return the request; without a budget, average bits vary."""
    if request["budget"] is None and request["budget_index"] is None:
        return request | {"budget": _WIDEST}
    return request


KIND = JobKind(
    name="frontier",
    summary="Solve a stored matrix at many budgets: size against predicted loss.",
    inputs=(MATRIX,),
    request=FrontierRequest,
    example={"matrix": "sha256:" + "2" * 64, "request": {"points": 16}},
    results=(
        Result(
            name="frontier",
            text="One object for each budget, in rising order.",
            check=check_rows,
            path="frontier",
        ),
    ),
    run=run,
    accept=accept,
)

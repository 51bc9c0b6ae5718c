"""``POST /v1/solve``: a measured matrix and budgets in, choices with bounds out, at once.

The body is written to a file as it comes and read by a process of its own (``solve_task``), since
it may hold a matrix of megabytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from bitquota.errors import NotFound
from bitquota.service.api.job_routes import results_of
from bitquota.service.api.schemas import Problem, ProblemAnswer, SolveAnswer, SolveOrder
from bitquota.service.api.state import Calling, Service, State  # noqa: TC001  # FastAPI reads them
from bitquota.service.api.streaming import write_body
from bitquota.service.store.formats import ArtifactKind

if TYPE_CHECKING:
    from bitquota.canonical import JsonObject

PATH = "/v1/solve"
router = APIRouter(tags=["solve"])
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem} for status in (401, 403, 404, 409, 413, 422, 503, 507)
}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": SolveOrder.model_json_schema()}},
    }
}


@router.post(
    PATH, response_model=SolveAnswer | ProblemAnswer, responses=_PROBLEMS, openapi_extra=_BODY
)
async def solve_now(request: Request, service: Service, caller: Calling) -> Response:
    """Solve a stored or inline matrix for each budget, or one problem; nothing is measured.

    Each budget gets `time_limit_s`; the answer says how far from the best it can be at most.
    """
    settings = service.settings
    incoming = await run_in_threadpool(service.blobs.incoming, settings.max_solve_bytes)
    try:
        service.blobs.check_room(0, settings.min_free_bytes)
        await write_body(request, incoming)
        await run_in_threadpool(incoming.close)
        _, answer = await service.solvers.run(
            caller.tenant,
            "solve",
            {
                "body": str(incoming.path),
                "max_bytes": settings.max_solve_bytes,
                "max_ratio": settings.max_unpacked_ratio,
                "max_unpacked_bytes": settings.max_calibration_bytes,
            },
            what="a matrix and its budgets",
            resolve=lambda need: _files(service, caller.tenant, need),
        )
    finally:
        await run_in_threadpool(incoming.discard)
    return Response(answer, media_type="application/json")


def _files(service: State, tenant: str, need: JsonObject) -> JsonObject:
    """Return where the files of a job or of an uploaded matrix lie."""
    if "matrix" in need:
        stored = service.artifacts.get(tenant, ArtifactKind.MATRIX, need["matrix"])
        return {"matrix": str(service.blobs.path(stored.digest)), "inventory": None}
    results = results_of(service, tenant, need["job"])
    if "matrix" not in results:
        msg = "the job must have produced a matrix; it produced none"
        raise NotFound(msg, job=need["job"])
    inventory = results.get("inventory")
    return {
        "matrix": str(service.blobs.path(results["matrix"])),
        "inventory": None if inventory is None else str(service.blobs.path(inventory)),
    }

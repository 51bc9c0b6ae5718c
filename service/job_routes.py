"""Endpoints for jobs: order, look, cancel, and fetch what came out."""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING, Annotated, Any

import anyio
from fastapi import APIRouter, Header, Path, Query, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from bitquota.budget import Budget
from bitquota.candidates import Inventory, Layer, LayerKind
from bitquota.canonical import digest_json
from bitquota.errors import Conflict, InvalidInput, NotFound
from bitquota.request import PlanRequest
from bitquota.service.jobs import Job, JobStatus, NewJob
from bitquota.service.schemas import JobOrder, JobPage, JobView, PlanList, Problem, job_view
from bitquota.service.state import Calling, RequestId, Service, State  # noqa: TC001  # FastAPI reads them

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from bitquota.service.keys import Caller

POLL_S = 1
"""Seconds that a client is asked to wait between two looks at a job."""

LONGEST_WAIT_S = 60
"""Longest ``Prefer: wait`` that is honoured."""

_LOOK_S = 0.2
_KEEP_ALIVE_S = 15.0

router = APIRouter(prefix="/v1", tags=["jobs"])

Prefer = Annotated[
    str | None, Header(description="`wait=N`: answer when the job has ended, or after N seconds.")
]
JobId = Annotated[str, Path(pattern=r"^job_[0-9a-f]{32}$", description="Id of a job.")]
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem} for status in (401, 403, 404, 409, 422, 429)
}


@router.post("/jobs", status_code=202, responses=_PROBLEMS)
async def create_job(
    order: JobOrder,
    response: Response,
    service: Service,
    caller: Calling,
    request_id: RequestId,
    prefer: Prefer = None,
    idempotency_key: Annotated[
        str | None, Header(min_length=1, max_length=255, description="Makes a repeat harmless.")
    ] = None,
) -> JobView:
    """Order a job; it is looked at every second under `Location` until it has ended."""
    job, replayed = await anyio.to_thread.run_sync(
        _create, order, service, caller, request_id, idempotency_key, limiter=service.writers
    )
    job = await _wait(service, job, prefer, response)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    response.headers["Retry-After"] = str(POLL_S)
    if replayed:
        response.headers["Idempotency-Replayed"] = "true"
    return job_view(job)


def _create(
    order: JobOrder, service: State, caller: Caller, request_id: str, key: str | None
) -> tuple[Job, bool]:
    request = PlanRequest.from_json(order.request)
    if order.kind == "plan":
        check_budgets(request)
    deadline = None if order.deadline_s is None else time.time() + order.deadline_s
    new = NewJob(
        tenant=caller.tenant,
        kind=order.kind,
        request=request.to_json(),
        model=order.model,
        dataset=order.dataset,
        labels=order.labels,
        priority=order.priority,
        deadline=deadline,
        webhook=order.webhook,
    )
    known = None if key is None else service.jobs.replay(new, key)
    if known is not None:
        return known, True
    if order.webhook is not None:
        service.webhooks.check(caller.tenant, order.webhook)
    service.quotas.check_order(caller.tenant)
    made = service.jobs.create(new, key)
    service.audit.add(caller, "job.create", made[0].id, request_id)
    service.supervisor.wake()
    return made


async def _wait(service: State, job: Job, prefer: str | None, response: Response) -> Job:
    """Return the job when it has ended, or after the seconds that the client prefers."""
    found = re.search(r"(?:^|[,;\s])wait=(\d{1,6})", prefer or "")
    if found is None:
        return job
    wait_s = min(int(found[1]), LONGEST_WAIT_S)
    response.headers["Preference-Applied"] = f"wait={wait_s}"
    until = time.monotonic() + wait_s
    while not job.status.final and time.monotonic() < until:
        await anyio.sleep(_LOOK_S)
        job = await run_in_threadpool(service.jobs.get, job.tenant, job.id)
    return job


@router.get("/jobs", responses=_PROBLEMS)
def list_jobs(
    service: Service,
    caller: Calling,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    cursor: Annotated[str | None, Query(max_length=64)] = None,
    status: Annotated[JobStatus | None, Query()] = None,
) -> JobPage:
    """List jobs, newest first."""
    found = service.jobs.page(caller.tenant, limit=limit + 1, before=cursor, status=status)
    more = len(found) > limit
    return JobPage(
        data=[job_view(job) for job in found[:limit]],
        has_more=more,
        next_cursor=found[limit - 1].id if more else None,
    )


@router.get(
    "/jobs/{job_id}/events",
    responses=_PROBLEMS
    | {200: {"content": {"text/event-stream": {}}, "description": "Server-sent events."}},
    response_class=StreamingResponse,
)
async def stream_events(
    job_id: JobId,
    service: Service,
    caller: Calling,
    last_event_id: Annotated[int, Header(ge=0, description="Resume after this event.")] = 0,
) -> StreamingResponse:
    """Stream what happens to a job from its beginning, or after `Last-Event-ID`, to its end."""
    await run_in_threadpool(service.jobs.get, caller.tenant, job_id)

    async def stream() -> AsyncIterator[str]:
        last, spoken = last_event_id, time.monotonic()
        while True:
            found = await run_in_threadpool(service.jobs.events, job_id, last)
            for number, kind, data in found:
                yield f"id: {number}\nevent: {kind}\ndata: {data}\n\n"
                last, spoken = number, time.monotonic()
                if kind == "status" and JobStatus(json.loads(data)["status"]).final:
                    return
            if not found:
                if service.supervisor.stopping:
                    return  # the client comes back to the next server with its Last-Event-ID
                if (await run_in_threadpool(service.jobs.get, caller.tenant, job_id)).status.final:
                    return  # every event was seen before this stream began
                if time.monotonic() - spoken > _KEEP_ALIVE_S:
                    yield ": still here\n\n"
                    spoken = time.monotonic()
                await anyio.sleep(_LOOK_S)

    return StreamingResponse(stream(), media_type="text/event-stream")


@router.get(
    "/jobs/{job_id}",
    responses=_PROBLEMS | {304: {"description": "As in the client's copy."}},
    response_model=JobView,
)
def get_job(
    job_id: JobId,
    service: Service,
    caller: Calling,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """Say how a job stands; with `If-None-Match`, 304 while nothing has changed."""
    job = service.jobs.get(caller.tenant, job_id)
    headers = {"ETag": f'"{job.id}-{job.version}"', "Cache-Control": "private, no-cache"}
    if not job.status.final:
        headers["Retry-After"] = str(POLL_S)
    if _matches(if_none_match, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return Response(job_view(job).model_dump_json(), headers=headers, media_type="application/json")


@router.post("/jobs/{job_id}/cancel", status_code=202, responses=_PROBLEMS)
def cancel_job(
    job_id: JobId, service: Service, caller: Calling, request_id: RequestId, response: Response
) -> JobView:
    """Ask for the end of a job; what was measured is kept."""
    job = service.jobs.cancel(caller.tenant, job_id)
    service.audit.add(caller, "job.cancel", job_id, request_id)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    if not job.status.final:
        response.headers["Retry-After"] = str(POLL_S)
    return job_view(job)


@router.get("/jobs/{job_id}/plan", responses=_PROBLEMS, response_model=PlanList | dict[str, object])
def get_plan(
    job_id: JobId,
    service: Service,
    caller: Calling,
    budget: Annotated[
        int | None, Query(ge=0, description="Position of the budget; all plans without it.")
    ] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """Return the plans of a job, or the plan of one budget in its canonical bytes."""
    digests = results_of(service, caller.tenant, job_id)["plans"]
    if budget is not None and budget >= len(digests):
        msg = f"the job must have a plan at position {budget}; it has {len(digests)}, from 0"
        raise NotFound(msg, plans=len(digests))
    headers = {"Cache-Control": "private, no-cache"}
    chosen = digests if budget is None else [digests[budget]]
    headers["ETag"] = f'"{digest_json([budget is None, *chosen])}"'
    if _matches(if_none_match, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    texts = [service.blobs.read(digest) for digest in chosen]
    body = texts[0]
    if budget is None:
        body = b'{"object":"list","data":[' + b",".join(t.rstrip() for t in texts) + b"]}"
    return Response(body, headers=headers, media_type="application/json")


@router.get(
    "/jobs/{job_id}/sensitivity",
    responses=_PROBLEMS
    | {200: {"content": {"application/octet-stream": {}}, "description": "An .npz archive."}},
    response_class=Response,
)
def get_sensitivity(job_id: JobId, service: Service, caller: Calling) -> Response:
    """Return the sensitivity matrix as the `.npz` that `bitquota solve` reads."""
    data = service.blobs.read(results_of(service, caller.tenant, job_id)["matrix"])
    named = {"Content-Disposition": f'attachment; filename="{job_id}.npz"'}
    return Response(data, headers=named, media_type="application/octet-stream")


@router.get(
    "/jobs/{job_id}/report",
    responses=_PROBLEMS | {200: {"content": {"text/markdown": {}}, "description": "Markdown."}},
    response_class=Response,
)
def get_report(job_id: JobId, service: Service, caller: Calling) -> Response:
    """Return the report of all plans as Markdown."""
    digest = results_of(service, caller.tenant, job_id).get("report")
    if digest is None:
        msg = "a report must be of plans; this job made none"
        raise NotFound(msg, job=job_id)
    return Response(service.blobs.read(digest), media_type="text/markdown; charset=utf-8")


def results_of(service: State, tenant: str, job_id: str) -> dict[str, Any]:
    """Return what a job left; raises ``NotFound``, or ``Conflict`` if it has left nothing."""
    job: Job = service.jobs.get(tenant, job_id)
    if job.results is None:
        said = "has not ended yet: wait for it" if not job.status.final else f"has {job.status}"
        msg = f"a job must have succeeded to have results; this one {said}"
        raise Conflict(msg, job=job_id, status=job.status.value)
    return job.results


def _matches(sent: str | None, tag: str) -> bool:
    if sent is None:
        return False
    return "*" in sent or tag in {part.strip().removeprefix("W/") for part in sent.split(",")}


_ANY_MODEL = Inventory(
    model_digest="",
    layers=(
        Layer(
            name="any", kind=LayerKind.LINEAR, weight_name="any.weight", weight_shape=(1, 1),
            rows=1, columns=1, n_weights=1,
        ),
    ),
)  # fmt: skip


def check_budgets(request: PlanRequest) -> None:
    """Read every budget, as far as that goes without the model.

    Raises:
        InvalidBudget: One cannot be read.
        InvalidInput: There is none.
    """
    if not request.budgets:
        msg = "at least one budget must be given, such as '3 bits' or '12 MiB'; got none"
        raise InvalidInput(msg)
    for text in request.budgets:
        for part in text.split("+"):
            Budget.parse(part, _ANY_MODEL)

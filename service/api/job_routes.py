"""Endpoints for jobs: submit, look, cancel, and fetch what came out."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import anyio
from fastapi import APIRouter, Header, Path, Query, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import FileResponse, StreamingResponse

from bitquota.canonical import digest_json
from bitquota.errors import Conflict, InvalidInput, NotFound
from bitquota.service.api.schemas import JobPage, JobView, PlanList, Problem, job_view
from bitquota.service.api.state import Calling, RequestId, Service, State  # noqa: TC001  # FastAPI reads them
from bitquota.service.api.submissions import MOST_PLANS, JobSubmission, new_job
from bitquota.service.jobs.job import Job, JobStatus
from bitquota.service.jobs.kinds import KINDS, Result

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from bitquota.service.security.keys import Caller

MOST_EVENTS = 2**31 - 1
"""Numbers of events are 32-bit integers in the database."""

POLL_S = 1
"""Seconds that a client is asked to wait between two looks at a job."""

LONGEST_WAIT_S = 60
"""Longest ``Prefer: wait`` that is honoured."""

_LOOK_S = 0.2
_LOOK_GROWS = 1.2
_LONGEST_LOOK_S = 1.0
_KEEP_ALIVE_S = 15.0

router = APIRouter(prefix="/v1", tags=["jobs"])

Prefer = Annotated[
    str | None, Header(description="`wait=N`: answer when the job has ended, or after N seconds.")
]
JOB_ID = r"^job_[0-9a-f]{32}$"
JobId = Annotated[str, Path(pattern=JOB_ID, description="Id of a job.")]
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem} for status in (401, 403, 404, 409, 422, 429)
}


@router.post("/jobs", status_code=202, responses=_PROBLEMS)
async def create_job(
    order: JobSubmission,
    response: Response,
    service: Service,
    caller: Calling,
    request_id: RequestId,
    prefer: Prefer = None,
    idempotency_key: Annotated[
        str | None, Header(min_length=1, max_length=255, description="Makes a repeat harmless.")
    ] = None,
) -> JobView:
    """Submit a job; it is looked at every second under `Location` until it has ended."""
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
    order: JobSubmission, service: State, caller: Caller, request_id: str, key: str | None
) -> tuple[Job, bool]:
    new = new_job(order, caller.tenant)
    known = None if key is None else service.jobs.replay(new, key)
    if known is not None:
        return known, True
    caller.check_priority(order.priority)
    if order.webhook is not None:
        service.webhooks.check(caller.tenant, order.webhook)
    service.quotas.check_order(caller.tenant)
    made = service.jobs.create(
        replace(new, trace=service.tracing.carrier()),
        key,
        also=lambda connection, job_id: service.audit.write(
            connection, caller, "job.create", job_id, request_id
        ),
    )
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
    cursor: Annotated[str | None, Query(pattern=JOB_ID)] = None,
    status: Annotated[JobStatus | None, Query()] = None,
    kind: Annotated[str | None, Query(max_length=16)] = None,
    label: Annotated[
        list[Annotated[str, Query(max_length=512)]] | None,
        Query(max_length=32, description="`name=value` that a job must have. Repeatable."),
    ] = None,
) -> JobPage:
    """List jobs, newest first."""
    found = service.jobs.page(
        caller.tenant,
        limit=limit + 1,
        before=cursor,
        status=status,
        kind=kind,
        labels=labels_of(label or []),
    )
    more = len(found) > limit
    return JobPage(
        data=[job_view(job) for job in found[:limit]],
        has_more=more,
        next_cursor=found[limit - 1].id if more else None,
    )


def _ended(service: State, tenant: str, job_id: str) -> bool:
    return service.jobs.get(tenant, job_id).status.final


def labels_of(texts: list[str]) -> dict[str, str]:
    """Return the labels that texts of the form ``name=value`` name."""
    found = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name:
            msg = f"a label must have the form name=value, such as team=vision; got '{text}'"
            raise InvalidInput(msg, label=text)
        found[name] = value
    return found


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
    last_event_id: Annotated[
        int, Header(ge=0, le=MOST_EVENTS, description="Resume after this event.")
    ] = 0,
) -> StreamingResponse:
    """Stream what happens to a job from its beginning, or after `Last-Event-ID`, to its end."""
    await run_in_threadpool(service.jobs.get, caller.tenant, job_id)
    service.event_streams.check(caller)

    async def counted() -> AsyncIterator[str]:
        with service.event_streams.one_more(caller):
            async for text in stream():
                yield text

    async def stream() -> AsyncIterator[str]:
        last, spoken = last_event_id, time.monotonic()
        look_s, looked = _LOOK_S, False
        while True:
            found = await run_in_threadpool(service.jobs.events, job_id, last)
            for number, kind, data in found:
                yield f"id: {number}\nevent: {kind}\ndata: {data}\n\n"
                last, spoken, look_s = number, time.monotonic(), _LOOK_S
                if kind == "status" and JobStatus(json.loads(data)["status"]).final:
                    return
            if not found:
                if service.supervisor.stopping:
                    return  # the client comes back to the next server with its Last-Event-ID
                silent = time.monotonic() - spoken > _KEEP_ALIVE_S
                # The last event ends a stream; it is not seen by one that began after it.
                if not looked or silent:
                    if await run_in_threadpool(_ended, service, caller.tenant, job_id):
                        return
                    looked = True
                if silent:
                    yield ": still here\n\n"
                    spoken = time.monotonic()
                await anyio.sleep(look_s)
                look_s = min(_LOOK_GROWS * look_s, _LONGEST_LOOK_S)

    return StreamingResponse(counted(), media_type="text/event-stream")


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
    if matches(if_none_match, headers["ETag"]):
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
        int | None,
        Query(ge=0, lt=MOST_PLANS, description="Position of the budget; all plans without it."),
    ] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """Return the plans of a job, or the plan of one budget in its canonical bytes."""
    digests = results_of(service, caller.tenant, job_id).get("plans", [])
    if not digests:
        msg = "a job must produce plans to have any; this one produced none"
        raise NotFound(msg, job=job_id)
    if budget is not None and budget >= len(digests):
        msg = f"the job must have a plan at position {budget}; it has {len(digests)}, from 0"
        raise NotFound(msg, plans=len(digests))
    headers = {"Cache-Control": "private, no-cache"}
    chosen = digests if budget is None else [digests[budget]]
    headers["ETag"] = f'"{digest_json([budget is None, *chosen])}"'
    if matches(if_none_match, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    texts = [service.blobs.read(digest) for digest in chosen]
    body = texts[0]
    if budget is None:
        body = b'{"object":"list","data":[' + b",".join(t.rstrip() for t in texts) + b"]}"
    return Response(body, headers=headers, media_type="application/json")


def _results_by_path() -> dict[str, list[tuple[str, Result]]]:
    """Return kind and result behind every path below a job, but that of plans."""
    found: dict[str, list[tuple[str, Result]]] = {}
    for kind in KINDS.values():
        for result in kind.results:
            if result.path not in {None, "plan"}:
                found.setdefault(result.path, []).append((kind.name, result))
    return found


def _add_result(path: str, sources: list[tuple[str, Result]]) -> None:
    """Add the endpoint of one result; it may have another form for each kind of job."""
    many = any(result.many for _, result in sources)
    media: dict[str, Any] = {result.media_type.partition(";")[0]: {} for _, result in sources}
    text = " ".join(dict.fromkeys(result.text for _, result in sources))
    kinds = ", ".join(f"`{name}`" for name, _ in sources)

    @router.get(
        f"/jobs/{{job_id}}/{path}",
        name=f"get_{path}",
        responses=_PROBLEMS
        | {
            200: {"content": media, "description": text},
            304: {"description": "As in the client's copy."},
        },
        response_class=Response,
        description=f"{text} Jobs of kind {kinds} leave it.",
    )
    def get_result(
        job_id: JobId,
        service: Service,
        caller: Calling,
        if_none_match: Annotated[str | None, Header()] = None,
        # A default, because annotations are read where ``many`` is not known.
        budget: int = Query(  # noqa: FAST002
            default=0, ge=0, include_in_schema=many, description="Position of the budget."
        ),
    ) -> Response:
        job = service.jobs.get(caller.tenant, job_id)
        known = dict(sources)
        if job.kind not in known:
            msg = f"a job must be of kind {' or '.join(known)} to have this; it is a {job.kind} job"
            raise NotFound(msg, job=job_id, kind=job.kind)
        result = known[job.kind]
        found = results_in(job).get(result.name)
        digests = found if result.many else [found]
        digest = digests[budget] if digests and budget < len(digests) else None
        if digest is None:
            place = f" at position {budget}" if result.many and digests else ""
            msg = f"the job must have left its {result.name}{place}; it left none"
            raise NotFound(msg, job=job_id)
        named = f"{job_id}-{result.path}{result.suffix}" if result.suffix else None
        return stored_file(service, digest, result.media_type, named, if_none_match)


for _path, _sources in _results_by_path().items():
    _add_result(_path, _sources)


def results_of(service: State, tenant: str, job_id: str) -> dict[str, Any]:
    """Return what a job left; raises ``NotFound``, or ``Conflict`` if it has left nothing."""
    return results_in(service.jobs.get(tenant, job_id))


def results_in(job: Job) -> dict[str, Any]:
    """Return what a job left; raises ``Conflict`` if it has left nothing."""
    if job.results is None:
        said = "has not ended yet: wait for it" if not job.status.final else f"has {job.status}"
        msg = f"a job must have succeeded to have results; this one {said}"
        raise Conflict(msg, job=job.id, status=job.status.value)
    return job.results


def stored_file(
    service: State, digest: str, media_type: str, named: str | None, if_none_match: str | None
) -> Response:
    """Return a stored file as it is, streamed; its digest is its tag."""
    headers = {"Cache-Control": "private, no-cache", "ETag": f'"{digest}"'}
    if matches(if_none_match, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    if named is not None:
        headers["Content-Disposition"] = f'attachment; filename="{named}"'
    return FileResponse(service.blobs.path(digest), headers=headers, media_type=media_type)


def matches(sent: str | None, tag: str) -> bool:
    """Return whether an ``If-None-Match`` names ``tag``."""
    if sent is None:
        return False
    return "*" in sent or tag in {part.strip().removeprefix("W/") for part in sent.split(",")}

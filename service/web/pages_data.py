"""What the pages fetch: charts, maps, and what changes while somebody watches."""

from __future__ import annotations

import contextlib
import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import anyio
import sqlalchemy as sa
from fastapi import APIRouter, Query, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, StreamingResponse

from bitquota.errors import BitquotaError, Conflict, NotFound
from bitquota.estimate import JobEstimate
from bitquota.report.charts import LARGEST
from bitquota.report.estimate import estimate_rows, estimate_sentences, stage_rows
from bitquota.service.api.job_routes import MOST_EVENTS
from bitquota.service.api.schemas import progress_said
from bitquota.service.api.state import Calling, Service, State  # noqa: TC001  # FastAPI reads them
from bitquota.service.jobs.job import JobStatus
from bitquota.service.jobs.kinds import KINDS
from bitquota.service.store.database import events
from bitquota.service.store.formats import ArtifactKind

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from sqlalchemy.engine import Connection

    from bitquota.canonical import JsonObject
    from bitquota.service.jobs.job import Job

router = APIRouter(include_in_schema=False)
_LOOK_S = 0.25
_KEEP_ALIVE_S = 15.0
_WATCHED = 50
_OLDER = 100
_KEPT_EVENTS = 200
_MOST_EVENTS = 100_000


# -------------------------------------------------------------------------------- jobs


def job_rows(service: State, tenant: str, jobs: Sequence[Job]) -> list[JsonObject]:
    """Return what the list of jobs shows of each, in their order."""
    wanted = {digest for job in jobs for digest in (job.model, job.dataset) if digest is not None}
    names = service.artifacts.names(tenant, wanted)
    return [
        {
            "id": job.id,
            "kind": job.kind,
            "status": job.status.value,
            "model": names.get(("model", job.model or ""), _short(job.model)),
            "dataset": names.get(("dataset", job.dataset or ""), _short(job.dataset)),
            "budgets": [str(b) for b in _budgets(job)],
            "labels": job.labels,
            "created_at": job.created_at,
            "started_at": job.started_at,
            "finished_at": job.finished_at,
            "progress": None if job.progress is None else progress_said(job.progress),
            "cancel_requested": job.cancel_requested,
            "version": job.version,
            "charts": has_charts(job),
        }
        for job in jobs
    ]


def _budgets(job: Job) -> list[object]:
    found = job.asked.get("budgets", ())
    return list(found) if isinstance(found, list | tuple) else []


def ordered(job: Job) -> list[tuple[str, str]]:
    """Return what a plan, or a job around one, was asked for beside its budgets, in words."""
    words = {
        "target": "Target",
        "weight_bits": "Bit-widths",
        "samples": "Samples",
        "holdout_samples": "Compared on",
        "loss": "Loss",
        "outputs": "Outputs",
        "effort": "Effort",
        "rounding": "Rounding",
        "corrections": "Corrections",
        "allow": "Also allowed",
    }
    asked = job.asked
    given = {label: asked.get(name) for name, label in words.items()}
    return [
        (label, ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))
        for label, value in given.items()
        if value
    ]


def _short(digest: str | None) -> str:
    return "" if digest is None else digest.removeprefix("sha256:")[:12]


def log_of(service: State, job_id: str) -> list[JsonObject]:
    """Return what happened to a job, oldest first; of each run of progress only its ends."""
    query = (
        sa.select(events.c.seq, events.c.type, events.c.data, events.c.at)
        .where(events.c.job == job_id)
        .order_by(events.c.seq)
        .limit(_MOST_EVENTS)
    )

    def read(connection: Connection) -> list[JsonObject]:
        kept: list[JsonObject] = []
        for row in connection.execute(query):
            entry = {
                "number": row.seq, "type": row.type, "data": json.loads(row.data), "at": row.at,
            }  # fmt: skip
            if len(kept) > 1 and _same_stage(kept[-1], entry) and _same_stage(kept[-2], entry):
                kept[-1] = entry
            else:
                kept.append(entry)
        return kept[-_KEPT_EVENTS:]

    return service.database.read(read)


def _same_stage(first: JsonObject, second: JsonObject) -> bool:
    if not first["type"] == second["type"] == "progress":
        return False
    return bool(first["data"].get("stage") == second["data"].get("stage"))


def result_links(job: Job) -> list[JsonObject]:
    """Return address and description of every result that can be fetched by itself."""
    kind = KINDS.get(job.kind)
    if kind is None or job.results is None:
        return []
    return [
        {
            "href": f"/v1/jobs/{job.id}/{result.path}",
            "text": result.text.replace("`", ""),
            "name": result.name,
        }
        for result in kind.results
        if result.path is not None and not result.many and job.results.get(result.name)
    ]


def has_charts(job: Job) -> bool:
    """Return whether the job left something that the model page can draw."""
    results = job.results or {}
    return any(results.get(name) for name in ("matrix", "plans", "comparison", "frontier"))


def require_charts(job: Job) -> None:
    """Raise ``Conflict`` or ``NotFound`` unless the model page has something to draw."""
    if job.results is None:
        said = "has not ended yet" if not job.status.final else f"has {job.status}"
        msg = f"a job must have succeeded before its model can be shown; this one {said}"
        raise Conflict(msg, job=job.id)
    if not has_charts(job):
        msg = (
            f"there must be something to draw; this {job.kind} job left no measurement and no plan"
        )
        raise NotFound(msg, job=job.id)


# -------------------------------------------------------------------------------- estimates


def estimate_of(service: State, job: Job) -> JsonObject | None:
    """Return an estimate in words, if the job left one."""
    digest = (job.results or {}).get("estimate")
    if not digest:
        return None
    found = JobEstimate.from_json(json.loads(service.blobs.read(digest)))
    return {
        "rows": estimate_rows(found),
        "stages": stage_rows(found),
        "sentences": estimate_sentences(found),
    }


@router.get("/jobs/{job_id}/estimate.json")
def estimate(job_id: str, service: Service, caller: Calling) -> Response:
    """Return what the form for a new job shows of an estimate."""
    found = estimate_of(service, service.jobs.get(caller.tenant, job_id))
    if found is None:
        msg = "the job must be an estimate that succeeded; this one left none"
        raise NotFound(msg, job=job_id)
    return Response(json.dumps(found), media_type="application/json")


# -------------------------------------------------------------------------------- charts


def chart_order(service: State, job: Job) -> JsonObject:
    """Return where the files of a job lie, for a task of ``chart_tasks``.

    Raises:
        Conflict, NotFound: As ``require_charts``.
    """
    require_charts(job)
    results = job.results or {}

    def path(name: str) -> str | None:
        return str(service.blobs.path(results[name])) if results.get(name) else None

    return {
        "job": job.id,
        "title": title_of(service, job),
        "plans": [str(service.blobs.path(digest)) for digest in results.get("plans", ())],
        **{name: path(name) for name in ("matrix", "comparison", "frontier")},
    }


async def draw(
    service: State, tenant: str, job_id: str, task: str, **more: str | None
) -> tuple[JsonObject, bytes]:
    """Return what a task of ``chart_tasks`` makes of a job's files."""
    order = await run_in_threadpool(lambda: chart_order(service, service.jobs.get(tenant, job_id)))
    pool = service.solvers if task == "report" else service.readers  # a report solves
    # Files are named by their content; a report is large, and made for one download.
    kept = task != "report"
    return await pool.run(tenant, task, order | more, what="what the job left", lasting=kept)


def model_file(service: State, tenant: str, job_id: str) -> dict[str, str | None]:
    """Return the format of a job's model, and where it lies if it is a folder.

    Nothing of either where the upload is not kept any more.
    """
    with contextlib.suppress(NotFound):
        digest = service.jobs.get(tenant, job_id).model or ""
        model = service.artifacts.get(tenant, ArtifactKind.MODEL, digest)
        is_folder = model.format == "huggingface-zip"
        folder = str(service.blobs.path(model.digest)) if is_folder else None
        return {"model_format": model.format, "folder": folder}
    return {"model_format": "", "folder": None}


async def runs(service: State, tenant: str, job_ids: Sequence[str]) -> list[JsonObject]:
    """Return what the comparison page shows of each job, in the order asked for.

    Raises:
        Conflict, NotFound: As ``require_charts``, for each of them.
    """
    found = []
    for job_id in job_ids:
        job = await run_in_threadpool(service.jobs.get, tenant, job_id)
        (row,) = await run_in_threadpool(job_rows, service, tenant, [job])
        left, _ = await draw(service, tenant, job_id, "runs")
        asked = dict(ordered(job))
        about = {name.lower(): asked.get(name, "") for name in ("Target", "Effort", "Rounding")}
        kept = ("id", "labels", "model", "dataset", "created_at")
        found.append({name: row[name] for name in kept} | about | left)
    return found


@router.get("/jobs/{job_id}/charts.json")
async def charts(job_id: str, service: Service, caller: Calling) -> Response:
    """Return what the model page draws, without the cross-layer maps."""
    _, found = await draw(service, caller.tenant, job_id, "charts")
    return Response(found, media_type="application/json")


@router.get("/jobs/{job_id}/cross.json")
async def cross(
    job_id: str,
    service: Service,
    caller: Calling,
    at: Annotated[str, Query(max_length=100)] = LARGEST,
) -> Response:
    """Return one map of cross-layer terms."""
    _, found = await draw(service, caller.tenant, job_id, "cross", at=at)
    return Response(found, media_type="application/json")


@router.get("/jobs/{job_id}/graph.json")
async def graph(job_id: str, service: Service, caller: Calling) -> Response:
    """Return the layers in the order in which they run, and which reads which."""
    job = await run_in_threadpool(service.jobs.get, caller.tenant, job_id)
    inventory = (job.results or {}).get("inventory")
    if not isinstance(inventory, str):
        msg = "a graph needs the layers of a job that has measured them; this one left none"
        raise NotFound(msg, job=job_id)

    def order() -> JsonObject:
        known = {"inventory": str(service.blobs.path(inventory)), "model": None, "format": None}
        with contextlib.suppress(NotFound):  # the upload may have been deleted
            model = service.artifacts.get(caller.tenant, ArtifactKind.MODEL, job.model or "")
            known |= {"model": str(service.blobs.path(model.digest)), "format": model.format}
        return known

    _, found = await service.readers.run(
        caller.tenant, "graph", await run_in_threadpool(order), what="a model", lasting=True
    )
    return Response(found, media_type="application/json")


@router.get("/jobs/{job_id}/report.html")
async def report_file(job_id: str, service: Service, caller: Calling) -> Response:
    """Return the model page as one file that needs no network."""
    _, found = await draw(service, caller.tenant, job_id, "report")
    named = {"Content-Disposition": f'attachment; filename="{job_id}.html"'}
    return Response(found, headers=named, media_type="text/html; charset=utf-8")


def title_of(service: State, job: Job) -> str:
    """Return what a person calls the model of a job."""
    if job.model is None:
        return f"{job.kind} {job.id}"
    try:
        name = service.artifacts.get(job.tenant, ArtifactKind.MODEL, job.model).name
    except NotFound:
        name = ""
    return name or _short(job.model)


# -------------------------------------------------------------------------------- live


@router.get("/jobs/{job_id}/live")
async def live_job(
    job_id: str,
    service: Service,
    caller: Calling,
    after: Annotated[int, Query(ge=0, le=MOST_EVENTS)] = 0,
) -> StreamingResponse:
    """Stream what happens to a job after event ``after``: each change of its row, each event."""
    tenant = caller.tenant
    await run_in_threadpool(service.jobs.get, tenant, job_id)

    async def stream() -> AsyncIterator[str]:
        last, version, spoken = after, -1, time.monotonic()
        while not service.supervisor.stopping:
            # The row first: events that come between the two reads are then sent twice at most
            # as a row, and never missed.
            job = await run_in_threadpool(service.jobs.get, tenant, job_id)
            found = await run_in_threadpool(service.jobs.events, job_id, last)
            for number, kind, data in found:
                yield _event("entry", {"number": number, "type": kind, "data": json.loads(data)})
                last = number
            if job.version != version:
                version = job.version
                rows = await run_in_threadpool(job_rows, service, tenant, [job])
                yield _event("row", rows[0] | {"measured": job.measured, "error": job.error})
                spoken = time.monotonic()
            if job.status.final and not found:
                return
            if time.monotonic() - spoken > _KEEP_ALIVE_S:
                yield ": still here\n\n"
                spoken = time.monotonic()
            await anyio.sleep(_LOOK_S)

    return StreamingResponse(stream(), media_type="text/event-stream")


@router.get("/live/jobs")
async def live_jobs(service: Service, caller: Calling) -> StreamingResponse:
    """Stream the rows of the tenant's newest jobs as they change."""
    tenant = caller.tenant

    async def stream() -> AsyncIterator[str]:
        known: dict[str, int] = {}
        spoken = 0.0
        while not service.supervisor.stopping:
            jobs = await run_in_threadpool(_newest, service, tenant)
            changed = [job for job in jobs if known.get(job.id) != job.version]
            if changed:
                known = {job.id: job.version for job in jobs}
                rows = await run_in_threadpool(job_rows, service, tenant, changed)
                for row in reversed(rows):
                    yield _event("row", row)
                spoken = time.monotonic()
            elif time.monotonic() - spoken > _KEEP_ALIVE_S:
                yield ": still here\n\n"
                spoken = time.monotonic()
            busy = any(job.status is JobStatus.RUNNING for job in jobs)
            await anyio.sleep(_LOOK_S if busy else 4 * _LOOK_S)

    return StreamingResponse(stream(), media_type="text/event-stream")


@router.get("/older/jobs")
def older_jobs(
    service: Service, caller: Calling, before: Annotated[str, Query(max_length=100)]
) -> Response:
    """Return the rows of up to ``_OLDER`` jobs before one, newest first."""
    found = service.jobs.page(caller.tenant, limit=_OLDER + 1, before=before)
    rows = job_rows(service, caller.tenant, found[:_OLDER])
    return JSONResponse({"data": rows, "has_more": len(found) > _OLDER})


def _newest(service: State, tenant: str) -> Sequence[Job]:
    try:
        return service.jobs.page(tenant, limit=_WATCHED)
    except BitquotaError:
        return []  # the database is away for a moment: nothing has changed as far as we know


def _event(kind: str, data: Any) -> str:  # noqa: ANN401  # JSON
    return f"event: {kind}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"

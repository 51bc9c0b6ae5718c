"""``GET /v1/jobs/plans``: the plans of all jobs, one row for each, without their layers.

The rows are read from the plans themselves, in a task of its own for each job; files are named by
their content, so the answers are kept. No column of the database repeats what a plan holds.

Design: docs/design/web-pages.md
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query
from starlette.concurrency import run_in_threadpool

from bitquota.service.api.job_routes import JOB_ID, labels_of
from bitquota.service.api.schemas import PlanPage, PlanRow, Problem
from bitquota.service.api.state import Calling, Service, State  # noqa: TC001  # FastAPI reads them
from bitquota.service.jobs.job import JobStatus
from bitquota.service.store.formats import ArtifactKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bitquota.service.jobs.job import Job

router = APIRouter(prefix="/v1", tags=["jobs"])
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": Problem} for status in (401, 403, 422, 503)
}


# Before the path of one job, whose id this would be.
@router.get("/jobs/plans", responses=_PROBLEMS)
async def list_plans(
    service: Service,
    caller: Calling,
    limit: Annotated[int, Query(ge=1, le=200, description="Jobs whose plans are listed.")] = 50,
    cursor: Annotated[str | None, Query(pattern=JOB_ID)] = None,
    kind: Annotated[str | None, Query(max_length=16)] = None,
    model: Annotated[str | None, Query(max_length=80, description="Digest of an upload.")] = None,
    label: Annotated[
        list[Annotated[str, Query(max_length=512)]] | None,
        Query(max_length=32, description="`name=value` that a job must have. Repeatable."),
    ] = None,
) -> PlanPage:
    """List the plans of all jobs that have some: sizes, losses and how they were made."""

    def page() -> tuple[Sequence[Job], dict[tuple[str, str], str]]:
        found = service.jobs.page(
            caller.tenant, limit=limit + 1, before=cursor, status=JobStatus.SUCCEEDED, kind=kind,
            labels=labels_of(label or []), model=model, result="plans",
        )  # fmt: skip
        digests = {job.model for job in found if job.model is not None}
        return found, service.artifacts.names(caller.tenant, digests)

    found, names = await run_in_threadpool(page)
    rows = [row for job in found[:limit] for row in await _rows(service, job, names)]
    more = len(found) > limit
    return PlanPage(data=rows, has_more=more, next_cursor=found[limit - 1].id if more else None)


async def _rows(service: State, job: Job, names: dict[tuple[str, str], str]) -> list[PlanRow]:
    plans = (job.results or {})["plans"]
    order = {"plans": [str(service.blobs.path(digest)) for digest in plans]}
    read, _ = await service.readers.run(
        job.tenant, "plan_rows", order, what="the plans of a job", lasting=True
    )
    asked = job.asked
    return [
        PlanRow(
            job=job.id,
            kind=job.kind,
            labels=job.labels,
            created_at=datetime.fromtimestamp(job.created_at, UTC),
            position=position,
            digest=plans[position],
            model=job.model,
            model_name=names.get((ArtifactKind.MODEL, job.model or ""), ""),
            effort=asked.get("effort"),
            rounding=asked.get("rounding"),
            **said,
        )
        for position, said in enumerate(read["rows"])
    ]

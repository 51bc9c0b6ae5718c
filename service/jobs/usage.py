"""What the holders of API keys have used: jobs, worker seconds and uploads, from the audit log.

Design: docs/design/jobs.md
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import sqlalchemy as sa

from bitquota.service.jobs.job import JobStatus
from bitquota.service.store.database import api_keys, artifacts, audit, jobs

if TYPE_CHECKING:
    from typing import Any

    from sqlalchemy.engine import Connection

    from bitquota.service.settings import Settings
    from bitquota.service.store.database import Database

_ENDED = [s.value for s in JobStatus if s.final]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyUsage:
    """What one key did since some time.

    Attributes:
        tenant: Whose key it is.
        actor: ``key:ID``, or ``local`` on a server without keys.
        name: Of the key, as its maker called it.
        jobs: Jobs submitted, those that are no longer kept included.
        succeeded: Of those that are kept.
        failed: Likewise, expired ones included.
        cancelled: Likewise.
        worker_s: Worker seconds of those that are kept.
        uploads: Files uploaded that were new.
        uploaded_bytes: Of those that are still there.
    """

    tenant: str
    actor: str
    name: str = ""
    jobs: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    worker_s: float = 0.0
    uploads: int = 0
    uploaded_bytes: int = 0


def usage_by_key(database: Database, *, since: float, tenant: str | None = None) -> list[KeyUsage]:
    """Return what each key did since ``since`` (seconds since 1970), by tenant and key.

    Cost: one pass over the audit log of that time.
    """

    def counted(*statuses: JobStatus) -> sa.ColumnElement[int]:
        found = jobs.c.status.in_([status.value for status in statuses])
        return sa.func.coalesce(sa.func.sum(sa.case((found, 1), else_=0)), 0)

    who = (audit.c.tenant, audit.c.actor)
    recent = [audit.c.at >= since] + ([] if tenant is None else [audit.c.tenant == tenant])
    ordered = (
        sa.select(
            *who,
            sa.func.count().label("jobs"),
            counted(JobStatus.SUCCEEDED).label("succeeded"),
            counted(JobStatus.FAILED, JobStatus.EXPIRED).label("failed"),
            counted(JobStatus.CANCELLED).label("cancelled"),
            sa.func.coalesce(sa.func.sum(jobs.c.worker_s), 0.0).label("worker_s"),
        )
        .select_from(audit.outerjoin(jobs, jobs.c.id == audit.c.subject))
        .where(audit.c.action == "job.create", *recent)
        .group_by(*who)
    )
    same = sa.and_(artifacts.c.digest == audit.c.subject, artifacts.c.tenant == audit.c.tenant)
    uploaded = (
        sa.select(
            *who,
            sa.func.count().label("uploads"),
            sa.func.coalesce(sa.func.sum(artifacts.c.size), 0).label("uploaded_bytes"),
        )
        .select_from(audit.outerjoin(artifacts, same))
        .where(audit.c.action.like("upload.%"), *recent)
        .group_by(*who)
    )

    def work(connection: Connection) -> tuple[list[dict[str, Any]], dict[str, str]]:
        rows: list[dict[str, Any]] = [
            {**row} for q in (ordered, uploaded) for row in connection.execute(q).mappings()
        ]
        names = connection.execute(sa.select(api_keys.c.id, api_keys.c.name))
        return rows, {f"key:{row.id}": row.name for row in names}

    rows, names = database.read(work)
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        found.setdefault((row["tenant"], row["actor"]), {}).update(row)
    return [KeyUsage(**found[key] | {"name": names.get(key[1], "")}) for key in sorted(found)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """How long a tenant's jobs and uploads are kept, and when the next of them goes.

    Attributes:
        job_s: Seconds after its end that a job is kept.
        upload_s: Seconds after its last use that an upload is kept.
        next_job_at: When the job that ended first may go, in seconds since 1970.
        next_upload_at: When the upload that was used last may go, unless a job needs it.
    """

    job_s: float
    upload_s: float
    next_job_at: float | None
    next_upload_at: float | None


def retention_of(settings: Settings, database: Database, tenant: str) -> Retention:
    """Return what holds for ``tenant``."""
    ended = sa.select(sa.func.min(jobs.c.finished_at)).where(
        jobs.c.tenant == tenant, jobs.c.status.in_(_ENDED)
    )
    used = sa.select(sa.func.min(artifacts.c.used_at)).where(artifacts.c.tenant == tenant)
    first_end, first_use = database.read(
        lambda connection: (connection.execute(ended).scalar(), connection.execute(used).scalar())
    )
    return Retention(
        job_s=settings.job_retention_s,
        upload_s=settings.upload_retention_s,
        next_job_at=None if first_end is None else first_end + settings.job_retention_s,
        next_upload_at=None if first_use is None else first_use + settings.upload_retention_s,
    )

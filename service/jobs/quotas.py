"""Quotas of tenants, kept and checked in the database, and the audit log."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from bitquota.errors import InvalidInput, QuotaExceeded
from bitquota.service.jobs.job import new_id
from bitquota.service.security.keys import check_tenant
from bitquota.service.store.database import artifacts, audit, jobs, tenants

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy.engine import Connection, RowMapping

    from bitquota.service.security.keys import Caller
    from bitquota.service.settings import Settings
    from bitquota.service.store.database import Database

WINDOW_S = 86400.0
"""Worker seconds are counted over this long."""

_QUEUE_RETRY_S = 30
_STORED_RETRY_S = 3600


_FIND_TENANT = sa.select(tenants).where(tenants.c.tenant == sa.bindparam("of_tenant"))


@cache
def _usage_query() -> sa.Select[Any]:
    """Return one statement for all that is asked before every submission, built once."""
    own = jobs.c.tenant == sa.bindparam("of_tenant")

    def count(status: str) -> sa.ScalarSelect[Any]:
        return sa.select(sa.func.count()).where(own, jobs.c.status == status).scalar_subquery()

    def total(column: sa.Column[Any], *conditions: sa.ColumnElement[bool]) -> sa.ScalarSelect[Any]:
        summed = sa.func.coalesce(sa.func.sum(column), 0)
        return sa.select(summed).where(*conditions).scalar_subquery()

    stored = total(artifacts.c.size, artifacts.c.tenant == sa.bindparam("of_tenant"))
    left = total(jobs.c.result_bytes, own, jobs.c.result_bytes > 0)
    ended = total(jobs.c.worker_s, own, jobs.c.finished_at > sa.bindparam("since"))
    going = total(
        jobs.c.worker_s, own, jobs.c.status.in_(("running", "queued")), jobs.c.attempts > 0
    )
    return sa.select(
        count("running").label("running"),
        count("queued").label("queued"),
        (stored + left).label("stored"),
        (ended + going).label("worked"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """Limits of one tenant.

    Attributes:
        max_running: Jobs at the same time.
        max_queued: Jobs that wait.
        max_stored_bytes: Of all uploads and results.
        max_worker_s: Worker seconds in 24 hours.
    """

    max_running: int
    max_queued: int
    max_stored_bytes: int
    max_worker_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantUsage:
    """What one tenant uses now, in the terms of ``Quota``."""

    running: int
    queued: int
    stored_bytes: int
    worker_s: float


class Quotas:
    """Limits and use of every tenant."""

    def __init__(self, database: Database, settings: Settings, clock: Callable[[], float]) -> None:
        self._db = database
        self._clock = clock
        self._defaults = Quota(
            max_running=settings.max_running,
            max_queued=settings.max_queued,
            max_stored_bytes=settings.max_stored_bytes,
            max_worker_s=settings.max_worker_s,
        )

    def of(self, tenant: str) -> Quota:
        """Return the quota in force."""
        return self._db.read(lambda connection: self._of(connection, tenant))

    def _of(self, connection: Connection, tenant: str) -> Quota:
        row = connection.execute(_FIND_TENANT, {"of_tenant": tenant}).first()
        values = asdict(self._defaults)
        if row is not None:
            values |= {k: v for k in values if (v := getattr(row, k)) is not None}
        return Quota(**values)

    def set(self, tenant: str, **limits: float | None) -> Quota:
        """Give a tenant limits of its own (``None``: the server's), and return what holds.

        Raises:
            InvalidInput: An unknown limit, or a negative one.
        """
        check_tenant(tenant)
        for name, value in limits.items():
            if name not in Quota.__dataclass_fields__ or (value is not None and value < 0):
                known = ", ".join(Quota.__dataclass_fields__)
                msg = f"a quota must be one of {known} and not negative; got {name}={value}"
                raise InvalidInput(msg)

        def work(connection: Connection) -> Quota:
            where = tenants.c.tenant == tenant
            if connection.execute(sa.select(tenants.c.tenant).where(where)).first() is None:
                connection.execute(tenants.insert().values(tenant=tenant, **limits))
            elif limits:
                connection.execute(tenants.update().where(where).values(**limits))
            return self._of(connection, tenant)

        return self._db.write(work)

    def usage(self, tenant: str) -> TenantUsage:
        """Return what a tenant uses now."""
        return self._db.read(lambda connection: self._usage(connection, tenant))

    def _usage(self, connection: Connection, tenant: str) -> TenantUsage:
        values = {"of_tenant": tenant, "since": self._clock() - WINDOW_S}
        row = connection.execute(_usage_query(), values).one()
        return TenantUsage(
            running=int(row.running),
            queued=int(row.queued),
            stored_bytes=int(row.stored),
            worker_s=float(row.worked),
        )

    def check_order(self, tenant: str) -> None:
        """Raise ``QuotaExceeded`` if a tenant may not submit another job now."""

        def work(connection: Connection) -> tuple[Quota, TenantUsage]:
            return self._of(connection, tenant), self._usage(connection, tenant)

        quota, usage = self._db.read(work)
        if usage.queued >= quota.max_queued:
            msg = (
                f"at most {quota.max_queued:,} jobs may wait; {usage.queued:,} do: try again when "
                "some have ended, or cancel some"
            )
            raise QuotaExceeded(msg, limit=quota.max_queued, retry_after_s=_QUEUE_RETRY_S)
        if usage.stored_bytes > quota.max_stored_bytes:
            msg = (
                f"at most {quota.max_stored_bytes:,} bytes may be stored; there are "
                f"{usage.stored_bytes:,}: delete uploads or wait until old jobs are collected"
            )
            raise QuotaExceeded(msg, limit=quota.max_stored_bytes, retry_after_s=_STORED_RETRY_S)
        if usage.worker_s >= quota.max_worker_s:
            msg = (
                f"at most {quota.max_worker_s:,.0f} worker seconds may be used in 24 hours; "
                f"{usage.worker_s:,.0f} were: try again later"
            )
            raise QuotaExceeded(msg, limit=quota.max_worker_s, retry_after_s=_STORED_RETRY_S)

    def check_upload(self, tenant: str, size: int) -> None:
        """Raise ``QuotaExceeded`` if a tenant may not store ``size`` more bytes."""

        def work(connection: Connection) -> tuple[Quota, TenantUsage]:
            return self._of(connection, tenant), self._usage(connection, tenant)

        quota, usage = self._db.read(work)
        if usage.stored_bytes + size > quota.max_stored_bytes:
            msg = (
                f"at most {quota.max_stored_bytes:,} bytes may be stored; there are "
                f"{usage.stored_bytes:,} and {size:,} more were sent: delete uploads first"
            )
            raise QuotaExceeded(msg, limit=quota.max_stored_bytes, retry_after_s=_STORED_RETRY_S)


class AuditLog:
    """Who did what; rows are added and never changed."""

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._db = database
        self._clock = clock

    def add(self, caller: Caller, action: str, subject: str = "", request: str = "") -> None:
        """Write one line."""
        self._db.write(lambda connection: self.write(connection, caller, action, subject, request))

    def write(
        self, connection: Connection, caller: Caller, action: str, subject: str, request: str
    ) -> None:
        """Write one line in a transaction that does the thing itself."""
        now = self._clock()
        values = {
            "id": new_id("audit", now),
            "at": now,
            "tenant": caller.tenant,
            "actor": caller.actor,
            "action": action,
            "subject": subject[:128],
            "request": request[:64],
        }
        connection.execute(audit.insert().values(values))

    def list(self, tenant: str | None = None, limit: int = 100) -> Sequence[RowMapping]:
        """Return the latest lines, newest first."""
        query = sa.select(audit).order_by(audit.c.id.desc()).limit(limit)
        if tenant is not None:
            query = query.where(audit.c.tenant == tenant)
        return self._db.read(lambda connection: connection.execute(query).mappings().all())

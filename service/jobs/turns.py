"""Whose turn it is: tenants share workers round-robin within the highest priority that waits.

Design: docs/design/jobs.md
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from bitquota.service.jobs.job import JobStatus
from bitquota.service.store.database import jobs, tenants

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Connection

_LOCK = 7281002
"""Number of the PostgreSQL advisory lock under which servers claim jobs one after another: without
it two of them could serve one tenant at once, beyond its limit and out of turn."""

_QUEUED, _RUNNING = JobStatus.QUEUED.value, JobStatus.RUNNING.value


def tenants_of(
    table: sa.Table, condition: Callable[[sa.FromClause], sa.ColumnElement[bool]]
) -> sa.CTE:
    """Return a query for the tenants that have a row in ``table`` for which ``condition`` holds.

    It jumps from each tenant to the next in an index that begins with the columns of the condition
    and the tenant, so that it costs O(tenants · log rows) and not O(rows).  Its last row is NULL.
    """
    first = table.alias()
    found = (
        sa.select(sa.func.min(first.c.tenant).label("tenant"))
        .where(condition(first))
        .cte("tenants_waiting", recursive=True)
    )
    other = table.alias()
    following = (
        sa.select(sa.func.min(other.c.tenant))
        .where(condition(other), other.c.tenant > found.c.tenant)
        .scalar_subquery()
    )
    return found.union_all(sa.select(following).where(found.c.tenant.is_not(None)))


@cache
def _turn_query() -> sa.Select[Any]:
    """Return one statement for the tenant whose turn it is and its highest priority."""
    waiting = tenants_of(jobs, lambda table: table.c.status == _QUEUED)
    highest = (
        sa.select(sa.func.max(jobs.c.priority))
        .where(jobs.c.status == _QUEUED, jobs.c.tenant == waiting.c.tenant)
        .scalar_subquery()
    )
    running = (
        sa.select(sa.func.count())
        .where(jobs.c.status == _RUNNING, jobs.c.tenant == waiting.c.tenant)
        .scalar_subquery()
    )
    known = tenants.c.tenant == waiting.c.tenant
    turns = (
        sa.select(
            waiting.c.tenant,
            highest.label("priority"),
            running.label("running"),
            sa.func.coalesce(tenants.c.max_running, sa.bindparam("of_max_running")).label("most"),
            sa.func.coalesce(tenants.c.served_at, 0.0).label("served_at"),
        )
        .select_from(waiting.outerjoin(tenants, known))
        .where(waiting.c.tenant.is_not(None))
        .subquery()
    )
    return (
        sa.select(turns.c.tenant, turns.c.priority)
        .where(turns.c.running < turns.c.most)
        .order_by(
            turns.c.priority.desc(), turns.c.running, turns.c.served_at, turns.c.tenant
        )
        .limit(1)
    )  # fmt: skip


_NEXT_OF_TENANT = (
    sa.select(jobs.c.id)
    .where(
        jobs.c.status == _QUEUED,
        jobs.c.tenant == sa.bindparam("of_tenant"),
        jobs.c.priority == sa.bindparam("of_priority"),
    )
    .order_by(jobs.c.id)
    .limit(1)
    .with_for_update(skip_locked=True)
)


def next_job(connection: Connection, now: float, max_running: int) -> str | None:
    """Return the id of the job to run next, locked, and note that its tenant has had its turn.

    Of the tenants with a job of the highest priority that waits, and fewer running jobs than they
    may have, it is the one with the fewest running, then the one served longest ago; of its jobs
    of that priority the oldest.  Cost: O(tenants · log jobs).

    Args:
        connection: In a transaction that writes.
        now: Seconds since 1970.
        max_running: Jobs of one tenant at the same time, unless its quota says otherwise.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
    turn = connection.execute(_turn_query(), {"of_max_running": max_running}).first()
    if turn is None:
        return None
    named = {"of_tenant": turn.tenant, "of_priority": turn.priority}
    row = connection.execute(_NEXT_OF_TENANT, named).first()
    if row is None:
        return None  # it is being cancelled this moment
    own = tenants.c.tenant == turn.tenant
    if not connection.execute(tenants.update().where(own).values(served_at=now)).rowcount:
        connection.execute(tenants.insert().values(tenant=turn.tenant, served_at=now))
    return str(row.id)

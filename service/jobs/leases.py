"""The working half of the job store: claims, heartbeats, and how a job ends.

A job is claimed under a lease with an epoch. Every write of a driver names its epoch and happens
only while that epoch holds the job, so a driver that was given up on can change nothing more.

Design: docs/design/jobs.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import sqlalchemy as sa

from bitquota.canonical import canonical_json
from bitquota.errors import BitquotaError, Cancelled, MeasurementFailed, ServiceTimeout
from bitquota.service.jobs.job import Job, JobStatus, LeaseLost, ended_body, job_of, new_id
from bitquota.service.jobs.turns import next_job
from bitquota.service.problem_json import problem_json
from bitquota.service.security.public_addresses import host_of
from bitquota.service.store.database import artifacts, deliveries, events, jobs
from bitquota.service.store.formats import FORMATS_OF_RESULTS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy.engine import Connection

    from bitquota.canonical import JsonObject
    from bitquota.service.jobs.job import KeptResult
    from bitquota.service.store.database import Database

CANCELLED = "the job was cancelled on request; what was measured is kept for the next one"
_ANY_QUEUED = sa.select(jobs.c.id).where(jobs.c.status == JobStatus.QUEUED.value).limit(1)
EXPIRED = "a job must end before its deadline; this one did not: give it more time"


class Leases:
    """Jobs as supervisors and drivers see them: who works on what, and until when.

    Args:
        database: Where they are.
        clock: Seconds since 1970; leases and deadlines follow it.
    """

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._db = database
        self._clock = clock

    def claim(self, owner: str, lease_s: float, max_running: int = 2**31 - 1) -> Job | None:
        """Give the next job to ``owner`` and return it with its new epoch.

        Whose job that is ``bitquota.service.jobs.turns`` says.

        Args:
            owner: Who takes it.
            lease_s: Seconds until the lease runs out.
            max_running: Jobs of one tenant at the same time, unless its quota says otherwise.
        """
        now = self._clock()

        def find(connection: Connection) -> bool:
            return connection.execute(_ANY_QUEUED).first() is not None

        def work(connection: Connection) -> Job | None:
            self._expire(connection, now)
            job_id = next_job(connection, now, max_running)
            if job_id is None:
                return None
            connection.execute(
                jobs.update()
                .where(jobs.c.id == job_id)
                .values(
                    status=JobStatus.RUNNING.value,
                    started_at=sa.func.coalesce(jobs.c.started_at, now),
                    epoch=jobs.c.epoch + 1,
                    attempts=jobs.c.attempts + 1,
                    fruitless=jobs.c.fruitless + 1,
                    lease_owner=owner,
                    lease_until=now + lease_s,
                    version=jobs.c.version + 1,
                )
            )
            add_event(connection, job_id, "status", {"status": JobStatus.RUNNING.value}, now)
            return job_of(connection.execute(sa.select(jobs).where(jobs.c.id == job_id)).one())

        # Looking first keeps idle servers, which ask five times a second, off the write lock.
        return self._db.write(work) if self._db.read(find) else None

    def _expire(self, connection: Connection, now: float) -> None:
        late = connection.execute(
            sa.select(jobs)
            .where(jobs.c.status == JobStatus.QUEUED.value, jobs.c.deadline <= now)
            .with_for_update(skip_locked=True)
        ).all()
        for row in late:
            finish(connection, job_of(row), JobStatus.EXPIRED, now, ServiceTimeout(EXPIRED))

    def requeue_lost(self, max_attempts: int) -> int:
        """Give up on drivers whose lease ran out; returns how many jobs that concerns."""
        now = self._clock()

        def find(connection: Connection) -> bool:
            found = connection.execute(
                sa.select(jobs.c.id)
                .where(jobs.c.status == JobStatus.RUNNING.value, jobs.c.lease_until < now)
                .limit(1)
            )
            return found.first() is not None

        def work(connection: Connection) -> int:
            lost = connection.execute(
                sa.select(jobs)
                .where(jobs.c.status == JobStatus.RUNNING.value, jobs.c.lease_until < now)
                .with_for_update()
            ).all()
            for row in lost:
                self._requeue(connection, job_of(row), max_attempts, now, "lease ran out")
            return len(lost)

        return self._db.write(work) if self._db.read(find) else 0

    def tell_queued(self, progress: JsonObject | None) -> None:
        """Say to all jobs that wait and have not begun why that is; ``None`` takes it back."""
        now = self._clock()
        text = None if progress is None else canonical_json(progress)
        waits = [jobs.c.status == JobStatus.QUEUED.value, jobs.c.attempts == 0]
        concerned = sa.select(jobs.c.id).where(*waits, jobs.c.progress.is_distinct_from(text))

        def work(connection: Connection) -> None:
            for (job_id,) in connection.execute(concerned.with_for_update()).all():
                values = {"progress": text, "version": jobs.c.version + 1}
                connection.execute(jobs.update().where(jobs.c.id == job_id).values(values))
                if progress is not None:
                    add_event(connection, job_id, "progress", progress, now)

        if self._db.read(lambda connection: connection.execute(concerned.limit(1)).first()):
            self._db.write(work)

    def await_driver(self, job_id: str, epoch: int, until: float, lease_s: float) -> float | None:
        """Renew the lease of a job whose driver has not begun; returns its new end.

        Args:
            job_id: The job.
            epoch: The driver's.
            until: When the lease ends, as its supervisor set it last.
            lease_s: Seconds until it shall run out.

        Returns:
            When it ends now, or ``None`` once the driver renews it by itself or the job is over.
        """
        renewed = self._clock() + lease_s

        def work(connection: Connection) -> bool:
            changed = connection.execute(
                jobs.update()
                .where(
                    jobs.c.id == job_id,
                    jobs.c.epoch == epoch,
                    jobs.c.status == JobStatus.RUNNING.value,
                    jobs.c.lease_until == until,
                )
                .values(lease_until=renewed)
            )
            return changed.rowcount == 1

        return renewed if self._db.write(work) else None

    def requeue(self, job_id: str, epoch: int, max_attempts: int, reason: str) -> None:
        """Queue a job again whose driver is known to have ended; nothing if it was finished."""
        now = self._clock()

        def work(connection: Connection) -> None:
            row = connection.execute(
                sa.select(jobs)
                .where(
                    jobs.c.id == job_id,
                    jobs.c.epoch == epoch,
                    jobs.c.status == JobStatus.RUNNING.value,
                )
                .with_for_update()
            ).first()
            if row is not None:
                self._requeue(connection, job_of(row), max_attempts, now, reason)

        self._db.write(work)

    def wanted(self, job_ids: Sequence[str]) -> dict[str, tuple[int, bool]]:
        """Return the epoch, and whether an end was asked for, of those jobs that are running."""
        query = sa.select(jobs.c.id, jobs.c.epoch, jobs.c.cancel_requested).where(
            jobs.c.id.in_(job_ids), jobs.c.status == JobStatus.RUNNING.value
        )
        return self._db.read(
            lambda connection: {
                r.id: (r.epoch, r.cancel_requested) for r in connection.execute(query)
            }
        )

    def running_owners(self) -> list[tuple[str, int, str]]:
        """Return ``(job, epoch, owner)`` of all running jobs."""
        query = sa.select(jobs.c.id, jobs.c.epoch, jobs.c.lease_owner).where(
            jobs.c.status == JobStatus.RUNNING.value
        )
        return self._db.read(
            lambda connection: [(r.id, r.epoch, r.lease_owner) for r in connection.execute(query)]
        )

    def _requeue(
        self, connection: Connection, job: Job, max_attempts: int, now: float, reason: str
    ) -> None:
        if job.cancel_requested:
            finish(connection, job, JobStatus.CANCELLED, now, Cancelled(CANCELLED))
            return
        if job.fruitless >= max_attempts:
            msg = (
                f"a job must measure something new within {max_attempts} attempts; its worker "
                f"ended each time before it did (last: {reason}). Either the model or a layer of "
                "it needs more memory than there is, or the machine is too busy for its slots"
            )
            error = MeasurementFailed(msg, attempts=job.attempts)
            finish(connection, job, JobStatus.FAILED, now, error)
            return
        connection.execute(
            jobs.update()
            .where(jobs.c.id == job.id, jobs.c.epoch == job.epoch)
            .values(
                status=JobStatus.QUEUED.value,
                lease_owner=None,
                lease_until=None,
                version=jobs.c.version + 1,
            )
        )
        said = {"status": JobStatus.QUEUED.value, "reason": reason}
        add_event(connection, job.id, "status", said, now)

    def heartbeat(
        self,
        job_id: str,
        epoch: int,
        *,
        lease_s: float,
        progress: JsonObject | None,
        measured: int,
        worker_s: float,
    ) -> Job:
        """Renew the lease and say how far the work is; returns the job as it stands.

        Args:
            job_id: The job.
            epoch: The driver's.
            lease_s: Seconds until the lease runs out.
            progress: Where the work is, or ``None`` if that did not change.
            measured: Ledger entries and checkpoints written since the last heartbeat.
            worker_s: Seconds of work since the last heartbeat.

        Raises:
            LeaseLost: Another driver has the job, or it has ended.
        """
        now = self._clock()

        def work(connection: Connection) -> Job:
            values: dict[str, Any] = {
                "lease_until": now + lease_s,
                "worker_s": jobs.c.worker_s + worker_s,
            }
            if measured:
                values |= {"measured": jobs.c.measured + measured, "fruitless": 0}
            if progress is not None:
                values |= {"progress": canonical_json(progress), "version": jobs.c.version + 1}
            self._fenced(connection, job_id, epoch, values)
            if progress is not None:
                add_event(connection, job_id, "progress", progress, now)
            return job_of(connection.execute(sa.select(jobs).where(jobs.c.id == job_id)).one())

        return self._db.write(work)

    def succeed(
        self,
        job_id: str,
        epoch: int,
        results: JsonObject,
        kept: Sequence[KeptResult] = (),
        peak_bytes: int = 0,
    ) -> None:
        """End a job with its results; raises ``LeaseLost``.

        Args:
            job_id: The job.
            epoch: The driver's.
            results: Digest, or list of digests, by name of the result.
            kept: Each file once; those with an artifact kind become uploads of the tenant.
            peak_bytes: The most memory that the evaluator took; 0 where that is not known.
        """
        now = self._clock()

        def work(connection: Connection) -> None:
            job = _one(connection, job_id)
            if job.status is JobStatus.SUCCEEDED and job.epoch == epoch:
                return  # the commit had arrived although its answer had not
            own = sum(one.size for one in kept if one.artifact is None)
            values = {
                "results": canonical_json(results),
                "result_bytes": own,
                "peak_bytes": peak_bytes,
            }
            self._fenced(connection, job_id, epoch, values)
            for one in kept:
                if one.artifact is not None:
                    _adopt(connection, job, one, now)
            finish(connection, job, JobStatus.SUCCEEDED, now, None)

        self._db.write(work)

    def fail(self, job_id: str, epoch: int, error: BitquotaError) -> None:
        """End a job with an error (cancelled and expired too); raises ``LeaseLost``."""
        now = self._clock()
        status = {
            Cancelled.slug: JobStatus.CANCELLED,
            ServiceTimeout.slug: JobStatus.EXPIRED,
        }.get(error.slug, JobStatus.FAILED)

        def work(connection: Connection) -> None:
            job = _one(connection, job_id)
            if job.status is status and job.epoch == epoch:
                return
            self._fenced(connection, job_id, epoch, {})
            finish(connection, job, status, now, error)

        self._db.write(work)

    def release(self, job_id: str, epoch: int, reason: str) -> None:
        """Hand a job back unfinished, without counting the attempt; nothing if it has ended."""
        now = self._clock()

        def work(connection: Connection) -> None:
            job = _one(connection, job_id)
            if job.status is not JobStatus.RUNNING or job.epoch != epoch:
                return
            connection.execute(
                jobs.update()
                .where(jobs.c.id == job_id)
                .values(fruitless=sa.func.max(jobs.c.fruitless - 1, 0))
                if connection.dialect.name == "sqlite"
                else jobs.update()
                .where(jobs.c.id == job_id)
                .values(fruitless=sa.func.greatest(jobs.c.fruitless - 1, 0))
            )
            self._requeue(connection, _one(connection, job_id), 2**31, now, reason)

        self._db.write(work)

    def _fenced(
        self, connection: Connection, job_id: str, epoch: int, values: dict[str, Any]
    ) -> None:
        changed = connection.execute(
            jobs.update()
            .where(
                jobs.c.id == job_id,
                jobs.c.epoch == epoch,
                jobs.c.status == JobStatus.RUNNING.value,
            )
            .values(values or {"epoch": epoch})
        )
        if changed.rowcount != 1:
            msg = f"a driver must hold the lease of its job; {job_id} epoch {epoch} is over"
            raise LeaseLost(msg, job=job_id, epoch=epoch)


def finish(
    connection: Connection,
    job: Job,
    status: JobStatus,
    now: float,
    error: BitquotaError | None,
) -> None:
    """End a job of the caller's epoch, with its event and what is to be delivered."""
    problem = None if error is None else problem_json(error)
    connection.execute(
        jobs.update()
        .where(jobs.c.id == job.id, jobs.c.epoch == job.epoch)
        .values(
            status=status.value,
            finished_at=now,
            lease_owner=None,
            lease_until=None,
            error=None if problem is None else canonical_json(problem),
            version=jobs.c.version + 1,
        )
    )
    if job.webhook is not None:
        connection.execute(
            deliveries.insert().values(
                id=new_id("msg", now),
                tenant=job.tenant,
                job=job.id,
                url=job.webhook,
                host=host_of(urlsplit(job.webhook)),
                body=ended_body(job.id, job.kind, status.value, now),
                created_at=now,
                next_at=now,
            )
        )
    said: JsonObject = {"status": status.value}
    add_event(connection, job.id, "status", said | ({"error": problem} if problem else {}), now)


_ADD_EVENT = events.insert().values(
    job=sa.bindparam("of_job"),
    seq=sa.select(sa.func.coalesce(sa.func.max(events.c.seq), 0))
    .where(events.c.job == sa.bindparam("of_job"))
    .scalar_subquery()
    + 1,
    type=sa.bindparam("of_type"),
    data=sa.bindparam("of_data"),
    at=sa.bindparam("of_time"),
)
"""Statements that every submission needs are built once: building one takes longer than "
"running it."""


def add_event(connection: Connection, job_id: str, kind: str, data: JsonObject, now: float) -> None:
    """Add what happened to a job, under its next number."""
    values = {"of_job": job_id, "of_type": kind, "of_data": canonical_json(data), "of_time": now}
    connection.execute(_ADD_EVENT, values)


def _adopt(connection: Connection, job: Job, one: KeptResult, now: float) -> None:
    """Make a result an upload of the job's tenant, unless it is one already."""
    assert one.artifact is not None  # noqa: S101  # its caller asked
    where = sa.and_(
        artifacts.c.tenant == job.tenant,
        artifacts.c.kind == one.artifact.value,
        artifacts.c.digest == one.digest,
    )
    if connection.execute(artifacts.update().where(where).values(used_at=now)).rowcount:
        return
    connection.execute(
        artifacts.insert().values(
            tenant=job.tenant,
            kind=one.artifact.value,
            digest=one.digest,
            format=FORMATS_OF_RESULTS[one.artifact],
            name=one.name,
            size=one.size,
            created_at=now,
            used_at=now,
        )
    )


def _one(connection: Connection, job_id: str) -> Job:
    query = sa.select(jobs).where(jobs.c.id == job_id).with_for_update()
    return job_of(connection.execute(query).one())

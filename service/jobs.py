"""The job store: what was asked, who works on it, how far it is, how it ended.

A job is claimed under a lease with an epoch. Every write of a driver names its epoch and happens
only while that epoch holds the job, so a driver that was given up on can change nothing more.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from bitquota.canonical import canonical_json, digest_json
from bitquota.errors import (
    BitquotaError,
    Cancelled,
    Conflict,
    InvalidInput,
    MeasurementFailed,
    NotFound,
    ServiceTimeout,
)
from bitquota.service.database import artifacts, deliveries, events, idempotency, jobs, tenants
from bitquota.service.inspection import FORMATS_OF_RESULTS
from bitquota.service.kinds import kind_by_name
from bitquota.service.problems import problem_json

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sqlalchemy.engine import Connection, Row

    from bitquota.canonical import JsonObject
    from bitquota.service.database import Database
    from bitquota.service.inspection import ArtifactKind


class JobStatus(StrEnum):
    """Where a job is in its life."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"

    @property
    def final(self) -> bool:
        """Whether nothing will change any more."""
        return self not in {JobStatus.QUEUED, JobStatus.RUNNING}


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """What a client asks for."""

    tenant: str
    kind: str
    request: JsonObject
    model: str | None = None
    dataset: str | None = None
    inputs: dict[str, list[str]] = field(default_factory=dict)
    """Digests of all other uploads, by role."""
    trace: dict[str, str] = field(default_factory=dict)
    """Headers that name the span of the request, where requests are traced."""
    labels: dict[str, str]
    priority: int = 0
    deadline: float | None = None
    webhook: str | None = None

    def uploads(self) -> list[tuple[ArtifactKind, str]]:
        """Return kind and digest of every upload that the job needs."""
        named = digests_by_role(self)
        return [
            (entry.artifact, digest)
            for entry in kind_by_name(self.kind).inputs
            for digest in named.get(entry.role, ())
        ]

    def fingerprint(self) -> str:
        """Return the digest that tells two orders under one idempotency key apart."""
        return digest_json(
            [
                self.kind,
                self.request,
                self.model,
                self.dataset,
                self.inputs,
                self.labels,
                self.priority,
                self.webhook,
            ]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One row of the job table; times in seconds since 1970."""

    id: str
    tenant: str
    kind: str
    status: JobStatus
    model: str | None
    dataset: str | None
    inputs: dict[str, list[str]]
    request: JsonObject
    labels: dict[str, str]
    priority: int
    deadline: float | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    cancel_requested: bool
    epoch: int
    attempts: int
    fruitless: int
    measured: int
    lease_owner: str | None
    lease_until: float | None
    progress: JsonObject | None
    error: JsonObject | None
    results: JsonObject | None
    result_bytes: int
    version: int
    worker_s: float
    webhook: str | None


def digests_by_role(job: NewJob | Job) -> dict[str, list[str]]:
    """Return the digests of all uploads of a job, by their role in the order."""
    named = {"model": job.model, "dataset": job.dataset}
    return {role: [digest] for role, digest in named.items() if digest is not None} | job.inputs


_JSON_COLUMNS = ("inputs", "request", "labels", "progress", "error", "results")


def _job(row: Row[Any]) -> Job:
    values = dict(row._mapping)  # noqa: SLF001  # SQLAlchemy's public name for it
    for name in _JSON_COLUMNS:
        if values[name] is not None:
            values[name] = json.loads(values[name])
    values["status"] = JobStatus(values["status"])
    return Job(**values)


class LeaseLost(Conflict):
    """The job was given to another driver; this one must stop and change nothing."""

    slug = "lease-lost"


class JobStore:
    """Jobs, their events and idempotency keys in a database.

    Args:
        database: Where they are.
        clock: Seconds since 1970; leases and deadlines are judged by it.
    """

    def __init__(self, database: Database, clock: Callable[[], float]) -> None:
        self._db = database
        self._clock = clock

    # ---------------------------------------------------------------- for clients

    def create(self, new: NewJob, key: str | None = None) -> tuple[Job, bool]:
        """Store a job and return it, with whether it had been stored before under ``key``.

        Raises:
            InvalidInput: ``key`` was used for another order.
            NotFound: The model or the dataset is not there (or is another tenant's).
        """
        now = self._clock()
        job_id = new_id("job", now)

        def work(connection: Connection) -> tuple[Job, bool]:
            if key is not None:
                known = self._replay(connection, new, key)
                if known is not None:
                    return known, known.id != job_id
            for kind, digest in new.uploads():
                self._touch(connection, new.tenant, kind, digest, now)
            connection.execute(
                jobs.insert().values(
                    id=job_id,
                    tenant=new.tenant,
                    kind=new.kind,
                    status=JobStatus.QUEUED.value,
                    model=new.model,
                    dataset=new.dataset,
                    inputs=canonical_json(new.inputs),
                    request=canonical_json(new.request),
                    labels=canonical_json(new.labels),
                    priority=new.priority,
                    deadline=new.deadline,
                    webhook=new.webhook,
                    created_at=now,
                )
            )
            if key is not None:
                connection.execute(
                    idempotency.insert().values(
                        tenant=new.tenant,
                        key=key,
                        fingerprint=new.fingerprint(),
                        job=job_id,
                        created_at=now,
                    )
                )
            said = {"status": JobStatus.QUEUED.value} | ({"trace": new.trace} if new.trace else {})
            self._event(connection, job_id, "status", said, now)
            return self._get(connection, new.tenant, job_id), False

        return self._db.write(work)

    def replay(self, new: NewJob, key: str) -> Job | None:
        """Return the job that was ordered under ``key``, if there is one.

        Raises:
            InvalidInput: It was another order.
        """
        return self._db.read(lambda connection: self._replay(connection, new, key))

    def _replay(self, connection: Connection, new: NewJob, key: str) -> Job | None:
        known = connection.execute(
            sa.select(idempotency).where(
                idempotency.c.tenant == new.tenant, idempotency.c.key == key
            )
        ).first()
        if known is None:
            return None
        if known.fingerprint != new.fingerprint():
            msg = (
                "an Idempotency-Key must be used for one order only; this one was used for job "
                f"{known.job} with another body: take a new key"
            )
            raise InvalidInput(msg, job=known.job)
        return self._get(connection, new.tenant, known.job)

    @staticmethod
    def _touch(
        connection: Connection, tenant: str, kind: ArtifactKind, digest: str, now: float
    ) -> None:
        touched = connection.execute(
            artifacts.update()
            .where(
                artifacts.c.tenant == tenant,
                artifacts.c.kind == kind.value,
                artifacts.c.digest == digest,
            )
            .values(used_at=now)
        )
        if touched.rowcount != 1:
            msg = f"the {kind} of a job must be uploaded first; {digest} is not there: PUT it"
            raise NotFound(msg, kind=kind.value, digest=digest)

    def get(self, tenant: str, job_id: str) -> Job:
        """Return a job of ``tenant``; raises ``NotFound``, also for another tenant's."""
        return self._db.read(lambda connection: self._get(connection, tenant, job_id))

    @staticmethod
    def _get(connection: Connection, tenant: str, job_id: str, *, lock: bool = False) -> Job:
        query = sa.select(jobs).where(jobs.c.id == job_id, jobs.c.tenant == tenant)
        row = connection.execute(query.with_for_update() if lock else query).first()
        if row is None:
            msg = f"the job must exist; there is no job '{job_id}'"
            raise NotFound(msg, job=job_id)
        return _job(row)

    def page(
        self,
        tenant: str,
        *,
        limit: int,
        before: str | None = None,
        status: JobStatus | None = None,
        kind: str | None = None,
    ) -> Sequence[Job]:
        """Return up to ``limit`` jobs of ``tenant``, newest first, older than ``before``."""
        query = sa.select(jobs).where(jobs.c.tenant == tenant)
        if before is not None:
            query = query.where(jobs.c.id < before)
        if status is not None:
            query = query.where(jobs.c.status == status.value)
        if kind is not None:
            query = query.where(jobs.c.kind == kind)
        query = query.order_by(jobs.c.id.desc()).limit(limit)
        return self._db.read(lambda connection: [_job(r) for r in connection.execute(query)])

    def cancel(self, tenant: str, job_id: str) -> Job:
        """Ask for the end of a job: a queued one ends now, a running one soon.

        Raises:
            NotFound: No such job.
            Conflict: It has ended in another way.
        """
        now = self._clock()

        def work(connection: Connection) -> Job:
            job = self._get(connection, tenant, job_id, lock=True)
            if job.status is JobStatus.CANCELLED:
                return job
            if job.status.final:
                msg = f"a job must be queued or running to be cancelled; it {job.status}"
                raise Conflict(msg, job=job_id, status=str(job.status))
            if job.status is JobStatus.QUEUED:
                self._finish(connection, job, JobStatus.CANCELLED, now, Cancelled(_CANCELLED))
            elif not job.cancel_requested:
                connection.execute(
                    jobs.update()
                    .where(jobs.c.id == job_id, jobs.c.status == JobStatus.RUNNING.value)
                    .values(cancel_requested=True, version=jobs.c.version + 1)
                )
                self._event(connection, job_id, "cancel_requested", {}, now)
            return self._get(connection, tenant, job_id)

        return self._db.write(work)

    def events(self, job_id: str, after: int, limit: int = 500) -> list[tuple[int, str, str]]:
        """Return ``(number, type, JSON text)`` of the events after number ``after``."""
        query = (
            sa.select(events.c.seq, events.c.type, events.c.data)
            .where(events.c.job == job_id, events.c.seq > after)
            .order_by(events.c.seq)
            .limit(limit)
        )
        return self._db.read(
            lambda connection: [(r.seq, r.type, r.data) for r in connection.execute(query)]
        )

    # ---------------------------------------------------------------- for supervisors

    def claim(self, owner: str, lease_s: float, max_running: int = 2**31 - 1) -> Job | None:
        """Give the next queued job to ``owner`` and return it with its new epoch.

        Args:
            owner: Who takes it.
            lease_s: Seconds until the lease runs out.
            max_running: Jobs of one tenant at the same time, unless its quota says otherwise.
        """
        now = self._clock()

        def work(connection: Connection) -> Job | None:
            self._expire(connection, now)
            others = jobs.alias("others")
            running = (
                sa.select(sa.func.count())
                .where(
                    others.c.tenant == jobs.c.tenant,
                    others.c.status == JobStatus.RUNNING.value,
                )
                .scalar_subquery()
            )
            own_limit = (
                sa.select(tenants.c.max_running)
                .where(tenants.c.tenant == jobs.c.tenant)
                .scalar_subquery()
            )
            row = connection.execute(
                sa.select(jobs.c.id)
                .where(
                    jobs.c.status == JobStatus.QUEUED.value,
                    running < sa.func.coalesce(own_limit, max_running),
                )
                .order_by(jobs.c.priority.desc(), jobs.c.id)
                .limit(1)
                .with_for_update(skip_locked=True, of=jobs)
            ).first()
            if row is None:
                return None
            connection.execute(
                jobs.update()
                .where(jobs.c.id == row.id)
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
            self._event(connection, row.id, "status", {"status": JobStatus.RUNNING.value}, now)
            return _job(connection.execute(sa.select(jobs).where(jobs.c.id == row.id)).one())

        return self._db.write(work)

    def _expire(self, connection: Connection, now: float) -> None:
        late = connection.execute(
            sa.select(jobs)
            .where(jobs.c.status == JobStatus.QUEUED.value, jobs.c.deadline <= now)
            .with_for_update(skip_locked=True)
        ).all()
        for row in late:
            self._finish(connection, _job(row), JobStatus.EXPIRED, now, ServiceTimeout(_EXPIRED))

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
                self._requeue(connection, _job(row), max_attempts, now, "lease ran out")
            return len(lost)

        return self._db.write(work) if self._db.read(find) else 0

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
                self._requeue(connection, _job(row), max_attempts, now, reason)

        self._db.write(work)

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
            self._finish(connection, job, JobStatus.CANCELLED, now, Cancelled(_CANCELLED))
            return
        if job.fruitless >= max_attempts:
            msg = (
                f"a job must measure something new within {max_attempts} attempts; its worker "
                f"ended each time before it did (last: {reason}). The model or a layer of it "
                "probably needs more memory than there is"
            )
            error = MeasurementFailed(msg, attempts=job.attempts)
            self._finish(connection, job, JobStatus.FAILED, now, error)
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
        self._event(connection, job.id, "status", said, now)

    # ---------------------------------------------------------------- for drivers

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
            measured: Ledger entries written since the last heartbeat.
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
                self._event(connection, job_id, "progress", progress, now)
            return _job(connection.execute(sa.select(jobs).where(jobs.c.id == job_id)).one())

        return self._db.write(work)

    def succeed(
        self, job_id: str, epoch: int, results: JsonObject, kept: Sequence[KeptResult] = ()
    ) -> None:
        """End a job with its results; raises ``LeaseLost``.

        Args:
            job_id: The job.
            epoch: The driver's.
            results: Digest, or list of digests, by name of the result.
            kept: Each file once; those with an artifact kind become uploads of the tenant.
        """
        now = self._clock()

        def work(connection: Connection) -> None:
            job = _one(connection, job_id)
            if job.status is JobStatus.SUCCEEDED and job.epoch == epoch:
                return  # the commit had arrived although its answer had not
            own = sum(one.size for one in kept if one.artifact is None)
            values = {"results": canonical_json(results), "result_bytes": own}
            self._fenced(connection, job_id, epoch, values)
            for one in kept:
                if one.artifact is not None:
                    _adopt(connection, job, one, now)
            self._finish(connection, job, JobStatus.SUCCEEDED, now, None)

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
            self._finish(connection, job, status, now, error)

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

    # ---------------------------------------------------------------- shared

    def _finish(
        self,
        connection: Connection,
        job: Job,
        status: JobStatus,
        now: float,
        error: BitquotaError | None,
    ) -> None:
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
                    body=ended_body(job.id, job.kind, status.value, now),
                    created_at=now,
                    next_at=now,
                )
            )
        said: JsonObject = {"status": status.value}
        self._event(
            connection, job.id, "status", said | ({"error": problem} if problem else {}), now
        )

    @staticmethod
    def _event(
        connection: Connection, job_id: str, kind: str, data: JsonObject, now: float
    ) -> None:
        last = sa.select(sa.func.coalesce(sa.func.max(events.c.seq), 0)).where(
            events.c.job == job_id
        )
        connection.execute(
            events.insert().values(
                job=job_id,
                seq=last.scalar_subquery() + 1,
                type=kind,
                data=canonical_json(data),
                at=now,
            )
        )


_CANCELLED = "the job was cancelled on request; what was measured is kept for the next one"
_EXPIRED = "a job must end before its deadline; this one did not: give it more time"


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptResult:
    """A file that a job left.

    Attributes:
        digest: Its content.
        size: Bytes.
        name: For people, should it become an upload.
        artifact: What upload it becomes, if it becomes one.
    """

    digest: str
    size: int
    name: str
    artifact: ArtifactKind | None = None


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
    return _job(connection.execute(query).one())


def new_id(prefix: str, now: float) -> str:
    """Return an unguessable id whose order is that of time: ``job_`` and 32 digits."""
    return f"{prefix}_{int(now * 1000):012x}{secrets.token_hex(10)}"


def ended_body(job_id: str, kind: str, status: str, finished_at: float) -> str:
    """Return what is sent when a job has ended; the rest is fetched with a key."""
    at = datetime.fromtimestamp(finished_at, UTC).isoformat()
    data: dict[str, Any] = {"id": job_id, "kind": kind, "status": status, "finished_at": at}
    return canonical_json({"type": f"job.{status}", "timestamp": at, "data": data})

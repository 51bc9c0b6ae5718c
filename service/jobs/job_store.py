"""The job store as clients see it: submissions, looks, lists, events, the wish to cancel.

The half that supervisors and drivers work with is its base, ``bitquota.service.jobs.leases``.

Design: docs/design/jobs.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

from bitquota.canonical import canonical_json
from bitquota.errors import Cancelled, Conflict, InvalidInput, NotFound
from bitquota.service.jobs.job import Job, JobStatus, job_of, new_id
from bitquota.service.jobs.leases import CANCELLED, Leases, add_event, finish
from bitquota.service.store.database import artifacts, events, idempotency, jobs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sqlalchemy.engine import Connection

    from bitquota.service.jobs.job import NewJob
    from bitquota.service.store.formats import ArtifactKind


# Built once: building a statement takes longer than running it.
_ADD_JOB = jobs.insert().returning(jobs)
_ADD_KEY = idempotency.insert()
_FIND_KEY = sa.select(idempotency).where(
    idempotency.c.tenant == sa.bindparam("of_tenant"), idempotency.c.key == sa.bindparam("of_key")
)
_FIND_JOB = sa.select(jobs).where(
    jobs.c.id == sa.bindparam("of_id"), jobs.c.tenant == sa.bindparam("of_tenant")
)
_TOUCH = (
    artifacts.update()
    .where(
        artifacts.c.tenant == sa.bindparam("of_tenant"),
        artifacts.c.kind == sa.bindparam("of_kind"),
        artifacts.c.digest == sa.bindparam("of_digest"),
    )
    .values(used_at=sa.bindparam("now"))
)


def _nothing(_connection: Connection, _job_id: str) -> None:
    """Do nothing."""


class JobStore(Leases):
    """Jobs, their events and idempotency keys in a database.

    Args:
        database: Where they are.
        clock: Seconds since 1970; leases and deadlines follow it.
    """

    def create(
        self,
        new: NewJob,
        key: str | None = None,
        *,
        also: Callable[[Connection, str], object] = _nothing,
    ) -> tuple[Job, bool]:
        """Store a job and return it, with whether it had been stored before under ``key``.

        Args:
            new: What is asked for.
            key: Submissions under one key are one job.
            also: Called with the connection and the job's id, in the same transaction.

        Raises:
            InvalidInput: ``key`` was used for another submission.
            NotFound: The model or the dataset is not there (or is another tenant's).
        """
        now = self._clock()
        job_id = new_id("job", now)

        def work(connection: Connection) -> tuple[Job, bool]:
            if key is not None:
                known = self._replay(connection, new, key)
                if known is not None:
                    return known, known.id != job_id

            # Its uploads must be there, and stay.
            for kind, digest in new.uploads():
                self._touch(connection, new.tenant, kind, digest, now)
            row = connection.execute(
                _ADD_JOB,
                {
                    "id": job_id,
                    "tenant": new.tenant,
                    "kind": new.kind,
                    "status": JobStatus.QUEUED.value,
                    "model": new.model,
                    "dataset": new.dataset,
                    "inputs": canonical_json(new.inputs),
                    "request": canonical_json(new.request),
                    "labels": canonical_json(new.labels),
                    "priority": new.priority,
                    "deadline": new.deadline,
                    "webhook": new.webhook,
                    "created_at": now,
                },
            ).one()
            if key is not None:
                connection.execute(
                    _ADD_KEY,
                    {
                        "tenant": new.tenant,
                        "key": key,
                        "fingerprint": new.fingerprint(),
                        "job": job_id,
                        "created_at": now,
                    },
                )

            # Its first event, and what else belongs to the same transaction.
            said = {"status": JobStatus.QUEUED.value} | ({"trace": new.trace} if new.trace else {})
            add_event(connection, job_id, "status", said, now)
            also(connection, job_id)
            return job_of(row), False

        return self._db.write(work)

    def replay(self, new: NewJob, key: str) -> Job | None:
        """Return the job that was submitted under ``key``, if there is one.

        Raises:
            InvalidInput: It was another submission.
        """
        return self._db.read(lambda connection: self._replay(connection, new, key))

    def _replay(self, connection: Connection, new: NewJob, key: str) -> Job | None:
        named = {"of_tenant": new.tenant, "of_key": key}
        known = connection.execute(_FIND_KEY, named).first()
        if known is None:
            return None
        if known.fingerprint != new.fingerprint():
            msg = (
                "an Idempotency-Key must be used for a single job; this one was used for job "
                f"{known.job} with another body: use a new key"
            )
            raise InvalidInput(msg, job=known.job)
        return self._get(connection, new.tenant, known.job)

    @staticmethod
    def _touch(
        connection: Connection, tenant: str, kind: ArtifactKind, digest: str, now: float
    ) -> None:
        named = {"of_tenant": tenant, "of_kind": kind.value, "of_digest": digest, "now": now}
        touched = connection.execute(_TOUCH, named)
        if touched.rowcount != 1:
            msg = f"the {kind} of a job must be uploaded first; {digest} is not there: PUT it"
            raise NotFound(msg, kind=kind.value, digest=digest)

    def get(self, tenant: str, job_id: str) -> Job:
        """Return a job of ``tenant``; raises ``NotFound``, also for another tenant's."""
        return self._db.read(lambda connection: self._get(connection, tenant, job_id))

    @staticmethod
    def _get(connection: Connection, tenant: str, job_id: str, *, lock: bool = False) -> Job:
        query = _FIND_JOB.with_for_update() if lock else _FIND_JOB
        row = connection.execute(query, {"of_tenant": tenant, "of_id": job_id}).first()
        if row is None:
            msg = f"the job must exist; there is no job '{job_id}'"
            raise NotFound(msg, job=job_id)
        return job_of(row)

    def page(
        self,
        tenant: str,
        *,
        limit: int,
        before: str | None = None,
        status: JobStatus | None = None,
        kind: str | None = None,
        labels: Mapping[str, str] | None = None,
        model: str | None = None,
        result: str | None = None,
    ) -> Sequence[Job]:
        """Return up to ``limit`` jobs of ``tenant``, newest first, older than ``before``.

        Args:
            tenant: Whose.
            limit: How many at most.
            before: Id of a job.
            status: Only those.
            kind: Only those.
            labels: Names and values that they have.
            model: Digest of the model that they were given.
            result: Name of a result that they left.
        """
        query = sa.select(jobs).where(jobs.c.tenant == tenant)
        if before is not None:
            query = query.where(jobs.c.id < before)
        if status is not None:
            query = query.where(jobs.c.status == status.value)
        if kind is not None:
            query = query.where(jobs.c.kind == kind)
        if model is not None:
            query = query.where(jobs.c.model == model)
        if result is not None:
            query = query.where(jobs.c.results.contains(f'"{result}":', autoescape=True))
        for name, value in (labels or {}).items():
            # Canonical JSON has one way to write a member, and a quote inside is escaped.
            member = canonical_json({name: value})[1:-1]
            query = query.where(jobs.c.labels.contains(member, autoescape=True))
        query = query.order_by(jobs.c.id.desc()).limit(limit)
        return self._db.read(lambda connection: [job_of(r) for r in connection.execute(query)])

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
                finish(connection, job, JobStatus.CANCELLED, now, Cancelled(CANCELLED))
            elif not job.cancel_requested:
                connection.execute(
                    jobs.update()
                    .where(jobs.c.id == job_id, jobs.c.status == JobStatus.RUNNING.value)
                    .values(cancel_requested=True, version=jobs.c.version + 1)
                )
                add_event(connection, job_id, "cancel_requested", {}, now)
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

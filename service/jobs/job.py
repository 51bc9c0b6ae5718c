"""What is known of a job: what was asked, where it stands, what it left."""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from bitquota.canonical import canonical_json, digest_json
from bitquota.errors import Conflict
from bitquota.service.jobs.kinds import kind_by_name

if TYPE_CHECKING:
    from sqlalchemy.engine import Row

    from bitquota.canonical import JsonObject
    from bitquota.service.store.formats import ArtifactKind


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
        """Return the digest that tells two submissions under one idempotency key apart."""
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
    peak_bytes: int
    version: int
    worker_s: float
    webhook: str | None

    @property
    def asked(self) -> JsonObject:
        """What was asked of a plan, by its job or by one around it, with effort and rounding."""
        plan = self.request.get("plan")
        request = plan if isinstance(plan, dict) else self.request
        # A request leaves these out where they are the usual.
        usual = {"effort": "normal", "rounding": "auto"} if "samples" in request else {}
        return usual | request


def digests_by_role(job: NewJob | Job) -> dict[str, list[str]]:
    """Return the digests of all uploads of a job, by their role in the submission."""
    named = {"model": job.model, "dataset": job.dataset}
    return {role: [digest] for role, digest in named.items() if digest is not None} | job.inputs


_JSON_COLUMNS = ("inputs", "request", "labels", "progress", "error", "results")


def job_of(row: Row[Any]) -> Job:
    """Return the job in a row of the job table."""
    values = dict(row._mapping)  # noqa: SLF001  # SQLAlchemy's public name for it
    for name in _JSON_COLUMNS:
        if values[name] is not None:
            values[name] = json.loads(values[name])
    values["status"] = JobStatus(values["status"])
    return Job(**values)


class LeaseLost(Conflict):
    """The job was given to another driver; this one must stop and change nothing."""

    slug = "lease-lost"


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


def new_id(prefix: str, now: float) -> str:
    """Return an unguessable id whose order is that of time: ``job_`` and 32 digits."""
    return f"{prefix}_{int(now * 1000):012x}{secrets.token_hex(10)}"


def ended_body(job_id: str, kind: str, status: str, finished_at: float) -> str:
    """Return what is sent when a job has ended; the rest is fetched with a key."""
    at = datetime.fromtimestamp(finished_at, UTC).isoformat()
    data: dict[str, Any] = {"id": job_id, "kind": kind, "status": status, "finished_at": at}
    return canonical_json({"type": f"job.{status}", "timestamp": at, "data": data})

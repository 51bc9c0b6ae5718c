"""Bodies of the REST API, as pydantic models; endpoints turn them into our types at once."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from bitquota.errors import InvalidInput
from bitquota.progress import stage_words

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bitquota.canonical import JsonObject
    from bitquota.service.jobs.job import Job
    from bitquota.service.store.artifacts import Artifact

DIGEST = r"^sha256:[0-9a-f]{64}$"

BudgetText = Annotated[str, Field(max_length=200)]
Digest = Annotated[str, Field(pattern=DIGEST)]


class ProgressView(BaseModel):
    """How far a job is."""

    stage: str = Field(description="Stable name of what is being done.")
    text: str = Field(description="The same for people.")
    done: int = Field(description="Finished units of the stage.")
    total: int = Field(description="Units of the stage.")
    reused: int = Field(default=0, description="How many of them were in the ledger.")
    fraction: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="How much of the whole job is done; never less than before, 1 at its end.",
    )
    left_s: float | None = Field(
        default=None, ge=0, description="Seconds that it will still take, about; null if unknown."
    )


class JobView(BaseModel):
    """A job as it stands."""

    object: Literal["job"] = "job"
    id: str
    kind: str
    status: Literal["queued", "running", "succeeded", "failed", "cancelled", "expired"]
    model: str | None
    dataset: str | None
    inputs: dict[str, list[str]] = Field(description="Digests of all other uploads, by role.")
    request: dict[str, Any]
    labels: dict[str, str]
    priority: int
    deadline: datetime | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    cancel_requested: bool
    attempts: int
    measured: int = Field(description="Ledger entries and checkpoints that this job wrote.")
    peak_bytes: int = Field(
        description="The most memory that the process which carried the job out took, its "
        "libraries included; 0 before the job has succeeded."
    )
    progress: ProgressView | None
    plans: int = Field(description="How many plans are ready.")
    results: dict[str, str | list[str]] = Field(
        description="Digest, or list of digests, by name of the result; empty before the end."
    )
    error: dict[str, Any] | None = Field(description="problem+json of a job that did not succeed.")


class JobPage(BaseModel):
    """Some jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[JobView]
    has_more: bool
    next_cursor: str | None


class PlanLoss(BaseModel):
    """What a plan measured on the hold-out samples."""

    mean: float
    error: float = Field(description="Standard error.")
    accuracy: float | None
    samples: int


class PlanRow(BaseModel):
    """A plan of a job, without its layers."""

    object: Literal["plan_row"] = "plan_row"
    job: str
    kind: str
    labels: dict[str, str]
    created_at: datetime
    position: int = Field(description="Of its budget among the job's: `?budget=` of its plan.")
    digest: str = Field(description="Of its file, as among the job's results.")
    model: str | None
    model_name: str
    target: str | None
    effort: str | None
    rounding: str | None
    budget: str
    selected: str = Field(description="What was chosen: the plan's own choice, or a baseline.")
    size_bits: int
    average_bits: float
    predicted: float | None
    loss: str
    unit: str | None
    measured: PlanLoss | None


class PlanPage(BaseModel):
    """The plans of some jobs, newest job first."""

    object: Literal["list"] = "list"
    data: list[PlanRow]
    has_more: bool
    next_cursor: str | None = Field(description="Id of the last job that was read.")


class ArtifactView(BaseModel):
    """An upload, or a plan or matrix that a job left."""

    object: Literal["model", "dataset", "plan", "matrix", "quantized"]
    id: str = Field(description="Digest of the content.")
    format: str
    name: str
    size: int
    created_at: datetime


class ReceivedView(BaseModel):
    """How far an upload in pieces is."""

    received: int = Field(description="Bytes that are there; the next piece begins here.")


class ArtifactPage(BaseModel):
    """Some uploads, in order of digest."""

    object: Literal["list"] = "list"
    data: list[ArtifactView]
    has_more: bool
    next_cursor: str | None


class SolveOrder(BaseModel):
    """A matrix and budgets to solve at once."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"job": "job_" + "0" * 32, "budgets": ["3.5 bits"]}]},
    )

    job: str | None = Field(
        default=None, pattern=r"^job_[0-9a-f]{32}$", description="A job that left a matrix."
    )
    matrix: str | None = Field(
        default=None, description="Or the digest of an uploaded matrix, or base64 of one."
    )
    budgets: list[BudgetText] = Field(default=[], max_length=64)
    tables: list[dict[str, Any]] = Field(
        default=[],
        max_length=8,
        description="Cost tables of `bitquota profile`, for budgets of time and energy.",
        json_schema_extra={"items": {"type": "object", "additionalProperties": True}},
    )
    problem: dict[str, Any] | None = Field(
        default=None,
        description="Instead of these three, a whole problem: what `bitquota solve` reads as a "
        "file (`bitquota solve --schema`). Its `matrix` is the id of a job, the digest of an "
        "upload, or base64 of the file.",
        json_schema_extra={"additionalProperties": True},
    )
    explain: bool = Field(default=False, description="Of a problem: what its bits cost and buy.")
    gap: float = Field(default=1e-4, ge=0, lt=1, description="Relative gap to stop at.")
    time_limit_s: float = Field(
        default=0.1, gt=0, le=30, description="For each budget, reading what was sent included."
    )
    seed: int = Field(default=0, ge=0, lt=2**31)


LONGEST_SOLVE_S = 120.0
"""Seconds that all budgets of one ``POST /v1/solve`` may take together."""


class SolvedBudget(BaseModel):
    """The best choice that was found for one budget."""

    budget: str
    limits: list[dict[str, Any]] = Field(description="What the budget means for this model.")
    status: str
    limit: str | None = Field(description="What stopped the solver, if something did.")
    predicted: float | None = Field(description="Predicted loss increase.")
    bound: float | None = Field(description="No choice is predicted below this.")
    absolute_gap: float | None
    relative_gap: float | None
    assignments: dict[str, dict[str, Any]] = Field(description="By layer; empty if none was found.")


class SolveAnswer(BaseModel):
    """One answer for each budget, in their order."""

    object: Literal["list"] = "list"
    data: list[SolvedBudget]


class ProblemAnswer(BaseModel):
    """The answer to a problem: what `bitquota solve --json` prints."""

    model_config = ConfigDict(extra="allow")

    object: Literal["solution"] = "solution"
    status: str
    limit: str | None = Field(description="What stopped the solver, if something did.")
    groups: list[str]
    choice: list[int] | None = Field(description="By group, which of its candidates.")
    labels: list[str] | None = Field(description="Their names.")
    objective: float | None = Field(description="Predicted loss increase.")
    bound: float | None = Field(description="No choice is predicted below this.")
    absolute_gap: float | None
    relative_gap: float | None
    spent: dict[str, int] | None = Field(description="By resource.")
    limits: dict[str, int]


class PlanList(BaseModel):
    """The plans of a job, one for each budget in the order of the request."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]


class Problem(BaseModel):
    """RFC 9457 problem details; `type` ends with a stable name of the error."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:bitquota:problem:not-found",
                    "title": "No such resource (also: not yours).",
                    "status": 404,
                    "detail": "the job must exist; there is no job 'job_0'",
                    "details": {"job": "job_0"},
                }
            ]
        }
    )

    type: str
    title: str
    status: int
    detail: str
    details: dict[str, Any]
    instance: str | None = None


def invalid_request(errors: Sequence[Mapping[str, Any]]) -> InvalidInput:
    """Return one error for what pydantic found wrong with a request."""
    found = [
        {"where": ".".join(map(str, e["loc"]))[:200], "what": str(e["msg"])[:500]}
        for e in errors[:50]
    ]
    said = "; ".join(f"{f['where']}: {f['what']}" for f in found[:3])
    return InvalidInput(f"a request must follow the documented schema; got {said}", errors=found)


def job_view(job: Job) -> JobView:
    """Return what a client sees of a job."""
    return JobView(
        id=job.id,
        kind=job.kind,
        status=job.status.value,
        model=job.model,
        dataset=job.dataset,
        inputs=job.inputs,
        request=job.request,
        labels=job.labels,
        priority=job.priority,
        deadline=_time(job.deadline),
        created_at=datetime.fromtimestamp(job.created_at, UTC),
        started_at=_time(job.started_at),
        finished_at=_time(job.finished_at),
        cancel_requested=job.cancel_requested,
        attempts=job.attempts,
        measured=job.measured,
        peak_bytes=job.peak_bytes,
        progress=None if job.progress is None else ProgressView(**progress_said(job.progress)),
        results=job.results or {},
        plans=len((job.results or {}).get("plans", ())),
        error=job.error,
    )


def progress_said(progress: JsonObject) -> JsonObject:
    """Return progress as clients see it; that of an earlier release has no words."""
    return {"text": stage_words(progress["stage"])} | progress


def artifact_view(artifact: Artifact) -> ArtifactView:
    """Return what a client sees of an upload."""
    return ArtifactView(
        object=artifact.kind.value,
        id=artifact.digest,
        format=artifact.format,
        name=artifact.name,
        size=artifact.size,
        created_at=datetime.fromtimestamp(artifact.created_at, UTC),
    )


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)

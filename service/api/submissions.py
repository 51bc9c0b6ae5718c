"""What clients submit: one pydantic model for each kind of job, made from its value.

Design: docs/design/jobs.md
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from fastapi import Body
from pydantic import BaseModel, ConfigDict, Field, create_model

from bitquota.service.api.request_limits import MOST_LABELS, check_labels, check_request
from bitquota.service.api.schemas import Digest
from bitquota.service.jobs.job import NewJob
from bitquota.service.jobs.kinds import KINDS, kind_by_name
from bitquota.service.security.keys import HIGHEST_PRIORITY, LOWEST_PRIORITY

if TYPE_CHECKING:
    from bitquota.service.jobs.kinds import Input, JobKind

MOST_PLANS = 64


class Submission(BaseModel):
    """What every submission may say."""

    model_config = ConfigDict(extra="forbid")

    kind: str
    request: Any
    labels: dict[str, str] = Field(
        default_factory=dict,
        max_length=MOST_LABELS,
        description="Free names and values, for finding it.",
    )
    priority: int = Field(
        default=0,
        ge=LOWEST_PRIORITY,
        le=HIGHEST_PRIORITY,
        description="Higher runs earlier; a key has a highest one, by default 0.",
    )
    deadline_s: float | None = Field(
        default=None, gt=0, le=30 * 86400, description="Seconds from now until it must have ended."
    )
    webhook: str | None = Field(
        default=None, max_length=2000, description="URL that is told when the job has ended."
    )


def submission_model(kind: JobKind) -> type[Submission]:
    """Return the model of a submission of ``kind``."""
    fields: dict[str, Any] = {
        "kind": (Literal[kind.name], Field(description=kind.summary)),
        "request": (kind.request, Field(description=f"What a {kind.name} job does.")),
    }
    fields |= {entry.role: _field(entry) for entry in kind.inputs}
    made: type[Submission] = create_model(
        f"{kind.name.capitalize()}Order", __base__=Submission, __doc__=kind.summary, **fields
    )
    return made


def _field(entry: Input) -> tuple[Any, Any]:
    described: dict[str, Any] = {"description": entry.text}
    if entry.many:
        described |= {"min_length": 0 if entry.optional else 1, "max_length": MOST_PLANS}
        described |= {"default_factory": list} if entry.optional else {}
        return list[Digest], Field(**described)
    if entry.optional:
        return Digest | None, Field(default=None, **described)
    return Digest, Field(**described)


_MODELS = tuple(submission_model(kind) for kind in KINDS.values())
EXAMPLES: dict[str, Any] = {
    kind.name: {"summary": kind.summary, "value": {"kind": kind.name} | kind.example}
    for kind in KINDS.values()
}

if TYPE_CHECKING:
    JobSubmission = Submission
else:
    JobSubmission = Annotated[
        Annotated[Union[_MODELS], Field(discriminator="kind")],  # noqa: UP007  # made of a tuple
        Body(openapi_examples=EXAMPLES),
    ]


def new_job(submission: Submission, tenant: str) -> NewJob:
    """Return the job that a submission asks for.

    Raises:
        InvalidInput: The request cannot be done whatever the uploads hold (the subclass says why).
    """
    kind = kind_by_name(submission.kind)
    named: dict[str, list[str]] = {}
    for entry in kind.inputs:
        value = getattr(submission, entry.role)
        if value:
            named[entry.role] = list(value) if entry.many else [value]
    request = submission.request
    if isinstance(request, BaseModel):
        request = request.model_dump(mode="json")
    check_request(request)
    check_labels(submission.labels)
    return NewJob(
        tenant=tenant,
        kind=submission.kind,
        request=kind.accept(request),
        model=named.pop("model", [None])[0],
        dataset=named.pop("dataset", [None])[0],
        inputs=named,
        labels=submission.labels,
        priority=submission.priority,
        deadline=None if submission.deadline_s is None else time.time() + submission.deadline_s,
        webhook=submission.webhook,
    )

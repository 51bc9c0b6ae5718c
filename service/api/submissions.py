"""Orders of jobs as a client sends them: one pydantic model for each kind, made from its value.

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


class Order(BaseModel):
    """What every order may say."""

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


def order_model(kind: JobKind) -> type[Order]:
    """Return the model of an order of ``kind``."""
    fields: dict[str, Any] = {
        "kind": (Literal[kind.name], Field(description=kind.summary)),
        "request": (kind.request, Field(description=f"What a {kind.name} job does.")),
    }
    fields |= {entry.role: _field(entry) for entry in kind.inputs}
    made: type[Order] = create_model(
        f"{kind.name.capitalize()}Order", __base__=Order, __doc__=kind.summary, **fields
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


_MODELS = tuple(order_model(kind) for kind in KINDS.values())
EXAMPLES: dict[str, Any] = {
    kind.name: {"summary": kind.summary, "value": {"kind": kind.name} | kind.example}
    for kind in KINDS.values()
}

if TYPE_CHECKING:
    JobOrder = Order
else:
    JobOrder = Annotated[
        Annotated[Union[_MODELS], Field(discriminator="kind")],  # noqa: UP007  # made of a tuple
        Body(openapi_examples=EXAMPLES),
    ]


def new_job(order: Order, tenant: str) -> NewJob:
    """Return the job that an order asks for.

    Raises:
        InvalidInput: The request cannot be done whatever the uploads hold (the subclass says why).
    """
    kind = kind_by_name(order.kind)
    named: dict[str, list[str]] = {}
    for entry in kind.inputs:
        value = getattr(order, entry.role)
        if value:
            named[entry.role] = list(value) if entry.many else [value]
    request = order.request
    if isinstance(request, BaseModel):
        request = request.model_dump(mode="json")
    check_request(request)
    check_labels(order.labels)
    return NewJob(
        tenant=tenant,
        kind=order.kind,
        request=kind.accept(request),
        model=named.pop("model", [None])[0],
        dataset=named.pop("dataset", [None])[0],
        inputs=named,
        labels=order.labels,
        priority=order.priority,
        deadline=None if order.deadline_s is None else time.time() + order.deadline_s,
        webhook=order.webhook,
    )

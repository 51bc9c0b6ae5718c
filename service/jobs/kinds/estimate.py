"""``estimate``: what another job would take, without running it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict, Field

from bitquota.canonical import canonical_json
from bitquota.estimate import JobEstimate
from bitquota.report.estimate import render_estimate
from bitquota.request import PlanRequest
from bitquota.service.jobs.kinds.compare import CompareRequest
from bitquota.service.jobs.kinds.kind import DATASET, MODEL, JobKind, Result
from bitquota.service.jobs.kinds.plan_request import with_budgets
from bitquota.service.jobs.kinds.results import REPORT, read_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from bitquota.canonical import JsonObject
    from bitquota.service.jobs.work import Work


_MAX_BYTES = 4 * 2**20
"""A tensor that ships as it is takes some hundred bytes."""


class EstimateRequest(CompareRequest):
    """A plan request, and which job with it is estimated."""

    model_config = ConfigDict(extra="forbid")

    job: Literal["plan", "measure", "compare"] = Field(
        default="plan",
        description="The job to estimate; `metrics`, `plans` and `max_passes` are of `compare`.",
    )


def run(work: Work) -> None:
    """Hand over the estimate."""
    from bitquota.search import estimating

    request = work.request
    given = work.measured_model(), work.samples(), PlanRequest.from_json(request["plan"])
    if request["job"] == "compare":
        found = estimating.estimate_compare(
            *given,
            request["metrics"],
            context=work.context,
            plans=request["plans"],
            affordable_passes=request["max_passes"],
        )
    elif request["job"] == "measure":
        found = estimating.estimate_measure(*given, context=work.context)
    else:
        found = estimating.estimate_plan(*given, context=work.context)
    work.give("estimate", canonical_json(found.to_json()).encode())


def accept(request: JsonObject) -> JsonObject:
    """Return the request after reading its budgets, which a mere measurement needs not have."""
    if request["job"] != "measure" or request["plan"]["budgets"]:
        with_budgets(request["plan"])
    return request


def derive(given: Mapping[str, Sequence[Path]]) -> dict[str, bytes]:
    """Return the estimate in words."""
    found = JobEstimate.from_json(read_json(given["estimate"][0]))
    return {"report": render_estimate(found).encode()}


KIND = JobKind(
    name="estimate",
    summary="Say how many passes, how long and how much memory a job would take; measures nothing.",
    inputs=(MODEL, DATASET),
    request=EstimateRequest,
    example={
        "model": "sha256:" + "0" * 64,
        "dataset": "sha256:" + "1" * 64,
        "request": {"job": "plan", "plan": {"budgets": ["3 bits"], "weight_bits": [2, 4, 8]}},
    },
    results=(
        Result(
            name="estimate",
            text="Passes, seconds and memory that are expected, and what the job is about.",
            check=lambda path: JobEstimate.from_json(read_json(path)),
            path="estimate",
            max_bytes=_MAX_BYTES,
        ),
        REPORT,
    ),
    run=run,
    accept=accept,
    derive_from=("estimate",),
    derive=derive,
)

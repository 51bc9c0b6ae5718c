"""``compare``: every metric's plan at every budget, measured."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from bitquota.canonical import canonical_json
from bitquota.report.comparison import Comparison
from bitquota.request import PlanRequest
from bitquota.service.jobs.kinds.kind import DATASET, MODEL, JobKind, Result
from bitquota.service.jobs.kinds.plan_request import PlanRequestBody, with_budgets
from bitquota.service.jobs.kinds.results import REPORT, read_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from bitquota.canonical import JsonObject
    from bitquota.service.jobs.work import Work


class CompareRequest(BaseModel):
    """A plan request, and what to compare."""

    model_config = ConfigDict(extra="forbid")

    plan: PlanRequestBody = Field(description="Budgets, candidates, samples; `measure` is ignored.")
    metrics: list[str] | None = Field(
        default=None, max_length=64, description="Only these; all affordable ones without it."
    )
    plans: int = Field(
        default=12, ge=0, le=1000, description="Random and near-good plans for each budget."
    )
    max_passes: float = Field(
        default=500.0, gt=0, description="Leave out measures that cost more, unless named."
    )


def run(work: Work) -> None:
    """Hand over the comparison."""
    from bitquota.search.compare import compare

    request = work.request
    found = compare(
        work.measured_model(),
        work.samples(),
        PlanRequest.from_json(request["plan"]),
        request["metrics"],
        plans=request["plans"],
        affordable_passes=request["max_passes"],
        context=work.context,
    )
    work.give("comparison", canonical_json(found.to_json()).encode())


def accept(request: JsonObject) -> JsonObject:
    """Return the request after reading its budgets."""
    with_budgets(request["plan"])
    return request


def derive(given: Mapping[str, Sequence[Path]]) -> dict[str, bytes]:
    """Return the report."""
    found = Comparison.from_json(json.loads(given["comparison"][0].read_bytes()))
    return {"report": found.render_markdown().encode()}


KIND = JobKind(
    name="compare",
    summary="Measure a model with every metric, and measure the plans that each leads to.",
    inputs=(MODEL, DATASET),
    request=CompareRequest,
    example={
        "model": "sha256:" + "0" * 64,
        "dataset": "sha256:" + "1" * 64,
        "request": {"plan": {"budgets": ["3 bits"]}, "metrics": ["gram", "diagonal"]},
    },
    results=(
        Result(
            name="comparison",
            text="Every way to choose, over all budgets.",
            check=lambda path: Comparison.from_json(read_json(path)),
            path="comparison",
        ),
        REPORT,
    ),
    run=run,
    accept=accept,
    derive_from=("comparison",),
    derive=derive,
)

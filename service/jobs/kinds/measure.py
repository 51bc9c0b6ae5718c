"""``measure``: the sensitivity matrix alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitquota.request import PlanRequest
from bitquota.service.jobs.kinds.kind import DATASET, MODEL, JobKind
from bitquota.service.jobs.kinds.plan_request import PlanRequestBody
from bitquota.service.jobs.kinds.results import MATRIX

if TYPE_CHECKING:
    from bitquota.canonical import JsonObject
    from bitquota.service.jobs.work import Work


def run(work: Work) -> None:
    """Hand over the matrix."""
    from bitquota.search.allocate import measure_matrix

    found = measure_matrix(
        work.measured_model(),
        work.samples(),
        PlanRequest.from_json(work.request),
        context=work.context,
    )
    work.give("matrix", found.to_bytes())


def accept(request: JsonObject) -> JsonObject:
    """Return the request; a measurement needs no budget."""
    return request


KIND = JobKind(
    name="measure",
    summary="Measure the sensitivity matrix of a model.",
    inputs=(MODEL, DATASET),
    request=PlanRequestBody,
    example={
        "model": "sha256:" + "0" * 64,
        "dataset": "sha256:" + "1" * 64,
        "request": {"weight_bits": [2, 4, 8], "samples": 256},
    },
    results=(MATRIX,),
    run=run,
    accept=accept,
)

"""``plan``: measure a model, solve for every budget, verify by measuring."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitquota.canonical import canonical_json
from bitquota.request import PlanRequest
from bitquota.service.jobs.kinds.kind import DATASET, MODEL, JobKind
from bitquota.service.jobs.kinds.plan_request import PlanRequestBody, with_budgets
from bitquota.service.jobs.kinds.results import (
    CERTIFICATES,
    INVENTORY,
    MATRIX,
    PLANS,
    QUANTIZED_WEIGHTS,
    REPORT,
    report_of_plans,
)

if TYPE_CHECKING:
    from bitquota.service.jobs.work import Work


def run(work: Work) -> None:
    """Hand over the matrix, the inventory, and a plan with its certificate for each budget."""
    from bitquota.search.allocate import allocate

    found = allocate(
        work.measured_model(),
        work.samples(),
        PlanRequest.from_json(work.request),
        context=work.context,
    )
    work.give("matrix", found.matrix.to_bytes())
    work.give("inventory", canonical_json(found.inventory.to_json()).encode())
    for plan in found.plans:
        work.give("plans", plan.dumps().encode())
    for certificate in found.certificates:
        if certificate is not None:
            work.give("certificates", certificate)
    for weights in found.weights:
        if weights is not None:
            work.give("quantized", weights)


KIND = JobKind(
    name="plan",
    summary="Measure a model and make the best plan for each budget.",
    inputs=(MODEL, DATASET),
    request=PlanRequestBody,
    example={
        "model": "sha256:" + "0" * 64,
        "dataset": "sha256:" + "1" * 64,
        "request": {"budgets": ["3 bits", "12 MiB"], "weight_bits": [2, 4, 8]},
        "labels": {"team": "vision"},
    },
    results=(MATRIX, INVENTORY, PLANS, CERTIFICATES, QUANTIZED_WEIGHTS, REPORT),
    run=run,
    accept=with_budgets,
    derive_from=("plans",),
    derive=report_of_plans,
)

"""``evaluate``: a model in full precision and under plans, on a labelled set."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from bitquota.canonical import canonical_json
from bitquota.errors import InvalidInput
from bitquota.report import evaluation_rows, markdown_table
from bitquota.request import LOSSES
from bitquota.service.inspection import ArtifactKind
from bitquota.service.kinds.kind import CORRECTION_DATA, DATASET, MODEL, Input, JobKind, Result
from bitquota.service.kinds.results import REPORT, read_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from bitquota.canonical import JsonObject
    from bitquota.service.work import Work


class EvaluateRequest(BaseModel):
    """What to run beside the plans themselves."""

    model_config = ConfigDict(extra="forbid")

    baselines: bool = Field(default=False, description="Also evaluate each plan's baselines.")
    loss: str = Field(default="kl", description=f"One of {', '.join(LOSSES)}.")


def run(work: Work) -> None:
    """Hand over what ``bitquota evaluate --json`` prints, and on how many samples."""
    from bitquota.allocate import evaluate_plans

    samples = work.samples()
    found = evaluate_plans(
        work.model(),
        samples,
        work.plans(),
        correction_data=work.samples_if_any("correction_data"),
        with_baselines=work.request["baselines"],
        loss=work.request["loss"],
        device=work.device,
        on_progress=work.on_progress,
    )
    document = {"n_samples": len(samples), "evaluations": [e.to_json() for e in found]}
    work.give("evaluation", canonical_json(document).encode())


def accept(request: JsonObject) -> JsonObject:
    """Return the request; raises ``InvalidInput`` for a loss that is not known."""
    if request["loss"] not in LOSSES:
        msg = f"loss must be one of {', '.join(LOSSES)}; got {request['loss']!r}"
        raise InvalidInput(msg, loss=request["loss"])
    return request


def check(path: Path) -> None:
    """Raise unless the file is such a document."""
    document = read_json(path)
    evaluation_rows(document["evaluations"], ["plan"] * len(document["evaluations"]))
    int(document["n_samples"])


def derive(given: Mapping[str, Sequence[Path]]) -> dict[str, bytes]:
    """Return the report."""
    document = json.loads(given["evaluation"][0].read_bytes())
    evaluations = document["evaluations"]
    names = [f"plan {k + 1}" for k in range(len(evaluations))]
    table = markdown_table(evaluation_rows(evaluations, names))
    return {"report": f"# On {document['n_samples']:,} samples\n\n{table}".encode()}


KIND = JobKind(
    name="evaluate",
    summary="Run a model in full precision and under plans on a labelled set.",
    inputs=(
        MODEL,
        DATASET,
        Input(
            role="plans",
            artifact=ArtifactKind.PLAN,
            text="Digests of plans: uploaded, or left by jobs.",
            many=True,
            optional=True,
        ),
        CORRECTION_DATA,
    ),
    request=EvaluateRequest,
    example={
        "model": "sha256:" + "0" * 64,
        "dataset": "sha256:" + "1" * 64,
        "plans": ["sha256:" + "3" * 64],
        "request": {"baselines": True},
    },
    results=(
        Result(
            name="evaluation",
            text="Loss increase and accuracy of every choice.",
            check=check,
            path="evaluation",
        ),
        REPORT,
    ),
    run=run,
    accept=accept,
    derive_from=("evaluation",),
    derive=derive,
)

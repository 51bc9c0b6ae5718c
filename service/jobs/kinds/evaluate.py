"""``evaluate``: a model in full precision and under plans, on a labelled set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from bitquota.canonical import canonical_json
from bitquota.errors import InvalidInput
from bitquota.evaluate.scores import Score
from bitquota.report.text import markdown_table, score_rows, score_sentences
from bitquota.service.jobs.kinds.kind import (
    CORRECTION_DATA,
    DATASET,
    MODEL,
    QUANTIZED,
    Input,
    JobKind,
    Result,
)
from bitquota.service.jobs.kinds.results import REPORT, read_json
from bitquota.service.store.formats import ArtifactKind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from bitquota.canonical import JsonObject
    from bitquota.service.jobs.work import Work


class EvaluateRequest(BaseModel):
    """What to run beside the plans themselves."""

    model_config = ConfigDict(extra="forbid")

    uniform: bool = Field(
        default=True, description="Also run the widest uniform plan of no more bytes."
    )
    baselines: bool = Field(default=False, description="Also run each plan's other baselines.")
    embedding: bool = Field(
        default=False, description="The output is an embedding rather than logits."
    )
    names: list[Annotated[str, Field(max_length=255)]] | None = Field(
        default=None, max_length=64, description="What to call each plan; by default `plan 1`, …"
    )


def run(work: Work) -> None:
    """Hand over what ``bitquota evaluate --json`` prints, and on how many samples."""
    from bitquota.evaluate.scoring import score_plans

    request = work.request
    model, samples, plans = work.measured_model(), work.samples(), work.plans()
    names = request["names"] or [f"plan {k + 1}" for k in range(len(plans))]
    if len(set(names)) != len(plans):
        msg = f"every plan needs a name of its own; got {len(plans)} plans and the names {names}"
        raise InvalidInput(msg, names=names)
    work.say("evaluate")
    scores = score_plans(
        model,
        samples,
        plans=dict(zip(names, plans, strict=True)),
        original=work.model("original") if work.paths("original") else None,
        correction_data=work.samples_if_any("correction_data"),
        with_uniform=request["uniform"],
        with_baselines=request["baselines"],
        kind="embedding" if request["embedding"] else "logits",
        context=work.context,
    )
    document = {"n_samples": len(samples), "scores": [score.to_json() for score in scores]}
    work.give("evaluation", canonical_json(document).encode())


def accept(request: JsonObject) -> JsonObject:
    """Return the request."""
    return request


def read(path: Path) -> tuple[int, list[Score]]:
    """Return the number of samples and the scores in a file; raises where it holds none."""
    document = read_json(path)
    return int(document["n_samples"]), [Score.from_json(score) for score in document["scores"]]


def derive(given: Mapping[str, Sequence[Path]]) -> dict[str, bytes]:
    """Return the report."""
    n_samples, scores = read(given["evaluation"][0])
    lines = "\n".join(f"- {line}" for line in score_sentences(scores))
    text = f"# On {n_samples:,} samples\n\n{markdown_table(score_rows(scores))}\n{lines}\n"
    return {"report": text.encode()}


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
        QUANTIZED,
        Input(
            role="original",
            artifact=ArtifactKind.MODEL,
            text="Of a trained model, what it was trained from: full precision and uniform are "
            "this model's.",
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
            check=read,
            path="evaluation",
        ),
        REPORT,
    ),
    run=run,
    accept=accept,
    derive_from=("evaluation",),
    derive=derive,
)

"""``finetune``: train a model under a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitquota.service.checkpoints import sent_checkpoints
from bitquota.service.inspection import ArtifactKind
from bitquota.service.kinds.kind import DATASET, MODEL, Input, JobKind
from bitquota.service.kinds.results import PLANS, REPORT, report_of_plans
from bitquota.service.kinds.training_request import (
    TRAINED_MODEL,
    TRAINING,
    WEIGHTS,
    TrainingBody,
    check_names,
    hand_over,
    settings_from,
)

if TYPE_CHECKING:
    from bitquota.canonical import JsonObject
    from bitquota.service.work import Work

CHECKPOINTS = ("finetune.safetensors",)


def run(work: Work) -> None:
    """Hand over the plan of the trained weights, the weights, and the history."""
    from bitquota.bridge import finetune_plan
    from bitquota.training.settings import TrainingSettings

    (plan,) = work.plans("plan")
    model = work.model()
    with sent_checkpoints(work, model.module) as kept:
        found = finetune_plan(
            model,
            plan,
            work.samples(),
            settings_from(work.request, TrainingSettings()),
            method=work.request["method"],
            checkpoint=kept.path(CHECKPOINTS[0]),
            **kept.running,
        )
    hand_over(work, found)


def accept(request: JsonObject) -> JsonObject:
    """Return the request; raises ``InvalidInput`` for names that are not known."""
    check_names(request)
    return request


KIND = JobKind(
    name="finetune",
    summary="Train a model under a plan; the dataset is labelled training data.",
    inputs=(
        MODEL,
        DATASET,
        Input(
            role="plan",
            artifact=ArtifactKind.PLAN,
            text="Digest of a plan of this model: uploaded, or left by a job.",
        ),
    ),
    request=TrainingBody,
    example={
        "model": "sha256:" + "0" * 64,
        "dataset": "sha256:" + "1" * 64,
        "plan": "sha256:" + "3" * 64,
        "request": {"method": "lsq", "epochs": 5},
    },
    results=(PLANS, WEIGHTS, TRAINED_MODEL, TRAINING, REPORT),
    checkpoints=CHECKPOINTS,
    run=run,
    accept=accept,
    derive_from=("plans",),
    derive=report_of_plans,
)

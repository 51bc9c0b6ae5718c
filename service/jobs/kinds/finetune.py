"""``finetune``: train a model under a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from bitquota.errors import InvalidInput
from bitquota.request import ACTIVATION_FITS
from bitquota.service.jobs.kinds.kind import DATASET, MODEL, QUANTIZED, Input, JobKind
from bitquota.service.jobs.kinds.results import PLANS, REPORT, report_of_plans
from bitquota.service.jobs.kinds.training_request import (
    NESTED,
    TRAINED_MODEL,
    TRAINING,
    WEIGHTS,
    TrainingBody,
    check_names,
    hand_over,
    settings_from,
)
from bitquota.service.jobs.training_checkpoints import sent_checkpoints
from bitquota.service.store.formats import ArtifactKind
from bitquota.training.settings import TrainingSettings

if TYPE_CHECKING:
    from bitquota.canonical import JsonObject
    from bitquota.models.loaded import LoadedModel
    from bitquota.plan import Plan
    from bitquota.service.jobs.training_checkpoints import SentCheckpoints
    from bitquota.service.jobs.work import Work

CHECKPOINTS = ("finetune.safetensors",)


class FinetuneBody(TrainingBody):
    """How to train under a plan."""

    symmetric: bool = Field(
        default=False, description="With `direct`: keep levels mirrored around zero."
    )
    activation_fit: str = Field(
        default="mse",
        max_length=20,
        description="First grids of quantized inputs: `mse` (each tensor's own error), or "
        "`joint`, `chan`, `irls`, which weigh channels.",
    )
    widths: tuple[int, ...] = Field(
        default=(),
        max_length=7,
        description="Train one set of nested codes for these bit-widths of all layers, 2 to 8, and "
        "for the plan if it has no others; with `method` `lsq`.",
    )


def run(work: Work) -> None:
    """Hand over the plan of the trained weights, the weights, and the history."""
    from bitquota.quantizers.channel_fit import ChannelRule
    from bitquota.training.qat import finetune_plan

    fit = work.request["activation_fit"]
    (plan,) = work.plans("plan")
    model = work.model()
    settings = settings_from(work.request, TrainingSettings())
    with sent_checkpoints(work, model.module) as kept:
        if work.request.get("widths"):
            _run_nested(work, model, plan, settings, kept)
            return
        found = finetune_plan(
            model,
            plan,
            work.samples(),
            settings,
            method=work.request["method"],
            symmetric=work.request["symmetric"],
            input_rule=None if fit == "mse" else ChannelRule(fit),
            loss=work.request.get("loss"),
            checkpoint=kept.path(CHECKPOINTS[0]),
            context=kept.context,
        )
    hand_over(work, found)


def _run_nested(
    work: Work, model: LoadedModel, plan: Plan, settings: TrainingSettings, kept: SentCheckpoints
) -> None:
    """Hand over one set of codes with all its plans; weights and model are those of the first."""
    from bitquota.training.nested_plans import PLANNED, finetune_nested

    found = finetune_nested(
        model, plan, work.samples(), work.request["widths"], settings,
        loss=work.request.get("loss"), checkpoint=kept.path(CHECKPOINTS[0]), context=kept.context,
    )  # fmt: skip
    shown = found.trained.get(PLANNED) or next(iter(found.trained.values()))
    hand_over(work, shown)
    for trained in found.trained.values():
        if trained is not shown:
            work.give("plans", trained.plan.dumps().encode())
    path = work.scratch / "nested.safetensors"
    found.save(path)
    work.give("nested", path)


def accept(request: JsonObject) -> JsonObject:
    """Return the request; raises ``InvalidInput`` for names that are not known."""
    check_names(request, activation_fit=ACTIVATION_FITS)
    if request["widths"]:
        _check_nested(request)
    return request


def _check_nested(request: JsonObject) -> None:
    widths = list(request["widths"])
    if not set(widths) <= set(range(2, 9)):
        msg = f"widths must be from 2 to 8; got {widths}"
        raise InvalidInput(msg, widths=widths)
    if request["method"] != "lsq" or request["symmetric"] or request["activation_fit"] != "mse":
        msg = (
            "widths train nested codes with learned steps: leave out method, symmetric and "
            "activation_fit, or widths"
        )
        raise InvalidInput(msg, widths=widths)


KIND = JobKind(
    name="finetune",
    summary="Train a model under a plan; the dataset is training data, labelled or not.",
    inputs=(
        MODEL,
        DATASET,
        Input(
            role="plan",
            artifact=ArtifactKind.PLAN,
            text="Digest of a plan of this model: uploaded, or left by a job.",
        ),
        QUANTIZED,
    ),
    request=FinetuneBody,
    example={
        "model": "sha256:" + "0" * 64,
        "dataset": "sha256:" + "1" * 64,
        "plan": "sha256:" + "3" * 64,
        "request": {"method": "lsq", "epochs": 5},
    },
    results=(PLANS, WEIGHTS, NESTED, TRAINED_MODEL, TRAINING, REPORT),
    checkpoints=CHECKPOINTS,
    run=run,
    accept=accept,
    derive_from=("plans",),
    derive=report_of_plans,
)

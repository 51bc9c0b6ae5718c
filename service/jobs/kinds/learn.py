"""``learn``: learn the bit-widths of a model by gradient, within budgets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from bitquota.candidates.budget import check_budgets
from bitquota.candidates.cost_table import CostTable
from bitquota.request import AUTO_LOSS, DEFAULT_WEIGHT_BITS, RECIPES
from bitquota.service.jobs.kinds.kind import DATASET, MODEL, Input, JobKind
from bitquota.service.jobs.kinds.results import PLANS, REPORT, report_of_plans
from bitquota.service.jobs.kinds.training_request import (
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

if TYPE_CHECKING:
    from bitquota.canonical import JsonObject
    from bitquota.service.jobs.work import Work


class LearnBody(TrainingBody):
    """What to learn, and how to train."""

    budgets: tuple[str, ...] = Field(
        min_length=1,
        max_length=3,
        description="Together: on weights, such as `2.5 bits`, bit operations, times (`5 ms` with "
        "`tables`), and on inputs, such as `act total 96 KiB`.",
    )
    weight_bits: tuple[int, ...] = Field(default=DEFAULT_WEIGHT_BITS, min_length=2, max_length=10)
    activation_bits: tuple[int, ...] = Field(
        default=(), max_length=10, description="Bit-widths on offer to inputs."
    )
    recipe: str = Field(
        default="stabilised", max_length=20, description=f"One of {', '.join(RECIPES)}."
    )
    ties: tuple[tuple[str, ...], ...] = Field(default=(), max_length=1000)
    exclude: tuple[str, ...] = Field(default=(), max_length=1000)
    tables: tuple[dict[str, Any], ...] = Field(
        default=(),
        max_length=2,
        description="Cost tables of `bitquota profile`, for budgets of time and energy.",
    )
    outputs: tuple[str, ...] = Field(
        default=(), max_length=100, description="Outputs that count, `NAME` or `NAME=WEIGHT`."
    )


def run(work: Work) -> None:
    """Hand over the plan that was learned, the weights, and the history."""
    from bitquota.training.learn import default_settings
    from bitquota.training.qat import learn_plan

    request = work.request
    plans = work.plans("plan")
    model = work.model()
    with sent_checkpoints(work, model.module) as kept:
        found = learn_plan(
            model,
            work.samples(),
            request["budgets"],
            request["weight_bits"],
            recipe=request["recipe"],
            method=request["method"],
            activation_bits=request["activation_bits"],
            start=plans[0] if plans else None,
            ties=request["ties"],
            exclude=request["exclude"],
            loss=request.get("loss") or AUTO_LOSS,
            tables=[CostTable.from_json(table) for table in request.get("tables", ())],
            outputs=request.get("outputs", ()),
            settings=settings_from(request, default_settings(request["recipe"])),
            checkpoint_folder=kept.folder,
            context=kept.context,
        )
    hand_over(work, found)


def accept(request: JsonObject) -> JsonObject:
    """Return the request; raises ``InvalidInput`` for names that are not known."""
    check_names(request, recipe=RECIPES)
    tables = [CostTable.from_json(table) for table in request["tables"]]
    check_budgets(request["budgets"], tables)
    return request


KIND = JobKind(
    name="learn",
    summary="Learn bit-widths by gradient and fine-tune; the dataset is training data.",
    inputs=(
        MODEL,
        DATASET,
        Input(
            role="plan",
            artifact=ArtifactKind.PLAN,
            text="Digest of a solved plan of this model to start from.",
            optional=True,
        ),
    ),
    request=LearnBody,
    example={
        "model": "sha256:" + "0" * 64,
        "dataset": "sha256:" + "1" * 64,
        "request": {"budgets": ["2.5 bits"], "recipe": "stabilised", "epochs": 5},
    },
    results=(PLANS, WEIGHTS, TRAINED_MODEL, TRAINING, REPORT),
    checkpoints=("learn.safetensors", "finetune.safetensors"),
    run=run,
    accept=accept,
    derive_from=("plans",),
    derive=report_of_plans,
)

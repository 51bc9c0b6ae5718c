"""What training jobs have in common: how to train, and the results."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from bitquota.candidates.storage import FULL_PRECISION_BITS
from bitquota.canonical import canonical_json
from bitquota.errors import InvalidInput
from bitquota.models.pt2.vetting import vet_pt2
from bitquota.plan import Plan
from bitquota.request import TRAINING_METHODS, parse_losses
from bitquota.service.jobs.kinds.kind import BINARY, Result
from bitquota.service.jobs.kinds.results import check_object
from bitquota.service.store.formats import ArtifactKind
from bitquota.training.settings import AUGMENTATIONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from bitquota.canonical import JsonObject
    from bitquota.service.jobs.work import Work
    from bitquota.training.qat import Trained
    from bitquota.training.settings import TrainingSettings


class TrainingBody(BaseModel):
    """How to train; what is left out takes the method's or recipe's own value."""

    model_config = ConfigDict(extra="forbid")

    method: str = Field(default="lsq", description="`lsq`, `tqt` or `direct`.", max_length=20)
    epochs: int = Field(default=10, ge=1, le=10_000, description="Passes, in each phase.")
    batch_size: int = Field(default=128, ge=2, le=65_536, description="Samples per step.")
    micro_batch: int | None = Field(
        default=None, ge=1, le=65_536, description="Samples that run at once; by default the batch."
    )
    loss: str | None = Field(
        default=None,
        max_length=1000,
        description="Distance to the full-precision output, named as in a plan's request; by "
        "default the plan's, or what the output is.",
    )
    learning_rate: float | None = Field(default=None, ge=0, le=10)
    quantizer_learning_rate: float | None = Field(default=None, ge=0, le=10)
    distillation: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of the loss that follows the full-precision model; all of it where "
        "the dataset has no labels.",
    )
    channel_weight: float = Field(
        default=0.0,
        ge=0,
        le=1e6,
        description="With quantized inputs: weight of the mean relative error of their channels.",
    )
    holdout_fraction: float = Field(
        default=0.1, gt=0, lt=1, description="Share of the dataset that selects."
    )
    patience: int | None = Field(default=None, ge=1)
    augmentation: str = Field(default="none", max_length=20, description="`none`, `shift_flip`.")
    mixed_precision: bool = Field(
        default=False,
        description="Steps in bfloat16: for GPUs and CPUs with AMX; others are ten times slower.",
    )
    seed: int = Field(default=0, ge=0, le=2**31)


SETTINGS = (
    "epochs", "batch_size", "micro_batch", "learning_rate", "quantizer_learning_rate",
    "distillation", "channel_weight", "holdout_fraction", "patience", "augmentation",
    "mixed_precision", "seed",
)  # fmt: skip
"""Members of the body that are training settings under the same name."""


def check_names(request: JsonObject, **own: Sequence[str]) -> None:
    """Raise ``InvalidInput`` for a method, an augmentation or an ``own`` name that there is not.

    ``own`` lists what a kind of job has besides: the known names by member of its submission.
    """
    named: dict[str, Sequence[str]] = {"method": TRAINING_METHODS, "augmentation": AUGMENTATIONS}
    for member, known in (named | own).items():
        if request[member] not in known:
            msg = f"{member} must be one of {', '.join(known)}; got {request[member]!r}"
            raise InvalidInput(msg, **{member: request[member]})
    if request["loss"] is not None:
        parse_losses(request["loss"])


def settings_from(request: JsonObject, defaults: TrainingSettings) -> TrainingSettings:
    """Return the defaults with what the submission says."""
    from dataclasses import replace

    given: dict[str, Any] = {k: request[k] for k in SETTINGS if request.get(k) is not None}
    return replace(defaults, **given)


def hand_over(work: Work, found: Trained) -> None:
    """Give plan, weights and history, and the model where ``torch.export`` can write it."""
    from dataclasses import asdict

    from bitquota.training.qat import write_pt2
    from bitquota.training.saved import save_trained

    program = work.scratch / "trained.pt2"
    # A courtesy, as on the command line: without it the weights are still complete.
    with contextlib.suppress(Exception):
        found = write_pt2(found, work.samples(), program)
    path = work.scratch / "trained.safetensors"
    save_trained(found.model, path)
    work.give("plans", found.plan.dumps().encode())
    work.give("weights", path)
    history = {
        "learning": None if found.learning is None else asdict(found.learning),
        "finetuning": asdict(found.model.record),
    }
    work.give("training", canonical_json(history).encode())
    if program.exists():
        work.give("trained_model", program)


def check_weights(path: Path) -> None:
    """Raise unless the file is a whole safetensors file with our description."""
    description, names = _described(path, "weights")
    _require_codes(description["layers"], names, "quantized.{}.codes")


def check_nested(path: Path) -> None:
    """Raise unless the file is a whole safetensors file with plans, and codes for their layers."""
    description, names = _described(path, "nested codes")
    for document in description["plans"].values():
        plan = Plan.from_json(document)
        kept = [a for a in plan.assignments if a.candidate.weight_bits != FULL_PRECISION_BITS]
        _require_codes([a.layer.name for a in kept], names, "codes.{}")


def _described(path: Path, what: str) -> tuple[JsonObject, set[str]]:
    """Return what a safetensors file says about itself, and the names in it."""
    import json

    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            return json.loads((file.metadata() or {})["bitquota"]), set(file.keys())
    except SafetensorError as err:
        msg = f"the {what} must be a safetensors file; got: {err}"
        raise InvalidInput(msg) from err


def _require_codes(layers: Iterable[str], names: set[str], pattern: str) -> None:
    missing = [n for n in layers if pattern.format(n) not in names]
    if missing:
        msg = f"the weights must have the codes of every layer; {missing[0]!r} has none"
        raise InvalidInput(msg, layers=missing)


WEIGHTS = Result(
    name="weights",
    text="The trained model as safetensors: weights to run, and the codes that they come from.",
    check=check_weights,
    path="weights",
    media_type=BINARY,
    suffix=".safetensors",
    max_bytes=16 * 2**30,
)
NESTED = Result(
    name="nested",
    text="With `widths`: one set of nested codes as safetensors, and all plans that it serves.",
    check=check_nested,
    path="nested",
    media_type=BINARY,
    suffix=".safetensors",
    optional=True,
    max_bytes=16 * 2**30,
)
TRAINED_MODEL = Result(
    name="trained_model",
    text="The trained model as a `.pt2`, for other jobs to name, where one can be made of it.",
    check=vet_pt2,
    path="trained-model",
    media_type=BINARY,
    suffix=".pt2",
    optional=True,
    max_bytes=16 * 2**30,
    keep_as=ArtifactKind.MODEL,
)
TRAINING = Result(
    name="training",
    text="Losses and accuracies of every epoch.",
    check=check_object,
    path="training",
)

"""Train a full-precision model a little, so that it stands quantization better before a plan.

References:
    [GradientL1] M. Alizadeh, A. Behboodi, M. van Baalen, C. Louizos, T. Blankevoort, M. Welling,
    "Gradient l1 Regularization for Quantization Robustness", ICLR 2020, arXiv 2002.07520.
    [DropBits] J. H. Lee, J. Yun, S. J. Hwang, E. Yang, "Cluster-Promoting Quantization with
    Bit-Drop for Minimizing Network Quantization Loss", ICCV 2021, arXiv 2109.02100 (a variant).

Design: docs/design/training.md
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitquota.candidates.storage import Scheme
from bitquota.candidates.table import Candidate
from bitquota.errors import InvalidCalibration, InvalidInput
from bitquota.evaluate.metrics import BATCH, measure_module
from bitquota.models.loaded import inventory_of
from bitquota.quantizers.apply import apply_plan
from bitquota.quantizers.corrections import reestimate_batch_norm
from bitquota.request import AUTO_LOSS, DEFAULT_WEIGHT_BITS, ROBUST
from bitquota.training.finetune import grouped
from bitquota.training.loop import STATISTICS_SAMPLES, train
from bitquota.training.prepared import prepared
from bitquota.training.settings import TrainingSettings
from bitquota.training.weight_quantizers import trainable_weight

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from bitquota.candidates.layers import Inventory, Layer
    from bitquota.context import Context
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel
    from bitquota.plan import MeasuredLoss
    from bitquota.sensitivity.losses import Loss
    from bitquota.training.loop import TrainingRecord

GRADIENT_WEIGHT = 0.05
"""What the l1 norm of the gradient counts for in the loss."""

SHOWN_BITS = (2, 3, 4)
"""Uniform bit-widths that are measured before and after."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Robust:
    """A model that was trained to be quantized.

    Attributes:
        module: In full precision, in eval mode; it returns what the model returned.
        record: What the run did.
        full_precision: Distance of the new model to the one before, on the hold-out.
        uniform: By bit-width: distance to the model before, of that model and of the new one, both
            rounded to nearest with batch-norm statistics re-estimated, on the hold-out.
    """

    module: nn.Module
    record: TrainingRecord
    full_precision: MeasuredLoss
    uniform: dict[int, tuple[MeasuredLoss, MeasuredLoss]]


class RobustModel(nn.Module):
    """A full-precision model in training, with one of the two ways or neither.

    ``gradient`` leaves weights alone and tells the loop to add the l1 norm of the loss's gradient,
    ``gradient_weight * sum |dL/dw|``, to the loss: that is what an error of at most d in every
    weight can cost to first order, divided by d. ``dropbits`` rounds each layer at every step to a
    bit-width drawn at random, or not at all, with learned steps for each width; gradients pass
    straight through to the weights.

    Args:
        model: The model; it is copied.
        layers: The layers that a plan may quantize.
        widths: Bit-widths that are drawn from; empty for none.
        gradient_weight: What the norm of the gradient counts for.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        widths: Sequence[int] = (),
        gradient_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.layers, self.gradient_weight = tuple(layers), gradient_weight
        self.quantizers = nn.ModuleList(
            nn.ModuleList(
                trainable_weight(
                    "lsq", self.latent(layer), layer, Candidate.of(layer, bits, Scheme())
                )
                for bits in widths
            )
            for layer in layers
        )

    def latent(self, layer: Layer) -> Tensor:
        """Return the weight of a layer."""
        return self.model.get_parameter(layer.weight_name)

    def watched(self) -> list[Tensor]:
        """Return the weights whose gradients shall be small."""
        return [self.latent(layer) for layer in self.layers] if self.gradient_weight else []

    def parameter_groups(self, settings: TrainingSettings) -> list[dict[str, Any]]:
        """Return groups for weights, biases and norms, and steps."""
        return grouped(self.model, self.quantizers, settings)

    def weights(self) -> dict[str, Tensor]:
        """Return rounded weights of some layers, drawn anew; none outside of training."""
        found: dict[str, Tensor] = {}
        if not self.model.training:
            return found
        for layer, quantizers in zip(self.layers, self.quantizers, strict=True):
            drawn = int(torch.randint(len(quantizers) + 1, ()))  # type: ignore[arg-type]
            if drawn < len(quantizers):  # type: ignore[arg-type]
                found[layer.weight_name] = quantizers[drawn].fake(self.latent(layer))  # type: ignore[index]
        return found

    def input_quantizers(self, weights: dict[str, Tensor]) -> AbstractContextManager[object]:
        """Inputs stay in full precision."""
        del weights
        return nullcontext()

    def penalty(self, progress: float) -> float:
        """Return nothing: there is no size."""
        del progress
        return 0.0

    def before_step(self) -> None:
        """Gradients stay as they are."""

    def after_step(self) -> None:
        """Parameters stay as they are."""

    def is_eligible(self) -> bool:
        """Every state may be kept."""
        return True


def make_robust(
    model: LoadedModel,
    data: CalibrationSet,
    settings: TrainingSettings | None = None,
    *,
    way: str = "dropbits",
    weight_bits: Sequence[int] = DEFAULT_WEIGHT_BITS,
    gradient_weight: float = GRADIENT_WEIGHT,
    exclude: Sequence[str] = (),
    loss: str | Loss | None = None,
    checkpoint: Path | None = None,
    context: Context | None = None,
) -> Robust:
    """Train ``model`` so that a plan made for the result loses less.

    Args:
        model: The full-precision model, which also teaches.
        data: Training samples, never the test set; with labels for ``gradient``.
        settings: How to train.
        way: ``gradient`` or ``dropbits``.
        weight_bits: With ``dropbits``: bit-widths that are drawn from.
        gradient_weight: With ``gradient``: what the norm counts for.
        exclude: Layers that will stay in full precision.
        loss: Distance to the output before, as in ``PlanRequest`` or one's own.
        checkpoint: File for resuming.
        context: Whom to tell, when to stop, and where to run.

    Raises:
        InvalidInput: An unknown way, or a number out of range.
        InvalidCalibration: ``gradient`` without labels: at its own output a model's gradient is
            zero, and nothing would be learned.
        Cancelled: The context said so; the checkpoint continues the run.

    Cost: a training of that length; with ``gradient`` about twice as much for the second
    derivatives. The last state is kept: what a plan will lose, the hold-out does not see.
    """
    _check(way, weight_bits, gradient_weight, data)
    settings = TrainingSettings() if settings is None else settings
    if way == "gradient" and settings.compiled:
        msg = "second derivatives cannot be compiled: train without compiling"
        raise InvalidInput(msg)
    ready = prepared(model, data, loss=loss or AUTO_LOSS, context=context)
    teacher, samples = ready.model.module, ready.samples
    inventory = inventory_of(ready.plain.module, model, samples)
    if exclude:
        inventory = inventory.exclude(exclude)
    widths = sorted(set(weight_bits)) if way == "dropbits" else []
    weight = gradient_weight if way == "gradient" else 0.0
    trainee = RobustModel(teacher, inventory.layers, widths, weight)
    record = train(
        trainee,
        teacher,
        samples,
        settings,
        identity={"model": model.digest, "robust": way, "bits": widths, "weight": weight},
        checkpoint=checkpoint,
        stage="finetune",
        keep_last=True,
        loss=ready.loss,
        context=context,
    )
    fit, holdout = samples.split(settings.holdout_fraction, settings.seed)

    # What it was for: uniform bit-widths before and after.
    def measured(module: nn.Module) -> MeasuredLoss:
        return measure_module(
            module, teacher, holdout, loss=ready.loss, kind=ready.kind,
            batch_size=settings.micro_batch or BATCH,
        )  # fmt: skip

    made = trainee.model.eval()
    return Robust(
        module=ready.returning(made),
        record=record,
        full_precision=measured(made),
        uniform={
            bits: (
                measured(_uniform(teacher, inventory, bits, fit)),
                measured(_uniform(made, inventory, bits, fit)),
            )
            for bits in SHOWN_BITS
        },
    )


def _check(
    way: str, weight_bits: Sequence[int], gradient_weight: float, data: CalibrationSet
) -> None:
    if way not in ROBUST:
        msg = f"robustness must be one of {', '.join(ROBUST)}; got '{way}'"
        raise InvalidInput(msg, way=way)
    if way == "dropbits" and not (weight_bits and 1 <= min(weight_bits) <= max(weight_bits) <= 16):
        msg = f"dropbits draws from bit-widths of 1 to 16; got {sorted(set(weight_bits))}"
        raise InvalidInput(msg, weight_bits=sorted(set(weight_bits)))
    if way == "gradient" and gradient_weight <= 0:
        msg = f"the weight of the gradient's norm must be above 0; got {gradient_weight}"
        raise InvalidInput(msg, gradient_weight=gradient_weight)
    if way == "gradient" and data.labels is None:
        msg = (
            "small gradients need a labelled set, because the distance to a model's own output has "
            "none; this one has no labels: add them, or take 'dropbits'"
        )
        raise InvalidCalibration(msg)


def _uniform(module: nn.Module, inventory: Inventory, bits: int, fit: CalibrationSet) -> nn.Module:
    """Return the model with all layers at ``bits``, batch norms re-estimated."""
    candidates = [Candidate.of(layer, bits, Scheme()) for layer in inventory.layers]
    found = apply_plan(module, inventory, candidates)
    reestimate_batch_norm(found, fit.first(STATISTICS_SAMPLES))
    return found

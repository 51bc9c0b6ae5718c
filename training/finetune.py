"""Fine-tune a model whose layers are quantized as a plan says.

References:
    [LSQ] S. Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv 1902.08153.
    [Hoang20] T. Hoang et al., "Direct Quantization for Training Highly Accurate Low Bit-width Deep
    Neural Networks", IJCAI 2020, arXiv 2012.13762 (method ``direct``; a reconstruction).
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitquota.errors import InvalidInput
from bitquota.plan import MeasuredLoss
from bitquota.quantizers.codebook import StoredCodebook
from bitquota.quantizers.layout import from_matrix
from bitquota.sensitivity.losses import loss_by_name, n_correct
from bitquota.sensitivity.measure import standard_error
from bitquota.sensitivity.runner import run_module
from bitquota.storage import FULL_PRECISION_BITS
from bitquota.training.loop import TrainingRecord, train
from bitquota.training.settings import TrainingSettings
from bitquota.training.weight_quantizers import trainable_weight

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from bitquota.candidates import Candidate, Inventory, Layer
    from bitquota.progress import IsCancelled, OnProgress
    from bitquota.quantizers.weights import QuantizedWeight
    from bitquota.sensitivity.calibration import CalibrationSet


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainedModel:
    """A fine-tuned model.

    Attributes:
        module: A copy of the model with the dequantized weights in place, in eval mode.
        stored: What each quantized layer takes on disk, by layer name.
        candidates: The quantization of each layer that was trained under.
        size_bits: Exact bits of the quantized layers, scales or levels included.
        record: What the run did.
    """

    module: nn.Module
    stored: dict[str, QuantizedWeight | StoredCodebook]
    candidates: tuple[Candidate, ...]
    size_bits: int
    record: TrainingRecord


class FixedPlan(nn.Module):
    """A model with one trainable quantized weight for each layer.

    Args:
        model: The model; it is copied.
        layers: The layers that are quantized.
        candidates: Their quantization, in the same order.
        method: ``lsq`` or ``direct``.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        candidates: Sequence[Candidate],
        method: str,
    ) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.layers = tuple(layers)
        self.quantizers = nn.ModuleList(
            [
                trainable_weight(method, self.latent(layer), layer, candidate)
                for layer, candidate in zip(layers, candidates, strict=True)
            ]
        )

    def latent(self, layer: Layer) -> Tensor:
        """Return the full-precision weight that training moves."""
        return self.model.get_parameter(layer.weight_name)

    def parameter_groups(self, settings: TrainingSettings) -> list[dict[str, Any]]:
        """Return groups for weights, biases and norms, and quantizers."""
        return grouped(self.model, self.quantizers, settings)

    def weights(self) -> dict[str, Tensor]:
        """Return the quantized weights."""
        return {
            layer.weight_name: quantizer.fake(self.latent(layer))  # type: ignore[operator]
            for layer, quantizer in zip(self.layers, self.quantizers, strict=True)
        }

    def input_quantizers(self) -> AbstractContextManager[object]:
        """Leave the layers' inputs as they are."""
        return nullcontext()

    def penalty(self, progress: float) -> float:
        """Return nothing: the size is fixed."""
        del progress
        return 0.0

    def before_step(self) -> None:
        """Gradients stay as they are."""

    def after_step(self) -> None:
        """Let each quantizer follow its weight."""
        for layer, quantizer in zip(self.layers, self.quantizers, strict=True):
            quantizer.after_step(self.latent(layer).data)  # type: ignore[operator]

    def is_eligible(self) -> bool:
        """Every state fits the plan."""
        return True

    def stored(self) -> dict[str, QuantizedWeight | StoredCodebook]:
        """Return what each layer takes on disk."""
        return {
            layer.name: quantizer.stored(self.latent(layer))  # type: ignore[operator]
            for layer, quantizer in zip(self.layers, self.quantizers, strict=True)
        }


def grouped(
    model: nn.Module, quantizers: nn.Module, settings: TrainingSettings
) -> list[dict[str, Any]]:
    """Return optimizer groups; weights with several dimensions decay, and quantizers if asked."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in parameters if p.ndim > 1],
            "lr": settings.learning_rate,
            "weight_decay": settings.weight_decay,
        },
        {
            "params": [p for p in parameters if p.ndim <= 1],
            "lr": settings.learning_rate,
            "weight_decay": 0.0,
        },
        {
            "params": list(quantizers.parameters()),
            "lr": settings.quantizer_learning_rate,
            "weight_decay": settings.quantizer_weight_decay,
        },
    ]
    return [group for group in groups if group["params"]]


def finetune(
    module: nn.Module,
    inventory: Inventory,
    candidates: Sequence[Candidate],
    data: CalibrationSet,
    settings: TrainingSettings | None = None,
    *,
    method: str = "lsq",
    start: nn.Module | None = None,
    checkpoint: Path | None = None,
    on_progress: OnProgress | None = None,
    cancelled: IsCancelled | None = None,
) -> TrainedModel:
    """Train the model under a fixed plan.

    Args:
        module: The full-precision model, which also teaches when ``settings`` ask for it.
        inventory: Its layers.
        candidates: One for each layer that is quantized; full-precision ones are left out.
        data: Labelled samples; never the test set.
        settings: How to train.
        method: ``lsq`` learns steps and keeps each candidate's format and exact size. ``direct``
            learns ``2^bits`` levels per tensor (another format, counted as such).
        start: Where the weights start, if not at ``module``.
        checkpoint: File for resuming.
        on_progress: Called after every step.
        cancelled: Asked before every step.

    Raises:
        InvalidInput: Nothing to train, an unknown method, activation bits (not trained here), or
            a checkpoint of another run.
        InvalidCalibration: Labels are missing.
        MeasurementFailed: The loss is not finite.
        Cancelled: ``cancelled`` said so; the checkpoint continues the run.

    Cost: see ``training.loop.train``. The result is the best epoch on the hold-out.
    """
    settings = TrainingSettings() if settings is None else settings
    chosen = [c for c in candidates if c.weight_bits != FULL_PRECISION_BITS]
    if not chosen:
        msg = "fine-tuning needs at least one quantized layer; all are in full precision"
        raise InvalidInput(msg)
    if any(c.activation_bits is not None for c in chosen):
        msg = (
            "fine-tuning trains quantized weights; this plan has quantized activations too: "
            "train with activations in full precision and calibrate them afterwards"
        )
        raise InvalidInput(msg)
    layers = [inventory.layer(c.layer) for c in chosen]
    plan = FixedPlan(module if start is None else start, layers, chosen, method)
    identity = {
        "model": inventory.model_digest,
        "candidates": [c.to_json() for c in chosen],
        "method": method,
    }
    record = train(
        plan,
        module,
        data,
        settings,
        identity=identity,
        checkpoint=checkpoint,
        stage="finetune",
        on_progress=on_progress,
        cancelled=cancelled,
    )
    return finished(plan, chosen, record)


def finished(
    plan: FixedPlan, candidates: Sequence[Candidate], record: TrainingRecord
) -> TrainedModel:
    """Return the model as it ships: weights read back from what is stored."""
    stored = plan.stored()
    size_bits = 0
    with torch.no_grad():
        for layer, candidate in zip(plan.layers, candidates, strict=True):
            weight = stored[layer.name]
            if isinstance(weight, StoredCodebook):
                value = weight.dequantize()
                size_bits += 8 * weight.n_bytes
            else:
                value = from_matrix(weight.dequantize(), layer)
                size_bits += candidate.size_bits
            plan.latent(layer).copy_(value)
    return TrainedModel(
        module=plan.model.eval(),
        stored=stored,
        candidates=tuple(candidates),
        size_bits=size_bits,
        record=record,
    )


def measure_trained(
    trained: nn.Module, teacher: nn.Module, data: CalibrationSet, *, batch_size: int = 64
) -> MeasuredLoss:
    """Return the divergence of a trained model to the full-precision one, and its accuracy.

    Args:
        trained: The trained model in eval mode.
        teacher: The full-precision model.
        data: Samples that were not trained on.
        batch_size: Samples per pass.

    Cost: one forward pass of each model over ``data``.
    """
    loss = loss_by_name("kl")
    values, right = [], 0.0
    with torch.no_grad():
        for batch in data.batches(batch_size):
            output = run_module(trained, batch.inputs)
            reference = run_module(teacher, batch.inputs)
            values.append(loss.per_sample(output, reference, batch.labels))
            if batch.labels is not None:
                right += float(n_correct(output, batch.labels).sum())
    losses = torch.cat(values).double().cpu().numpy()
    return MeasuredLoss(
        mean=float(losses.mean()),
        standard_error=float(standard_error(losses)),
        n_samples=len(losses),
        unit=loss.unit,
        accuracy=None if data.labels is None else right / len(losses),
    )

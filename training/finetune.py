"""Fine-tune a model whose layers are quantized as a plan says.

References:
    [LSQ] S. Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv 1902.08153.
    [TQT] S. Jain et al., "Trained Quantization Thresholds for Accurate and Efficient Fixed-Point
    Inference of Deep Neural Networks", MLSys 2020, arXiv 1903.08066.
    [Hoang20] T. Hoang et al., "Direct Quantization for Training Highly Accurate Low Bit-width Deep
    Neural Networks", IJCAI 2020, arXiv 2012.13762 (method ``direct``; a reconstruction).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitquota.candidates.storage import FULL_PRECISION_BITS
from bitquota.errors import InvalidInput
from bitquota.evaluate.metrics import measure_module
from bitquota.models.identity import model_fingerprint
from bitquota.models.layout import from_matrix
from bitquota.quantizers.activations import quantized_inputs
from bitquota.training.input_quantizers import LearnedInputSteps, calibrated_inputs
from bitquota.training.loop import TrainingRecord, train
from bitquota.training.settings import TrainingSettings
from bitquota.training.weight_quantizers import trainable_weight, trained_candidate

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from bitquota.candidates.layers import Inventory, Layer
    from bitquota.candidates.table import Candidate
    from bitquota.context import Context
    from bitquota.models.calibration import CalibrationSet
    from bitquota.plan import MeasuredLoss
    from bitquota.quantizers.activations import ActivationQuantizer
    from bitquota.quantizers.channel_fit import ChannelRule
    from bitquota.quantizers.weights import QuantizedWeight
    from bitquota.sensitivity.losses import Loss


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TrainedModel:
    """A fine-tuned model.

    Attributes:
        module: A copy of the model with the dequantized weights in place, in eval mode.
        stored: What each quantized layer takes on disk, by layer name.
        candidates: The quantization of each trained layer as it is stored; ``direct`` changes
            integers into codebooks.
        inputs: The trained quantizer of each layer's input, where inputs are quantized.
        size_bits: Exact bits of the quantized layers, scales or levels included.
        record: What the run did.
        inventory: The layers that were trained.
        latents: The model with the full-precision weights that training moved.
    """

    module: nn.Module
    stored: dict[str, QuantizedWeight]
    candidates: tuple[Candidate, ...]
    size_bits: int
    record: TrainingRecord
    inventory: Inventory
    latents: nn.Module
    inputs: dict[str, ActivationQuantizer] = field(default_factory=dict)

    def running(self) -> AbstractContextManager[object]:
        """Return the context in which ``module`` sees the inputs that it was trained with."""
        return quantized_inputs(self.module, self.inventory, self.inputs)


class FixedPlan(nn.Module):
    """A model with one trainable quantized weight for each layer.

    Args:
        model: The model; it is copied.
        layers: The layers that are quantized.
        candidates: Their quantization, in the same order.
        method: ``lsq``, ``tqt`` or ``direct``.
        inputs: Calibrated quantizers of inputs, by layer.
        symmetric: Keep the levels of codebooks mirrored.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        candidates: Sequence[Candidate],
        method: str,
        inputs: dict[str, ActivationQuantizer] | None = None,
        *,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.layers = tuple(layers)
        self.quantizers = nn.ModuleList(
            [
                trainable_weight(method, self.latent(layer), layer, candidate, symmetric=symmetric)
                for layer, candidate in zip(layers, candidates, strict=True)
            ]
        )
        watched = [layer for layer in layers if layer.name in (inputs or {})]
        self.inputs = LearnedInputSteps(watched, [(inputs or {})[la.name] for la in watched])

    def latent(self, layer: Layer) -> Tensor:
        """Return the full-precision weight that training moves."""
        return self.model.get_parameter(layer.weight_name)

    def parameter_groups(self, settings: TrainingSettings) -> list[dict[str, Any]]:
        """Return groups for weights, biases and norms, and quantizers."""
        return grouped(self.model, nn.ModuleList([self.quantizers, self.inputs]), settings)

    def weights(self) -> dict[str, Tensor]:
        """Return the quantized weights."""
        return {
            layer.weight_name: quantizer.fake(self.latent(layer))  # type: ignore[operator]
            for layer, quantizer in zip(self.layers, self.quantizers, strict=True)
        }

    def input_quantizers(self, weights: dict[str, Tensor]) -> AbstractContextManager[object]:
        """Return the context in which inputs are quantized."""
        return self.inputs.watch(self.model, weights)

    def penalty(self, progress: float) -> Tensor | float:
        """Return what channels of inputs add: the size is fixed."""
        del progress
        return self.inputs.channel_price()

    def before_step(self) -> None:
        """Gradients stay as they are."""

    def after_step(self) -> None:
        """Let each quantizer follow its weight."""
        for layer, quantizer in zip(self.layers, self.quantizers, strict=True):
            quantizer.after_step(self.latent(layer).data)  # type: ignore[operator]

    def is_eligible(self) -> bool:
        """Every state fits the plan."""
        return True

    def stored(self) -> dict[str, QuantizedWeight]:
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
            "params": [p for p in quantizers.parameters() if p.numel()],
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
    symmetric: bool = False,
    input_rule: ChannelRule | None = None,
    start: nn.Module | None = None,
    loss: Loss | None = None,
    checkpoint: Path | None = None,
    context: Context | None = None,
) -> TrainedModel:
    """Train the model under a fixed plan.

    Args:
        module: The full-precision model, which also teaches when ``settings`` ask for it.
        inventory: Its layers.
        candidates: One for each layer that is quantized; full-precision ones are left out.
        data: Samples; never the test set. Without labels the model is followed alone.
        settings: How to train.
        method: ``lsq`` learns steps, ``tqt`` learns steps that are powers of two; both keep each
            candidate's format and exact size. ``direct`` learns the levels themselves: integers of
            up to ``DIRECT_BITS`` bits become codebooks, counted as such.
        symmetric: Keep the levels of codebooks mirrored.
        input_rule: Where the plan quantizes inputs, fit their first grids to the majority of
            channels by this rule.
        start: Where the weights start, if not at ``module``.
        loss: Distance to the full-precision output, by default the divergence.
        checkpoint: File for resuming.
        context: Whom to tell, and when to stop.

    Raises:
        InvalidInput: Nothing to train, an unknown method or one that cannot train a candidate's
            grid, or a checkpoint of another run.
        InvalidCalibration: Labels are missing.
        MeasurementFailed: The loss is not finite.
        Cancelled: The context said so; the checkpoint continues the run.

    Cost: see ``training.loop.train``. The result is the best epoch on the hold-out.
    """
    settings = TrainingSettings() if settings is None else settings
    chosen = [
        trained_candidate(method, inventory.layer(c.layer), c)
        for c in candidates
        if c.weight_bits != FULL_PRECISION_BITS
    ]
    if not chosen:
        msg = "fine-tuning needs at least one quantized layer; all are in full precision"
        raise InvalidInput(msg)
    layers = [inventory.layer(c.layer) for c in chosen]
    inputs = first_inputs(module, inventory, chosen, data, settings, rule=input_rule)
    plan = FixedPlan(
        module if start is None else start, layers, chosen, method, inputs, symmetric=symmetric
    )
    plan.inputs.channel_weight = settings.channel_weight
    identity = {
        "model": inventory.model_digest,
        "candidates": [c.to_json() for c in chosen],
        "method": method,
        "symmetric": symmetric,
        "start": None if start is None else model_fingerprint(start),
        "input_rule": None if input_rule is None else str(input_rule),
    }
    record = train(
        plan,
        module,
        data,
        settings,
        identity=identity,
        checkpoint=checkpoint,
        stage="finetune",
        from_start=True,
        loss=loss,
        context=context,
    )
    return finished(plan, inventory, chosen, record)


def first_inputs(
    module: nn.Module,
    inventory: Inventory,
    candidates: Sequence[Candidate],
    data: CalibrationSet,
    settings: TrainingSettings,
    *,
    rule: ChannelRule | None = None,
) -> dict[str, ActivationQuantizer]:
    """Return calibrated quantizers of the inputs that candidates quantize, by layer.

    Raises:
        InvalidInput: There are some, and the step is to be compiled.
    """
    widths = {c.layer: c.activation_bits for c in candidates if c.activation_bits is not None}
    if not widths:
        return {}
    if settings.compiled:
        msg = "a step with quantized inputs cannot be compiled: train without compiling"
        raise InvalidInput(msg)
    fit, _ = data.split(settings.holdout_fraction, settings.seed)
    return calibrated_inputs(module, inventory, fit, widths, rule=rule)


def finished(
    plan: FixedPlan,
    inventory: Inventory,
    candidates: Sequence[Candidate],
    record: TrainingRecord,
) -> TrainedModel:
    """Return the model as it ships: weights read back from what is stored."""
    stored = plan.stored()
    latents = copy.deepcopy(plan.model).eval()
    with torch.no_grad():
        for layer in plan.layers:
            plan.latent(layer).copy_(from_matrix(stored[layer.name].dequantize(), layer))
    return TrainedModel(
        module=plan.model.eval(),
        stored=stored,
        candidates=tuple(candidates),
        inputs=plan.inputs.trained(),
        size_bits=sum(c.size_bits for c in candidates),
        record=record,
        inventory=inventory,
        latents=latents,
    )


def measure_trained(
    trained: TrainedModel,
    teacher: nn.Module,
    data: CalibrationSet,
    *,
    loss: Loss | None = None,
    kind: str = "logits",
    batch_size: int = 64,
) -> MeasuredLoss:
    """Return the distance of a trained model to the full-precision one, and its accuracy.

    Args:
        trained: The trained model.
        teacher: The full-precision model.
        data: Samples that were not trained on.
        loss: The distance, by default the divergence.
        kind: What is scored besides, see ``evaluate.metrics.compare_models``.
        batch_size: Samples per pass.

    Cost: one forward pass of each model over ``data``.
    """

    def run(*inputs: Tensor) -> Any:  # noqa: ANN401  # whatever the model returns
        with trained.running():
            return trained.module(*inputs)

    return measure_module(run, teacher, data, loss=loss, kind=kind, batch_size=batch_size)

"""Train one set of nested codes that serves several plans, and keep it as one file.

Design: docs/design/training.md
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

import bitquota
from bitquota.candidates.storage import FULL_PRECISION_BITS
from bitquota.evaluate.metrics import BATCH
from bitquota.models.identity import model_fingerprint
from bitquota.models.layout import from_matrix
from bitquota.plan import Assignment, Plan
from bitquota.quantizers.activations import ActivationQuantizer
from bitquota.quantizers.planned import full_precision_module
from bitquota.request import AUTO_LOSS
from bitquota.training.finetune import TrainedModel, first_inputs, measure_trained
from bitquota.training.loop import train
from bitquota.training.nested import TOP, NestedModel, nested_weight, statistics_of
from bitquota.training.prepared import prepared
from bitquota.training.qat import Trained, check_trainable
from bitquota.training.saved import read_described, write_described
from bitquota.training.settings import TrainingSettings

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from bitquota.context import Context
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel
    from bitquota.quantizers.weights import QuantizedWeight
    from bitquota.sensitivity.losses import Loss

SCHEMA = "bitquota/nested/1"
PLANNED = "plan"
"""Name of the assignment of the plan that was given; the others are ``W2``, ``W3`` and so on."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Nested:
    """One set of codes, and the plans that it serves.

    Attributes:
        trained: By name: each plan with the model that runs under it.
        model: The codes, steps and statistics of all of them.
    """

    trained: dict[str, Trained]
    model: NestedModel

    @property
    def payload_bits(self) -> int:
        """What codes, steps and factors of all plans take together; statistics are extra."""
        codes = sum(c.numel() * TOP for c in self.model.codes().values())
        scales = sum(p.numel() for p in (*self.model.log_steps, *self.model.log_factors))
        return int(codes + 32 * scales)

    def save(self, path: Path) -> None:
        """Write all plans and what they share as one safetensors file."""
        with torch.no_grad():
            model = self.model
            quantized = {la.weight_name for la in model.layers}
            apart = quantized | set(statistics_of(model.model))
            tensors: dict[str, Tensor] = {
                f"shared.{k}": v for k, v in model.model.state_dict().items() if k not in apart
            }
            for k, (name, codes) in enumerate(model.codes().items()):
                tensors[f"codes.{name}"] = codes
                # Steps as they are, not logarithms: powers need not agree between machines.
                tensors[f"steps.{name}"] = model.top_steps(k)
                factors = torch.stack([model.factor(k, b) for b in model.widths])
                tensors[f"factors.{name}"] = factors
            model.select(model.mode)
            for (mode, name), key in model.statistics.items():
                tensors[f"statistics.{mode}.{name}"] = model.get_buffer(key)
        description = {
            "schema": SCHEMA,
            "widths": model.widths,
            "plans": {name: found.plan.to_json() for name, found in self.trained.items()},
            "inputs": {name: asdict(q) for name, q in model.inputs.trained().items()},
        }
        write_described(path, tensors, description)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SavedNested:
    """What ``Nested.save`` wrote.

    Attributes:
        plans: By name.
        widths: Bit-widths that the codes were trained for, rising.
        tensors: As they stand in the file.
        inputs: Trained quantizers of inputs, by layer: those of all plans.
    """

    plans: dict[str, Plan]
    widths: tuple[int, ...]
    tensors: dict[str, Tensor]
    inputs: dict[str, ActivationQuantizer]

    def weights(self, name: str) -> dict[str, QuantizedWeight]:
        """Return the weight of each layer under the plan of that name: top bits of the codes."""
        found = {}
        for a in self.plans[name].assignments:
            layer, bits = a.layer.name, a.candidate.weight_bits
            if bits == FULL_PRECISION_BITS:
                continue
            factor = self.tensors[f"factors.{layer}"][self.widths.index(bits)]
            steps = self.tensors[f"steps.{layer}"] * factor
            found[layer] = nested_weight(self.tensors[f"codes.{layer}"], steps, bits)
        return found

    def state(self, name: str) -> dict[str, Tensor]:
        """Return the state dictionary of the model under the plan of that name."""
        shared, own = "shared.", f"statistics.{name}."
        state = {k.removeprefix(shared): v for k, v in self.tensors.items() if k.startswith(shared)}
        state |= {k.removeprefix(own): v for k, v in self.tensors.items() if k.startswith(own)}
        layers = {a.layer.name: a.layer for a in self.plans[name].assignments}
        for layer, weight in self.weights(name).items():
            state[layers[layer].weight_name] = from_matrix(weight.dequantize(), layers[layer])
        return state


def load_nested(path: Path) -> SavedNested:
    """Read what ``Nested.save`` wrote; raises ``InvalidInput`` for anything else."""
    description, tensors = read_described(path, SCHEMA, "'bitquota finetune --widths'")
    return SavedNested(
        plans={name: Plan.from_json(plan) for name, plan in description["plans"].items()},
        widths=tuple(description["widths"]),
        tensors=tensors,
        inputs={k: ActivationQuantizer(**q) for k, q in description.get("inputs", {}).items()},
    )


def finetune_nested(
    model: LoadedModel,
    plan: Plan,
    data: CalibrationSet,
    widths: Sequence[int],
    settings: TrainingSettings | None = None,
    *,
    loss: str | Loss | None = None,
    checkpoint: Path | None = None,
    context: Context | None = None,
) -> Nested:
    """Train one set of weights that serves every width, and ``plan`` if its widths are among them.

    Args:
        model: The model that the plan was made for.
        plan: Which layers are quantized, and an assignment to be served.
        data: Training samples, as for ``finetune_plan``.
        widths: Bit-widths to be served, of 2 to 8.
        settings: How to train; every step runs each assignment once.
        loss: As for ``finetune_plan``.
        checkpoint: File for resuming.
        context: Whom to tell, when to stop, and where to run.

    Raises:
        StalePlan: The plan was made for another model.
        InvalidInput: Widths out of range, or see ``finetune_plan``.
        Cancelled: The context said so; the checkpoint continues the run.

    Cost: as many trainings as there are assignments, at once.
    """
    check_trainable(plan, model)
    settings = TrainingSettings() if settings is None else settings
    ready = prepared(
        model, data, loss=loss or AUTO_LOSS, known=None if loss else plan.outputs, context=context
    )
    teacher = full_precision_module(ready.model, plan, ready.samples)
    kept = [a for a in plan.assignments if a.candidate.weight_bits != FULL_PRECISION_BITS]
    layers, own = [a.layer for a in kept], [a.candidate.weight_bits for a in kept]
    modes: dict[str, Sequence[int]] = {f"W{b}": [b] * len(layers) for b in sorted(set(widths))}
    if set(own) <= set(widths):
        modes[PLANNED] = own
    planned = [a.candidate for a in kept]
    inputs = first_inputs(teacher, plan.inventory, planned, ready.samples, settings)
    nested = NestedModel(teacher, layers, modes, inputs)
    nested.inputs.channel_weight = settings.channel_weight
    record = train(
        nested,
        teacher,
        ready.samples,
        settings,
        identity={"model": plan.model_digest, "plan": plan.digest(), "modes": modes},
        checkpoint=checkpoint,
        stage="finetune",
        loss=ready.loss,
        context=context,
    )
    _, holdout = ready.samples.split(settings.holdout_fraction, settings.seed)
    found = {}
    for mode in modes:
        nested.select(mode)
        stored, candidates = nested.stored(), nested.candidates()
        module = copy.deepcopy(nested.model).eval()
        with torch.no_grad():
            for layer in layers:
                weight = from_matrix(stored[layer.name].dequantize(), layer)
                module.get_parameter(layer.weight_name).copy_(weight)
        trained = TrainedModel(
            module=module,
            stored=stored,
            candidates=candidates,
            size_bits=sum(c.size_bits for c in candidates),
            record=record,
            inventory=plan.inventory,
            latents=nested.model,
            inputs=nested.inputs.trained(),
        )
        measured = measure_trained(
            trained, teacher, holdout, loss=ready.loss, kind=ready.kind,
            batch_size=settings.micro_batch or BATCH,
        )  # fmt: skip
        trained = ready.as_it_returns(trained)
        by_layer = {c.layer: c for c in candidates}
        made = Plan(
            model_digest=model_fingerprint(trained.module),
            assignments=tuple(
                Assignment(layer=a.layer, candidate=by_layer.get(a.layer.name, a.candidate))
                for a in plan.assignments
            ),
            unquantized=plan.unquantized,
            selected="trained:nested",
            measured=measured,
            loss=ready.loss.name,
            outputs=ready.found(),
            provenance=_provenance(plan, mode, modes, settings, data),
        )
        found[mode] = Trained(plan=made, model=trained)
    return Nested(trained=found, model=nested)


def _provenance(
    plan: Plan,
    mode: str,
    modes: dict[str, Sequence[int]],
    settings: TrainingSettings,
    data: CalibrationSet,
) -> dict[str, Any]:
    return {
        "plan": plan.digest(),
        "trained_from": plan.model_digest,
        "method": "nested",
        "nested": {"this": mode, "all": sorted(modes)},
        "settings": asdict(settings),
        "data": data.digest,
        "bitquota": bitquota.__version__,
    }

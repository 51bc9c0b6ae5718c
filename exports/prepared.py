"""What every exporter starts from: integer weights, the corrected model, and a reference output."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bitquota.candidates.targets.target import DYNAMIC_FITS
from bitquota.errors import InvalidPlan
from bitquota.exports.export_report import (
    HALF_TOLERANCE,
    TOLERANCE,
    Difference,
    ExportedTensor,
    ExportReport,
    describe_candidate,
    describe_files,
)
from bitquota.models.binding import bound
from bitquota.models.loaded import check_model, in_memory
from bitquota.models.on_demand import on_demand
from bitquota.models.onnx.program import source_of
from bitquota.models.running import primary_output, tensor_of
from bitquota.quantizers.activations import quantize_inputs_of
from bitquota.quantizers.apply import apply_plan
from bitquota.quantizers.planned import (
    full_precision_module,
    quantizers_of,
    run_from_files,
    runs_from_files,
)
from bitquota.quantizers.quantized_model import shipped_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from bitquota.candidates.layers import Layer
    from bitquota.candidates.table import Candidate
    from bitquota.candidates.targets import Target
    from bitquota.canonical import JsonObject
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel
    from bitquota.plan import Plan
    from bitquota.quantizers.activations import InputGrid
    from bitquota.quantizers.weights import QuantizedWeight

VERIFY_SAMPLES = 64
"""Samples on which an export is compared with fake-quantization."""
VERIFY_BYTES = 2**26
"""Of a language model's logits on them, at most: vocabularies are large."""
NUDGE = 1e-6
"""By what share of itself a weight moves, about, where its runtime adds up in another order."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PreparedExport:
    """A plan applied to a model, ready to be written.

    Attributes:
        model: The full-precision model.
        plan: What to write.
        target: For which target, if for one.
        module: A copy of the model with fake-quantized weights and the plan's corrections.
        layers: The plan's layers by name.
        candidates: The plan's candidates by layer, without what they say of activations.
        weights: Integer codes and scales of every quantized layer; of a model with weights in
            files each is read when it is asked for.
        inputs: A few samples, or ``None``: then nothing is run.
        reference: Output of ``module`` on them.
        identity_note: What must be said of the digest that the plan names its model by.
        unused: Quantized layers that compute nothing, which a traced graph therefore lacks.
        activations: Grids of layers' inputs, where the format holds them: ``reference`` has its
            inputs on these, ``module`` has not.
        input_noise: By what share of the norm of its outputs these change the model.
        edge_noise: By what share outputs on these grids change where weights move by ``NUDGE``.
        traced: Where the graph of ``module`` is kept for further exports of it, if anywhere.
    """

    model: LoadedModel
    plan: Plan
    target: Target | None
    module: nn.Module
    layers: dict[str, Layer]
    candidates: dict[str, Candidate]
    weights: Mapping[str, QuantizedWeight]
    inputs: tuple[Tensor, ...] | None = None
    reference: Tensor | None = None
    identity_note: str = ""
    unused: tuple[str, ...] = ()
    activations: Mapping[str, InputGrid] = field(default_factory=dict)
    input_noise: float = 0.0
    edge_noise: float = 0.0
    traced: dict[str, Any] | None = None

    def without(self, unused: Sequence[str]) -> PreparedExport:
        """Return the same without layers that the file lacks because nothing reads them."""
        kept = {k: v for k, v in self.weights.items() if k not in unused}
        return replace(self, weights=kept, unused=tuple(unused))

    @property
    def planned_rest_bits(self) -> int:
        """What the plan leaves as it is: other tensors, and layers in full precision."""
        written = {*self.weights, *self.unused}
        kept = [c.size_bits for c in self.candidates.values() if c.layer not in written]
        return self.plan.unquantized_bits + sum(kept)

    @property
    def target_name(self) -> str | None:
        """Name of the target, if the export is for one."""
        return None if self.target is None else self.target.name

    def difference(self, module: Any) -> Difference | None:  # noqa: ANN401  # any callable model
        """Run ``module`` on the samples and compare with fake-quantization."""
        if self.inputs is None or self.reference is None:
            return None
        with torch.no_grad():
            output = primary_output(module(*self.inputs))
        # Sums over some samples at a time: logits of a large vocabulary in float64 are large.
        maximum = squares = energy = 0.0
        for mine, other in zip(output, self.reference, strict=True):
            expected = other.double()
            gap = mine.double() - expected
            # The larger of the two would let NaN pass.
            maximum = float(torch.tensor([maximum, float(gap.abs().max())]).max())
            squares += float(gap.square().sum())
            energy += float(expected.square().sum())
        norm, apart = math.sqrt(energy), math.sqrt(squares)
        return Difference(
            maximum=maximum,
            relative=apart / norm if norm else apart,
            n_samples=len(self.inputs[0]),
        )

    def report(
        self,
        exporter: str,
        module: nn.Module | None,
        folder: Path,
        files: Sequence[Path],
        tensors: Sequence[ExportedTensor],
        *,
        held_bytes: int,
        runtime: JsonObject,
        weight_files: Sequence[Path] | None = None,
        notes: tuple[str, ...] = (),
    ) -> ExportReport:
        """Return the report of written files; what was read from them is run on the samples.

        Args:
            exporter: What wrote them.
            module: What it reads from them, or ``None`` where nothing can run it.
            folder: Where they are.
            files: All of them.
            tensors: Every quantized weight, as it was read back.
            held_bytes: Bytes of all tensors in the files.
            runtime: What ran them, its version and options.
            weight_files: Those that hold tensors, whose other bytes are the container's; all
                unless given.
            notes: What a user should know.
        """
        weight_files = files if weight_files is None else weight_files
        if self.unused:
            notes = (*notes, f"left out, because nothing reads them: {', '.join(self.unused)}")
        return ExportReport(
            exporter=exporter,
            target=self.target_name,
            plan_digest=self.plan.digest(),
            model_digest=self.plan.model_digest,
            files=describe_files(folder, files),
            tensors=tuple(tensors),
            unquantized_bits=held_bytes * 8 - sum(t.actual_bits for t in tensors),
            planned_unquantized_bits=self.planned_rest_bits,
            container_bytes=sum(file.stat().st_size for file in weight_files) - held_bytes,
            difference=None if module is None else self.difference(module),
            tolerance=self._tolerance,
            runtime=runtime,
            notes=notes,
        )

    def exported_tensor(
        self, name: str, *, tensor: str, stored: str, actual_bits: int
    ) -> ExportedTensor:
        """Return the export report of one layer's weight."""
        candidate = self.candidates[name]
        return ExportedTensor(
            layer=name,
            tensor=tensor,
            planned=describe_candidate(candidate),
            stored=stored,
            planned_bits=candidate.size_bits,
            actual_bits=actual_bits,
        )

    @property
    def _tolerance(self) -> float | None:
        """The largest relative difference, if not ``TOLERANCE``.

        Values at the edge of a step of a grid fall to one side here and to the other there, and
        change what follows: in a shallow model hardly, in a deep one by more than the grids do.
        """
        if self.activations:
            return TOLERANCE + max(0.5 * self.input_noise, 2 * self.edge_noise)
        return HALF_TOLERANCE if self._in_half else None

    @property
    def _in_half(self) -> bool:
        """Whether a graph computes in float16; torch modules compute in float32."""
        source = source_of(self.module)
        return source is not None and any(tensor.dtype == np.float16 for tensor in source.fed)

    def with_tensors(self, readers: Mapping[str, Callable[[], Tensor]]) -> nn.Module:
        """Return a copy of ``module`` with other tensors, by name; readers return their values.

        Of a model with weights in files each is read while its module runs.
        """
        if self.model.pages is not None:
            return on_demand(self.model, readers)
        module = copy.deepcopy(self.module)
        state = module.state_dict()
        with torch.no_grad():
            for name, read in readers.items():
                state[name].copy_(read())
        return module

    def unquantized_tensors(self) -> dict[str, Tensor]:
        """Return every other tensor of the corrected model that ships, each stored once."""
        quantized = {
            alias
            for name in self.weights
            for alias in (self.layers[name].weight_name, *self.layers[name].aliases)
        }
        kept: dict[str, Tensor] = {}
        seen: set[tuple[int, tuple[int, ...], torch.dtype]] = set()
        for name, tensor in self.module.state_dict().items():
            if name in quantized or name.endswith("num_batches_tracked"):
                continue
            key = (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype)
            if tensor.numel() and key in seen:
                continue
            seen.add(key)
            kept[name] = tensor
        return kept


def prepare_export(
    model: LoadedModel,
    plan: Plan,
    *,
    target: Target | None = None,
    samples: CalibrationSet | None = None,
    correction_data: CalibrationSet | None = None,
    holds_inputs: type[InputGrid] | None = None,
) -> PreparedExport:
    """Quantize the weights of ``model`` as ``plan`` says and apply its corrections.

    Args:
        model: The model that the plan was made for.
        plan: What to export.
        target: Its rules are checked first.
        samples: The first of them are run to compare the export with fake-quantization; by
            default the model's own example.
        correction_data: Unlabelled samples that the plan's corrections are fitted on.
        holds_inputs: Which grids of inputs the format holds, if any. They are the plan's own if its
            quantized weights are there, else fitted to the samples, if there are any.

    Raises:
        StalePlan: The plan was made for another model.
        InvalidPlan: The plan breaks the target's rules, or names layers that the model lacks.
        InvalidInput: Corrections or error feedback without data.
    """
    note = check_model(plan, model)
    if not runs_from_files(plan, model):
        model = in_memory(model)
    if target is not None:
        plan.require(target)
    samples = None if samples is None else bound(model, samples)
    correction_data = None if correction_data is None else bound(model, correction_data)
    data = correction_data if correction_data is not None else samples
    from_files = model.pages is not None
    module = model.module if from_files else full_precision_module(model, plan, data)
    layers = {a.layer.name: a.layer for a in plan.assignments}
    # What a runtime calibrates for itself is in no file: only weights are written and compared.
    candidates = {
        a.layer.name: replace(a.candidate, activation_bits=None) for a in plan.assignments
    }
    for layer in layers.values():
        _require_weight(module, layer)

    # The weights that were written beside the plan, or as it quantizes them now; and the model
    # that has them.
    stored: dict[str, QuantizedWeight] = {}
    weights: Mapping[str, QuantizedWeight] = stored
    shipped = shipped_weights(plan, model)
    if shipped is not None:
        weights = shipped.weights
        if from_files:
            quantized = run_from_files(model, plan, shipped)
        else:
            quantized = replace(shipped, activations={}).put_into(module, plan.inventory)
    else:
        weights = stored = {}
        chosen = tuple(candidates.values())
        quantized = apply_plan(
            module,
            plan.inventory,
            chosen,
            corrections=plan.corrections,
            correction_data=data,
            fitted=quantizers_of(plan, model, module, chosen, data),
            stored=stored,
        )
    grids: dict[str, InputGrid] = {}
    if holds_inputs is not None and shipped is not None:
        grids = {k: g for k, g in shipped.activations.items() if isinstance(g, holds_inputs)}
    elif holds_inputs is not None and (data is not None or plan.activation_fit in DYNAMIC_FITS):
        own = plan.candidates
        found = quantizers_of(plan, model, module, own, data).input_grids(own)
        grids = {k: g for k, g in found.items() if isinstance(g, holds_inputs)}

    # What exported files will be compared with.
    inputs = verifying_inputs(model, samples)
    reference = None
    if inputs is not None:
        inputs = _few_enough(model, quantized, inputs)
        with torch.no_grad():
            reference = primary_output(quantized(*inputs))
    input_noise = edge_noise = 0.0
    if grids and inputs is not None and reference is not None:
        plain, on_grids = reference, copy.deepcopy(quantized)
        for name, grid in grids.items():
            quantize_inputs_of(on_grids, name, grid)
        with torch.no_grad():
            reference = primary_output(on_grids(*inputs))
            if not from_files:
                _nudge(on_grids, [layers[name] for name in weights])
            nudged = primary_output(on_grids(*inputs))
        input_noise = _apart(reference, plain)
        edge_noise = _apart(nudged, reference)
    return PreparedExport(
        model=model,
        plan=plan,
        target=target,
        module=quantized,
        layers=layers,
        candidates=candidates,
        weights=weights,
        inputs=inputs,
        reference=reference,
        identity_note=note,
        activations=grids,
        input_noise=input_noise,
        edge_noise=edge_noise,
    )


def _nudge(module: nn.Module, layers: Iterable[Layer]) -> None:
    """Move the weights of layers, in place, by random shares of ``NUDGE``."""
    noise = torch.Generator().manual_seed(0)
    for layer in layers:
        weight = tensor_of(module, layer.weight_name)
        share = torch.randn(weight.shape, generator=noise).to(weight)
        weight.mul_(1 + NUDGE * share)


def _apart(one: Tensor, other: Tensor) -> float:
    """Return the norm of the difference as a share of that of ``other``."""
    return float((one.double() - other.double()).norm()) / (float(other.double().norm()) or 1.0)


def verifying_inputs(
    model: LoadedModel, samples: CalibrationSet | None
) -> tuple[Tensor, ...] | None:
    """Return inputs to compare an export on, or ``None`` if nobody knows what they look like.

    A model's own example may be zeros, which would hide a wrong weight: floating-point inputs
    become noise from a fixed seed.
    """
    if samples is not None:
        return tuple(t[:VERIFY_SAMPLES] for t in samples.inputs)
    if model.example_inputs is None:
        return None
    noise = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(t.shape, generator=noise) if t.is_floating_point() else t
        for t in model.example_inputs
    )


def _few_enough(
    model: LoadedModel, module: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Return so many of the inputs that the outputs of a language model stay small."""
    if model.folder is None or inputs[0].is_floating_point():
        return inputs
    with torch.no_grad():
        one = primary_output(module(*(t[:1] for t in inputs)))
    n = max(1, VERIFY_BYTES // (4 * one.numel()))
    return tuple(t[:n] for t in inputs)


def _require_weight(module: nn.Module, layer: Layer) -> None:
    owner, _, leaf = layer.weight_name.rpartition(".")
    try:
        getattr(module.get_submodule(owner), leaf)
    except AttributeError as err:
        msg = f"the plan's layer '{layer.name}' must exist in the model; it does not"
        raise InvalidPlan(msg, layer=layer.name) from err

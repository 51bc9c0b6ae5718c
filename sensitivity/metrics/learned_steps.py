"""Learned step sizes as sensitivities: a short joint training of all bit-widths at once.

References:
    [LIMPQ] C. Tang et al., "Mixed-Precision Neural Network Quantization via Learned Layer-wise
    Importance", ECCV 2022, arXiv 2203.08368.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from bitquota.candidates.storage import FULL_PRECISION_BITS
from bitquota.errors import MeasurementFailed
from bitquota.models.calls import tensor_key
from bitquota.models.running import primary_output
from bitquota.quantizers.activations import InputWatcher
from bitquota.quantizers.differentiable import binary, lsq
from bitquota.quantizers.grid import levels
from bitquota.sensitivity.metrics.metric import (
    BACKWARD,
    FORWARD,
    Metric,
    Scores,
    Work,
    row_sums,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bitquota.candidates.layers import Layer
    from bitquota.candidates.table import Candidate, CandidateTable
    from bitquota.sensitivity.runners.base import Runner

_Key = tuple[str, str, int | None]
"""Of weights or inputs; the layer; the bit-width."""

GRADIENT_LIMIT = 1.0
"""Largest absolute gradient of anything, as in the authors' code."""


@dataclass(frozen=True, slots=True)
class LearnedIndicators(Metric):
    """``s = s_a + α s_w``: the steps of inputs and weights that training ends with [LIMPQ].

    All bit-widths are trained jointly on the measurement's own samples: every batch runs once with
    each width everywhere and once with a width drawn for each layer, and adds the gradients up
    (momentum SGD, cosine rate, gradients clipped to +-1). Weights are shared; steps and the
    parameters of norms belong to a width, and batch norm sees the batch. One step per tensor.
    Inputs have steps where candidates quantize them (``s_a = 0`` otherwise); those without negative
    values have levels from 0 on.

    We differ in the length: ``epochs`` over some hundred samples, where the paper takes half of
    ImageNet, so steps stay near their start ``2 E|w| / sqrt(highest level)``, which is a weight
    error of its own kind. ``α`` is theirs to set for each network, and matters only beside inputs.

    Pitfall: a step scales with the weights, and a batch norm behind a layer makes that arbitrary.
    """

    epochs: int = 4
    batch_size: int = 64
    rate: float = 0.01
    seed: int = 0
    alpha: float = 1.0

    name: ClassVar[str] = "limpq"
    known_as: ClassVar[str] = "learned step sizes (LIMPQ, 4 epochs of the samples, not ImageNet)"
    needs_labels: ClassVar[bool] = True
    needs_gradients: ClassVar[bool] = True
    sees_activations: ClassVar[bool] = True

    def cost(self, runner: Runner, table: CandidateTable) -> float:
        """Return one pass forwards and backwards for every width and the mixture, each epoch.

        Epochs are of whole batches; where inputs are quantized, one batch is looked at before.
        """
        n = len(runner.calibration)
        share = min(self.batch_size, n) / n
        passes = self._steps(n) * (len(_widths(table)) + 1) * (FORWARD + BACKWARD)
        return share * (passes + (FORWARD if _input_widths(table) else 0.0))

    def _steps(self, n_samples: int) -> int:
        """Return the number of batches of the whole training."""
        return self.epochs * max(1, n_samples // self.batch_size)

    def scores(self, work: Work) -> Scores:
        """Train, and score every row."""
        indicators = self._indicators(work)

        def value(candidate: Candidate) -> float:
            weights = indicators.get(("weights", candidate.layer, candidate.weight_bits), 0.0)
            inputs = indicators.get(("inputs", candidate.layer, candidate.activation_bits), 0.0)
            return inputs + self.alpha * weights

        samples = len(work.runner.calibration)
        return Scores(
            diagonal=row_sums(work.table, value),
            error=None,
            loss=self.name,
            unit="steps",
            details={"samples": samples, "batches": self._steps(samples)},
        )

    def _indicators(self, work: Work) -> dict[_Key, float]:
        """Return the steps of every layer and width, from the ledger if they are there."""
        inventory, widths, inputs = (
            work.runner.inventory,
            _widths(work.table),
            _input_widths(work.table),
        )
        layers = [inventory.layer(name) for name in work.layers]
        keys: list[_Key] = [("weights", layer.name, b) for layer in layers for b in widths]
        keys += [("inputs", layer.name, b) for layer in layers for b in inputs]
        samples = work.runner.calibration
        variant = {"widths": widths, "inputs": inputs, "of": samples.to_json()}
        key = work.key(0, variant, "indicators")
        known = work.recorder.context.ledger.get(key)
        if known is None:
            found = self._train(work, layers, widths, inputs)
            work.recorder.context.ledger.put(
                key, np.array([found[k] for k in keys], dtype=np.float64)
            )
            return found
        return dict(zip(keys, (float(v) for v in known), strict=True))

    def _train(
        self, work: Work, layers: Sequence[Layer], widths: Sequence[int], inputs: Sequence[int]
    ) -> dict[_Key, float]:
        joint = _Joint(work.runner.module, layers, widths, inputs)
        samples = work.runner.calibration
        if inputs:
            first = samples.take(range(min(self.batch_size, len(samples))))
            joint.start_inputs(first.inputs)
            work.charge_samples(len(first), FORWARD)
        total = self._steps(len(samples))
        optimizer = torch.optim.SGD(joint.parameters(), lr=self.rate, momentum=0.9)
        generator = torch.Generator().manual_seed(self.seed)
        order: list[int] = []
        for step in range(total):
            work.recorder.context.check(self.name)
            if len(order) < min(self.batch_size, len(samples)):
                order = torch.randperm(len(samples), generator=generator).tolist()
            batch = samples.take(order[: self.batch_size])
            order = order[self.batch_size :]
            assert batch.labels is not None  # noqa: S101  # ``measure`` has checked
            optimizer.param_groups[0]["lr"] = (
                self.rate * 0.5 * (1 + math.cos(math.pi * step / total))
            )
            optimizer.zero_grad()
            drawn = torch.randint(len(widths), (len(layers),), generator=generator).tolist()
            for choice in [[k] * len(layers) for k in range(len(widths))] + [drawn]:
                output = joint(choice, batch.inputs)
                loss = functional.cross_entropy(
                    output.reshape(-1, output.shape[-1]), batch.labels.reshape(-1)
                )
                if not bool(torch.isfinite(loss)):
                    msg = "the loss of the joint training must stay finite; it did not"
                    raise MeasurementFailed(msg, measure=self.name)
                loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_value_(joint.parameters(), GRADIENT_LIMIT)
            optimizer.step()
            work.charge_samples(len(batch), (len(widths) + 1) * (FORWARD + BACKWARD))
            work.recorder.context.report(self.name, step + 1, total)
        return joint.indicators()


class _Joint(nn.Module):
    """A model with steps and norm parameters for every width.

    Args:
        module: The model.
        layers: Whose weights and inputs are quantized.
        widths: Of weights.
        inputs: Of inputs; none leaves them as they are.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[Layer],
        widths: Sequence[int],
        inputs: Sequence[int],
    ) -> None:
        super().__init__()
        self.layers, self.widths, self.inputs = tuple(layers), tuple(widths), tuple(inputs)
        # Not registered: its own parameters stay as they are.
        self._module = [module]
        self._names = dict(module.named_parameters(remove_duplicate=False))
        quantized = {layer.weight_name for layer in layers}
        self.latents = nn.ParameterList(
            [self._names[layer.weight_name].detach().clone() for layer in layers]
        )
        self.own = [n for n, p in self._names.items() if p.ndim <= 1 and n not in quantized]
        self.norms = nn.ParameterList(
            [self._names[n].detach().clone() for _ in widths for n in self.own]
        )
        starts = [[_start(latent.detach(), bits) for bits in widths] for latent in self.latents]
        self.steps = nn.Parameter(torch.tensor(starts))
        self.input_steps = nn.Parameter(torch.ones(len(self.layers), len(self.inputs)))
        self._signed = [True] * len(self.layers)

    @torch.no_grad()
    def start_inputs(self, inputs: tuple[Tensor, ...]) -> None:
        """Set the steps of inputs to LSQ's start on a batch, and see which have signs."""
        index = {layer.name: k for k, layer in enumerate(self.layers)}

        def look(layer: str, values: Tensor) -> Tensor:
            if values.is_floating_point():
                k = index[layer]
                self._signed[k] = bool((values < 0).any())
                for j, bits in enumerate(self.inputs):
                    self.input_steps[k, j] = _start(values, bits, signed=self._signed[k])
            return values

        keys = {tensor_key(self._names[la.weight_name]): la.name for la in self.layers}
        with InputWatcher(keys, look):
            self._module[0](*inputs)

    def forward(self, choice: Sequence[int], inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the output with layer ``l`` at width ``choice[l]``, its input likewise."""
        values: dict[str, Tensor] = {}
        places: dict[tuple[Any, ...], str] = {}
        at = {layer.name: k for k, layer in enumerate(self.layers)}
        for k, (layer, latent) in enumerate(zip(self.layers, self.latents, strict=True)):
            made = _quantized(latent, self.steps[k, choice[k]], self.widths[choice[k]])
            values[layer.weight_name] = made
            places[tensor_key(made)] = layer.name
        # A mixture takes the norms of its first layer's width.
        first = choice[0] * len(self.own)
        values |= {n: self.norms[first + i] for i, n in enumerate(self.own)}

        def look(layer: str, given: Tensor) -> Tensor:
            if not given.is_floating_point():
                return given
            k = at[layer]
            j = choice[k] % len(self.inputs)
            bits, signed = self.inputs[j], self._signed[k]
            return _quantized(given, self.input_steps[k, j], bits, signed=signed)

        module = self._module[0]
        buffers = {n: b.detach().clone() for n, b in module.named_buffers()}
        was_training = module.training
        module.train()
        try:
            with InputWatcher(places, look) if self.inputs else nullcontext():
                return primary_output(functional_call(module, values | buffers, inputs))
        finally:
            module.train(was_training)

    @torch.no_grad()
    def indicators(self) -> dict[_Key, float]:
        """Return the size of each step."""
        found: dict[_Key, float] = {}
        for k, layer in enumerate(self.layers):
            for j, bits in enumerate(self.widths):
                found["weights", layer.name, bits] = abs(float(self.steps[k, j]))
            for j, bits in enumerate(self.inputs):
                found["inputs", layer.name, bits] = abs(float(self.input_steps[k, j]))
        return found


def _levels(bits: int, *, signed: bool) -> tuple[int, int]:
    return levels(bits) if signed else (0, 2**bits - 1)


def _start(latent: Tensor, bits: int, *, signed: bool = True) -> float:
    """Return LSQ's start, ``2 E|w| / sqrt(highest level)``."""
    highest = max(1, _levels(bits, signed=signed)[1])
    return max(2 * float(latent.abs().mean()) / math.sqrt(highest), 1e-8)


def _quantized(latent: Tensor, step: Tensor, bits: int, *, signed: bool = True) -> Tensor:
    lowest, highest = _levels(bits, signed=signed)
    scale = 1 / math.sqrt(latent.numel() * max(1, highest))
    if bits == 1 and signed:
        return binary(latent, step, gradient_scale=scale)
    return lsq(latent, step, lowest, highest, gradient_scale=scale)


def _widths(table: CandidateTable) -> list[int]:
    found: set[Any] = {c.weight_bits for row in table.rows for c in row.candidates}
    return sorted(found - {FULL_PRECISION_BITS})


def _input_widths(table: CandidateTable) -> list[int]:
    found = {c.activation_bits for row in table.rows for c in row.candidates}
    return sorted(bits for bits in found if bits is not None)

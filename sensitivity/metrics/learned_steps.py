"""Learned step sizes as sensitivities: a short joint training of all bit-widths at once.

References:
    [LIMPQ] C. Tang et al., "Mixed-Precision Neural Network Quantization via Learned Layer-wise
    Importance", ECCV 2022, arXiv 2203.08368.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from bitquota.candidates.storage import FULL_PRECISION_BITS
from bitquota.errors import MeasurementFailed
from bitquota.models.running import primary_output
from bitquota.quantizers.differentiable import binary, lsq
from bitquota.quantizers.grid import levels
from bitquota.sensitivity.metrics.metric import (
    BACKWARD,
    FORWARD,
    Metric,
    Scores,
    Work,
    changes_anything,
    row_sums,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bitquota.candidates.layers import Layer
    from bitquota.candidates.table import Candidate, CandidateTable
    from bitquota.sensitivity.runners.base import Runner

GRADIENT_LIMIT = 1.0
"""Largest absolute gradient of anything, as in the authors' code."""


@dataclass(frozen=True, slots=True)
class LearnedIndicators(Metric):
    """``s = step_l(b) / std(W_l)``, the step that training at ``b`` bits ends with [LIMPQ].

    All bit-widths are trained jointly on the measurement's own samples: every step runs once with
    each width everywhere and once with a width drawn for each layer, and adds the gradients up
    (momentum SGD, cosine rate, gradients clipped to +-1). Weights are shared; steps and the
    parameters of norms belong to a width, and batch norm sees the batch. One step per tensor.

    A step scales with the weights, and batch norm makes that scale arbitrary: it is divided by the
    standard deviation of the layer's weights, which the paper does not do. Scores of input
    quantizers are left out. The samples are few (hundreds, where the paper takes half of ImageNet),
    so the steps stay near their start, which is a weight error of its own kind.
    """

    epochs: int = 4
    batch_size: int = 64
    rate: float = 0.01
    seed: int = 0

    name: ClassVar[str] = "limpq"
    known_as: ClassVar[str] = "learned step sizes (LIMPQ)"
    needs_labels: ClassVar[bool] = True
    needs_gradients: ClassVar[bool] = True

    def cost(self, runner: Runner, table: CandidateTable) -> float:
        """Return one pass forwards and backwards for every width and the mixture, each epoch.

        Epochs are of whole batches.
        """
        n = len(runner.calibration)
        share = self._steps(n) * min(self.batch_size, n) / n
        return share * (len(_widths(table)) + 1) * (FORWARD + BACKWARD)

    def _steps(self, n_samples: int) -> int:
        """Return the number of batches of the whole training."""
        return self.epochs * max(1, n_samples // self.batch_size)

    def scores(self, work: Work) -> Scores:
        """Train, and score every row."""
        indicators = self._indicators(work)

        def value(candidate: Candidate) -> float:
            if not changes_anything(candidate) or candidate.weight_bits == FULL_PRECISION_BITS:
                return 0.0
            return indicators[candidate.layer, candidate.weight_bits]

        return Scores(
            diagonal=row_sums(work.table, value),
            error=None,
            loss=self.name,
            unit="steps per standard deviation",
            details={"samples": len(work.runner.calibration)},
        )

    def _indicators(self, work: Work) -> dict[tuple[str, int], float]:
        """Return the normalised step of every layer and width, from the ledger if it is there."""
        inventory, widths = work.runner.inventory, _widths(work.table)
        layers = [inventory.layer(name) for name in work.layers]
        keys = [(layer.name, b) for layer in layers for b in widths]
        samples = work.runner.calibration
        key = work.key(0, {"widths": widths, "of": samples.to_json()}, "indicators")
        known = work.recorder.context.ledger.get(key)
        if known is None:
            found = self._train(work, layers, widths)
            work.recorder.context.ledger.put(
                key, np.array([found[k] for k in keys], dtype=np.float64)
            )
            return found
        return dict(zip(keys, (float(v) for v in known), strict=True))

    def _train(
        self, work: Work, layers: Sequence[Layer], widths: Sequence[int]
    ) -> dict[tuple[str, int], float]:
        joint = _Joint(work.runner.module, layers, widths)
        samples = work.runner.calibration
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
    """A model with steps and norm parameters for every width."""

    def __init__(self, module: nn.Module, layers: Sequence[Layer], widths: Sequence[int]) -> None:
        super().__init__()
        self.layers, self.widths = tuple(layers), tuple(widths)
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

    def forward(self, choice: Sequence[int], inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the output with layer ``l`` at width ``choice[l]``."""
        values: dict[str, Tensor] = {}
        for k, (layer, latent) in enumerate(zip(self.layers, self.latents, strict=True)):
            values[layer.weight_name] = _quantized(
                latent, self.steps[k, choice[k]], self.widths[choice[k]]
            )
        # A mixture takes the norms of its first layer's width.
        first = choice[0] * len(self.own)
        values |= {n: self.norms[first + i] for i, n in enumerate(self.own)}
        module = self._module[0]
        buffers = {n: b.detach().clone() for n, b in module.named_buffers()}
        was_training = module.training
        module.train()
        try:
            return primary_output(functional_call(module, values | buffers, inputs))
        finally:
            module.train(was_training)

    @torch.no_grad()
    def indicators(self) -> dict[tuple[str, int], float]:
        """Return each step over the standard deviation of its layer's weights."""
        found: dict[tuple[str, int], float] = {}
        for k, (layer, latent) in enumerate(zip(self.layers, self.latents, strict=True)):
            deviation = max(float(latent.double().std()), 1e-12)
            for j, bits in enumerate(self.widths):
                found[layer.name, bits] = abs(float(self.steps[k, j])) / deviation
        return found


def _start(latent: Tensor, bits: int) -> float:
    """Return LSQ's start, ``2 E|w| / sqrt(highest level)``."""
    highest = max(1, levels(bits)[1])
    return max(2 * float(latent.abs().mean()) / math.sqrt(highest), 1e-8)


def _quantized(latent: Tensor, step: Tensor, bits: int) -> Tensor:
    lowest, highest = levels(bits)
    scale = 1 / math.sqrt(latent.numel() * max(1, highest))
    if bits == 1:
        return binary(latent, step, gradient_scale=scale)
    return lsq(latent, step, lowest, highest, gradient_scale=scale)


def _widths(table: CandidateTable) -> list[int]:
    found: set[Any] = {c.weight_bits for row in table.rows for c in row.candidates}
    return sorted(found - {FULL_PRECISION_BITS})

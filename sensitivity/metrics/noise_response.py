"""How much the loss answers to noise in one layer at a time, times each candidate's own error.

References:
    [HIGGS] V. Malinovskii et al. Pushing the limits of large language model quantization via the
    linearity theorem. NAACL 2025. arXiv 2411.17525.

Design: docs/design/measures.md
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch.func import functional_call

from bitquota.models.running import checked_output, inputs_of
from bitquota.sensitivity.metrics.metric import (
    FORWARD,
    Metric,
    Scores,
    Work,
    chunk_weights,
    over_chunks,
    row_sums,
)
from bitquota.sensitivity.metrics.weight_error import relative_error
from bitquota.sensitivity.recorder import checked_losses

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from bitquota.candidates.table import CandidateTable
    from bitquota.sensitivity.runners.base import Runner

SIZES = (0.05, 0.1, 0.15, 0.2)
"""Norms of the noise in units of the layer's: 8 bits to 3 bits and a half, where it is linear."""


@dataclass(frozen=True, slots=True)
class NoiseResponse(Metric):
    """``s = α_l t_l²``, ``t_l² = ‖ΔW‖² / ‖W‖²``, ``α_l`` from Gaussian noise in ``l`` [HIGGS].

    ``α_l`` is the least-squares slope through the origin of the loss increase ``D_k`` over ``t_k²``
    where ``W_l`` is replaced by ``W_l + t_k ‖W_l‖ ε / ‖ε‖``: ``α_l = Σ_k D_k t_k² / Σ_k t_k⁴``. By
    their theorem the loss grows by about ``Σ_l α_l t_l²`` while all ``t_l`` are small.

    We differ: they fit the slope to perplexity at more sizes of the noise; here it is fitted at
    ``SIZES`` to the loss that was asked for, one draw of the noise for each layer.

    Pitfalls: rounding to nearest is no noise of random direction, and at 2 and 3 bits the loss is
    no longer linear in ``t²``; on ResNet-20 the relative error alone ranks as well.
    """

    name: ClassVar[str] = "noise_response"
    known_as: ClassVar[str] = "relative weight MSE times response to noise (HIGGS)"
    estimates_loss: ClassVar[bool] = True

    def cost(self, runner: Runner, table: CandidateTable) -> float:
        """Return a pass for each layer and size of the noise, and the references."""
        del runner
        n_layers = len({c.layer for row in table.rows for c in row.candidates})
        return FORWARD * (1 + len(SIZES) * n_layers)

    def scores(self, work: Work) -> Scores:
        """Score every row."""
        layers, n_chunks = work.layers, len(work.runner.chunks)
        work.recorder.shards = len(layers)
        alphas = np.array([[self._alpha(work, k, n) for n in layers] for k in range(n_chunks)])
        mean = dict(zip(layers, chunk_weights(work.runner) @ alphas, strict=True))
        errors = dict(zip(layers, over_chunks(alphas), strict=True))
        relative = {c: relative_error(work, c) for row in work.table.rows for c in row.candidates}
        squares = row_sums(work.table, lambda c: (errors[c.layer] * relative[c]) ** 2)
        return Scores(
            diagonal=row_sums(work.table, lambda c: mean[c.layer] * relative[c]),
            error=np.sqrt(squares),
            loss=work.loss.name,
            unit=work.loss.unit,
            details={"alpha": {name: float(value) for name, value in mean.items()}},
        )

    def _alpha(self, work: Work, chunk: int, layer: str) -> float:
        key = work.key(chunk, {"layer": layer, "sizes": list(SIZES)}, "noise")

        def run() -> list[NDArray[np.float64]]:
            found = torch.stack([self._increase(work, chunk, layer, size) for size in SIZES])
            work.charge(chunk, FORWARD * len(SIZES))
            return checked_losses(found[None], self.name)

        squares = np.array(SIZES) ** 2
        increases = work.recorder.shard([key], run)[key]
        return float(increases @ squares / (squares @ squares))

    @staticmethod
    def _increase(work: Work, chunk: int, layer: str, size: float) -> Tensor:
        """Return f64[]: the mean loss increase of a chunk with noise in one layer."""
        runner, span = work.runner, work.runner.chunks[chunk]
        weight = runner.weights.original(layer).detach()
        # The seed is the layer's name: no result depends on the order of layers.
        generator = torch.Generator().manual_seed(zlib.crc32(layer.encode()))
        noise = torch.randn(weight.shape, generator=generator).to(weight)
        moved = weight + size * weight.norm() / noise.norm() * noise
        name = runner.weights.layer(layer).weight_name
        reference, labels = runner.reference(chunk), runner.labels(chunk)
        inputs = inputs_of(runner.calibration, span)
        with torch.no_grad():
            output = checked_output(
                functional_call(runner.module, {name: moved}, inputs), len(span)
            )
            noisy = work.loss.per_sample(output, reference, labels)
            plain = work.loss.per_sample(reference, reference, labels)
        return (noisy.double() - plain.double()).mean().cpu()

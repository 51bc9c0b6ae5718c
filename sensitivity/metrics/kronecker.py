"""Activation-aware diagonal Kronecker factors: second moments of inputs and output gradients.

References:
    [CASA] Activation-aware bit allocation for language models with swap search on the loss, 2026:
    ``s = Σ_ij b_i a_j ΔW_ij²``, ``a_j = E[x_j²]``, ``b_i = E[g_i²]``.
    [KFC] R. Grosse, J. Martens. A Kronecker-factored approximate Fisher matrix for convolution
    layers. ICML 2016. arXiv 1602.01407.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from bitquota.sensitivity.metrics.local_response import LabelledGradientMetric, measure_rows
from bitquota.sensitivity.metrics.metric import (
    Scores,
    Work,
    changes_anything,
    chunk_weights,
    over_chunks,
)

if TYPE_CHECKING:
    from torch import Tensor

    from bitquota.candidates.table import Row
    from bitquota.sensitivity.metrics.local_response import Calls


@dataclass(frozen=True, slots=True)
class KroneckerFisher(LabelledGradientMetric):
    """``s = ½ P Σ_ij b_i a_j ΔW_ij²``, ``a_j = E[x_j²]``, ``b_i = E[g_i²]`` [CASA].

    ``x_j`` is what weight ``(i, j)`` is multiplied with, ``g_i`` the gradient of the sample's
    cross entropy at output channel ``i``, both over samples and positions (pixels, tokens), and
    ``P`` the number of positions. For a language model ``P`` is the same everywhere; for
    convolutions it is not, and has to stand there [KFC, positions taken as uncorrelated].

    Neither the moments nor a weight gradient are formed: the layer itself, run on ``x²`` with the
    weight ``ΔW²``, gives ``Σ_j x_j² ΔW_ij²`` at every position, which is contracted with ``b``.
    Expectations are over each chunk; the score is the mean over chunks and its standard error
    theirs.

    Pitfalls: any scalar proxy that drops the correlations of inputs can be off by the square root
    of the factors' condition numbers; weights only, quantized inputs are not seen.
    """

    name: ClassVar[str] = "kronecker"
    known_as: ClassVar[str] = "diagonal Kronecker Fisher (CASA)"

    def scores(self, work: Work) -> Scores:
        """Score every row."""

        def contracted(work: Work, calls: Calls, row: Row) -> Tensor:
            total = torch.zeros((), dtype=torch.float64)
            for candidate in filter(changes_anything, row.candidates):
                squared = work.delta(candidate).square()
                for call in calls[candidate.layer]:
                    assert call.gradient is not None  # noqa: S101  # traced with a loss
                    n, axis = len(call.gradient), call.channel_axis % call.output_dims
                    others = [d for d in range(call.output_dims) if d != axis]
                    b = call.gradient.double().square().mean(dim=others)  # [channels]
                    x = call.inputs.square() if call.inputs.is_floating_point() else call.inputs
                    moments = call.respond(squared, x).double().sum(dim=others)  # [channels]
                    total = total.to(b.device) + 0.5 * (b @ moments) / n
            return total[None]

        per_chunk = np.concatenate(measure_rows(work, contracted), axis=1).T  # f64[C, n_rows]
        return Scores(
            diagonal=chunk_weights(work.runner) @ per_chunk,
            error=over_chunks(per_chunk),
            loss=work.loss.name,
            unit=work.loss.unit,
        )

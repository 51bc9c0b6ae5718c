"""Orthogonality of layers: which layers say what no other layer says.

References:
    [OMPQ] Y. Ma et al. OMPQ: orthogonal mixed precision quantization. AAAI 2023. arXiv 2109.07865.
    [CKA] S. Kornblith, M. Norouzi, H. Lee, G. Hinton. Similarity of neural network representations
    revisited. ICML 2019. arXiv 1905.00414.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from bitquota.candidates.storage import FULL_PRECISION_BITS
from bitquota.errors import InvalidInput
from bitquota.sensitivity.metrics.layer_trace import trace_layers
from bitquota.sensitivity.metrics.metric import (
    FORWARD,
    Metric,
    Scores,
    Work,
    chunk_weights,
    over_chunks,
    row_sums,
)
from bitquota.sensitivity.recorder import checked_losses

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from bitquota.candidates.table import Candidate, CandidateTable
    from bitquota.sensitivity.runners.base import Runner


def orthogonality(features: Sequence[Tensor]) -> Tensor:
    """Return ``f64[L, L]``: ``ORM_ij = ‖F_iᵀ F_j‖² / (‖F_iᵀ F_i‖ ‖F_jᵀ F_j‖)`` [OMPQ, equation 7].

    With features centred over the samples this is linear [CKA]; 1 on the diagonal. Computed from
    the Gram matrices over samples, ``‖F_iᵀ F_j‖² = ⟨F_i F_iᵀ, F_j F_jᵀ⟩``, so a feature may be as
    wide as it likes. A layer whose feature is constant is orthogonal to all others.

    Args:
        features: ``[n, ...]`` each, the same samples.

    Cost: O(L n² width + L² n²).
    """
    grams = []
    for feature in features:
        flat = feature.reshape(len(feature), -1).double()
        centred = flat - flat.mean(dim=0)
        gram = (centred @ centred.T).flatten()
        norm = gram.norm()
        grams.append(gram / norm if norm > 0 else gram)
    stacked = torch.stack(grams)
    return (stacked @ stacked.T).fill_diagonal_(1.0)


def later_means(values: NDArray[np.float64], turns: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return for every layer the mean of the values of itself and of those behind it.

    Args:
        values: f64[C, L].
        turns: f64[L], the place of each layer in the order in which they run.
    """
    order = np.argsort(-turns, kind="stable")
    means = np.empty_like(values)
    means[:, order] = values[:, order].cumsum(axis=1) / np.arange(1, len(order) + 1)
    return means


@dataclass(frozen=True, slots=True)
class Orthogonality(Metric):
    """``s = (32 - b) w_l``, ``w_l`` the mean of ``θ_j = exp(-β γ_j)`` over ``j >= l`` [OMPQ].

    ``γ_j = Σ_{i ≠ j} ORM_ij``. Layers are numbered as they run: the released code
    (``mixed_bit/feature_extract.py``) weighs a layer's bits with the mean of its own θ and those of
    all later layers, which the paper's text does not say. It maximises ``Σ b_l w_l`` by linear
    programming and rounds; with one candidate per layer ``-b w`` and ``(32 - b) w`` differ by a
    constant, so solving this diagonal exactly is solving theirs without rounding, and full
    precision scores zero. A layer's feature is what the model made of its output before the next
    layer (see ``layer_trace``); the ORM is that of each chunk, weights the mean over chunks.
    Layers of a group add up; bits of activations are not seen.

    Pitfalls: looks neither at the weights' error nor at the loss. The released scripts use β from
    1e-9 to 100 by network; at 1e-9 every θ is 1 and the method fills the smallest layers first,
    exactly as ``size only`` does, which it has to be compared with. On ResNet-20 no β carried
    usable signal, and a large one was harmful.

    Attributes:
        beta: How strongly similarity counts.
    """

    beta: float = 0.3

    name: ClassVar[str] = "orthogonality"
    known_as: ClassVar[str] = "orthogonality (OMPQ)"

    def __post_init__(self) -> None:
        """Check the exponent."""
        if not 0 <= self.beta < np.inf:
            msg = f"beta must be finite and at least 0; got {self.beta}"
            raise InvalidInput(msg, beta=self.beta)

    def cost(self, runner: Runner, table: CandidateTable) -> float:
        """Return one pass."""
        del runner, table
        return FORWARD

    def scores(self, work: Work) -> Scores:
        """Score every row."""
        layers, runner = work.layers, work.runner
        found = np.empty((len(runner.chunks), 2, len(layers)))
        for chunk in range(len(runner.chunks)):
            # Each layer's number depends on all the layers it is compared with, not on β.
            key = work.recorder.key(chunk, {"layers": layers}, "metric orthogonality in order")

            def run(chunk: int = chunk) -> list[NDArray[np.float64]]:
                calls = trace_layers(runner, chunk, layers, self.name, features=True)
                work.charge(chunk, FORWARD)
                features = [calls[name][0].feature for name in layers]
                similar = orthogonality([f for f in features if f is not None])
                turns = torch.tensor([list(calls).index(name) for name in layers])
                return checked_losses(
                    torch.stack([similar.sum(dim=1).cpu() - 1.0, turns.double()])[None], self.name
                )

            found[chunk] = work.recorder.shard([key], run)[key].reshape(2, -1)
        importance = later_means(np.exp(-self.beta * found[:, 0]), found[0, 1])
        theta = chunk_weights(runner) @ importance
        errors = over_chunks(importance)
        index = {name: k for k, name in enumerate(layers)}

        def spared(candidate: Candidate) -> int:
            return FULL_PRECISION_BITS - candidate.weight_bits

        return Scores(
            diagonal=row_sums(work.table, lambda c: spared(c) * theta[index[c.layer]]),
            error=np.sqrt(
                row_sums(work.table, lambda c: (spared(c) * errors[index[c.layer]]) ** 2)
            ),
            loss=self.name,
            unit="weighted bits",
            details={"weights": dict(zip(layers, theta.tolist(), strict=True))},
        )

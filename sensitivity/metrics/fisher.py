"""Fisher metrics: squared gradients of the labelled loss, in weight space and in output space.

References:
    [MPQCO] W. Chen, P. Wang, J. Cheng. Towards mixed-precision quantization of neural networks via
    constrained optimization. ICCV 2021. arXiv 2110.06554.
    [AutoQuantize] NVIDIA Model Optimizer, ``mtq.auto_quantize``, the gradient score.

Both need labels: around full precision the gradient of a divergence to the model itself is zero.
They are taken with cross entropy, whatever loss is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from bitquota.sensitivity.metrics.local_response import (
    LabelledGradientMetric,
    measure_rows,
    per_sample_dot,
    response_to,
)
from bitquota.sensitivity.metrics.metric import Scores, Work, changes_anything
from bitquota.sensitivity.recorder import standard_error

if TYPE_CHECKING:
    from torch import Tensor

    from bitquota.candidates.table import Row
    from bitquota.sensitivity.metrics.local_response import Calls, RowScore


def _mean_and_error(work: Work, score: RowScore) -> Scores:
    values = np.concatenate(measure_rows(work, score), axis=1)  # f64[n_rows, N]
    return Scores(
        diagonal=values.mean(axis=1),
        error=standard_error(values),
        loss=work.loss.name,
        unit=work.loss.unit,
    )


@dataclass(frozen=True, slots=True)
class EmpiricalFisher(LabelledGradientMetric):
    """``s = 1/(2N) Σ_n ⟨∂ log p(y_n | x_n) / ∂W, Q(W) - W⟩²`` [MPQCO].

    For cross entropy the Gauss-Newton Hessian at a well-trained model is close to this empirical
    Fisher matrix, so the score is the second-order loss increase *along the actual change* of the
    weights, not a trace times a length. We never form a weight gradient: its inner product with
    the change is that of the gradient at the layer's output with the layer's response to the
    change, sample by sample. A group is perturbed as a whole (the sum inside the square).

    We differ from the paper in the allocator (exact instead of greedy), and in quantized inputs,
    which enter through the same response.

    Pitfalls: differentiates the log of the softmax, not a logit; a confident model has small
    gradients on most samples, so a few samples decide (see the standard errors); on a model that
    fits its labels badly the empirical Fisher is not the Hessian.
    """

    name: ClassVar[str] = "empirical_fisher"
    known_as: ClassVar[str] = "empirical Fisher (MPQCO)"
    sees_activations: ClassVar[bool] = True

    def scores(self, work: Work) -> Scores:
        """Score every row."""

        def directional(work: Work, calls: Calls, row: Row) -> Tensor:
            slope = torch.zeros(())
            for candidate in filter(changes_anything, row.candidates):
                for call in calls[candidate.layer]:
                    assert call.gradient is not None  # noqa: S101  # traced with a loss
                    change = response_to(work, call, candidate)
                    slope = slope.to(change.device) + per_sample_dot(call.gradient, change)
            return 0.5 * slope.square()

        return _mean_and_error(work, directional)


@dataclass(frozen=True, slots=True)
class OutputFisher(LabelledGradientMetric):
    """``s = 1/(2N) Σ_n Σ_elements (∂L_n/∂y)² (y_c - y)²`` with ``y`` the layer's output.

    The Fisher matrix of each layer's *output*, its diagonal only, against the change of that
    output with weights and (if quantized) inputs of candidate ``c`` [AutoQuantize]. The factor
    one half makes it a second-order loss increase; it changes no ranking.

    Pitfall: output elements move together, which the diagonal cannot see; where errors cancel
    over positions it overestimates, where they add up it underestimates.
    """

    name: ClassVar[str] = "output_fisher"
    known_as: ClassVar[str] = "output Fisher (NVIDIA AutoQuantize)"
    sees_activations: ClassVar[bool] = True

    def scores(self, work: Work) -> Scores:
        """Score every row."""

        def elementwise(work: Work, calls: Calls, row: Row) -> Tensor:
            total = torch.zeros(())
            for candidate in filter(changes_anything, row.candidates):
                for call in calls[candidate.layer]:
                    assert call.gradient is not None  # noqa: S101  # traced with a loss
                    moved = response_to(work, call, candidate).double().square()
                    dot = per_sample_dot(call.gradient.double().square(), moved)
                    total = total.to(dot.device) + dot
            return 0.5 * total

        return _mean_and_error(work, elementwise)

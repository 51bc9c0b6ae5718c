"""Learn bit-widths by gradient: three recipes that differ in what is learned and how size is held.

References:
    [DQ] S. Uhlich et al., "Mixed Precision DNNs: All you need is a good parametrization", ICLR
    2020, arXiv 1905.11452.
    [Chikin22] V. Chikin, K. Solodskikh, I. Zhelavskaya, "Explicit Model Size Control and Relaxation
    via Smooth Regularization for Mixed-Precision Quantization", ECCV 2022 (the ellipsoid).
"""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitquota.quantizers.differentiable import UniformQuantizer, ste_round
from bitquota.quantizers.layout import from_matrix, to_matrix
from bitquota.quantizers.scales import least_squares_scale
from bitquota.training.finetune import grouped

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from bitquota.candidates import Layer
    from bitquota.training.settings import TrainingSettings

START_BITS = 4.0


class BitLearner(nn.Module):
    """A model whose layers' bit-widths are parameters.

    Args:
        model: The full-precision model; it is copied.
        layers: The layers to learn for.
        code_limit_bits: Bits that the codes of all layers may take together.
        least: Smallest bit-width.
        most: Largest bit-width.
        per_channel: Let every output channel's step keep its ratio to the layer's; otherwise one
            step per tensor, as published.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        code_limit_bits: float,
        *,
        least: float,
        most: float,
        per_channel: bool,
    ) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.layers = tuple(layers)
        self.limit, self.least, self.most = code_limit_bits, least, most
        self.counts = torch.tensor([float(layer.n_weights) for layer in layers])
        self.parts = nn.ModuleList()
        for layer in layers:
            matrix = to_matrix(self.latent(layer).detach(), layer)
            part = nn.Module()
            part.register_buffer("ratios", _row_ratios(matrix, per_channel=per_channel))
            self.parts.append(part)

    def latent(self, layer: Layer) -> Tensor:
        """Return the full-precision weight that training moves."""
        return self.model.get_parameter(layer.weight_name)

    def _scaled(self, k: int) -> Tensor:
        """Return a layer's matrix with its rows at a common scale."""
        ratios = self.parts[k].ratios
        assert isinstance(ratios, torch.Tensor)  # noqa: S101  # registered above
        return to_matrix(self.latent(self.layers[k]), self.layers[k]) / ratios

    def _unscaled(self, k: int, matrix: Tensor) -> Tensor:
        ratios = self.parts[k].ratios
        assert isinstance(ratios, torch.Tensor)  # noqa: S101  # registered above
        return from_matrix(matrix * ratios, self.layers[k])

    def quantized(self, k: int) -> Tensor:
        """Return the quantized matrix of layer ``k``, rows at a common scale."""
        raise NotImplementedError

    def relaxed_bits(self) -> Tensor:
        """Return f32[layers], differentiable, not rounded."""
        raise NotImplementedError

    def weights(self) -> dict[str, Tensor]:
        """Return the quantized weights."""
        return {
            layer.weight_name: self._unscaled(k, self.quantized(k))
            for k, layer in enumerate(self.layers)
        }

    def parameter_groups(self, settings: TrainingSettings) -> list[dict[str, Any]]:
        """Return groups for weights, biases and norms, and quantizers."""
        return grouped(self.model, self.parts, settings)

    def input_quantizers(self) -> AbstractContextManager[object]:
        """Leave the layers' inputs as they are."""
        return nullcontext()

    def penalty(self, progress: float) -> Tensor | float:
        """Return nothing unless a recipe says otherwise."""
        del progress
        return 0.0

    def before_step(self) -> None:
        """Gradients stay as they are unless a recipe says otherwise."""

    def after_step(self) -> None:
        """Parameters stay as they are unless a recipe says otherwise."""

    def is_eligible(self) -> bool:
        """Every state may be kept; the exact repair follows."""
        return True


class StabilisedLearner(BitLearner):
    """[DQ]'s U3 in the logarithm, with relaxed bit-widths in the penalty (our variant).

    Learned are ``log2 d`` and ``log2 q_max`` of every layer; the forward pass uses real steps. The
    bit-width ``log2(q_max/d + 1) + 1`` enters the penalty without rounding, limited to what is on
    offer: ``strength(t) relu(size/limit - 1)``, the strength rising from 0.5 to 2.5.
    """

    strength = (0.5, 2.5)

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        code_limit_bits: float,
        *,
        least: float,
        most: float,
        per_channel: bool,
    ) -> None:
        super().__init__(
            model, layers, code_limit_bits, least=least, most=most, per_channel=per_channel
        )
        for k, part in enumerate(self.parts):
            matrix = self._scaled(k).detach()
            highest = int(2 ** (START_BITS - 1) - 1)
            step = _tensor_step(matrix, highest)
            part.log_step = nn.Parameter(torch.tensor(math.log2(step)))
            part.log_range = nn.Parameter(torch.tensor(math.log2(step * highest)))

    def quantized(self, k: int) -> Tensor:
        """Return the quantized matrix; the levels are a multiple of the step."""
        step, largest = 2.0 ** self._of(k, "log_step"), 2.0 ** self._of(k, "log_range")
        matrix = self._scaled(k)
        # The code refinement of [DQ]: clip, then round to the step.
        clipped = torch.minimum(torch.maximum(matrix, -largest), largest)
        return step * ste_round(clipped / step)

    def relaxed_bits(self) -> Tensor:
        """Return ``log2(q_max/d + 1) + 1`` within what is on offer."""
        spans = torch.stack(
            [self._of(k, "log_range") - self._of(k, "log_step") for k in range(len(self.parts))]
        )
        return (torch.log2(2.0**spans + 1) + 1).clamp(self.least, self.most)

    def penalty(self, progress: float) -> Tensor:
        """Return the price of being over the limit."""
        low, high = self.strength
        size = (self.counts * self.relaxed_bits()).sum()
        return (low + (high - low) * progress) * torch.relu(size / self.limit - 1)

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep each range at least one step, so that no layer vanishes."""
        for k in range(len(self.parts)):
            self._of(k, "log_range").clamp_(min=float(self._of(k, "log_step")))

    def _of(self, k: int, name: str) -> Tensor:
        value = getattr(self.parts[k], name)
        assert isinstance(value, torch.Tensor)  # noqa: S101  # registered above
        return value


class EllipsoidLearner(BitLearner):
    """Size held by construction: bit-widths live on an ellipsoid [Chikin22] (reconstruction).

    ``b_l = b_min + t_l^2`` with ``t = sqrt(T) v / ||v||_n``, ``||v||_n^2 = sum n_l v_l^2``, and
    ``T`` the limit less ``b_min`` for every weight. For any ``v``, ``sum n_l b_l`` is the limit: no
    penalty to tune. The quantizer is U2 with ``b`` from above and ``log2 q_max`` learned.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        code_limit_bits: float,
        *,
        least: float,
        most: float,
        per_channel: bool,
    ) -> None:
        super().__init__(
            model, layers, code_limit_bits, least=least, most=most, per_channel=per_channel
        )
        self.parts.register_parameter("direction", nn.Parameter(torch.ones(len(self.layers))))
        start = float(self.relaxed_bits().detach()[0])
        for k, part in enumerate(self.parts):
            highest = max(1, round(2 ** (start - 1) - 1))
            step = _tensor_step(self._scaled(k).detach(), highest)
            part.log_range = nn.Parameter(torch.tensor(math.log2(step * highest)))

    def relaxed_bits(self) -> Tensor:
        """Return bit-widths whose total is the limit exactly (before the cap at ``most``)."""
        direction = self.parts.get_parameter("direction")
        spare = max(0.0, self.limit - self.least * float(self.counts.sum()))
        norm = (self.counts * direction.square()).sum()
        return self.least + spare * direction.square() / norm

    def quantized(self, k: int) -> Tensor:
        """Return the quantized matrix at the layer's relaxed bit-width."""
        bits = self.relaxed_bits()[k].clamp(max=self.most)
        levels = 2.0 ** (bits - 1) - 1
        largest = 2.0 ** self.parts[k].get_parameter("log_range")
        step = largest / levels
        clipped = torch.minimum(torch.maximum(self._scaled(k), -largest), largest)
        return step * ste_round(clipped / step)


class PublishedLearner(BitLearner):
    """[DQ] as published and coded: U3 with a quadratic penalty, clipped gradients, projection.

    One step per tensor (and one for each bias in the authors' code, not here: biases ship in
    full precision), penalty ``0.1 relu(kB - limit)^2`` with kB = bits / 8 / 1024, quantizer
    gradients clipped to ``+-d``, parameters projected into their box. The authors select the best
    *feasible* state, as this does; unlike theirs the selection runs on a hold-out of the training
    data. The optimizer is the shared loop's AdamW rather than their momentum SGD.
    """

    strength = 0.1

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        code_limit_bits: float,
        *,
        least: float,
        most: float,
        per_channel: bool,
    ) -> None:
        super().__init__(
            model, layers, code_limit_bits, least=least, most=most, per_channel=per_channel
        )
        for k, part in enumerate(self.parts):
            largest = float(self._scaled(k).detach().abs().max())
            step = 2.0 ** math.floor(math.log2(max(largest, 1e-6) / (2 ** (START_BITS - 1) - 1)))
            part.quantizer = UniformQuantizer(step, START_BITS)

    def _quantizer(self, k: int) -> UniformQuantizer:
        quantizer = self.parts[k].quantizer
        assert isinstance(quantizer, UniformQuantizer)  # noqa: S101  # registered above
        return quantizer

    def quantized(self, k: int) -> Tensor:
        """Return the quantized matrix."""
        out: Tensor = self._quantizer(k)(self._scaled(k))
        return out

    def relaxed_bits(self) -> Tensor:
        """Return the bit-widths: whole numbers, differentiable by straight-through."""
        return torch.stack([self._quantizer(k).bits() for k in range(len(self.parts))])

    def penalty(self, progress: float) -> Tensor:
        """Return the squared excess in kB, times 0.1."""
        del progress
        excess = ((self.counts * self.relaxed_bits()).sum() - self.limit) / 8 / 1024
        return self.strength * torch.relu(excess).square()

    def before_step(self) -> None:
        """Clip the gradients of the quantizers."""
        for k in range(len(self.parts)):
            self._quantizer(k).clip_gradients()

    def after_step(self) -> None:
        """Project the quantizers into their box."""
        for k in range(len(self.parts)):
            self._quantizer(k).project()

    @torch.no_grad()
    def is_eligible(self) -> bool:
        """Whether the present bit-widths fit the limit."""
        return float((self.counts * self.relaxed_bits()).sum()) <= self.limit


def _row_ratios(matrix: Tensor, *, per_channel: bool) -> Tensor:
    """Return f32[rows, 1]: each row's best 4-bit scale over the geometric mean of all."""
    if not per_channel:
        return matrix.new_ones(1, 1)
    scales = least_squares_scale(matrix.double(), -7, 7)[:, None]
    if not bool((scales > 0).any()):
        return matrix.new_ones(1, 1)
    mean = scales[scales > 0].log().mean().exp()
    return torch.where(scales > 0, scales / mean, 1.0).to(matrix.dtype)


def _tensor_step(matrix: Tensor, highest: int) -> float:
    step = float(least_squares_scale(matrix.double().reshape(1, -1), -highest, highest))
    return step if step > 0 else 1e-4

"""Learn bit-widths by gradient: recipes that differ in what is learned and how size is held.

References:
    [DQ] S. Uhlich et al., "Mixed Precision DNNs: All you need is a good parametrization", ICLR
    2020, arXiv 1905.11452.
    [Chikin22] V. Chikin, K. Solodskikh, I. Zhelavskaya, "Explicit Model Size Control and Relaxation
    via Smooth Regularization for Mixed-Precision Quantization", ECCV 2022 (the ellipsoid).
    [Nikolic20] M. Nikolic et al., "BitPruning: Learning Bitlengths for Aggressive and Accurate
    Quantization", 2020, arXiv 2002.03090.

Design: docs/design/training.md
"""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitquota.errors import InvalidInput
from bitquota.models.layout import from_matrix, to_matrix
from bitquota.quantizers.differentiable import ste_round
from bitquota.quantizers.scales import least_squares_scale
from bitquota.training.finetune import grouped
from bitquota.training.smooth import ellipsoid_bits, off_grid, off_widths

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from bitquota.candidates.layers import Layer
    from bitquota.training.input_quantizers import LearnedInputBits
    from bitquota.training.prices import Prices
    from bitquota.training.settings import TrainingSettings

START_BITS = 4.0
STRENGTH = (0.5, 2.5)
"""Price of being over a budget by all of it, at the start and at the end of a run."""


class BitLearner(nn.Module):
    """A model whose layers' bit-widths are parameters.

    Args:
        model: The full-precision model; it is copied.
        prices: The layers to learn for, the bit-widths on offer, and what they take of each budget.
        per_channel: Let every output channel's step keep its ratio to the layer's; otherwise one
            step per tensor, as published.
        start_bits: Bit-width of each layer to start from, such as a solved plan's; by default
            every recipe's own.
        inputs: Learned bit-widths of the layers' inputs, or ``None`` for full precision.

    Attributes:
        held: Budgets that the recipe itself keeps; the others have a price that rises.
    """

    def __init__(
        self,
        model: nn.Module,
        prices: Prices,
        *,
        per_channel: bool,
        start_bits: Sequence[float] | None = None,
        inputs: LearnedInputBits | None = None,
    ) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.prices, self.layers = prices, prices.layers
        self.least, self.most = float(prices.widths[0]), float(prices.widths[-1])
        self.held: frozenset[int] = frozenset()
        self.start_bits = None if start_bits is None else [float(b) for b in start_bits]
        self.inputs = inputs
        self.counts: Tensor
        counts = torch.tensor([float(layer.n_weights) for layer in self.layers])
        self.register_buffer("counts", counts, persistent=False)
        self.parts = nn.ModuleList()
        for layer in self.layers:
            matrix = to_matrix(self.latent(layer).detach(), layer)
            part = nn.Module()
            part.register_buffer("ratios", _row_ratios(matrix, per_channel=per_channel))
            self.parts.append(part)
        self.prepare()

    def prepare(self) -> None:
        """Register what the recipe learns."""
        raise NotImplementedError

    def start_of(self, k: int) -> float:
        """Return the bit-width that layer ``k`` starts from."""
        if self.start_bits is None:
            return START_BITS
        return min(max(self.start_bits[k], self.least), self.most)

    def latent(self, layer: Layer) -> Tensor:
        """Return the full-precision weight that training moves."""
        return self.model.get_parameter(layer.weight_name)

    def _tensor(self, k: int, name: str) -> Tensor:
        value = getattr(self.parts[k], name)
        assert isinstance(value, torch.Tensor)  # noqa: S101  # registered by ``prepare``
        return value

    def _scaled(self, k: int) -> Tensor:
        """Return a layer's matrix with its rows at a common scale."""
        matrix = to_matrix(self.latent(self.layers[k]), self.layers[k])
        return matrix / self._tensor(k, "ratios")

    def quantized(self, k: int) -> Tensor:
        """Return the quantized matrix of layer ``k``, rows at a common scale."""
        raise NotImplementedError

    def relaxed_bits(self) -> Tensor:
        """Return f32[layers], differentiable, not rounded."""
        raise NotImplementedError

    def weights(self) -> dict[str, Tensor]:
        """Return the quantized weights."""
        return {
            layer.weight_name: from_matrix(self.quantized(k) * self._tensor(k, "ratios"), layer)
            for k, layer in enumerate(self.layers)
        }

    def parameter_groups(self, settings: TrainingSettings) -> list[dict[str, Any]]:
        """Return groups for weights, biases and norms, and quantizers."""
        own = [self.parts] if self.inputs is None else [self.parts, self.inputs]
        return grouped(self.model, nn.ModuleList(own), settings)

    def input_quantizers(self, weights: dict[str, Tensor]) -> AbstractContextManager[object]:
        """Return the context in which inputs are quantized."""
        return nullcontext() if self.inputs is None else self.inputs.watch(self.model, weights)

    def input_bits(self) -> Tensor | None:
        """Return f32[layers] of the inputs, differentiable; ``None`` if they are not learned."""
        if self.inputs is None:
            return None
        learned = self.inputs.relaxed_bits()
        at = [self.inputs.at.get(layer.name) for layer in self.layers]
        # What is not learned costs the same at any bit-width.
        return torch.stack([learned.new_tensor(self.most) if k is None else learned[k] for k in at])

    def penalty(self, progress: float) -> Tensor | float:
        """Return the recipe's own price, and ``strength(t) sum_k relu(taken_k/budget_k - 1)``."""
        low, high = STRENGTH
        bits, input_bits = self.relaxed_bits(), self.input_bits()
        excess = [
            self.prices.excess(k, bits, input_bits, self.shares())
            for k in range(len(self.prices.budgets))
            if k not in self.held
        ]
        price = self.weight_penalty(progress)
        if self.inputs is not None:
            price = price + self.inputs.channel_price()
        return price + (low + (high - low) * progress) * sum(excess, bits.new_zeros(()))

    def shares(self) -> Tensor | None:
        """Return f32[layers]: the share of each layer that is stored; ``None`` for all."""
        return None

    def weight_penalty(self, progress: float) -> Tensor | float:
        """Return nothing unless a recipe says otherwise."""
        del progress
        return 0.0

    def before_step(self) -> None:
        """Gradients stay as they are unless a recipe says otherwise."""

    def after_step(self) -> None:
        """Keep parameters in their box."""
        if self.inputs is not None:
            self.inputs.settle()

    def finish(self) -> None:
        """Leave weights for the second phase, where the recipe keeps them elsewhere."""

    def is_eligible(self) -> bool:
        """Every state may be kept; the exact repair follows."""
        return True


class StabilisedLearner(BitLearner):
    """[DQ]'s U3 in the logarithm, with relaxed bit-widths in the penalty (our variant).

    Learned are ``log2 d`` and ``log2 q_max`` of every layer; the forward pass uses real steps. The
    bit-width ``log2(q_max/d + 1) + 1`` enters the penalty without rounding, limited to what is on
    offer: the strength of the penalty rises from 0.5 to 2.5 (``BitLearner.penalty``).
    """

    def prepare(self) -> None:
        """Register step and range of every layer."""
        for k, part in enumerate(self.parts):
            highest = max(1, round(2 ** (self.start_of(k) - 1) - 1))
            step = tensor_step(self._scaled(k).detach(), highest)
            part.log_step = nn.Parameter(torch.tensor(math.log2(step)))
            part.log_range = nn.Parameter(torch.tensor(math.log2(step * highest)))

    def quantized(self, k: int) -> Tensor:
        """Return the quantized matrix; the levels are a multiple of the step."""
        step, largest = 2.0 ** self._tensor(k, "log_step"), 2.0 ** self._tensor(k, "log_range")
        # The code refinement of [DQ]: clip, then round to the step.
        return clip_and_round(self._scaled(k), step, largest)

    def relaxed_bits(self) -> Tensor:
        """Return ``log2(q_max/d + 1) + 1`` within what is on offer."""
        spans = torch.stack(
            [
                self._tensor(k, "log_range") - self._tensor(k, "log_step")
                for k in range(len(self.parts))
            ]
        )
        return (torch.log2(2.0**spans + 1) + 1).clamp(self.least, self.most)

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep each range at least one step, so that no layer vanishes."""
        super().after_step()
        for k in range(len(self.parts)):
            log_range = self._tensor(k, "log_range")
            log_range.copy_(torch.maximum(log_range, self._tensor(k, "log_step")))


class EllipsoidLearner(BitLearner):
    """Size held by construction: bit-widths live on an ellipsoid [Chikin22] (reconstruction).

    ``b_l = b_min + t_l^2`` with ``t = sqrt(T) v / ||v||_n``, ``||v||_n^2 = sum n_l v_l^2``, and
    ``T`` the limit less ``b_min`` for every weight. For any ``v``, ``sum n_l b_l`` is the limit: no
    penalty to tune. The quantizer is U2 with ``b`` from above and ``log2 q_max`` learned. ``n_l``
    is what a bit of layer ``l`` takes of the first budget that is linear in bit-widths: weights of
    a size, multiplications of bit operations. A limit on all inputs together is held in the same
    way. Further budgets have the price of other recipes.

    Smooth regularisers pull weights to their grid and bit-widths to those on offer, growing from
    zero along the run (``smooth``); they act besides the straight-through forward pass.
    """

    def prepare(self) -> None:
        """Register the direction, and the range of every layer."""
        plane = self.prices.plane()
        if plane is None:
            msg = (
                "recipe 'ellipsoid' needs a budget that is linear in the bit-widths of weights, "
                "such as '2.5 bits'; here none is: add one, or take recipe 'stabilised'"
            )
            raise InvalidInput(msg)
        held, slopes, self.limit = plane
        self.held = frozenset({held})
        if self.inputs is not None and (of_inputs := self.prices.plane(of_inputs=True)):
            at, input_slopes, limit = of_inputs
            self.held |= {at}
            layers = {la.name: k for k, la in enumerate(self.layers)}
            learned = [layers[name] for name in self.inputs.at]
            self.inputs.hold(input_slopes[learned], limit)
        self.slopes: Tensor
        self.register_buffer("slopes", slopes, persistent=False)
        # A direction of zero has no gradient: nothing starts quite at the floor.
        spare = [max(self.start_of(k) - self.least, 0.1) for k in range(len(self.layers))]
        self.parts.register_parameter("direction", nn.Parameter(torch.tensor(spare).sqrt()))
        start = self.relaxed_bits().detach().clamp(max=self.most).tolist()
        for k, part in enumerate(self.parts):
            highest = max(1, round(2 ** (start[k] - 1) - 1))
            step = tensor_step(self._scaled(k).detach(), highest)
            part.log_range = nn.Parameter(torch.tensor(math.log2(step * highest)))

    def relaxed_bits(self) -> Tensor:
        """Return bit-widths whose total is the limit exactly (before the cap at ``most``)."""
        direction = self.parts.get_parameter("direction")
        return ellipsoid_bits(direction, self.slopes, self.least, self.limit)

    def quantized(self, k: int) -> Tensor:
        """Return the quantized matrix at the layer's relaxed bit-width."""
        levels, largest = self._grid(k)
        return clip_and_round(self._scaled(k), largest / levels, largest)

    def _grid(self, k: int) -> tuple[Tensor, Tensor]:
        """Return levels on one side, and range."""
        levels = 2.0 ** (self.relaxed_bits()[k].clamp(max=self.most) - 1) - 1
        return levels, 2.0 ** self._tensor(k, "log_range")

    def weight_penalty(self, progress: float) -> Tensor:
        """Return the smooth regularisers of weights and of bit-widths, both growing."""
        off = []
        for k in range(len(self.layers)):
            levels, largest = self._grid(k)
            step, levels = (largest / levels).detach(), levels.detach()
            off.append(off_grid(self._scaled(k), step, levels))
        total = progress * ON_GRID * torch.stack(off).mean()
        total = total + progress * ON_OFFER * off_widths(self.relaxed_bits(), self.prices.widths)
        if self.inputs is not None:
            offered = [a for a in self.prices.input_widths if a is not None]
            total = total + progress * ON_OFFER * off_widths(self.inputs.relaxed_bits(), offered)
        return total


ON_GRID, ON_OFFER = 0.1, 0.1
"""Weights of the smooth regularisers at the end of a run; the paper's are not public."""


class BitPruningLearner(BitLearner):
    """Bit lengths between whole numbers: a mixture of the two nearest grids [Nikolic20].

    ``Q_n = (1 - f) Q_floor(n) + f Q_floor(n)+1`` with ``f = n - floor(n)``, so that the gradient to
    ``n`` is ``Q_floor(n)+1 - Q_floor(n)``, contracted with the loss's. The published penalty
    ``gamma sum n_l`` has no limit to meet; here ``gamma`` acts only above the limit and rises, as
    in ``BitLearner.penalty``. The range of every layer is learned, too.
    """

    def prepare(self) -> None:
        """Register bit length and range of every layer."""
        for k, part in enumerate(self.parts):
            highest = max(1, round(2 ** (self.start_of(k) - 1) - 1))
            step = tensor_step(self._scaled(k).detach(), highest)
            part.log_range = nn.Parameter(torch.tensor(math.log2(step * highest)))
        start = [self.start_of(k) for k in range(len(self.layers))]
        self.parts.register_parameter("lengths", nn.Parameter(torch.tensor(start)))

    def relaxed_bits(self) -> Tensor:
        """Return the lengths within what is on offer."""
        return self.parts.get_parameter("lengths").clamp(self.least, self.most)

    def quantized(self, k: int) -> Tensor:
        """Return the mixture of the two nearest whole bit-widths."""
        length = self.relaxed_bits()[k]
        whole = math.floor(float(length.detach()))
        share = length - whole
        largest, matrix = 2.0 ** self._tensor(k, "log_range"), self._scaled(k)
        lower = clip_and_round(matrix, largest / (2.0 ** (whole - 1) - 1), largest)
        upper = clip_and_round(matrix, largest / (2.0**whole - 1), largest)
        return (1 - share) * lower + share * upper

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the lengths within what is on offer, where they have a gradient."""
        super().after_step()
        self.parts.get_parameter("lengths").clamp_(self.least, self.most)


def clip_and_round(matrix: Tensor, step: Tensor, largest: Tensor) -> Tensor:
    """Return ``matrix`` clipped to ``+-largest`` and rounded to multiples of ``step``."""
    clipped = torch.minimum(torch.maximum(matrix, -largest), largest)
    return step * ste_round(clipped / step)


def _row_ratios(matrix: Tensor, *, per_channel: bool) -> Tensor:
    """Return f32[rows, 1]: each row's best 4-bit scale over the geometric mean of all."""
    if not per_channel:
        return matrix.new_ones(1, 1)
    scales = least_squares_scale(matrix.double(), -7, 7)[:, None]
    if not bool((scales > 0).any()):
        return matrix.new_ones(1, 1)
    mean = scales[scales > 0].log().mean().exp()
    return torch.where(scales > 0, scales / mean, 1.0).to(matrix.dtype)


def tensor_step(matrix: Tensor, highest: int) -> float:
    """Return the best step of a tensor with codes up to ``highest``."""
    step = float(least_squares_scale(matrix.double().reshape(1, -1), -highest, highest))
    return step if step > 0 else 1e-4

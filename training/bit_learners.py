"""Learn bit-widths by gradient: recipes that differ in what is learned and how size is held.

References:
    [DQ] S. Uhlich et al., "Mixed Precision DNNs: All you need is a good parametrization", ICLR
    2020, arXiv 1905.11452.
    [Chikin22] V. Chikin, K. Solodskikh, I. Zhelavskaya, "Explicit Model Size Control and Relaxation
    via Smooth Regularization for Mixed-Precision Quantization", ECCV 2022 (the ellipsoid).
    [Nikolic20] M. Nikolic et al., "BitPruning: Learning Bitlengths for Aggressive and Accurate
    Quantization", 2020, arXiv 2002.03090.
    [BSQ] H. Yang et al., "BSQ: Exploring Bit-Level Sparsity for Mixed-Precision Neural Network
    Quantization", ICLR 2021, arXiv 2102.10462.
    [MSQ] S. Han et al., "MSQ: Memory-Efficient Bit Sparsification Quantization", 2025, arXiv
    2507.22349.
"""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitquota.models.layout import from_matrix, to_matrix
from bitquota.quantizers.differentiable import UniformQuantizer, ste_round
from bitquota.quantizers.scales import least_squares_scale
from bitquota.training.finetune import grouped

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from bitquota.candidates.layers import Layer
    from bitquota.training.input_quantizers import LearnedInputBits
    from bitquota.training.settings import TrainingSettings

START_BITS = 4.0
INPUT_STRENGTH = (0.5, 2.5)
"""Price of inputs over their limit, at the start and at the end of a run."""


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
        start_bits: Bit-width of each layer to start from, such as a solved plan's; by default
            every recipe's own.
        inputs: Learned bit-widths of the layers' inputs, or ``None`` for full precision.
        input_limits: Limits on the bits of all inputs together and of the largest, or ``None``.
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
        start_bits: Sequence[float] | None = None,
        inputs: LearnedInputBits | None = None,
        input_limits: tuple[int | None, int | None] = (None, None),
    ) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.layers = tuple(layers)
        self.limit, self.least, self.most = code_limit_bits, least, most
        self.start_bits = None if start_bits is None else [float(b) for b in start_bits]
        self.inputs, self.input_limits = inputs, input_limits
        self.counts: Tensor
        counts = torch.tensor([float(layer.n_weights) for layer in layers])
        self.register_buffer("counts", counts, persistent=False)
        self.parts = nn.ModuleList()
        for layer in layers:
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

    def penalty(self, progress: float) -> Tensor | float:
        """Return the price of size over the limits: of weights by the recipe, and of inputs."""
        price = self.weight_penalty(progress)
        if self.inputs is None:
            return price
        low, high = INPUT_STRENGTH
        return price + (low + (high - low) * progress) * self.inputs.excess(*self.input_limits)

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

    def is_eligible(self) -> bool:
        """Every state may be kept; the exact repair follows."""
        return True

    def over_limit(self, progress: float, strength: tuple[float, float]) -> Tensor:
        """Return ``strength(t) relu(size/limit - 1)``, the strength rising linearly."""
        low, high = strength
        size = (self.counts * self.relaxed_bits()).sum()
        return (low + (high - low) * progress) * torch.relu(size / self.limit - 1)


class StabilisedLearner(BitLearner):
    """[DQ]'s U3 in the logarithm, with relaxed bit-widths in the penalty (our variant).

    Learned are ``log2 d`` and ``log2 q_max`` of every layer; the forward pass uses real steps. The
    bit-width ``log2(q_max/d + 1) + 1`` enters the penalty without rounding, limited to what is on
    offer: ``strength(t) relu(size/limit - 1)``, the strength rising from 0.5 to 2.5.
    """

    strength = (0.5, 2.5)

    def prepare(self) -> None:
        """Register step and range of every layer."""
        for k, part in enumerate(self.parts):
            highest = max(1, round(2 ** (self.start_of(k) - 1) - 1))
            step = _tensor_step(self._scaled(k).detach(), highest)
            part.log_step = nn.Parameter(torch.tensor(math.log2(step)))
            part.log_range = nn.Parameter(torch.tensor(math.log2(step * highest)))

    def quantized(self, k: int) -> Tensor:
        """Return the quantized matrix; the levels are a multiple of the step."""
        step, largest = 2.0 ** self._tensor(k, "log_step"), 2.0 ** self._tensor(k, "log_range")
        # The code refinement of [DQ]: clip, then round to the step.
        return _clip_and_round(self._scaled(k), step, largest)

    def relaxed_bits(self) -> Tensor:
        """Return ``log2(q_max/d + 1) + 1`` within what is on offer."""
        spans = torch.stack(
            [
                self._tensor(k, "log_range") - self._tensor(k, "log_step")
                for k in range(len(self.parts))
            ]
        )
        return (torch.log2(2.0**spans + 1) + 1).clamp(self.least, self.most)

    def weight_penalty(self, progress: float) -> Tensor:
        """Return the price of being over the limit."""
        return self.over_limit(progress, self.strength)

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
    penalty to tune. The quantizer is U2 with ``b`` from above and ``log2 q_max`` learned.
    """

    def prepare(self) -> None:
        """Register the direction, and the range of every layer."""
        # A direction of zero has no gradient: nothing starts quite at the floor.
        spare = [max(self.start_of(k) - self.least, 0.1) for k in range(len(self.layers))]
        self.parts.register_parameter("direction", nn.Parameter(torch.tensor(spare).sqrt()))
        start = self.relaxed_bits().detach().clamp(max=self.most).tolist()
        for k, part in enumerate(self.parts):
            highest = max(1, round(2 ** (start[k] - 1) - 1))
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
        levels = 2.0 ** (self.relaxed_bits()[k].clamp(max=self.most) - 1) - 1
        largest = 2.0 ** self._tensor(k, "log_range")
        return _clip_and_round(self._scaled(k), largest / levels, largest)


class BitPruningLearner(BitLearner):
    """Bit lengths between whole numbers: a mixture of the two nearest grids [Nikolic20].

    ``Q_n = (1 - f) Q_floor(n) + f Q_floor(n)+1`` with ``f = n - floor(n)``, so that the gradient to
    ``n`` is ``Q_floor(n)+1 - Q_floor(n)``, contracted with the loss's. The published penalty
    ``gamma sum n_l`` has no limit to meet; here ``gamma`` acts only above the limit and rises, as
    in ``StabilisedLearner``. The range of every layer is learned, too.
    """

    strength = (0.5, 2.5)

    def prepare(self) -> None:
        """Register bit length and range of every layer."""
        for k, part in enumerate(self.parts):
            highest = max(1, round(2 ** (self.start_of(k) - 1) - 1))
            step = _tensor_step(self._scaled(k).detach(), highest)
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
        lower = _clip_and_round(matrix, largest / (2.0 ** (whole - 1) - 1), largest)
        upper = _clip_and_round(matrix, largest / (2.0**whole - 1), largest)
        return (1 - share) * lower + share * upper

    def weight_penalty(self, progress: float) -> Tensor:
        """Return the price of being over the limit."""
        return self.over_limit(progress, self.strength)

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the lengths within what is on offer, where they have a gradient."""
        super().after_step()
        self.parts.get_parameter("lengths").clamp_(self.least, self.most)


class BitSparsityLearner(BitLearner):
    """Weights are pressed until their last bit is zero, and the bit is dropped ([BSQ] by [MSQ]).

    Every layer starts at ``most`` bits. With step ``s``, the distance of ``w/s`` to the nearest
    even number, ``|w/s - 2 round(w/2s)|``, is what the last bit holds; its mean over all weights
    is the penalty. At ``EVENTS`` moments of the first part of the run the layers whose last bit is
    set least often lose it, as many as the size needs to come down to the limit in equal steps.
    [MSQ] weighs layers by Hessian traces besides, which this does not; [BSQ] keeps bit planes as
    parameters, which takes as many times the memory as there are bits.
    """

    strength = 0.05
    EVENTS = 12
    LAST_EVENT = 0.7
    """Part of the run after which bit-widths stay."""

    def prepare(self) -> None:
        """Register range, bit-width and the number of events that are over."""
        for k, part in enumerate(self.parts):
            largest = float(self._scaled(k).detach().abs().max())
            part.log_range = nn.Parameter(torch.tensor(math.log2(max(largest, 1e-8))))
        start = [self.most if self.start_bits is None else self.start_of(k) + 1
                 for k in range(len(self.layers))]  # fmt: skip
        self.bits: Tensor
        self.register_buffer("bits", torch.tensor(start).clamp(max=self.most))
        self.first_size: Tensor
        self.register_buffer("first_size", (self.counts * self.bits).sum())
        self.events: Tensor
        self.register_buffer("events", torch.tensor(0))
        self._progress = 0.0

    def relaxed_bits(self) -> Tensor:
        """Return the present bit-widths, whole numbers."""
        return self.bits

    def _step(self, k: int) -> Tensor:
        return 2.0 ** (self._tensor(k, "log_range") - self.bits[k] + 1)

    def quantized(self, k: int) -> Tensor:
        """Return the matrix on its full signed range of codes."""
        step, half = self._step(k), 2.0 ** (self.bits[k] - 1)
        codes = torch.minimum(torch.maximum(self._scaled(k) / step, -half), half - 1)
        return step * ste_round(codes)

    def last_bits(self, k: int) -> Tensor:
        """Return how far each weight is from a code whose last bit is zero, in steps."""
        ratio = self._scaled(k) / self._step(k).detach()
        return (ratio - 2 * torch.round(ratio / 2).detach()).abs().clamp(max=1)

    def weight_penalty(self, progress: float) -> Tensor:
        """Return the mean of the last bits, while there are bits to drop."""
        self._progress = float(progress)
        if self._progress >= self.LAST_EVENT:
            return self.counts.new_zeros(())
        sums = [self.last_bits(k).sum() for k in range(len(self.layers)) if self._can_drop(k)]
        total: Tensor = sum(sums, self.counts.new_zeros(())) / self.counts.sum()
        return self.strength * total

    def _can_drop(self, k: int) -> bool:
        return float(self.bits[k]) > self.least

    @torch.no_grad()
    def after_step(self) -> None:
        """Drop last bits when an event is due."""
        super().after_step()
        due = min(self.EVENTS, math.floor(self._progress / self.LAST_EVENT * self.EVENTS))
        if due <= int(self.events):
            return
        self.events.fill_(due)
        share = due / self.EVENTS
        allowed = float(self.first_size) + share * min(0.0, self.limit - float(self.first_size))
        while float((self.counts * self.bits).sum()) > allowed:
            # Share of weights whose last bit is set, by rounding: the layer that loses least, and
            # of several the largest. Each loses one bit before any loses the next.
            used = [
                (float((self.last_bits(k) > 0.5).float().mean()), -float(self.counts[k]), k)
                for k in range(len(self.layers))
                if self._can_drop(k)
            ]
            if not used:
                break
            for _, _, k in sorted(used):
                if float((self.counts * self.bits).sum()) <= allowed:
                    break
                self.bits[k] -= 1


class PublishedLearner(BitLearner):
    """[DQ] as published and coded: U3 with a quadratic penalty, clipped gradients, projection.

    One step per tensor (and one for each bias in the authors' code, not here: biases ship in
    full precision), penalty ``0.1 relu(kB - limit)^2`` with kB = bits / 8 / 1024, quantizer
    gradients clipped to ``+-d``, parameters projected into their box. The authors select the best
    *feasible* state, as this does; unlike theirs the selection runs on a hold-out of the training
    data. Momentum SGD, its steps and its decay come with the recipe's settings
    (``learn.default_settings``). Limits on inputs use the other recipes' term.

    Steps are real-valued. The authors also round them to powers of two, for hardware that shifts
    (``UniformQuantizer`` can); a bit-width then changes only where a step doubles or halves, which
    small rates of learning never reach.
    """

    strength = 0.1

    def prepare(self) -> None:
        """Register a quantizer for every layer, started as published."""
        for k, part in enumerate(self.parts):
            bits = self.start_of(k)
            largest = float(self._scaled(k).detach().abs().max())
            exponent = math.log2(max(largest, 1e-6) / (2 ** (bits - 1) - 1))
            step = 2.0 ** (math.floor(exponent) if bits <= START_BITS else math.ceil(exponent))
            part.quantizer = UniformQuantizer(step, bits)

    def _quantizer(self, k: int) -> UniformQuantizer:
        quantizer = self.parts[k].quantizer
        assert isinstance(quantizer, UniformQuantizer)  # noqa: S101  # registered by ``prepare``
        return quantizer

    def quantized(self, k: int) -> Tensor:
        """Return the quantized matrix."""
        out: Tensor = self._quantizer(k)(self._scaled(k))
        return out

    def relaxed_bits(self) -> Tensor:
        """Return the bit-widths: whole numbers, differentiable by straight-through."""
        return torch.stack([self._quantizer(k).bits() for k in range(len(self.parts))])

    def weight_penalty(self, progress: float) -> Tensor:
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
        super().after_step()
        for k in range(len(self.parts)):
            self._quantizer(k).project()

    @torch.no_grad()
    def is_eligible(self) -> bool:
        """Whether the present bit-widths fit the limit."""
        return float((self.counts * self.relaxed_bits()).sum()) <= self.limit


def _clip_and_round(matrix: Tensor, step: Tensor, largest: Tensor) -> Tensor:
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


def _tensor_step(matrix: Tensor, highest: int) -> float:
    step = float(least_squares_scale(matrix.double().reshape(1, -1), -highest, highest))
    return step if step > 0 else 1e-4

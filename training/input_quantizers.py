"""Trainable quantizers of layers' inputs: learned steps at a bit-width, or learned bit-widths.

Grids start from calibrated ones. A layer's input is what is multiplied with its weight; integer
inputs (token ids) pass.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bitquota.models.calls import tensor_key
from bitquota.quantizers.activations import ActivationQuantizer, InputWatcher, collect_inputs
from bitquota.quantizers.channel_fit import ChannelRule, calibrate_channels, channel_axis
from bitquota.quantizers.differentiable import lsq, ste_round
from bitquota.training.smooth import ellipsoid_bits

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from bitquota.candidates.layers import Inventory, Layer
    from bitquota.models.calibration import CalibrationSet

CALIBRATION_SAMPLES = 512
"""Training samples that the first grids are fitted on."""

START_BITS = 8
"""Learned input bit-widths start here: everything is still close to full precision."""


class TrainedInputs(nn.Module):
    """What the two ways share: which layers, how they are watched, what channels add to the loss.

    Attributes:
        channel_weight: What the mean relative error of a channel counts for in the loss.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.at = {layer.name: k for k, layer in enumerate(layers)}
        self.channel_weight = 0.0
        self._errors: list[Tensor] = []

    def quantize(self, k: int, values: Tensor) -> Tensor:
        """Return the input of layer ``k``, quantized."""
        raise NotImplementedError

    def watch(
        self, model: nn.Module, weights: Mapping[str, Tensor]
    ) -> AbstractContextManager[object]:
        """Return the context in which the layers see quantized inputs."""
        if not self.layers:
            return nullcontext()

        self._errors = []

        def look(name: str, values: Tensor) -> Tensor:
            if not values.is_floating_point():
                return values
            k = self.at[name]
            if self.channel_weight and model.training:
                # Of the grid alone: gradients to the values would shrink what is quantized.
                fixed = values.detach()
                rows = (self.quantize(k, fixed) - fixed, fixed)
                self._errors.append(_mean_of_channels(*rows, channel_axis(self.layers[k])))
            return self.quantize(k, values)

        # The weights of the running step stand in for the model's own.
        names = {
            tensor_key(weights.get(la.weight_name, model.get_parameter(la.weight_name))): la.name
            for la in self.layers
        }
        return InputWatcher(names, look)

    def channel_price(self) -> Tensor | float:
        """Return ``mu mean_l mean_c r_c`` of the last pass, ``r_c`` channel ``c``'s relative error.

        One step serves all channels of a layer's input, and the loss alone follows the few with the
        largest values; this serves the many (Hoang et al. 2020, by its abstract).
        """
        if not self._errors:
            return 0.0
        return self.channel_weight * torch.stack(self._errors).mean()


def _mean_of_channels(error: Tensor, values: Tensor, axis: int) -> Tensor:
    """Return the mean over channels of squared error over energy; silent channels have none."""
    squares = [t.float().movedim(axis, 0).flatten(1).square().sum(dim=1) for t in (error, values)]
    return torch.where(squares[1] > 0, squares[0] / squares[1].clamp(min=1e-20), 0.0).mean()


class LearnedInputSteps(TrainedInputs):
    """Learned steps at fixed bit-widths: ``s = s0 exp(t)``; zero points stay as calibrated.

    Args:
        layers: Layers whose input is quantized.
        starts: Calibrated grids, in the same order.
    """

    def __init__(self, layers: Sequence[Layer], starts: Sequence[ActivationQuantizer]) -> None:
        super().__init__(layers)
        self.starts = tuple(starts)
        # An input that is always zero has no step to learn from; any will do.
        self.register_buffer("start", torch.tensor([s.scale or 1.0 for s in starts]))
        self.start: Tensor
        self.log_factor = nn.Parameter(torch.zeros(len(self.starts)))

    def quantize(self, k: int, values: Tensor) -> Tensor:
        """Return the quantized input."""
        start = self.starts[k]
        step = self.start[k] * torch.exp(self.log_factor[k])
        zero = start.zero_point
        return lsq(values, step.to(values.dtype), start.lowest - zero, start.highest - zero)

    @torch.no_grad()
    def trained(self) -> dict[str, ActivationQuantizer]:
        """Return the quantizer of every layer as it ships."""
        steps = (self.start * torch.exp(self.log_factor)).tolist()
        return {
            layer.name: ActivationQuantizer(
                bits=s.bits, scale=step, zero_point=s.zero_point, lowest=s.lowest, highest=s.highest
            )
            for layer, s, step in zip(self.layers, self.starts, steps, strict=True)
        }


class LearnedInputBits(TrainedInputs):
    """Learned bit-widths of inputs: U3 in the logarithm, one step and one range per tensor.

    Args:
        layers: Layers whose input is quantized.
        starts: Calibrated grids of ``START_BITS`` bits.
        least: Smallest bit-width.
        most: Largest bit-width.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        starts: Sequence[ActivationQuantizer],
        *,
        least: float,
        most: float,
    ) -> None:
        super().__init__(layers)
        self.least, self.most = least, most
        self.signed = [s.lowest - s.zero_point < 0 for s in starts]
        bits = min(most, START_BITS)
        ranges = [
            max(s.scale, 1e-8) * max(s.highest - s.zero_point, s.zero_point - s.lowest)
            for s in starts
        ]
        spans = [2.0 ** (bits - signed) - 1 for signed in self.signed]
        steps = [r / max(1.0, n) for r, n in zip(ranges, spans, strict=True)]
        self.log_step: Tensor | None = nn.Parameter(torch.tensor([math.log2(s) for s in steps]))
        self.limit = math.inf
        self.log_range = nn.Parameter(torch.tensor([math.log2(r) for r in ranges]))

    def hold(self, slopes: Tensor, limit: float) -> None:
        """Keep ``sum slope_l b_l = limit`` by construction from now on (``smooth``).

        Bit-widths start in proportion to the present ones, and steps follow from them.
        """
        spare = (self.relaxed_bits().detach() - self.least).clamp(min=0.1)
        self.limit, self.log_step = limit, None
        self.slopes: Tensor
        self.register_buffer("slopes", slopes, persistent=False)
        self.direction = nn.Parameter(spare.sqrt())

    def _signs(self) -> Tensor:
        return self.log_range.new_tensor([float(s) for s in self.signed])

    def steps(self) -> Tensor:
        """Return f32[layers], differentiable."""
        if self.log_step is not None:
            return 2.0**self.log_step
        levels = 2.0 ** (self.relaxed_bits() - self._signs()) - 1
        return 2.0**self.log_range / levels.clamp(min=1.0)

    def quantize(self, k: int, values: Tensor) -> Tensor:
        """Return the quantized input; without sign, negative values become zero."""
        step, largest = self.steps()[k], 2.0 ** self.log_range[k]
        lowest = -largest if self.signed[k] else torch.zeros_like(largest)
        clipped = torch.minimum(torch.maximum(values.float(), lowest), largest)
        return (step * ste_round(clipped / step)).to(values.dtype)

    def relaxed_bits(self) -> Tensor:
        """Return f32[layers]: ``log2(q_max/d + 1)``, plus one for the sign, within the offer."""
        if self.log_step is None:
            bits = ellipsoid_bits(self.direction, self.slopes, self.least, self.limit)
            return bits.clamp(self.least, self.most)
        spans = 2.0 ** (self.log_range - self.log_step)
        return (torch.log2(spans + 1) + self._signs()).clamp(self.least, self.most)

    @torch.no_grad()
    def settle(self) -> None:
        """Keep each range at least one step."""
        if self.log_step is not None:
            self.log_range.copy_(torch.maximum(self.log_range, self.log_step))


def calibrated_inputs(
    model: nn.Module,
    inventory: Inventory,
    data: CalibrationSet,
    bits: Mapping[str, int],
    *,
    rule: ChannelRule | None = None,
) -> dict[str, ActivationQuantizer]:
    """Return the grid of every named layer whose input is floating-point.

    Args:
        model: The full-precision model in eval mode.
        inventory: Its layers.
        data: Training samples; the first ``CALIBRATION_SAMPLES`` are used.
        bits: Bit-width by layer.
        rule: Fit to the majority of channels by this rule; by default each tensor's own error.

    Cost: one or two forward passes over the samples.
    """
    batches = [b.inputs for b in data.first(CALIBRATION_SAMPLES).batches(64)]
    found: dict[str, ActivationQuantizer] = {}
    if rule is None:
        inputs = collect_inputs(model, inventory, batches)
        for name, width in bits.items():
            if name in inputs.histograms:
                found[name] = inputs.histograms[name].quantizer(width)
        return found
    for width in sorted(set(bits.values())):
        fitted = calibrate_channels(model, inventory, batches, width, rule)
        found |= {name: q for name, q in fitted.items() if bits.get(name) == width}
    return {name: found[name] for name in bits if name in found}

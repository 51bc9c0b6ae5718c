"""Fit an activation quantizer to the majority of channels instead of to the loudest.

One scale serves all channels of a layer's input, so a plain least-squares fit follows the few
channels with the largest values. Weighing each channel's error by its own energy serves the many.
A reconstruction after the abstract of [Hoang20]: its exact rule could not be read.

References:
    [Hoang20] T. Hoang, T. Do, T. Nguyen, N. Cheung, "Direct Quantization for Training Highly
    Accurate Low Bit-width Deep Neural Networks", IJCAI 2020, arXiv 2012.13762.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import torch

from bitquota.candidates.layers import LayerKind
from bitquota.candidates.targets.target import DYNAMIC_FITS
from bitquota.errors import InvalidInput
from bitquota.quantizers.activations import (
    ACTIVATION_BITS,
    ActivationQuantizer,
    CalibratedInputs,
    InputWatcher,
    TokenInputs,
    collect_inputs,
    weights_of,
)
from bitquota.quantizers.scales import least_squares_scale

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor, nn

    from bitquota.candidates.layers import Inventory, Layer

IRLS_STEPS = 10
VALUES_PER_CHANNEL = 512
"""Values kept of each channel: enough for a scale, little enough for an exact fit."""


class ChannelRule(StrEnum):
    """How channels are weighed against each other."""

    JOINT = "joint"
    """All values alike: what calibration usually does."""
    CHAN = "chan"
    """Each channel's error relative to its energy."""
    IRLS = "irls"
    """The sum over channels of relative errors, not squared: large errors of few channels count
    less still, by iteratively reweighted least squares."""


def fit_channels(values: Tensor, bits: int, rule: ChannelRule) -> ActivationQuantizer:
    """Return the quantizer that minimises ``sum_c w_c sum (x - Q(x))^2``.

    ``w_c`` is 1 (``joint``), ``1 / E[x_c^2]`` (``chan``), or ``1 / (E[x_c^2] (sqrt(r_c) + eps))``
    with ``r_c`` the relative error of channel ``c`` (``irls``, ten rounds). Each weighted fit is
    exact over all scales. Channels that are always zero count for nothing.

    Args:
        values: Floating-point ``[channels, n]``. The grid is unsigned if none is negative, else
            symmetric.
        bits: One of ``ACTIVATION_BITS``.
        rule: How channels are weighed.

    Raises:
        InvalidInput: A bit-width off the list.
    """
    if bits not in ACTIVATION_BITS:
        allowed = ", ".join(map(str, ACTIVATION_BITS))
        msg = f"an activation bit-width must be one of {allowed}; got {bits}"
        raise InvalidInput(msg, activation_bits=bits)
    exact = values.detach().double()
    signed = bool((exact < 0).any())
    lowest = -(2 ** (bits - 1)) if signed else 0
    highest = lowest + 2**bits - 1

    def fitted(weight: Tensor) -> ActivationQuantizer:
        importance = weight[:, None].expand_as(exact).reshape(1, -1)
        scale = least_squares_scale(exact.reshape(1, -1), lowest, highest, importance)
        return ActivationQuantizer(
            bits=bits, scale=float(scale), zero_point=0, lowest=lowest, highest=highest
        )

    energy = exact.square().mean(dim=1)
    if rule is ChannelRule.JOINT:
        return fitted((energy > 0).double())
    weight = torch.where(energy > 0, 1 / energy.clamp(min=1e-300), 0.0)
    best = fitted(weight)
    if rule is ChannelRule.CHAN:
        return best
    best_error = float(relative_errors(exact, best).sqrt().sum())
    for _ in range(IRLS_STEPS):
        errors = relative_errors(exact, best)
        tried = fitted(weight / (errors.sqrt() + 1e-3))
        error = float(relative_errors(exact, tried).sqrt().sum())
        if error >= best_error:
            break
        best, best_error = tried, error
    return best


def relative_errors(values: Tensor, quantizer: ActivationQuantizer) -> Tensor:
    """Return f64[channels]: squared error over energy; 0 for a channel that is always zero."""
    exact = values.double()
    energy = exact.square().sum(dim=1)
    error = (exact - quantizer(exact)).square().sum(dim=1)
    return torch.where(energy > 0, error / energy.clamp(min=1e-300), 0.0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChannelInputs(CalibratedInputs):
    """Calibrated inputs whose grids are fitted to channels; used like any others.

    Attributes:
        values: Some values of every layer's input, ``[channels, n]``.
        weighing: How channels are weighed.
    """

    values: Mapping[str, Tensor]
    weighing: ChannelRule
    _fitted: dict[tuple[str, int], ActivationQuantizer] = field(default_factory=dict)

    def __call__(self, layer: str, bits: int) -> Callable[[Tensor], Tensor]:
        """Return the fake-quantizer of ``layer``'s input; raises as ``CalibratedInputs``."""
        if layer not in self.values:
            # Integer inputs pass, unseen ones are refused, as everywhere.
            return CalibratedInputs.__call__(self, layer, bits)
        key = (layer, bits)
        if key not in self._fitted:
            self._fitted[key] = fit_channels(self.values[layer], bits, self.weighing)
        return self._fitted[key]


def channel_axis(layer: Layer) -> int:
    """Return the dimension of a layer's input that holds channels."""
    return 1 if layer.kind.name.startswith("CONV") else -1


def collect_channels(
    module: nn.Module,
    inventory: Inventory,
    batches: Iterable[tuple[Tensor, ...]],
    rule: ChannelRule = ChannelRule.CHAN,
) -> ChannelInputs:
    """Return some values of every layer's floating-point input, to fit grids of any width to.

    Args:
        module: The full-precision model in eval mode.
        inventory: Its layers.
        batches: Positional arguments of forward passes.
        rule: How channels are weighed.

    Cost: one forward pass over the batches; ``VALUES_PER_CHANNEL`` values per channel are kept of
    each batch, evenly spaced.
    """
    kept: dict[str, list[Tensor]] = {}
    axis_of = {la.name: channel_axis(la) for la in inventory.layers}

    def look(layer: str, values: Tensor) -> Tensor:
        if values.is_floating_point():
            rows = values.detach().movedim(axis_of[layer], 0).flatten(1)
            stride = max(1, rows.shape[1] // VALUES_PER_CHANNEL)
            kept.setdefault(layer, []).append(rows[:, ::stride][:, :VALUES_PER_CHANNEL].cpu())
        return values

    with torch.no_grad(), InputWatcher(weights_of(module, inventory), look):
        for inputs in batches:
            module(*inputs)
    passing = {la.name for la in inventory.layers if la.kind is LayerKind.EMBEDDING}
    return ChannelInputs(
        histograms={},
        passing=frozenset(passing - set(kept)),
        values={name: torch.cat(parts, dim=1) for name, parts in kept.items()},
        weighing=rule,
    )


def collect_by(
    fit: str,
    module: nn.Module,
    inventory: Inventory,
    batches: Iterable[tuple[Tensor, ...]],
) -> CalibratedInputs | TokenInputs:
    """Return calibrated inputs: ``mse`` fits each tensor, a ``ChannelRule`` weighs its channels.

    ``token`` and ``token_float`` fit each token when it comes: nothing is run.
    """
    if fit in DYNAMIC_FITS:
        kinds = {layer.name: layer.kind for layer in inventory.layers}
        return TokenInputs(kinds=kinds, floats=fit == DYNAMIC_FITS[1])
    if fit in list(ChannelRule):
        return collect_channels(module, inventory, batches, ChannelRule(fit))
    return collect_inputs(module, inventory, batches)


def calibrate_channels(
    module: nn.Module,
    inventory: Inventory,
    batches: Iterable[tuple[Tensor, ...]],
    bits: int,
    rule: ChannelRule = ChannelRule.CHAN,
) -> dict[str, ActivationQuantizer]:
    """Return the input quantizer of every layer with a floating-point input.

    Arguments and cost as ``collect_channels``; ``bits`` is one of ``ACTIVATION_BITS``.
    """
    found = collect_channels(module, inventory, batches, rule)
    return {name: fit_channels(values, bits, rule) for name, values in found.values.items()}

"""Bit-widths and output channels learned together: channels that carry nothing get zero bits.

References:
    [DJPQ] Y. Wang, Y. Lu, T. Blankevoort, "Differentiable Joint Pruning and Quantization for
    Hardware Efficiency", ECCV 2020, arXiv 2007.10463.
    [VIB] B. Dai, C. Zhu, B. Guo, D. Wipf, "Compressing Neural Networks using the Variational
    Information Bottleneck", ICML 2018, arXiv 1802.10399 (the gates).

Design: docs/design/training.md
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitquota.candidates.rows import MIXED_KINDS
from bitquota.candidates.storage import PRUNED_BITS, Scheme
from bitquota.candidates.table import Candidate
from bitquota.errors import BudgetTooSmall, InvalidInput
from bitquota.models.calls import LayerCall, LayerWatcher, tensor_key
from bitquota.training.bit_learners import StabilisedLearner

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from contextlib import AbstractContextManager

    from bitquota.candidates.layers import Layer
    from bitquota.training.prices import Prices

    Kept = Mapping[str, tuple[bool, ...]]
    """By layer: which output channels stay. A layer that is not named keeps all."""

START, LEAST, MOST = -3.0, -8.0, 3.0
"""Logarithm of the noise of a gate: at the start, and its ends."""

RATE = 10.0
"""Gates move so many times as fast as steps and ranges: they have further to go."""

SOFTNESS = 1.0
"""Of the share of channels that counts: ``sigmoid(-log(alpha) / SOFTNESS)``."""

INFORMATION = 0.02
"""Weight of the information that gates let through, on average over all channels."""


class GatedLearner(StabilisedLearner):
    """Gates on output channels beside learned bit-widths [DJPQ].

    A channel's output is multiplied by ``1 + sqrt(alpha) e``, ``e`` a standard normal number for
    each sample. ``1/2 log(1 + 1/alpha)`` nats pass such a gate at most [VIB]; their mean over all
    channels, times ``INFORMATION``, is added to the loss, so noise rises where the loss does not
    mind. A channel with ``alpha > 1`` (more noise than signal) is dropped: its row of the weight
    has zero bits. What budgets count meanwhile is each layer's cost times the share of its channels
    that stays, softly, so that bits and channels compete for the same budget.

    Own: a gate's mean is 1, since the row's scale does what it would; budgets instead of a weighted
    sum of bit operations; quantizer and its penalty are those of ``StabilisedLearner``. A dropped
    channel ends as its bias, so the layers behind still read it and keep their columns: bytes and
    bit operations count what is left of this layer alone.
    """

    def prepare(self) -> None:
        """Register step and range of every layer, and a gate for each channel."""
        super().prepare()
        for layer, part in zip(self.layers, self.parts, strict=True):
            gates = layer.rows if has_gates(layer) else 0
            part.noise = nn.Parameter(torch.full((gates,), START / RATE))

    def log_alpha(self, k: int) -> Tensor:
        """Return f32[rows] of layer ``k``, empty where it has no gates."""
        return RATE * self._tensor(k, "noise")

    def weights(self) -> dict[str, Tensor]:
        """Return the quantized weights; outside of steps, dropped channels are zero."""
        found = super().weights()
        if self.model.training:
            return found
        for k, layer in enumerate(self.layers):
            noise = self.log_alpha(k).detach()
            if len(noise):
                weight = found[layer.weight_name]
                stays = (noise <= 0).to(weight).reshape(-1, *[1] * (weight.ndim - 1))
                found[layer.weight_name] = weight * stays
        return found

    def input_quantizers(self, weights: dict[str, Tensor]) -> AbstractContextManager[object]:
        """Return the context in which inputs are quantized and outputs pass their gates."""
        stack = ExitStack()
        stack.enter_context(super().input_quantizers(weights))
        if self.model.training:
            gates = {
                tensor_key(weights[layer.weight_name]): noise
                for k, layer in enumerate(self.layers)
                if len(noise := self.log_alpha(k))
            }
            stack.enter_context(_Gates(gates))
        return stack

    def shares(self) -> Tensor:
        """Return the soft share of each layer's channels that stays."""
        found = []
        for k in range(len(self.layers)):
            noise = self.log_alpha(k)
            whole = noise.new_ones(())
            found.append(torch.sigmoid(-noise / SOFTNESS).mean() if len(noise) else whole)
        return torch.stack(found)

    def weight_penalty(self, progress: float) -> Tensor | float:
        """Return what the gates let through."""
        del progress
        every = torch.cat([self.log_alpha(k) for k in range(len(self.layers))])
        if not len(every):
            return 0.0
        return INFORMATION * 0.5 * nn.functional.softplus(-every).mean()

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep ranges and gates between their ends."""
        super().after_step()
        for part in self.parts:
            part.noise.clamp_(LEAST / RATE, MOST / RATE)  # type: ignore[operator]

    def ranking(self) -> list[tuple[float, int, int]]:
        """Return log alpha, layer and row of every gate, the noisiest first."""
        found = [
            (float(noise), -k, -row)
            for k in range(len(self.layers))
            for row, noise in enumerate(self.log_alpha(k).detach())
        ]
        return [(noise, -k, -row) for noise, k, row in sorted(found, reverse=True)]


class _Gates(LayerWatcher[Tensor]):
    """Multiplies the output of each layer by ``1 + sqrt(alpha) e``, known by log alpha."""

    def around(
        self,
        known: Tensor,
        call: LayerCall,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:  # noqa: ANN401
        """Run the call, and let its output pass the gates."""
        output: Tensor = func(*args, **kwargs)
        axis = call.channel_axis % output.ndim
        # One number for each sample and channel: within a sample the signal keeps its form.
        shape = [n if d in (0, axis) else 1 for d, n in enumerate(output.shape)]
        drawn = torch.randn(shape, device=output.device)
        along = [-1 if d == axis else 1 for d in range(output.ndim)]
        gate = 1 + drawn * torch.exp(known / 2).reshape(along)
        return output * gate.to(output.dtype)


def has_gates(layer: Layer) -> bool:
    """Whether the output channels of a layer can be dropped one by one."""
    return layer.kind in MIXED_KINDS and layer.rows > 1


def check_gates(scheme: Scheme, *, compiled: bool) -> None:
    """Raise ``InvalidInput`` unless rows may have bit-widths of their own, and steps be watched."""
    if not scheme.mixes:
        msg = (
            "recipe 'djpq' drops output channels, so scales must be per channel or group; got "
            f"'{scheme.granularity}': leave the granularity out"
        )
        raise InvalidInput(msg, granularity=str(scheme.granularity))
    if compiled:
        msg = "a step with gates on outputs cannot be compiled: train without compiling"
        raise InvalidInput(msg)


def candidate_with(
    layer: Layer, width: int, scheme: Scheme, input_width: int | None, kept: Kept
) -> Candidate:
    """Return a layer at a bit-width, its dropped channels at zero bits."""
    rows = kept.get(layer.name, ())
    if all(rows):
        return Candidate.of(layer, width, scheme, input_width)
    if not any(rows):
        return Candidate.of(layer, PRUNED_BITS, scheme)
    bits = tuple(width if stays else PRUNED_BITS for stays in rows)
    return Candidate.of(layer, width, replace(scheme, row_bits=bits), input_width)


def gated_prices(learner: GatedLearner, price: Callable[[Kept], Prices], scheme: Scheme) -> Prices:
    """Return the prices of what the gates leave.

    Channels with more noise than signal are dropped; where the smallest bit-widths of the others
    would still exceed a budget, the noisiest of these too, as few as it takes. A layer whose bytes
    would not fall, because the order of its rows is stored, keeps all.

    Raises:
        BudgetTooSmall: What has no gates exceeds a budget.

    Cost: pricing all candidates, ``log2`` of the number of channels times. Exact.
    """
    ranking = learner.ranking()
    least = learner.prices.widths[0]

    def dropped(n: int) -> Kept:
        gone: dict[int, set[int]] = {}
        for _, k, row in ranking[:n]:
            gone.setdefault(k, set()).add(row)
        found: dict[str, tuple[bool, ...]] = {}
        for k, rows in gone.items():
            layer = learner.layers[k]
            kept = {layer.name: tuple(row not in rows for row in range(layer.rows))}
            left = candidate_with(layer, least, scheme, None, kept)
            if left.size_bits < candidate_with(layer, least, scheme, None, {}).size_bits:
                found |= kept
        return found

    low = sum(noise > 0 for noise, _, _ in ranking)
    try:
        return price(dropped(low))
    except BudgetTooSmall:
        best = price(dropped(len(ranking)))
    high = len(ranking)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            best, high = price(dropped(middle)), middle
        except BudgetTooSmall:
            low = middle
    return best

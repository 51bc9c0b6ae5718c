"""Learned bit-widths as published with "all you need is a good parametrization".

References:
    [DQ] S. Uhlich et al., "Mixed Precision DNNs: All you need is a good parametrization", ICLR
    2020, arXiv 1905.11452.

Design: docs/design/training.md
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from bitquota.errors import InvalidInput
from bitquota.quantizers.differentiable import UniformQuantizer
from bitquota.quantizers.power_of_two import PowerOfTwoQuantizer
from bitquota.training.bit_learners import START_BITS, BitLearner

KB = 8 * 1024
"""Bits of the unit in which [DQ] measures sizes."""

SIZES = (
    "size_bits", "weight_size_bits", "code_bits", "activation_bits_total", "activation_bits_max",
)  # fmt: skip
"""Resources that the published penalty can be about."""


class PublishedLearner(BitLearner):
    """[DQ] as published and coded: U3 with a quadratic penalty, clipped gradients, projection.

    One step per tensor, biases included: each has a quantizer like its weight's, started at the
    same range, and counts towards the size. Biases end on their grids and stand still in the second
    phase; files hold them as numbers of 32 bits, which is how plans count them. Penalty
    ``0.1 sum_j relu(g_j)^2`` over all budgets (equation 10), with ``g_j`` what weights, all inputs
    together (8b) or the largest input (8c) take beyond budget ``j`` in kB of 1024 bytes; quantizer
    gradients clipped to ``+-d``, parameters projected into their box. The authors select the best
    *feasible* state, as this does; unlike theirs the selection runs on a hold-out of the training
    data. Momentum SGD, its steps and its decay come with the recipe's settings
    (``learn.default_settings``). Inputs have real steps, and relaxed bit-widths in the penalty.

    Steps are real-valued. The authors also round them to powers of two, for hardware that shifts
    (``UniformQuantizer`` can); a bit-width then changes only where a step doubles or halves, which
    small rates of learning never reach.
    """

    strength = 0.1

    def prepare(self) -> None:
        """Register a quantizer for every layer, started as published."""
        plane, budgets = self.prices.plane(), self.prices.budgets
        if plane is None or any(b.resource not in SIZES for b in budgets):
            got = ", ".join(f"'{b.text or b.resource}'" for b in budgets)
            msg = (
                "the published recipes hold sizes of weights and inputs, such as '2.5 bits' and "
                f"'act 8 KiB'; got {got}: take recipe 'stabilised' for other budgets"
            )
            raise InvalidInput(msg, resources=[b.resource for b in budgets])
        weights, _, self.limit = plane
        self.held = frozenset(range(len(budgets)))
        self.of_inputs = [k for k in range(len(budgets)) if k != weights]
        names = {k: self._named_bias(k) for k in range(len(self.layers))}
        self.bias_names = {k: name for k, name in names.items() if name is not None}
        for k, part in enumerate(self.parts):
            largest = max(float(self._scaled(k).detach().abs().max()), 1e-6)
            part.quantizer = self.started(largest, self.start_of(k))
            if k in self.bias_names:
                part.bias_quantizer = self.started(largest, self.start_of(k))

    def started(self, largest: float, bits: float) -> UniformQuantizer | PowerOfTwoQuantizer:
        """Return a quantizer of weights up to ``largest``."""
        exponent = math.log2(largest / (2 ** (bits - 1) - 1))
        step = 2.0 ** (math.floor(exponent) if bits <= START_BITS else math.ceil(exponent))
        return UniformQuantizer(step, bits)

    def _named_bias(self, k: int) -> str | None:
        """Return the name of the bias beside the weight of layer ``k``, if it has one."""
        owner = self.layers[k].weight_name.rpartition(".")[0]
        name = f"{owner}.bias" if owner else "bias"
        found = dict(self.model.named_parameters()).get(name)
        alike = found is not None and found.shape == (self.layers[k].rows,)
        return name if alike else None

    def biases(self) -> dict[str, Tensor]:
        """Return the quantized biases."""
        return {
            name: cast("nn.Module", self.parts[k].bias_quantizer)(self.model.get_parameter(name))
            for k, name in self.bias_names.items()
        }

    def weights(self) -> dict[str, Tensor]:
        """Return the quantized weights and biases."""
        return super().weights() | self.biases()

    @torch.no_grad()
    def finish(self) -> None:
        """Leave biases on their grids, where the second phase lets them be."""
        for name, values in self.biases().items():
            bias = self.model.get_parameter(name)
            bias.copy_(values)
            bias.requires_grad = False

    def _every_quantizer(self) -> list[UniformQuantizer | PowerOfTwoQuantizer]:
        """Return the quantizers of weights and of biases."""
        kinds = (UniformQuantizer, PowerOfTwoQuantizer)
        return [module for module in self.parts.modules() if isinstance(module, kinds)]

    def _bias_bits(self) -> Tensor:
        """Return the bits of all biases, differentiable."""
        total = self.counts.new_zeros(())
        for k in self.bias_names:
            quantizer = cast("UniformQuantizer", self.parts[k].bias_quantizer)
            total = total + self.layers[k].rows * quantizer.bits()
        return total

    def _quantizer(self, k: int) -> UniformQuantizer | PowerOfTwoQuantizer:
        return cast("UniformQuantizer | PowerOfTwoQuantizer", self.parts[k].quantizer)

    def quantized(self, k: int) -> Tensor:
        """Return the quantized matrix."""
        out: Tensor = self._quantizer(k)(self._scaled(k))
        return out

    def relaxed_bits(self) -> Tensor:
        """Return the bit-widths: whole numbers, differentiable by straight-through."""
        return torch.stack([self._quantizer(k).bits() for k in range(len(self.parts))])

    def weight_penalty(self, progress: float) -> Tensor:
        """Return the squares of all excesses in kB, times 0.1."""
        del progress
        return self.strength * sum(
            (torch.relu(g).square() for g in self._excesses()), self.counts.new_zeros(())
        )

    def _excesses(self) -> list[Tensor]:
        """Return ``g_j`` of every budget, in kB; negative where there is room."""
        bits, inputs = self.relaxed_bits(), self.input_bits()
        found = [((self.counts * bits).sum() + self._bias_bits() - self.limit) / KB]
        for k in self.of_inputs:
            taken = self.prices.taken(k, bits, inputs)
            total = taken.max() if self.prices.is_peak(k) else taken.sum()
            found.append((total - self.prices.budgets[k].available) / KB)
        return found

    def before_step(self) -> None:
        """Clip the gradients of the quantizers."""
        for quantizer in self._every_quantizer():
            quantizer.clip_gradients()

    def after_step(self) -> None:
        """Project the quantizers into their box."""
        super().after_step()
        for quantizer in self._every_quantizer():
            quantizer.project()

    @torch.no_grad()
    def is_eligible(self) -> bool:
        """Whether the present bit-widths fit the limits."""
        return all(float(g) <= 0 for g in self._excesses())


class PublishedPowersLearner(PublishedLearner):
    """[DQ]'s P3: weights are powers of two, smallest and largest magnitude are learned.

    Everything else as in ``PublishedLearner``; gradients are clipped to ``+-q_min``. A grid of
    ``b`` bits has ``2^(b-1)`` magnitudes and no zero, which is what the scheme ``power_of_two``
    stores; the second phase trains its scales. The authors' networks multiply their logits with a
    trained scalar; here it multiplies weight and bias of the last layer, which is the same where
    that gives the logits, and the model stays what it was: the scales of the second phase begin at
    it.
    """

    def prepare(self) -> None:
        """Register quantizers, and the logarithm of the scalar."""
        super().prepare()
        self.parts.register_parameter("log_scalar", nn.Parameter(torch.zeros(())))

    def started(self, largest: float, bits: float) -> PowerOfTwoQuantizer:
        """Return a quantizer whose largest magnitude is the power of two nearest to ``largest``."""
        return PowerOfTwoQuantizer(2.0 ** round(math.log2(largest)), bits)

    def _last(self) -> list[str]:
        """Return the names of what the scalar multiplies."""
        bias = self.bias_names.get(len(self.layers) - 1)
        return [self.layers[-1].weight_name, *([] if bias is None else [bias])]

    def weights(self) -> dict[str, Tensor]:
        """Return the quantized weights and biases, the last ones times the scalar."""
        found, scalar = super().weights(), self.parts.get_parameter("log_scalar").exp()
        return found | {name: found[name] * scalar for name in self._last()}

    @torch.no_grad()
    def finish(self) -> None:
        """Leave biases on their grids, and the scalar in the last layer."""
        super().finish()
        scalar = self.parts.get_parameter("log_scalar").exp()
        for name in self._last():
            self.model.get_parameter(name).mul_(scalar)

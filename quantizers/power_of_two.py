"""Power-of-two quantizers in the three parametrizations of [DQ].

Only with smallest and largest magnitude learned (P3) are the gradients bounded and decoupled.

References:
    [DQ] S. Uhlich et al., "Mixed Precision DNNs: All you need is a good parametrization", ICLR
    2020, arXiv 1905.11452.

Design: docs/design/training.md
"""

from __future__ import annotations

import math
from enum import StrEnum

import torch
from torch import Tensor, nn

from bitquota.errors import InvalidInput
from bitquota.quantizers.differentiable import ste_ceil, ste_round


class PowerOfTwoForm(StrEnum):
    """What is learned of a power-of-two quantizer; the third follows."""

    BITS_LARGEST = "P1"
    BITS_SMALLEST = "P2"
    SMALLEST_LARGEST = "P3"


class PowerOfTwoQuantizer(nn.Module):
    """Levels ``+-2^k`` between ``q_min`` and ``q_max`` [DQ, equation 4].

    ``sign(x) q_min`` below ``q_min``, ``sign(x) 2^floor(1/2 + log2|x|)`` up to ``q_max``,
    ``sign(x) q_max`` above, with ``q_max = 2^(2^(b-1) - 1) q_min``. With ``with_zero`` one code
    stands for zero: values below ``q_min / sqrt 2`` become 0 (activations); weights have no zero.
    Both ends are rounded to powers of two, straight-through.

    Gradients: ``dQ/dx = 2^floor(1/2 + log2|x|) / |x|`` inside, 0 outside; P3 has (1, 0), (0, 0),
    (0, 1) times ``sign(x)`` in the three regions (equation 6).

    Args:
        largest: Initial ``q_max``.
        bits: Initial ``b``.
        form: Which two are learned.
        signed: Whether negative values are kept.
        with_zero: Whether one code stands for zero.
        power_of_two_ends: Round the ends; off only to look at gradients.
    """

    def __init__(
        self,
        largest: float,
        bits: float,
        form: PowerOfTwoForm = PowerOfTwoForm.SMALLEST_LARGEST,
        *,
        signed: bool = True,
        with_zero: bool = False,
        power_of_two_ends: bool = True,
    ) -> None:
        super().__init__()
        if largest <= 0 or bits < 1:
            msg = (
                "a power-of-two quantizer must start with a positive range and at least one bit; "
                f"got {largest}, {bits} bits"
            )
            raise InvalidInput(msg)
        self.form, self.signed, self.with_zero = form, signed, with_zero
        self.power_of_two_ends = power_of_two_ends
        smallest = largest / 2.0 ** (2.0 ** (bits - 1) - 1)
        start = {
            PowerOfTwoForm.BITS_LARGEST: (bits, largest),
            PowerOfTwoForm.BITS_SMALLEST: (bits, smallest),
            PowerOfTwoForm.SMALLEST_LARGEST: (smallest, largest),
        }[form]
        self.first = nn.Parameter(torch.tensor(float(start[0])))
        self.second = nn.Parameter(torch.tensor(float(start[1])))

    def ends(self) -> tuple[Tensor, Tensor]:
        """Return ``(q_min, q_max)``, differentiable."""
        if self.form is PowerOfTwoForm.SMALLEST_LARGEST:
            smallest: Tensor = self.first
            largest: Tensor = self.second
        else:
            span = 2.0 ** (2.0 ** (self.first - 1) - 1)
            if self.form is PowerOfTwoForm.BITS_LARGEST:
                smallest, largest = self.second / span, self.second
            else:
                smallest, largest = self.second, self.second * span
        if not self.power_of_two_ends:
            return smallest, largest
        return 2.0 ** ste_round(torch.log2(smallest)), 2.0 ** ste_round(torch.log2(largest))

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized ``x``."""
        smallest, largest = self.ends()
        if not self.signed:
            x = torch.relu(x)
        size = x.abs()
        safe = size.clamp(min=1e-30)
        level = 2.0 ** torch.floor(0.5 + torch.log2(safe))
        # Straight-through on the floor: 2^(log2 |x| + c) has the derivative 2^(...)/|x|.
        middle = size * (level / safe).detach()
        out = torch.where(size <= smallest, smallest, torch.where(size > largest, largest, middle))
        if self.with_zero:
            out = torch.where(size < smallest.detach() / math.sqrt(2), torch.zeros_like(out), out)
        # Zero has no sign; a weight grid without zero takes it for positive.
        sign = torch.where(x < 0, -1.0, 1.0).to(x)
        return sign * out

    def bits(self) -> Tensor:
        """Return ``ceil(log2(log2(q_max/q_min) + 1) + 1)``: the last bit is sign or zero."""
        smallest, largest = self.ends()
        span = ste_round(torch.log2(largest / smallest))
        return ste_ceil(torch.log2(span.clamp(min=0) + 1) + 1)

    def clip_gradients(self) -> None:
        """Limit the gradients of P3's parameters to plus or minus ``q_min`` (authors' code)."""
        if self.form is not PowerOfTwoForm.SMALLEST_LARGEST:
            return
        bound = float(self.first.detach())
        for parameter in (self.first, self.second):
            if parameter.grad is not None:
                parameter.grad.clamp_(-bound, bound)

    @torch.no_grad()
    def project(self) -> None:
        """Put P3's parameters back into their box: ``2^-16 <= q_min <= q_max <= 127``."""
        if self.form is not PowerOfTwoForm.SMALLEST_LARGEST:
            return
        low = torch.minimum(self.first, self.second).clamp(2.0**-16, 127.0)
        self.second.copy_(torch.maximum(self.first, self.second).clamp(2.0**-16, 127.0))
        self.first.copy_(low)

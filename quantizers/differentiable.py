"""Differentiable quantizers: straight-through rounding with learnable grids.

``UniformQuantizer`` and ``PowerOfTwoQuantizer`` come in the three parametrizations of [DQ] each, so
that its claim can be shown: only with step and range learned (U3), or smallest and largest
magnitude (P3), are the gradients bounded and decoupled. ``lsq`` and ``tqt`` are the reference
quantizers for training at a given bit-width.

References:
    [DQ] S. Uhlich et al., "Mixed Precision DNNs: All you need is a good parametrization", ICLR
    2020, arXiv 1905.11452.
    [LSQ] S. Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv 1902.08153.
    [TQT] S. Jain et al., "Trained Quantization Thresholds for Accurate and Efficient Fixed-Point
    Inference of Deep Neural Networks", MLSys 2020, arXiv 1903.08066.
"""

from __future__ import annotations

import math
from enum import StrEnum

import torch
from torch import Tensor, nn

from bitquota.errors import InvalidInput


def ste_round(x: Tensor) -> Tensor:
    """Return ``round(x)`` (ties to even) with the gradient of ``x``."""
    return x + (torch.round(x) - x).detach()


def ste_ceil(x: Tensor) -> Tensor:
    """Return ``ceil(x)`` with the gradient of ``x``."""
    return x + (torch.ceil(x) - x).detach()


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return ``x`` with its gradient times ``factor``."""
    return x * factor + (x - x * factor).detach()


class UniformForm(StrEnum):
    """What is learned of a uniform quantizer; the third follows."""

    BITS_STEP = "U1"
    BITS_RANGE = "U2"
    STEP_RANGE = "U3"


class PowerOfTwoForm(StrEnum):
    """What is learned of a power-of-two quantizer; the third follows."""

    BITS_LARGEST = "P1"
    BITS_SMALLEST = "P2"
    SMALLEST_LARGEST = "P3"


class UniformQuantizer(nn.Module):
    """Uniform grid with learnable step ``d``, range ``q_max`` and bit-width ``b`` [DQ, section 2].

    ``Q(x) = sign(x) d floor(|x|/d + 1/2)`` for ``|x| <= q_max``, else ``sign(x) q_max``
    (equation 1), with ``q_max = (2^(b-1) - 1) d``; without sign the input is clipped to
    ``[0, q_max]`` and ``q_max = (2^b - 1) d``. Two of the three are parameters (``first``,
    ``second``), in the order of the form's name.

    Gradients, with ``e = Q(x) - x`` (equation 3): U3 has ``dQ/dd = e/d`` inside and 0 outside,
    ``dQ/dq_max = 0`` inside and ``sign(x)`` outside.

    Args:
        step: Initial ``d``.
        bits: Initial ``b``; need not be an integer.
        form: Which two are learned.
        signed: Whether negative values are kept.
        power_of_two_step: Round ``d`` to a power of two in the forward pass, straight-through.
    """

    def __init__(
        self,
        step: float,
        bits: float,
        form: UniformForm = UniformForm.STEP_RANGE,
        *,
        signed: bool = True,
        power_of_two_step: bool = False,
    ) -> None:
        super().__init__()
        if step <= 0 or bits < 1 + signed:
            msg = (
                f"a uniform quantizer must start with a positive step and at least "
                f"{1 + signed} bits; got step {step}, {bits} bits"
            )
            raise InvalidInput(msg)
        self.form, self.signed, self.power_of_two_step = form, signed, power_of_two_step
        largest = (2.0 ** (bits - signed) - 1) * step
        start = {
            UniformForm.BITS_STEP: (bits, step),
            UniformForm.BITS_RANGE: (bits, largest),
            UniformForm.STEP_RANGE: (step, largest),
        }[form]
        self.first = nn.Parameter(torch.tensor(float(start[0])))
        self.second = nn.Parameter(torch.tensor(float(start[1])))

    def grid(self) -> tuple[Tensor, Tensor]:
        """Return ``(d, q_max)``, differentiable."""
        if self.form is UniformForm.STEP_RANGE:
            return self._rounded(self.first), self.second
        levels = 2.0 ** (self.first - int(self.signed)) - 1
        if self.form is UniformForm.BITS_STEP:
            step = self._rounded(self.second)
            return step, levels * step
        return self._rounded(self.second / levels), self.second

    def _rounded(self, step: Tensor) -> Tensor:
        return 2.0 ** ste_round(torch.log2(step)) if self.power_of_two_step else step

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized ``x``."""
        step, largest = self.grid()
        if not self.signed:
            x = torch.relu(x)
        rounded = step * ste_round(x / step)
        return torch.where(x.abs() <= largest, rounded, torch.sign(x) * largest)

    def bits(self) -> Tensor:
        """Return the bit-width that the grid needs, differentiable by straight-through.

        ``ceil(log2(q_max/d + 1) + 1)``, without the ``+ 1`` when unsigned; ``q_max`` is put on the
        grid first and the result is at least 2 (1 unsigned), as in the authors' code.
        """
        step, largest = self.grid()
        levels = ste_round(largest / step)
        return torch.maximum(
            ste_ceil(torch.log2(levels + 1) + int(self.signed)),
            levels.new_tensor(1.0 + self.signed),
        )

    def clip_gradients(self) -> None:
        """Limit the gradients of U3's parameters to plus or minus ``d`` (authors' code)."""
        if self.form is not UniformForm.STEP_RANGE:
            return
        bound = float(self.first.detach())
        for parameter in (self.first, self.second):
            if parameter.grad is not None:
                parameter.grad.clamp_(-bound, bound)

    @torch.no_grad()
    def project(self) -> None:
        """Put U3's parameters back into their box after a step (authors' code).

        ``2^-8 <= d <= 1``, ``2^-8 <= q_max <= 127`` (255 unsigned), swapped if ``d > q_max``.
        """
        if self.form is not UniformForm.STEP_RANGE:
            return
        if float(self.first) > float(self.second) - 1e-5:
            step, largest = float(self.second), float(self.first)
            self.first.fill_(step)
            self.second.fill_(largest)
        self.first.clamp_(2.0**-8, 1.0)
        self.second.clamp_(2.0**-8, 127.0 if self.signed else 255.0)


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


def lsq(
    values: Tensor,
    step: Tensor,
    lowest: Tensor | float,
    highest: Tensor | float,
    *,
    gradient_scale: float = 1.0,
) -> Tensor:
    """Return values on the grid ``step * {lowest..highest}`` with a learnable step [LSQ].

    ``v = w/s``, ``q = round(clip(v))``, out ``q s``. Gradients: to ``w`` inside the clip; to ``s``:
    ``q - v`` inside, ``lowest`` or ``highest`` outside (equation 3), times ``gradient_scale``, for
    which the paper takes ``1 / sqrt(n highest)``. A negative step turns the grid around.

    Args:
        values: Any shape.
        step: Broadcastable to ``values``, not zero.
        lowest: Lowest level; tensors broadcast.
        highest: Highest level. For the one-bit grid {-1, +1} see ``binary``.
        gradient_scale: Factor on the step's gradient.
    """
    s = scale_gradient(step, gradient_scale)
    v = values / s
    low = torch.as_tensor(lowest, dtype=v.dtype, device=v.device)
    high = torch.as_tensor(highest, dtype=v.dtype, device=v.device)
    return ste_round(torch.minimum(torch.maximum(v, low), high)) * s


def binary(values: Tensor, step: Tensor, *, gradient_scale: float = 1.0) -> Tensor:
    """Return ``sign(w) |s|``: the one-bit grid; ``w`` has a gradient within ``+-2 |s|``."""
    s = scale_gradient(step, gradient_scale)
    v = torch.clamp(values / s, -2.0, 2.0)
    sign = torch.where(v >= 0, 1.0, -1.0).to(v)
    return (v + (sign - v).detach()) * s


def tqt(values: Tensor, log2_threshold: Tensor, bits: int, *, signed: bool = True) -> Tensor:
    """Return values on a grid whose power-of-two step follows a learnable threshold [TQT].

    ``s = 2^ceil(log2 t) / 2^(b-1)`` (``2^b`` unsigned), ceil straight-through (equations 4 to 6).
    """
    levels = 2 ** (bits - 1) if signed else 2**bits
    step = 2.0 ** ste_ceil(log2_threshold) / levels
    return lsq(values, step, -levels if signed else 0, levels - 1)

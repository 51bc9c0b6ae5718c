"""Differentiable quantizers: straight-through rounding with learnable grids.

``UniformQuantizer`` comes in the three parametrizations of [DQ], so that its claim can be shown:
only with step and range learned (U3) are the gradients bounded and decoupled. ``lsq`` is the
reference quantizer for training at a given bit-width.

References:
    [DQ] S. Uhlich et al., "Mixed Precision DNNs: All you need is a good parametrization", ICLR
    2020, arXiv 1905.11452.
    [LSQ] S. Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv 1902.08153.
"""

from __future__ import annotations

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

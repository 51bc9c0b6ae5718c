"""Floating-point numbers of few bits: their codes, their values, and scales for them.

Design: docs/design/grids-and-scales.md

References:
    [MX] Open Compute Project, "OCP Microscaling Formats (MX) Specification", version 1.0, 2023.
    [OFP8] Open Compute Project, "OCP 8-bit Floating Point Specification (OFP8)", version 1.0, 2023.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bitquota.candidates.storage import FLOATS, SMALL_SCALES, Grid, ScaleFormat

if TYPE_CHECKING:
    from torch import Tensor

    from bitquota.candidates.storage import FloatFormat

E4M3 = FLOATS[Grid.FLOAT][8]

SMALLEST_EXPONENT, LARGEST_EXPONENT = -126, 127
"""Of scales that are powers of two: what float32 holds as a normal number."""

RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 1.5)
"""Scales that are tried, in units of the one at which the largest weight is the largest number.

Down to a half, which clips; 1.5 puts a weight of E2M1 at 4 instead of 6, where steps are finer."""


def float_values(values: Tensor, of: FloatFormat) -> Tensor:
    """Return the number of a format nearest to each value, ties to even, clipped to its range."""
    size = values.abs().clamp(max=of.largest)
    step = _step(size, of)
    return torch.copysign(torch.round(size / step) * step, values)


def float_codes(values: Tensor, of: FloatFormat) -> Tensor:
    """Return i32: the bit pattern of the number nearest to each value; never minus zero."""
    nearest = float_values(values, of)
    size = nearest.abs()
    exponent = _exponent(size, of)
    steps = torch.round(size / torch.exp2(exponent - of.mantissa_bits)).int()
    pattern = ((exponent - of.least_exponent).int() << of.mantissa_bits) + steps
    sign = 1 << (of.exponent_bits + of.mantissa_bits)
    return torch.where(nearest < 0, pattern + sign, pattern)


def float_read(codes: Tensor, of: FloatFormat, dtype: torch.dtype) -> Tensor:
    """Return the number that each bit pattern stands for."""
    magnitude = codes & ((1 << (of.exponent_bits + of.mantissa_bits)) - 1)
    field, mantissa = magnitude >> of.mantissa_bits, magnitude & ((1 << of.mantissa_bits) - 1)
    # Subnormal numbers have the exponent of the first normal ones, and no leading one.
    steps = mantissa + torch.where(field > 0, 1 << of.mantissa_bits, 0)
    exponent = (field - 1).clamp(min=0) + of.least_exponent - of.mantissa_bits
    size = steps.to(dtype) * torch.exp2(exponent.to(dtype))
    return torch.where(magnitude == codes, size, -size)


def _exponent(size: Tensor, of: FloatFormat) -> Tensor:
    """Return the exponent of each number, in the dtype of the numbers."""
    exponent = torch.frexp(size).exponent - 1
    return torch.where(size > 0, exponent, of.least_exponent).clamp(min=of.least_exponent).to(size)


def _step(size: Tensor, of: FloatFormat) -> Tensor:
    return torch.exp2(_exponent(size, of) - of.mantissa_bits)


def tensor_factor(scales: Tensor) -> float:
    """Return the power of two in whose units the scales of a tensor are stored as E4M3.

    The smallest with which the largest scale fits. A power of two makes products of code, scale and
    factor exact in bfloat16.
    """
    largest = float(scales.max()) if scales.numel() else 0.0
    if largest <= 0:
        return 1.0
    exponent = torch.frexp(torch.tensor(largest / E4M3.largest, dtype=torch.float64)).exponent
    factor = 2.0 ** int(exponent)
    return factor / 2 if largest <= E4M3.largest * factor / 2 else factor


def stored_scales(scales: Tensor, scale_format: ScaleFormat, factor: float | None = None) -> Tensor:
    """Return positive scales as they are read back from 8 bits, in their own dtype.

    Args:
        scales: All scales of a tensor.
        scale_format: E8M0 or E4M3.
        factor: Of the tensor, for E4M3; by default ``tensor_factor``.
    """
    if scale_format is ScaleFormat.E8M0:
        # The nearest power of two by its logarithm; a scale of zero is as small as can be.
        exponent = torch.log2(scales.clamp(min=2.0**SMALLEST_EXPONENT)).round()
        return torch.exp2(exponent.clamp(SMALLEST_EXPONENT, LARGEST_EXPONENT))
    unit = tensor_factor(scales) if factor is None else factor
    nearest = float_values(scales / unit, E4M3)
    # No scale of a weight that is not zero becomes zero.
    least = 2.0 ** (E4M3.least_exponent - E4M3.mantissa_bits)
    return torch.where(scales > 0, nearest.clamp(min=least), nearest) * unit


def fit_float_scale(
    values: Tensor,
    of: FloatFormat,
    scale_format: ScaleFormat,
    importance: Tensor | None = None,
    *,
    absmax: bool = False,
) -> Tensor:
    """Return f64[g]: the scale of each line with the smallest squared error of those tried.

    Each is tried as it will be stored, so a power of two is chosen by what it costs.

    Args:
        values: f64[g, n].
        of: The format of the codes.
        scale_format: How the scales are stored.
        importance: f64[g, n], not negative, or ``None`` for ones.
        absmax: Put the largest weight at the largest number, and try nothing else.

    Cost: rounding all values once for each of ``RATIOS``.
    """
    plain = values.abs().amax(dim=1) / of.largest
    small = scale_format in SMALL_SCALES
    factor = tensor_factor(plain * max(RATIOS)) if scale_format is ScaleFormat.E4M3 else None

    def stored(scales: Tensor) -> Tensor:
        return stored_scales(scales, scale_format, factor) if small else scales

    if absmax:
        return stored(plain)
    best, best_error = stored(plain), torch.full_like(plain, torch.inf)
    for ratio in RATIOS:
        scale = stored(plain * ratio)
        unit = torch.where(scale > 0, scale, 1.0)[:, None]
        squares = (values - unit * float_values(values / unit, of)).square()
        error = (squares if importance is None else squares * importance).sum(dim=1)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best


def scale_bytes(
    scales: Tensor, scale_format: ScaleFormat, factor: float | None = None
) -> tuple[Tensor, float]:
    """Return u8: the stored codes of scales that ``stored_scales`` returned, and their factor."""
    if scale_format is ScaleFormat.E8M0:
        return (torch.log2(scales.double()).round() + 127).to(torch.uint8), 1.0
    factor = tensor_factor(scales.double()) if factor is None else factor
    return float_codes(scales.double() / factor, E4M3).to(torch.uint8), factor


def scales_of_bytes(codes: Tensor, scale_format: ScaleFormat, factor: float) -> Tensor:
    """Return f32: the scales that ``scale_bytes`` was given."""
    if scale_format is ScaleFormat.E8M0:
        return torch.exp2(codes.double() - 127).float()
    return (float_read(codes.int(), E4M3, torch.float64) * factor).float()

"""Scales, zero points and levels of a grid, fitted to the weights that share them.

Design: docs/design/grids-and-scales.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bitquota.candidates.storage import (
    FLOATS,
    K_BLOCK,
    PRUNED_BITS,
    Granularity,
    Grid,
    ScaleFormat,
    ScaleRule,
    Scheme,
)
from bitquota.errors import InvalidInput
from bitquota.quantizers.affine_fit import fit_affine
from bitquota.quantizers.float_formats import fit_float_scale
from bitquota.quantizers.grid import numbers_of
from bitquota.quantizers.kquants import fit_k_blocks
from bitquota.quantizers.levels import fit_companded, fit_levels, fit_scale
from bitquota.quantizers.scales import asymmetric_scale, symmetric_scale
from bitquota.quantizers.sparsity import stays

if TYPE_CHECKING:
    from torch import Tensor

SCALE_DTYPES = {
    ScaleFormat.FP32: torch.float32,
    ScaleFormat.FP16: torch.float16,
    ScaleFormat.BF16: torch.bfloat16,
    # What 8 bits hold, as float32 (``float_formats.stored_scales``).
    ScaleFormat.E8M0: torch.float32,
    ScaleFormat.E4M3: torch.float32,
}


def fitted_parameters(
    values: Tensor, bits: int, scheme: Scheme, weight: Tensor | None, *, scan: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return scales and zero points as ``QuantizedWeight`` stores them, and which weights stay.

    Args:
        values: f64[rows, columns].
        bits: Bit-width.
        scheme: Everything else.
        weight: What a squared error of each weight counts for, f64[rows, columns].
        scan: Fit scales of the symmetric grid as of a large matrix (``least_squares_scales``).

    Returns:
        The third is bool[rows, columns], or ``None`` where all weights stay.
    """
    if bits == PRUNED_BITS:
        return values.new_zeros(len(values), 1), None, None
    kept = stays(values, bits, scheme, weight)
    left = values if kept is None else values * kept
    return *_parameters(left, bits, scheme, weight, scan=scan), kept


def _parameters(
    values: Tensor, bits: int, scheme: Scheme, weight: Tensor | None, *, scan: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return scales and zero points."""
    if scheme.grid is Grid.K_BLOCKS:
        if values.shape[1] % K_BLOCK:
            msg = f"the grid '{scheme.grid}' needs {K_BLOCK} to divide the row; got {values.shape}"
            raise InvalidInput(msg, columns=values.shape[1])
        return fit_k_blocks(values, bits, weight), None
    lines, line_weight = _lines(values, weight, scheme)
    zero: Tensor | None = None
    if scheme.grid is Grid.OFFSET:
        scale = torch.stack(fit_affine(lines, bits, line_weight), dim=1)
    elif scheme.grid is Grid.CODEBOOK:
        scale = fit_levels(lines, bits, line_weight)
    elif scheme.grid is Grid.COMPANDED:
        scale = fit_companded(lines, bits, line_weight)
    elif scheme.grid in FLOATS:
        scale = fit_float_scale(
            lines,
            FLOATS[scheme.grid][bits],
            scheme.scale_format,
            line_weight,
            absmax=scheme.scale_rule is ScaleRule.ABSMAX,
        )
    elif scheme.grid is Grid.ASYMMETRIC:
        scale, zero = asymmetric_scale(lines, bits, scheme.scale_rule, line_weight)
    elif (numbers := numbers_of(scheme.grid, bits)) is not None:
        plain = scheme.grid is Grid.NORMAL_FLOAT and scheme.scale_rule is ScaleRule.ABSMAX
        scale = lines.abs().amax(dim=1) if plain else fit_scale(lines, numbers, line_weight)
    else:
        scale = symmetric_scale(lines, bits, scheme.scale_rule, line_weight, scan=scan)
    shape = (1, -1) if scheme.granularity is Granularity.TENSOR else (len(values), -1)
    scales = _store_scale(scale, scheme.scale_format).reshape(shape)
    return scales, None if zero is None else zero.reshape(shape).int()


def _lines(
    values: Tensor, importance: Tensor | None, scheme: Scheme
) -> tuple[Tensor, Tensor | None]:
    """Return values and importance as one line per scale; a short last group is padded."""
    if scheme.granularity is Granularity.TENSOR:
        return values.reshape(1, -1), None if importance is None else importance.reshape(1, -1)
    if scheme.granularity is Granularity.CHANNEL:
        return values, importance
    assert scheme.group_size is not None  # noqa: S101  # invariant of Scheme
    missing = -values.shape[1] % scheme.group_size
    if missing:
        weight = torch.ones_like(values) if importance is None else importance
        importance = torch.nn.functional.pad(weight, (0, missing))
        values = torch.nn.functional.pad(values, (0, missing))
    size = scheme.group_size
    return values.reshape(-1, size), None if importance is None else importance.reshape(-1, size)


def _store_scale(scale: Tensor, scale_format: ScaleFormat) -> Tensor:
    dtype = SCALE_DTYPES[scale_format]
    largest = torch.finfo(dtype).max
    return scale.clamp(-largest, largest).to(dtype)

"""The grids that weights are rounded to: integers, codebooks, powers of two.

Design: docs/design/grids-and-scales.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bitquota.candidates.storage import Granularity, Grid

if TYPE_CHECKING:
    from torch import Tensor

    from bitquota.candidates.storage import Scheme


def levels(bits: int) -> tuple[int, int]:
    """Return lowest and highest level of the symmetric grid.

    The full signed range ``-2^(b-1)..2^(b-1)-1``. At one bit that range would be {-1, 0}, which
    can only take weights away; there the grid is {-1, +1} instead, and still fits one bit.
    """
    return (-1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def nearest_codes(
    values: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, scheme: Scheme
) -> Tensor:
    """Return i32[rows, columns]: the code nearest to each value (ties to even).

    ``scales`` are the levels of a codebook, ``[rows or 1, 2^bits]``, ascending.
    """
    columns = values.shape[1]
    if scheme.grid is Grid.CODEBOOK:
        return _nearest_levels(values, scales.double()).int()
    scale = spread(scales.double(), columns, scheme)
    step = torch.where(scale != 0, scale, 1.0)
    if scheme.grid is Grid.POWER_OF_TWO:
        return power_codes(values / step, bits)
    if zero_points is not None:
        zero = spread(zero_points.double(), columns, scheme)
        return (torch.round(values / step) + zero).clamp(0, 2**bits - 1).int()
    if bits == 1:
        return torch.where(values >= 0, 1, -1).int()
    lowest, highest = levels(bits)
    return torch.round(values / step).clamp(lowest, highest).int()


def _nearest_levels(values: Tensor, table: Tensor) -> Tensor:
    middles = (table[:, 1:] + table[:, :-1]) / 2
    if len(middles) == 1:
        return torch.bucketize(values.contiguous(), middles[0].contiguous())
    return torch.searchsorted(middles.contiguous(), values.contiguous())


def power_codes(values: Tensor, bits: int) -> Tensor:
    """Return i32 codes of ``values`` in units of the scale: sign bit first, then ``k`` of 2^-k.

    The level is the nearest one, not the nearest exponent: between ``2^-k`` and ``2^-k-1`` they
    change at the arithmetic middle, which has the smaller squared error.
    """
    last = 2 ** (bits - 1) - 1
    size = values.abs().clamp(min=2.0 ** -(last + 2))
    exponent = torch.floor(-torch.log2(size / 1.5)).clamp(0, last).int()
    return exponent + torch.where(values < 0, 2 ** (bits - 1), 0).int()


def power_values(codes: Tensor, bits: int) -> Tensor:
    """Return f32: ``+-2^-k`` of each code."""
    half = 2 ** (bits - 1)
    sign = torch.where(codes >= half, -1.0, 1.0)
    return sign * torch.exp2(-(codes % half).float())


def spread(per_scale: Tensor, columns: int, scheme: Scheme) -> Tensor:
    """Return one value per weight (broadcastable to ``[rows, columns]``)."""
    if scheme.granularity is not Granularity.GROUP:
        return per_scale
    assert scheme.group_size is not None  # noqa: S101  # invariant of Scheme
    return per_scale.repeat_interleave(scheme.group_size, dim=1)[:, :columns]

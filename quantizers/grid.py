"""The integer grids that weights are rounded to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bitquota.storage import Granularity

if TYPE_CHECKING:
    from torch import Tensor

    from bitquota.storage import Scheme


def levels(bits: int) -> tuple[int, int]:
    """Return lowest and highest level of the symmetric grid.

    The full signed range ``-2^(b-1)..2^(b-1)-1``. At one bit that range would be {-1, 0}, which
    can only take weights away; there the grid is {-1, +1} instead, and still fits one bit.
    """
    return (-1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def nearest_codes(
    values: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, scheme: Scheme
) -> Tensor:
    """Return i32[rows, columns]: the code nearest to each value (ties to even)."""
    columns = values.shape[1]
    scale = spread(scales.double(), columns, scheme)
    step = torch.where(scale != 0, scale, 1.0)
    if zero_points is not None:
        zero = spread(zero_points.double(), columns, scheme)
        return (torch.round(values / step) + zero).clamp(0, 2**bits - 1).int()
    if bits == 1:
        return torch.where(values >= 0, 1, -1).int()
    lowest, highest = levels(bits)
    return torch.round(values / step).clamp(lowest, highest).int()


def spread(per_scale: Tensor, columns: int, scheme: Scheme) -> Tensor:
    """Return one value per weight (broadcastable to ``[rows, columns]``)."""
    if scheme.granularity is not Granularity.GROUP:
        return per_scale
    assert scheme.group_size is not None  # noqa: S101  # invariant of Scheme
    return per_scale.repeat_interleave(scheme.group_size, dim=1)[:, :columns]

"""Smooth relaxations of grids and bit-widths, and sizes that hold by construction.

References:
    [Chikin22] V. Chikin, K. Solodskikh, I. Zhelavskaya, "Explicit Model Size Control and Relaxation
    via Smooth Regularization for Mixed-Precision Quantization", ECCV 2022.
    [QSin] K. Solodskikh, V. Chikin, R. Aydarkhanov, D. Song, I. Zhelavskaya, J. Wei, "Towards
    Accurate Network Quantization with Equivalent Smooth Regularizer", ECCV 2022.

Design: docs/design/training.md
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def ellipsoid_bits(direction: Tensor, slopes: Tensor, least: float, limit: float) -> Tensor:
    """Return ``b_l`` with ``sum slope_l b_l = limit`` for any direction [Chikin22].

    ``b_l = b_min + T v_l^2 / sum slope_l v_l^2`` with ``T`` what the limit leaves above ``b_min``.

    Args:
        direction: ``f32[layers]``, ``v``; not all zero.
        slopes: ``f32[layers]``: what a bit of each layer takes.
        least: ``b_min``.
        limit: Of the sum.
    """
    spare = max(0.0, limit - least * float(slopes.sum()))
    return least + spare * direction.square() / (slopes * direction.square()).sum()


def off_grid(values: Tensor, step: Tensor, highest: Tensor) -> Tensor:
    """Return the mean of ``sin^2(pi x)`` of codes ``x = values / step`` within the grid [QSin].

    Beyond ``+-highest`` codes it goes on as ``pi^2 (|x| - highest)^2``, whose second derivative is
    the same: the regulariser has no steps, and is zero exactly on the grid.
    """
    codes = values / step
    inside = torch.sin(math.pi * codes).square()
    outside = (math.pi * (codes.abs() - highest)).square()
    return torch.where(codes.abs() <= highest, inside, outside).mean()


def off_widths(bits: Tensor, widths: Sequence[int]) -> Tensor:
    """Return the mean of ``sin^2(pi x)``, ``x`` the way from one width on offer to the next.

    Zero exactly where every bit-width is on offer; beyond the ends it is zero as well.
    """
    offered = torch.tensor([float(w) for w in widths], device=bits.device)
    inside = bits.clamp(float(offered[0]), float(offered[-1]))
    high = torch.searchsorted(offered, inside.detach()).clamp(1, len(widths) - 1)
    way = (inside - offered[high - 1]) / (offered[high] - offered[high - 1])
    return torch.sin(math.pi * way).square().mean()

"""Super-blocks of 256 weights whose own scales are integers: the K types of llama.cpp.

A super-block holds sub-blocks of 16 or 32 weights. Each has a small integer scale, and on the
affine widths (2, 4 and 5 bits) an integer minimum; one or two fp16 numbers give both their unit:

    w = (d s) q - (d_min m)

Scales and minima are fitted by least squares and rounded to their integers before codes are chosen
(by any rounder), so codes are the best for what a reader computes.

Design: docs/design/grids-and-scales.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bitquota.candidates.storage import K_BLOCK, K_BLOCKS, ScaleRule
from bitquota.quantizers.affine_fit import fit_affine
from bitquota.quantizers.scales import symmetric_scale

if TYPE_CHECKING:
    from torch import Tensor


def fit_k_blocks(values: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """Return the parameters of every block, ``f16[rows, blocks * n]``.

    Args:
        values: f64[rows, columns], 256 dividing the columns.
        bits: 2 to 6.
        importance: f64[rows, columns], not negative: weighs the squared errors.

    The parameters of a block are ``d``, ``d_min`` (affine only), the scales and the minima of its
    sub-blocks; the integers among them are exact in fp16. Heuristic for the affine widths (a few
    starts, two rounds of least squares each), exact least squares per sub-block for the others
    before scales are rounded.
    """
    kind = K_BLOCKS[bits]
    lines = values.reshape(-1, kind.sub_block)
    weight = None if importance is None else importance.reshape(lines.shape)
    n_sub = K_BLOCK // kind.sub_block
    if kind.affine:
        scale, low = fit_affine(lines, bits, weight, through_zero=True)
        unit, whole = _integers(scale.reshape(-1, n_sub), 0, kind.largest)
        unit_low, minima = _integers(-low.reshape(-1, n_sub), 0, kind.largest)
        parts = [unit, unit_low, whole, minima]
    else:
        scale = symmetric_scale(lines, bits, ScaleRule.LEAST_SQUARES, weight)
        unit, whole = _integers(scale.reshape(-1, n_sub), -kind.largest - 1, kind.largest)
        parts = [unit, whole]
    return torch.cat(parts, dim=1).half().reshape(len(values), -1)


def k_block_steps(parameters: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return step and offset of every sub-block, f32[rows, sub-blocks], as readers compute them.

    A code ``q`` stands for ``step * q + offset``: ``step = d s``, ``offset = - d_min m``.
    """
    kind = K_BLOCKS[bits]
    units, scales, minima = split_parameters(parameters, bits)
    step = units[:, :1].float() * scales.float()
    offset = -(units[:, 1:].float() * minima.float()) if kind.affine else torch.zeros_like(step)
    rows = len(parameters)
    return step.reshape(rows, -1), offset.reshape(rows, -1)


def split_parameters(parameters: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return units ``f16[n, 1 or 2]``, integer scales and minima ``i32[n, sub-blocks]`` of blocks.

    The minima are empty, ``[n, 0]``, where the width has none.
    """
    kind = K_BLOCKS[bits]
    n_units = 2 if kind.affine else 1
    n_sub = K_BLOCK // kind.sub_block
    blocks = parameters.reshape(-1, n_units * (1 + n_sub))
    units, whole = blocks[:, :n_units], blocks[:, n_units:].float().int()
    return units, whole[:, :n_sub], whole[:, n_sub:]


def _integers(values: Tensor, least: int, most: int) -> tuple[Tensor, Tensor]:
    """Return an fp16 unit for each row, and the integers that give ``values`` back."""
    unit = (values.abs().amax(1, keepdim=True) / most).half().double()
    safe = torch.where(unit == 0, torch.ones_like(unit), unit)
    whole = (values / safe).round().clamp(least, most)
    return unit, torch.where(unit == 0, torch.zeros_like(whole), whole)

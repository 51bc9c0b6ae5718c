"""Super-blocks of 256 weights whose own scales are integers: the K types of llama.cpp.

A super-block holds sub-blocks of 16 or 32 weights. Each has a small integer scale, and on the
affine widths (2, 4 and 5 bits) an integer minimum; one or two fp16 numbers give both their unit:

    w = (d s) q - (d_min m)

Scales and minima are fitted by least squares and rounded to their integers before the codes are
chosen, so codes are the best for what a reader computes.

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


def fit_k_blocks(
    values: Tensor, bits: int, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return codes ``i32[rows, columns]`` and parameters ``f16[rows, blocks * n]``.

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
    rows = len(values)
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
    parameters = torch.cat(parts, dim=1).half()
    step, offset = (t.double().reshape(-1, 1) for t in _effective(parameters, bits))
    least, most = code_range(bits)
    safe = torch.where(step == 0, torch.ones_like(step), step)
    codes = ((lines + offset) / safe).round().clamp(least, most)
    codes = torch.where(step == 0, torch.zeros_like(codes), codes)
    return codes.int().reshape(rows, -1), parameters.reshape(rows, -1)


def read_k_blocks(codes: Tensor, parameters: Tensor, bits: int) -> Tensor:
    """Return f32[rows, columns], computed as readers of GGUF do."""
    kind = K_BLOCKS[bits]
    n_sub = K_BLOCK // kind.sub_block
    n_parameters = (2 if kind.affine else 1) * (1 + n_sub)
    step, offset = _effective(parameters.reshape(-1, n_parameters), bits)
    lines = codes.reshape(-1, kind.sub_block).float()
    return (step.reshape(-1, 1) * lines - offset.reshape(-1, 1)).reshape(codes.shape)


def code_range(bits: int) -> tuple[int, int]:
    """Return the least and the largest code of a width."""
    if K_BLOCKS[bits].affine:
        return 0, 2**bits - 1
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


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


def _effective(parameters: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return ``d s`` and ``d_min m`` of every sub-block, f32[blocks, sub-blocks]."""
    units, scales, minima = split_parameters(parameters, bits)
    step = units[:, :1].float() * scales.float()
    if not K_BLOCKS[bits].affine:
        return step, torch.zeros_like(step)
    return step, units[:, 1:].float() * minima.float()


def _integers(values: Tensor, least: int, most: int) -> tuple[Tensor, Tensor]:
    """Return an fp16 unit for each row, and the integers that give ``values`` back."""
    unit = (values.abs().amax(1, keepdim=True) / most).half().double()
    safe = torch.where(unit == 0, torch.ones_like(unit), unit)
    whole = (values / safe).round().clamp(least, most)
    return unit, torch.where(unit == 0, torch.zeros_like(whole), whole)

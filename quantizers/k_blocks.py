"""Super-blocks of 256 weights whose own scales are integers: the K types of llama.cpp.

A super-block holds sub-blocks of 16 or 32 weights. Each has a small integer scale, and on the
affine widths (2, 4 and 5 bits) an integer minimum; one or two fp16 numbers give both their unit:

    w = (d s) q - (d_min m)

Scales and minima are fitted by least squares and rounded to their integers before the codes are
chosen, so codes are the best for what a reader computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bitquota.quantizers.scales import symmetric_scale
from bitquota.storage import K_BLOCK, K_BLOCKS, ScaleRule

if TYPE_CHECKING:
    from torch import Tensor

_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
"""Shares of the full range that least squares starts from: outliers may be clipped."""


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
        scale, low = _affine(lines, bits, weight)
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


def _affine(lines: Tensor, bits: int, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return scale > 0 and offset <= 0 of each line, f64[n]: ``x ~ scale q + offset``."""
    weight = torch.ones_like(lines) if weight is None else weight
    most = 2**bits - 1
    lowest = lines.amin(1).clamp(max=0)
    spread = lines.amax(1).clamp(min=0) - lowest
    best_scale, best_low = spread / most, lowest.clone()
    best_error = _error(lines, weight, best_scale, best_low, most)
    for share in _SHRINK:
        scale, low = spread * (share / most), lowest * share
        for _ in range(2):
            scale, low = _least_squares(lines, weight, _codes(lines, scale, low, most))
            error = _error(lines, weight, scale, low, most)
            better = (error < best_error) & (scale > 0)
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_low = torch.where(better, low, best_low)
    return best_scale, best_low


def _codes(lines: Tensor, scale: Tensor, low: Tensor, most: int) -> Tensor:
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = ((lines - low[:, None]) / safe[:, None]).round().clamp(0, most)
    return torch.where(scale[:, None] > 0, codes, torch.zeros_like(codes))


def _error(lines: Tensor, weight: Tensor, scale: Tensor, low: Tensor, most: int) -> Tensor:
    codes = _codes(lines, scale, low, most)
    gap = scale[:, None] * codes + low[:, None] - lines
    return (weight * gap.square()).sum(1)


def _least_squares(lines: Tensor, weight: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best scale and offset for given codes; an offset above 0 becomes 0."""
    total = weight.sum(1)
    q, x = (weight * codes).sum(1), (weight * lines).sum(1)
    qq, qx = (weight * codes.square()).sum(1), (weight * codes * lines).sum(1)
    spread = total * qq - q.square()
    safe = torch.where(spread > 0, spread, torch.ones_like(spread))
    scale = torch.where(spread > 0, (total * qx - q * x) / safe, torch.zeros_like(spread))
    heavy = torch.where(total > 0, total, torch.ones_like(total))
    low = (x - scale * q) / heavy
    above = low > 0
    through = torch.where(qq > 0, qx / torch.where(qq > 0, qq, torch.ones_like(qq)), scale)
    return torch.where(above, through, scale), low.clamp(max=0)

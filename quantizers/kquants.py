"""Super-blocks of 256 weights whose own scales are integers: the K types of llama.cpp.

A super-block holds sub-blocks of 16 or 32 weights. Each has a small integer scale, and on the
affine widths (2, 4 and 5 bits) an integer minimum; one or two fp16 numbers give both their unit:

    w = (d s) q - (d_min m)

Scales and minima are fitted by least squares and rounded to their integers before codes are chosen
(by any rounder), so codes are the best for what a reader computes. On the affine widths the units
are then fitted anew to all integers of a block, and each pair of integers moves to the best of its
neighbors: llama.cpp's search over scales (make_qkx3_quants, make_qp_quants) ends at larger errors.

Design: docs/design/grids-and-scales.md
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import torch

from bitquota.candidates.storage import K_BLOCK, K_BLOCKS, ScaleRule
from bitquota.quantizers.affine_fit import fit_affine
from bitquota.quantizers.scales import symmetric_scale

if TYPE_CHECKING:
    from torch import Tensor

_ROUNDS = 2
"""Rounds of units and integers: a third lowers the error of normal weights by less than 1 %."""


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
        blocks = values.reshape(-1, n_sub, kind.sub_block)
        weights = torch.ones_like(blocks) if weight is None else weight.reshape(blocks.shape)
        fit = _BlockFit(blocks, weights, 2**bits - 1, unit, unit_low, whole, minima)
        for _ in range(_ROUNDS):
            fit.refit_units()
            fit.move_integers(kind.largest)
        parts = [fit.unit, fit.unit_low, fit.scales, fit.minima]
    else:
        scale = symmetric_scale(lines, bits, ScaleRule.LEAST_SQUARES, weight)
        unit, whole = _integers(scale.reshape(-1, n_sub), -kind.largest - 1, kind.largest)
        parts = [unit, whole]
    return torch.cat(parts, dim=1).half().reshape(len(values), -1)


class _BlockFit:
    """Units and integers of affine blocks, and the codes and errors that they lead to.

    Args:
        values: f64[blocks, sub-blocks, columns].
        weights: The same shape: weighs the squared errors.
        most: Largest code.
        unit: f64[blocks, 1], exact in fp16: ``d``; ``unit_low`` is ``d_min``.
        unit_low: See there.
        scales: f64[blocks, sub-blocks], integers; likewise ``minima``.
        minima: See there.
    """

    def __init__(
        self,
        values: Tensor,
        weights: Tensor,
        most: int,
        unit: Tensor,
        unit_low: Tensor,
        scales: Tensor,
        minima: Tensor,
    ) -> None:
        self._values, self._weights, self._most = values, weights, most
        self.unit, self.unit_low, self.scales, self.minima = unit, unit_low, scales, minima
        self._codes, self._errors = self._read(unit, unit_low, scales, minima)

    def _read(self, unit: Tensor, low: Tensor, scales: Tensor, minima: Tensor) -> list[Tensor]:
        """Return the nearest codes, and the error of each sub-block."""
        step = (unit * scales).float().double()[..., None]  # as readers compute it
        offset = -(low * minima).float().double()[..., None]
        safe = torch.where(step > 0, step, torch.ones_like(step))
        codes = ((self._values - offset) / safe).round_().clamp_(0, self._most)
        gap = codes * step + offset - self._values
        return [codes, (self._weights * gap.square_()).sum(-1)]

    def refit_units(self) -> None:
        """Replace the units of blocks by least squares, where this lowers the error."""
        x, w = self._values, self._weights
        up, down = self.scales[..., None] * self._codes, self.minima[..., None].expand_as(x)
        uu, ud, dd = (_sum(w * a * b) for a, b in ((up, up), (up, down), (down, down)))
        xu, xd = _sum(w * x * up), _sum(w * x * down)
        spread = uu * dd - ud.square()
        usable = spread > 1e-12 * uu * dd
        safe = torch.where(usable, spread, torch.ones_like(spread))
        unit = ((xu * dd - xd * ud) / safe).half().double()
        low = ((xu * ud - xd * uu) / safe).half().double()
        usable &= (unit > 0) & (low >= 0)
        unit, low = torch.where(usable, unit, self.unit), torch.where(usable, low, self.unit_low)
        codes, errors = self._read(unit, low, self.scales, self.minima)
        better = errors.sum(1, keepdim=True) < self._errors.sum(1, keepdim=True)
        self.unit = torch.where(better, unit, self.unit)
        self.unit_low = torch.where(better, low, self.unit_low)
        self._errors = torch.where(better, errors, self._errors)
        self._codes = torch.where(better[..., None], codes, self._codes)

    def move_integers(self, largest: int) -> None:
        """Move the scale and minimum of each sub-block to the best of their neighbors."""
        scales, minima = self.scales, self.minima
        for up, down in product((-1, 0, 1), repeat=2):
            moved, lowered = (scales + up).clamp(0, largest), (minima + down).clamp(0, largest)
            codes, errors = self._read(self.unit, self.unit_low, moved, lowered)
            better = errors < self._errors
            self.scales = torch.where(better, moved, self.scales)
            self.minima = torch.where(better, lowered, self.minima)
            self._errors = torch.where(better, errors, self._errors)
            self._codes = torch.where(better[..., None], codes, self._codes)


def _sum(values: Tensor) -> Tensor:
    return values.sum((1, 2))[:, None]


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

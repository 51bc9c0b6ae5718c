"""What follows GPTQ: coordinate descent, and scales fitted once more to the codes that it chose.

Design: docs/design/rounding.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bitquota.candidates.storage import Granularity, Grid, ScaleRule
from bitquota.quantizers.column_path import times_gram
from bitquota.quantizers.gptq import improved
from bitquota.quantizers.grid import matrix_grid

if TYPE_CHECKING:
    from torch import Tensor

    from bitquota.candidates.storage import Scheme

ROUNDS = 5
"""Rounds of scales and codes in turn."""

DESCENTS = 2
"""Rounds where scales stay."""


def refitted(
    values: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    scheme: Scheme,
    gram: Tensor,
    *,
    scales_stay: bool = False,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return codes and scales with a smaller ``tr(E G E^T)``, ``E = W - s (q - z)``.

    Scales are fitted to weights before there are codes. With feedback codes lie further from their
    weights than half a step, and other scales suit them better: scales and codes are improved in
    turn, ``ROUNDS`` times, each while the other stays. A row that gains nothing stays as it was.

    Scales that are not numbers of their own (powers of two, levels, K blocks), one scale for all
    rows, and scales by other rules than least squares stay; codes alone are improved, ``DESCENTS``
    times.

    Args:
        values: ``W``, f64[rows, columns].
        codes: ``q``, i32[rows, columns].
        scales: ``s``, as ``QuantizedWeight`` stores them.
        zeros: ``z``, likewise.
        bits: Bit-width.
        scheme: Everything else.
        gram: ``G``, f64[groups, columns, columns], one for each group of consecutive rows.
        scales_stay: Whether scales stay in any case.
        kept: Which weights may differ from zero (``matrix_grid``).

    Cost: for each round one and a half products of [rows, columns] by [columns, columns] and a
    round of coordinate descent.
    """
    scales_stay = (
        scales_stay
        or scheme.grid not in (Grid.SYMMETRIC, Grid.ASYMMETRIC)
        or scheme.granularity is Granularity.TENSOR
        or scheme.scale_rule not in (ScaleRule.LEAST_SQUARES, ScaleRule.LEAST_SQUARES_POSITIVE)
    )
    columns = values.shape[1]
    grid = matrix_grid(scales, zeros, bits, scheme, columns, kept=kept)
    found, factors = codes, scales
    off = values - grid.read(found)
    moved = times_gram(off, gram)
    error = (moved * off).sum(dim=1)
    for _ in range(DESCENTS if scales_stay else ROUNDS):
        if not scales_stay:
            factors = _scales_for(moved, found, factors, zeros, scheme, gram)
            grid = matrix_grid(factors, zeros, bits, scheme, columns, kept=kept)
        found = grid.nearest(improved(values, grid.read(found), grid, gram))
        off = values - grid.read(found)
        moved = times_gram(off, gram)
        now = (moved * off).sum(dim=1)
        better = (now < error)[:, None]
        error = torch.minimum(now, error)
        codes = torch.where(better, found, codes)
        if not scales_stay:
            scales = torch.where(better, factors, scales)
    return codes, scales


def _scales_for(
    moved: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    scheme: Scheme,
    gram: Tensor,
) -> Tensor:
    """Return the best scales for given codes, one group of columns after the other, as stored.

    ``moved``: ``E G`` of what is stored now, f64[rows, columns]; it is written over.
    """
    columns = codes.shape[1]
    size = scheme.group_size if scheme.granularity is Granularity.GROUP else None
    size = size or columns
    factors, found = scales.double(), scales.clone()
    levels = codes.double()
    if zeros is not None:
        levels -= zeros.double().repeat_interleave(size, dim=1)[:, :columns]
    for k, first in enumerate(range(0, columns, size)):
        part, later = slice(first, first + size), slice(first + size, None)
        own = levels[:, part]
        power = (times_gram(own, gram[:, part, part]) * own).sum(dim=1)
        change = (moved[:, part] * own).sum(dim=1) / power.clamp_min(1e-300)
        stored = (factors[:, k] + change).to(scales.dtype)
        # No scale changes its sign, or vanishes.
        sound = (power > 0) & (stored.double() * factors[:, k] > 0) & stored.isfinite()
        found[:, k] = torch.where(sound, stored, scales[:, k])
        # What the groups to come see of it.
        change = found[:, k].double() - factors[:, k]
        moved[:, later] -= times_gram(own * change[:, None], gram[:, part, later])
    return found

"""Fit the grids that are not integers: codebooks by k-means, others by least squares.

All functions work on ``values: f64[g, n]``, one line for the weights that share levels or a scale.

Design: docs/design/grids-and-scales.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitquota.quantizers.grid import Table, companded_levels

if TYPE_CHECKING:
    from bitquota.quantizers.grid import Numbers

LLOYD_STEPS = 25
SCALE_STARTS = 16
"""Scales to start from, evenly over the two octaves below the largest weight."""

SCALE_STEPS = 4

EXPONENTS = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5)
"""Of companded levels; 1 is the integer grid. All are exact in 16 bits."""

COMPANDED_STARTS = 4


def fit_levels(values: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """Return f64[g, 2^bits] ascending levels: Lloyd's k-means from the quantiles of each line.

    A line of no more than ``2^bits`` distinct values has them for levels, so that weights which
    lie on a codebook are read back as they are. Otherwise a local optimum of
    ``sum importance (x - L[x])^2``.

    Args:
        values: f64[g, n].
        bits: 1 to 8.
        importance: f64[g, n], not negative, or ``None`` for ones.

    Cost: ``LLOYD_STEPS`` sweeps over the values.
    """
    ordered, order = values.contiguous().sort(dim=1)
    weight = torch.ones_like(ordered) if importance is None else importance.gather(1, order)
    n_levels = 2**bits
    n = ordered.shape[1]
    places = ((torch.arange(n_levels, dtype=torch.float64) + 0.5) / n_levels * n).long()
    levels = ordered[:, places.clamp(max=n - 1)].contiguous()
    zeros = torch.zeros_like(levels)
    for _ in range(LLOYD_STEPS):
        codes = torch.searchsorted(((levels[:, 1:] + levels[:, :-1]) / 2).contiguous(), ordered)
        counts = zeros.scatter_add(1, codes, weight)
        sums = zeros.scatter_add(1, codes, weight * ordered)
        empty = counts <= 0
        levels = torch.where(empty, levels, sums / counts.clamp(min=1e-300))
        # An empty level restarts at the largest error of its line, one a sweep.
        error = weight * (ordered - levels.gather(1, codes)).square()
        worst = ordered.gather(1, error.argmax(dim=1, keepdim=True))
        first = (empty.cumsum(dim=1) == 1) & empty
        levels = torch.where(first, worst, levels).sort(dim=1).values
    rank = torch.nn.functional.pad((ordered.diff(dim=1) > 0).long().cumsum(dim=1), (1, 0))
    few = rank[:, -1:] < n_levels
    # Ranks beyond the last level occur only in lines that do not take this branch.
    exact = ordered[:, -1:].expand_as(levels).scatter(1, rank.clamp(max=n_levels - 1), ordered)
    return torch.where(few, exact, levels)


def fit_scale(
    values: Tensor,
    numbers: Numbers,
    importance: Tensor | None = None,
    *,
    starts: int = SCALE_STARTS,
) -> Tensor:
    """Return f64[g], the scale of a table of numbers with the smallest squared error found.

    Alternates codes and scale (``s = sum w x l / sum w l^2``) from ``starts`` scales; the
    largest weight itself is one, so that weights on such a grid are read back as they are.

    Args:
        values: f64[g, n].
        numbers: What codes stand for in units of the scale; 1 is the largest.
        importance: f64[g, n], not negative, or ``None`` for ones.
        starts: Scales to start from.

    Cost: ``starts * SCALE_STEPS`` sweeps over the values.
    """
    weight = torch.ones_like(values) if importance is None else importance
    largest = values.abs().amax(dim=1)
    best, best_error = largest, torch.full_like(largest, torch.inf)
    for k in range(starts):
        scale = largest * 2.0 ** (-2.0 * k / starts)
        for step in range(SCALE_STEPS):
            safe = torch.where(scale > 0, scale, 1.0)[:, None]
            level = numbers.nearest(values / safe)
            error = (weight * (values - safe * level).square()).sum(dim=1)
            better = error < best_error
            best, best_error = (
                torch.where(better, scale, best),
                torch.where(better, error, best_error),
            )
            if step < SCALE_STEPS - 1:
                total = (weight * level.square()).sum(dim=1).clamp(min=1e-300)
                scale = ((weight * values * level).sum(dim=1) / total).abs()
    return best


def fit_companded(values: Tensor, bits: int, importance: Tensor | None = None) -> Tensor:
    """Return f64[g, 2]: scale and exponent of the levels with the smallest squared error found.

    Every exponent of ``EXPONENTS`` is tried with a scale of its own. The side with the largest
    weight gets the extra level.

    Args:
        values: f64[g, n].
        bits: 2 to 8.
        importance: f64[g, n], not negative, or ``None`` for ones.

    Cost: ``len(EXPONENTS) * (COMPANDED_STARTS * SCALE_STEPS + 1)`` sweeps over the values.
    """
    weight = torch.ones_like(values) if importance is None else importance
    side = torch.where(values.amax(dim=1) > -values.amin(dim=1), -1.0, 1.0).to(values)
    turned = values * side[:, None]
    best = torch.ones(len(values), 2, dtype=values.dtype, device=values.device)
    best_error = torch.full_like(side, torch.inf)
    for exponent in EXPONENTS:
        unit = torch.tensor([[1.0, exponent]], dtype=torch.float64, device=values.device)
        numbers = Table(companded_levels(unit, bits)[0])
        scale = fit_scale(turned, numbers, importance, starts=COMPANDED_STARTS)
        safe = torch.where(scale > 0, scale, 1.0)[:, None]
        error = (weight * (turned - safe * numbers.nearest(turned / safe)).square()).sum(dim=1)
        better = error < best_error
        found = torch.stack([scale * side, torch.full_like(scale, exponent)], dim=1)
        best = torch.where(better[:, None], found, best)
        best_error = torch.where(better, error, best_error)
    return best

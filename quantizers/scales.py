"""Fit scales and zero points: absmax, percentile, exact (weighted) least squares.

All functions work on ``values: f64[g, n]``, one line per scale. The grid of a line is
``scale * (code - zero_point)`` with ``code`` an integer; written with ``level = code - zero_point``
it runs from ``lowest`` to ``highest``. One bit is the exception: see ``weights.levels``.

Design: docs/design/grids-and-scales.md
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bitquota.candidates.storage import ScaleRule

PERCENTILE = 0.995
"""Share of weights that the percentile rule keeps inside the grid."""

BREAKPOINTS_AT_ONCE = 1 << 22
"""Breakpoints that the exact fit sorts at a time: bounds its memory to about 300 MB."""

EXACT_LIMIT_BREAKPOINTS = 1 << 28
"""Above it (8 bits on a large weight of a language model) the fit is a refined scan."""

EXACT_LIMIT_LEVELS = 256
"""Above it (16 bits) too: the error is about 1e-9 of the weights whatever the scale."""

SCAN_POINTS = 128


def symmetric_scale(
    values: Tensor, bits: int, rule: ScaleRule, importance: Tensor | None = None
) -> Tensor:
    """Return ``f64[g]``, the scale of each line on the symmetric grid of ``bits``.

    * ``absmax``: the smallest scale for which no error exceeds half a step,
      ``max|w| / (2^(b-1) - 1/2)``; for one bit (levels -1 and +1, a step of two scales) it is
      ``max|w| / 2``.
    * ``percentile``: the same with the ``PERCENTILE`` quantile of ``|w|`` for the maximum.
    * ``least_squares``: ``argmin_s sum h (w - s q)^2`` with ``q = clip(round(w / s))``, exact,
      over scales of both signs (``least_squares_positive``: positive only); for one bit that is
      the (weighted) mean of ``|w|``.

    Args:
        values: f64[g, n].
        bits: 1 to 8, or 16.
        rule: How to fit.
        importance: ``h``, f64[g, n] and not negative, or ``None`` for ones. Values with
            importance 0 count for no rule (padding).
    """
    half_range = 2.0 ** (bits - 1) - 0.5 if bits > 1 else 2.0
    counted = values if importance is None else torch.where(importance > 0, values, 0.0)
    if rule is ScaleRule.ABSMAX:
        return counted.abs().amax(dim=1) / half_range
    if rule is ScaleRule.PERCENTILE:
        return _quantile(counted.abs(), PERCENTILE, importance) / half_range
    if bits == 1:
        weight = torch.ones_like(values) if importance is None else importance
        total = weight.sum(dim=1)
        return (weight * values.abs()).sum(dim=1) / torch.where(total > 0, total, 1.0)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    positive = least_squares_scale(values, low, high, importance)
    if rule is ScaleRule.LEAST_SQUARES_POSITIVE:
        return positive
    # The grid has one level more below zero than above. Rounding -w on it is rounding w on the
    # grid turned around, at the same cost in bits.
    negative = least_squares_scale(-values, low, high, importance)
    turned = grid_error(-values, negative, low, high, importance)
    # Where neither clips, both fit alike: rounding noise must not decide the sign.
    better = turned < (1 - 1e-9) * grid_error(values, positive, low, high, importance)
    return torch.where(better, -negative, positive)


def asymmetric_scale(
    values: Tensor, bits: int, rule: ScaleRule, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return ``(scale f64[g], zero point i64[g])`` with codes and zero points in 0..2^b-1.

    ``absmax`` spans minimum to maximum (zero always included); ``percentile`` spans the
    quantiles ``1 - PERCENTILE`` and ``PERCENTILE``. ``least_squares`` is exact in the scale for
    every zero point it tries: all of them up to 3 bits, above that the best few of a scan over
    ranges (a heuristic in the zero point only).
    """
    top = 2**bits - 1
    counted = values if importance is None else torch.where(importance > 0, values, 0.0)
    if rule is ScaleRule.PERCENTILE:
        low = -_quantile(-counted, PERCENTILE, importance)
        high = _quantile(counted, PERCENTILE, importance)
    else:
        low, high = counted.amin(dim=1), counted.amax(dim=1)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if rule not in (ScaleRule.LEAST_SQUARES, ScaleRule.LEAST_SQUARES_POSITIVE):
        return _range_to_grid(low, high, top)
    best_scale, best_zero = _range_to_grid(low, high, top)
    best_error = grid_error(values, best_scale, -best_zero, top - best_zero, importance)
    if bits <= 3:
        tried = [torch.full_like(best_zero, z) for z in range(top + 1)]
    else:
        tried = _likely_zero_points(values, low, high, top, importance)
    for zero in tried:
        scale = least_squares_scale(values, -zero, top - zero, importance)
        error = grid_error(values, scale, -zero, top - zero, importance)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def least_squares_scale(
    values: Tensor,
    lowest: Tensor | int,
    highest: Tensor | int,
    importance: Tensor | None = None,
) -> Tensor:
    """Return ``f64[g]``: the scale that minimises ``sum h (w - s q)^2``, ``q = clip(round(w/s))``.

    With ``t = 1/s``, the codes change only at the breakpoints ``t = (k - 1/2) / |w|``. Between two
    of them ``q`` is fixed and the best scale is ``A/B`` with ``A = sum h w q``, ``B = sum h q^2``,
    leaving ``sum h w^2 - A^2/B``. Both sums follow from cumulative sums over the sorted
    breakpoints, so the largest ``A^2/B`` is the exact optimum over all scales: rounding again at
    ``A/B`` can only lower the error of its segment, and no segment's error lies below its
    ``- A^2/B``. Scales so small that clipping alone costs more than the absmax scale does are
    left out.

    Exact up to ``EXACT_LIMIT_BREAKPOINTS`` breakpoints and ``EXACT_LIMIT_LEVELS`` levels a side;
    above that a scan of ``SCAN_POINTS`` scales, the promising ones refined by alternating codes
    and scale, no worse than the scan itself.

    Args:
        values: f64[g, n].
        lowest: Lowest level, not above 0: an int or i64[g].
        highest: Highest level, not below 0: an int or i64[g].
        importance: ``h``, f64[g, n], or ``None`` for ones.

    Cost: O(K log K) for ``K`` breakpoints, at most ``g n 2^(b-1)``.
    """
    lines = len(values)
    low = torch.as_tensor(lowest, device=values.device).expand(lines)
    high = torch.as_tensor(highest, device=values.device).expand(lines)
    magnitude = values.abs()
    if importance is not None:
        magnitude = torch.where(importance > 0, magnitude, 0.0)
    caps = torch.where(values >= 0, high[:, None], -low[:, None]).double()
    if int(caps.max()) > EXACT_LIMIT_LEVELS:
        return _refined_scan(values, magnitude, low, high, importance)
    counts, limit = _breakpoint_counts(values, magnitude, caps, low, high, importance)
    per_line = counts.sum(dim=1)
    if int(per_line.sum()) > EXACT_LIMIT_BREAKPOINTS:
        return _refined_scan(values, magnitude, low, high, importance)
    scale = torch.zeros(lines, dtype=torch.float64, device=values.device)
    start = 0
    ends = per_line.cumsum(0).tolist()
    while start < lines:
        base = ends[start - 1] if start else 0
        stop = start + 1
        while stop < lines and ends[stop] - base <= BREAKPOINTS_AT_ONCE:
            stop += 1
        part = slice(start, stop)
        scale[part] = _best_segment(
            magnitude[part],
            counts[part],
            limit[part],
            None if importance is None else importance[part],
        )
        start = stop
    return scale


def grid_error(
    values: Tensor,
    scale: Tensor,
    lowest: Tensor | int,
    highest: Tensor | int,
    importance: Tensor | None = None,
) -> Tensor:
    """Return ``f64[g]``: ``sum h (w - s q)^2`` at the nearest levels ``q``."""
    lines = len(values)
    low: Tensor = torch.as_tensor(lowest, device=values.device).expand(lines)[:, None].to(values)
    high: Tensor = torch.as_tensor(highest, device=values.device).expand(lines)[:, None].to(values)
    step = torch.where(scale != 0, scale, 1.0)[:, None]
    levels = torch.round(values / step).clamp(low, high)
    error = (values - scale[:, None] * levels).square()
    return (error if importance is None else importance * error).sum(dim=1)


def _quantile(values: Tensor, share: float, importance: Tensor | None) -> Tensor:
    """Return the value of rank ``ceil(share * n)`` of each line, padding not counted."""
    if importance is None:
        return values.kthvalue(max(1, math.ceil(share * values.shape[1])), dim=1).values
    n_counted = (importance > 0).sum(dim=1)
    ordered = torch.where(importance > 0, values, torch.inf).sort(dim=1).values
    rank = (share * n_counted).ceil().long().clamp(min=1) - 1
    found = ordered.gather(1, rank[:, None])[:, 0]
    return torch.where(n_counted > 0, found, 0.0)


def _range_to_grid(low: Tensor, high: Tensor, top: int) -> tuple[Tensor, Tensor]:
    scale = (high - low) / top
    step = torch.where(scale != 0, scale, 1.0)
    return scale, torch.round(-low / step).long().clamp(0, top)


def _breakpoint_counts(
    values: Tensor,
    magnitude: Tensor,
    caps: Tensor,
    low: Tensor,
    high: Tensor,
    importance: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return how many breakpoints of each value matter, and the largest ``t`` of each line."""
    weight = importance if importance is not None else torch.ones((), dtype=torch.float64)
    weight = weight.to(values.device)
    reach = torch.where(caps > 0, magnitude / caps.clamp(min=1.0), 0.0).amax(dim=1)
    known = grid_error(values, reach, low, high, importance)
    # Clipping only grows as the scale falls: bisect for where it alone exceeds the known error.
    lower, upper = torch.zeros_like(reach), reach.clone()
    for _ in range(24):
        middle = (lower + upper) / 2
        clipped = (magnitude - caps * middle[:, None]).clamp(min=0.0).square()
        too_small = (weight * clipped).sum(dim=1) > known
        lower = torch.where(too_small, middle, lower)
        upper = torch.where(too_small, upper, middle)
    # Slightly beyond the bound, for rounding; where nothing is clipped at all there is no bound,
    # and twice the reciprocal reach holds every breakpoint up to the cap of the largest value.
    limit = torch.where(lower > 0, 1.0 / lower.clamp(min=1e-300), 2.0 / reach.clamp(min=1e-300))
    limit = torch.where(reach > 0, limit * (1 + 1e-9), 0.0)
    counts = torch.floor(magnitude * limit[:, None] + 0.5).clamp(min=0.0)
    return torch.minimum(counts, caps).long(), limit


def _best_segment(
    magnitude: Tensor, counts: Tensor, limit: Tensor, importance: Tensor | None
) -> Tensor:
    lines, n = magnitude.shape
    flat = counts.reshape(-1)
    total = int(flat.sum())
    scale = torch.zeros(lines, dtype=torch.float64, device=magnitude.device)
    if total == 0:
        return scale
    owner = torch.repeat_interleave(torch.arange(lines * n, device=flat.device), flat)
    first = flat.cumsum(0) - flat
    level = torch.arange(total, device=flat.device) - first[owner] + 1  # 1..count of each value
    size = magnitude.reshape(-1)[owner]
    line = torch.div(owner, n, rounding_mode="floor")
    # One sort for all lines: the line number is the whole part of the key.
    key = line + ((level - 0.5) / (size * limit[line])).clamp(max=1.0 - 1e-12)
    order = key.argsort()
    line, size, level = line[order], size[order], level[order].double()
    gain = 2.0 * level - 1.0
    if importance is not None:
        weight = importance.reshape(-1)[owner[order]]
        size, gain = size * weight, gain * weight
    a, b = size.cumsum(0), gain.cumsum(0)
    ends = counts.sum(dim=1).cumsum(0)
    before = ends - counts.sum(dim=1)
    a = a - torch.cat([a.new_zeros(1), a])[before][line]
    b = b - torch.cat([b.new_zeros(1), b])[before][line]
    explained = torch.where(b > 0, a * a / b.clamp(min=1e-300), 0.0)
    best = torch.zeros(lines, dtype=torch.float64, device=flat.device)
    best.scatter_reduce_(0, line, explained, "amax")
    found = torch.nonzero(explained >= best[line])[:, 0]
    ratio = torch.where(b[found] > 0, a[found] / b[found].clamp(min=1e-300), 0.0)
    return scale.scatter_reduce(0, line[found], ratio, "amax")


def _refined_scan(
    values: Tensor, magnitude: Tensor, low: Tensor, high: Tensor, importance: Tensor | None
) -> Tensor:
    caps = torch.where(values >= 0, high[:, None], -low[:, None]).double().clamp(min=1.0)
    reach = (magnitude / caps).amax(dim=1)
    best, best_error = reach, grid_error(values, reach, low, high, importance)
    for share in torch.linspace(1.0 / SCAN_POINTS, 1.1, SCAN_POINTS).tolist():
        scale = reach * share
        for _ in range(2):
            error = grid_error(values, scale, low, high, importance)
            better = error < best_error
            best, best_error = torch.where(better, scale, best), torch.minimum(error, best_error)
            if not bool((error <= 1.05 * best_error).any()):
                break
            step = torch.where(scale != 0, scale, 1.0)[:, None]
            levels = torch.round(values / step).clamp(low[:, None].double(), high[:, None].double())
            weighted = levels if importance is None else importance * levels
            power = (weighted * levels).sum(dim=1)
            dot = (weighted * values).sum(dim=1)
            scale = torch.where(power > 0, dot / power.clamp(min=1e-300), scale)
    return best


def _likely_zero_points(
    values: Tensor, low: Tensor, high: Tensor, top: int, importance: Tensor | None
) -> list[Tensor]:
    """Return the zero points of the three best ranges out of a scan over both ends."""
    shares = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
    errors, zeros = [], []
    for a in shares:
        for b in shares:
            scale, zero = _range_to_grid(low * a, high * b, top)
            errors.append(grid_error(values, scale, -zero, top - zero, importance))
            zeros.append(zero)
    ranked = torch.stack(errors).argsort(dim=0, stable=True)[:3]
    return list(torch.stack(zeros).gather(0, ranked))

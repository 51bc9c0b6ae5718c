"""Fit scales and zero points: absmax, percentile, exact (weighted) least squares.

All functions work on ``values: f64[g, n]``, one line per scale. The grid of a line is
``scale * (code - zero_point)`` with ``code`` an integer; written with ``level = code - zero_point``
it runs from ``lowest`` to ``highest``. One bit is the exception: see ``weights.levels``.

Design: docs/design/grids-and-scales.md
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitquota.candidates.storage import ScaleRule
from bitquota.quantizers.scale_kernels import BISECTIONS, as_arrays, best_scales

if TYPE_CHECKING:
    from collections.abc import Sequence

PERCENTILE = 0.995
"""Share of weights that the percentile rule keeps inside the grid."""

BREAKPOINTS_AT_ONCE = 1 << 16
VALUES_AT_ONCE = 1 << 15
"""What is fitted together, exactly and by scans: it stays in the processor's cache."""

EXACT_LIMIT_BREAKPOINTS = 1 << 21
"""Above it (4 bits and more on a weight of a language model) the fit of a matrix is a scan."""

SCAN_POINTS = 48
LATTICE_POINTS = 3


def symmetric_scale(
    values: Tensor,
    bits: int,
    rule: ScaleRule,
    importance: Tensor | None = None,
    *,
    scan: bool = False,
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
        scan: Whether least squares look at some scales only (``least_squares_scales``).
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
    if rule is ScaleRule.LEAST_SQUARES_POSITIVE:
        return least_squares_scale(values, low, high, importance)
    # The grid has one level more below zero than above. Rounding -w on it is rounding w on the
    # grid turned around, at the same cost in bits.
    positive, negative = least_squares_scales(
        values, [(low, high), (-high, -low)], importance, scan=scan
    )
    turned = grid_error(values, negative, -high, -low, importance)
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
    fitted = least_squares_scales(values, [(-z, top - z) for z in tried], importance)
    for zero, scale in zip(tried, fitted, strict=True):
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
    """Return ``f64[g]``: the scale for levels from ``lowest`` to ``highest``.

    See ``least_squares_scales``.
    """
    return least_squares_scales(values, [(lowest, highest)], importance)[0]


def least_squares_scales(
    values: Tensor,
    ranges: Sequence[tuple[Tensor | int, Tensor | int]],
    importance: Tensor | None = None,
    *,
    scan: bool = False,
) -> list[Tensor]:
    """Return for each range ``f64[g]``: the scale with the smallest squared error on its levels.

    The error is ``sum h (w - s q)^2`` with ``q = clip(round(w/s))``. With ``t = 1/s``, the codes
    change only at the breakpoints ``t = (k - 1/2) / |w|``. Between two of them ``q`` is fixed and
    the best scale is ``A/B`` with ``A = sum h w q``, ``B = sum h q^2``, leaving
    ``sum h w^2 - A^2/B``. Both sums follow from cumulative sums over the sorted breakpoints, so the
    largest ``A^2/B`` is the exact optimum over all scales: rounding again at ``A/B`` can only lower
    the error of its segment, and no segment's error lies below its ``- A^2/B``. Scales so small
    that clipping alone costs more than the absmax scale does are left out. Breakpoints are sorted
    once for all ranges.

    Exact up to ``EXACT_LIMIT_BREAKPOINTS`` breakpoints. Above that ``A^2/B`` is looked at for
    ``SCAN_POINTS`` scales, from the smallest that could pay to absmax, and for the few that put
    the smallest value on a low level: weights that lie on a grid already are found by one or the
    other. At 6 bits and more, where breakpoints become that many, this costs up to 7 % of the
    error.

    Args:
        values: f64[g, n].
        ranges: Lowest level, not above 0, and highest, not below 0: ints or i64[g].
        importance: ``h``, f64[g, n], or ``None`` for ones.
        scan: Look at some scales only, however few the breakpoints are.

    Cost: O(K log K) for ``K`` breakpoints, at most ``n 2^(b-1)`` a line; the scan O(n).
    """
    lines, n = values.shape
    bounds = torch.stack(
        [
            torch.stack([torch.as_tensor(end, device=values.device).expand(lines) for end in pair])
            for pair in ranges
        ]
    ).double()  # [ranges, 2, lines]
    top = float(torch.maximum(-bounds[:, 0], bounds[:, 1]).max())
    scan = scan or top * values.numel() > EXACT_LIMIT_BREAKPOINTS
    fit = _scanned_scales if scan else _exact_scales
    at_once = max(1, int(VALUES_AT_ONCE // n if scan else BREAKPOINTS_AT_ONCE // (top * n)))
    parts = []
    for start in range(0, lines, at_once):
        part = slice(start, start + at_once)
        weight = None if importance is None else importance[part]
        parts.append(fit(values[part], bounds[:, :, part], weight))
    return list(torch.cat(parts, dim=1))


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


def _smallest_scale(
    magnitude: Tensor, caps: Tensor, known: Tensor, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return two scales of each line: none below the first can be the best, the second is absmax.

    Clipping only grows as the scale falls: bisect for where it alone exceeds the known error.
    """
    reach = (magnitude / caps).amax(dim=1)
    lower, upper = torch.zeros_like(reach), reach.clone()
    for _ in range(BISECTIONS):
        middle = (lower + upper) / 2
        clipped = (magnitude - caps * middle[:, None]).clamp_(min=0.0).square_()
        if importance is not None:
            clipped *= importance
        too_small = clipped.sum(dim=1) > known
        lower = torch.where(too_small, middle, lower)
        upper = torch.where(too_small, upper, middle)
    # Slightly beyond the bound, for rounding.
    least = torch.where(lower > 0, lower, reach / 2**BISECTIONS) * (1 - 1e-9)
    return least, reach


def _start(
    values: Tensor, bounds: Tensor, importance: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return magnitudes, their highest level in any range, and what ``_smallest_scale`` does."""
    magnitude = values.abs()
    if importance is not None:
        magnitude = torch.where(importance > 0, magnitude, 0.0)
    known = torch.zeros(len(values), dtype=torch.float64, device=values.device)
    for low, high in bounds:
        own = torch.where(values >= 0, high[:, None], -low[:, None])
        reach = torch.where(own > 0, magnitude / own.clamp(min=1.0), 0.0).amax(dim=1)
        known = torch.maximum(known, grid_error(values, reach, low, high, importance))
    caps = torch.where(values >= 0, bounds[:, 1].amax(0)[:, None], -bounds[:, 0].amin(0)[:, None])
    caps = caps.clamp(min=1.0)
    return magnitude, caps, *_smallest_scale(magnitude, caps, known, importance)


def _exact_scales(values: Tensor, bounds: Tensor, importance: Tensor | None) -> Tensor:
    """Return f64[ranges, g]."""
    if values.device.type != "cpu":
        return _sorted_scales(values, bounds, importance)
    best = torch.zeros(len(bounds), len(values), dtype=torch.float64)
    weight = values[:0] if importance is None else importance
    best_scales(*as_arrays(values, weight, bounds, best))
    return best


def _sorted_scales(values: Tensor, bounds: Tensor, importance: Tensor | None) -> Tensor:
    """Return f64[ranges, g], the breakpoints of all lines sorted together, as GPUs like it."""
    lines, n = values.shape
    magnitude, caps, least, _ = _start(values, bounds, importance)
    safe = torch.where(least > 0, least, 1.0)[:, None]
    counts = torch.minimum(torch.floor(magnitude / safe + 0.5), caps).long()
    flat, per_line = counts.reshape(-1), counts.sum(dim=1)
    total, width = int(per_line.sum()), int(per_line.max())
    found = torch.zeros(len(bounds), lines, dtype=torch.float64, device=values.device)
    if total == 0:
        return found

    # One entry for each breakpoint, in rows as long as the longest line's.
    owner = torch.repeat_interleave(torch.arange(lines * n, device=flat.device), flat)
    count = torch.arange(total, device=flat.device)
    level = (count - (flat.cumsum(0) - flat)[owner] + 1).double()  # 1..count of each value
    line = torch.div(owner, n, rounding_mode="floor")
    slot = line * width + count - (per_line.cumsum(0) - per_line)[line]
    size, gain = magnitude.reshape(-1)[owner], 2.0 * level - 1.0
    key = values.new_full((lines * width,), torch.inf).index_put_((slot,), (level - 0.5) / size)
    order = key.reshape(lines, width).argsort(dim=1)
    if importance is not None:
        weight = importance.reshape(-1)[owner]
        size, gain = size * weight, gain * weight
    signed = torch.where(values.reshape(-1)[owner] >= 0, level, -level)
    size, gain, signed = (
        values.new_zeros(lines * width)
        .index_put_((slot,), part)
        .reshape(lines, width)
        .gather(1, order)
        for part in (size, gain, signed)
    )

    # The best segment of each line in each range.
    for k, (low, high) in enumerate(bounds):
        inside = (signed >= low[:, None]) & (signed <= high[:, None])
        a, b = (size * inside).cumsum(dim=1), (gain * inside).cumsum(dim=1)
        safe = b.clamp(min=1e-300)
        explained = a * a / safe
        best = explained.amax(dim=1, keepdim=True)
        found[k] = torch.where((explained >= best) & (b > 0), a / safe, 0.0).amax(dim=1)
    return found


def _scanned_scales(values: Tensor, bounds: Tensor, importance: Tensor | None) -> Tensor:
    """Return f64[ranges, g]: the best of some segments for each line."""
    magnitude, _, least, reach = _start(values, bounds, importance)
    # In float32, which is exact enough to compare segments; the scale itself is float64.
    small = values.float()
    weight = None if importance is None else importance.float()
    weighted = small if weight is None else small * weight
    some = torch.where(magnitude > 0, magnitude, torch.inf).amin(dim=1)
    shares = torch.linspace(0, 1, SCAN_POINTS, dtype=torch.float64, device=values.device)
    most = 1.02 * torch.where(reach > 0, reach, 1.0)
    ratio = torch.where(reach > 0, least, 1.0) / most
    tried = [most * ratio ** float(share) for share in shares]
    tried += [torch.where(some < torch.inf, some / k, 1.0) for k in range(1, LATTICE_POINTS + 1)]
    found = []
    for low, high in bounds.float():
        best = torch.full((len(values),), -1.0, device=values.device)
        scale = reach.clone()
        for point in tried:
            q = (small * (1 / point).float()[:, None]).round_()
            q = torch.maximum(torch.minimum(q, high[:, None], out=q), low[:, None], out=q)
            a = (q * weighted).sum(dim=1)
            b = (q.square_() if weight is None else q.square_().mul_(weight)).sum(dim=1)
            explained = torch.where(b > 0, a * a / b.clamp(min=1e-30), -1.0)
            better = explained > best
            best = torch.where(better, explained, best)
            scale = torch.where(better, point, scale)
        # The best scale for the codes of the best point.
        step = torch.where(scale > 0, scale, 1.0)[:, None]
        levels = torch.round(values / step).clamp(low[:, None].double(), high[:, None].double())
        heavy = levels if importance is None else importance * levels
        power = (heavy * levels).sum(dim=1)
        dot = (heavy * values).sum(dim=1)
        found.append(torch.where(power > 0, dot / power.clamp(min=1e-300), scale))
    return torch.stack(found)


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

"""Least-squares fit of ``x ~ scale q + offset`` with codes ``q`` from 0 to ``2^bits - 1``.

Design: docs/design/grids-and-scales.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
"""Shares of the full range that least squares starts from: outliers may be clipped."""
_MOST_COUNTS = 8
"""Most numbers of steps that are tried for weights that lie on a grid already."""


def fit_affine(
    lines: Tensor, bits: int, weight: Tensor | None = None, *, through_zero: bool = False
) -> tuple[Tensor, Tensor]:
    """Return scale and offset of each line, f64[n].

    Args:
        lines: f64[n, columns].
        bits: Bit-width of the codes.
        weight: f64[n, columns], not negative: weighs the squared errors.
        through_zero: Whether the offset must be 0 or below, so that the range reaches zero.

    Heuristic: a few starts, two rounds of least squares from each; never worse than the full
    range. A scale is 0 where all values of a line are equal (or, through zero, all are 0).

    The last start is for weights that were rounded before: a line of a 4-bit model spans fewer
    steps of its old grid than there are codes (at 5 bits 30 half steps, of 31), and from the full
    range least squares does not get there.
    """
    weight = torch.ones_like(lines) if weight is None else weight
    most = 2**bits - 1
    lowest, highest = lines.amin(1), lines.amax(1)
    if through_zero:
        lowest, highest = lowest.clamp(max=0), highest.clamp(min=0)
    spread = highest - lowest
    best_scale, best_low = spread / most, lowest.clone()
    best_error = _error(lines, weight, best_scale, best_low, most)
    middle = torch.zeros_like(lowest) if through_zero else (lowest + highest) / 2
    starts = [(spread * (s / most), middle + (lowest - middle) * s) for s in _SHRINK]
    if most >= 3:  # one bit has no steps to leave out
        starts.append((_whole_steps(lines, weight, lowest, spread, most), lowest))
    for start in starts:
        scale, low = start
        for _ in range(2):
            codes = _codes(lines, scale, low, most)
            scale, low = _least_squares(lines, weight, codes, through_zero=through_zero)
            error = _error(lines, weight, scale, low, most)
            better = (error < best_error) & (scale > 0)
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_low = torch.where(better, low, best_low)
    return best_scale, best_low


def _whole_steps(
    lines: Tensor, weight: Tensor, lowest: Tensor, spread: Tensor, most: int
) -> Tensor:
    """Return the best scale, f64[n], of which fewer than ``most`` steps span the range."""
    counts = range(most - 1, most - 1 - min(_MOST_COUNTS, most // 3), -1)
    errors = [_error(lines, weight, spread / count, lowest, most) for count in counts]
    chosen = torch.stack(errors).argmin(0)
    return spread / (most - 1 - chosen)


def _codes(lines: Tensor, scale: Tensor, low: Tensor, most: int) -> Tensor:
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = ((lines - low[:, None]) / safe[:, None]).round().clamp(0, most)
    return torch.where(scale[:, None] > 0, codes, torch.zeros_like(codes))


def _error(lines: Tensor, weight: Tensor, scale: Tensor, low: Tensor, most: int) -> Tensor:
    codes = _codes(lines, scale, low, most)
    gap = scale[:, None] * codes + low[:, None] - lines
    return (weight * gap.square()).sum(1)


def _least_squares(
    lines: Tensor, weight: Tensor, codes: Tensor, *, through_zero: bool
) -> tuple[Tensor, Tensor]:
    """Return the best scale and offset for given codes."""
    total = weight.sum(1)
    q, x = (weight * codes).sum(1), (weight * lines).sum(1)
    qq, qx = (weight * codes.square()).sum(1), (weight * codes * lines).sum(1)
    spread = total * qq - q.square()
    safe = torch.where(spread > 0, spread, torch.ones_like(spread))
    scale = torch.where(spread > 0, (total * qx - q * x) / safe, torch.zeros_like(spread))
    heavy = torch.where(total > 0, total, torch.ones_like(total))
    low = (x - scale * q) / heavy
    if not through_zero:
        return scale, low
    # An offset above 0 becomes 0; the scale is the best without one.
    through = torch.where(qq > 0, qx / torch.where(qq > 0, qq, torch.ones_like(qq)), scale)
    return torch.where(low > 0, through, scale), low.clamp(max=0)

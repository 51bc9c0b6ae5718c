"""The exact search for the scales of lines in machine code: a sort, and sums that run along.

Torch makes a dozen tensors as large as all breakpoints of all lines; here those of one line stay
in the processor's cache.

Design: docs/design/grids-and-scales.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bitquota.compiled import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

BISECTIONS = 8
"""Halvings of the range in which the smallest scale that could be the best is looked for."""


@compiled
def best_scales(values: Floats, weight: Floats, bounds: Floats, found: Floats) -> None:
    """Write the scale of each line in each range into ``found``.

    What ``scales.least_squares_scales`` describes; sums run in the order of values and breakpoints.
    All arrays are contiguous.

    Args:
        values: f64[lines, n].
        weight: f64[lines, n], or without lines for ones.
        bounds: f64[ranges, 2, lines]: lowest and highest levels.
        found: f64[ranges, lines], zeros.
    """
    lines, n = values.shape
    n_ranges = len(bounds)
    for line in range(lines):
        value = values[line]
        weights = weight[line] if len(weight) else np.ones(n)
        size, cap = np.empty(n), np.empty(n)
        least = _least_scale(value, weights, bounds[:, :, line], size, cap)

        # One entry for each breakpoint, in the order of the values.
        safe = least if least > 0 else 1.0
        counts = np.minimum(np.floor(size / safe + 0.5), cap)
        total = int(counts.sum())
        key, signed = np.empty(total), np.empty(total)
        part, gain = np.empty(total), np.empty(total)
        at = 0
        for j in range(n):
            for level in range(1, int(counts[j]) + 1):
                key[at] = (level - 0.5) / size[j]
                signed[at] = level if value[j] >= 0 else -level
                part[at] = size[j] * weights[j]
                gain[at] = (2.0 * level - 1.0) * weights[j]
                at += 1
        order = np.argsort(key, kind="mergesort")

        # The best segment in each range; of equal ones the largest scale.
        for k in range(n_ranges):
            low, high = bounds[k, 0, line], bounds[k, 1, line]
            a = b = best = scale = 0.0
            for s in order:
                if low <= signed[s] <= high:
                    a += part[s]
                    b += gain[s]
                    explained = a * a / max(b, 1e-300)
                    if explained > best:
                        best = explained
                        scale = a / b
                    elif explained == best and b > 0:
                        scale = max(scale, a / b)
            found[k, line] = scale


@compiled
def _least_scale(value: Floats, weight: Floats, bounds: Floats, size: Floats, cap: Floats) -> float:
    """Return a scale below which none can be the best (``scales._smallest_scale``).

    Writes the magnitudes of values that count into ``size``, their highest levels into ``cap``.
    """
    n = len(value)
    for j in range(n):
        size[j] = abs(value[j]) if weight[j] > 0 else 0.0
        cap[j] = 1.0

    # The largest error of absmax scales: each range has one of its own.
    known = reach = 0.0
    for k in range(len(bounds)):
        low, high = bounds[k, 0], bounds[k, 1]
        widest = 0.0
        for j in range(n):
            own = high if value[j] >= 0 else -low
            cap[j] = max(cap[j], own)
            if own > 0:
                widest = max(widest, size[j] / own)
        step = widest if widest != 0 else 1.0
        error = 0.0
        for j in range(n):
            level = min(max(np.rint(value[j] / step), low), high)
            error += weight[j] * (value[j] - widest * level) ** 2
        known = max(known, error)

    # Clipping only grows as the scale falls: bisect for where it alone exceeds that error.
    for j in range(n):
        reach = max(reach, size[j] / cap[j])
    lower, upper = 0.0, reach
    for _ in range(BISECTIONS):
        middle = (lower + upper) / 2
        clipped = 0.0
        for j in range(n):
            clipped += weight[j] * max(size[j] - cap[j] * middle, 0.0) ** 2
        if clipped > known:
            lower = middle
        else:
            upper = middle
    # Slightly beyond the bound, for rounding.
    return (lower if lower > 0 else reach / 2**BISECTIONS) * (1 - 1e-9)


def load_kernels() -> None:
    """Load the kernel, or compile it."""
    one = np.ones((1, 1))
    best_scales(one, one, np.ones((1, 2, 1)), np.zeros((1, 1)))


def as_arrays(*tensors: Any) -> tuple[NDArray[Any], ...]:  # noqa: ANN401  # of torch
    """Return contiguous arrays over the memory of tensors on the CPU."""
    return tuple(tensor.detach().contiguous().numpy() for tensor in tensors)

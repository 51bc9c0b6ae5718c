"""Columns of whole numbers of steps, rounded one after the other in machine code.

A column has as few rows as the layer has outputs. Of 16 to 64 rows torch spends all but a
twentieth of its time on getting from one operator to the next.

Design: docs/design/rounding.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bitquota.compiled import compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Numbers = NDArray[np.floating[Any]]

ROWS = 256
"""Rows whose errors of a block of columns are kept at hand: 128 KiB of them in float32."""

ROUNDING: dict[np.dtype[Any], float] = {
    np.dtype(np.float32): 1.5 * 2**23,
    np.dtype(np.float64): 1.5 * 2**52,
}
"""What rounds a number half to even when it is added and taken away, if the number is small."""


@compiled
def block_path(
    work: Numbers,
    original: Numbers,
    feedback: Numbers,
    divisor: Numbers,
    step: Numbers,
    offset: Numbers,
    least: Numbers,
    most: Numbers,
    errors: Numbers,
    chosen: Numbers,
    rounding: Numbers,
    has_offset: bool,  # noqa: FBT001
    signs: bool,  # noqa: FBT001
) -> None:
    """Round a block of columns; all arrays are ``[columns, rows]`` of one type, and contiguous.

    Consecutive rows form groups of one size; each group has its own ``F`` and ``d``.

    ``x_j = work_j - sum_{s before j} e_s F_sj`` takes the nearest value of the grid, and

        e_j = (x_j - q_j) / d_j    or, where ``d_j`` is 0,    e_j = original_j - q_j.

    Args:
        work: What the columns are when nothing within the block is fed back.
        original: What they are in the weight.
        feedback: ``F^T``, [groups, columns, columns]: what column ``j`` gets of column ``s``.
        divisor: ``d``, [groups, columns].
        step: [columns or 1, rows]; 0 where the only value is the offset.
        offset: Likewise; looked at only with ``has_offset``.
        least: The least whole number of steps; likewise.
        most: The greatest; likewise.
        errors: ``e``, written.
        chosen: ``q``, written.
        rounding: [1], of ``ROUNDING``.
        has_offset: Whether there are offsets.
        signs: Whether the grid is ``-step`` and ``step``.
    """
    columns, rows = work.shape
    magic = rounding[0]
    per_group = rows // len(feedback)
    values = np.empty(min(per_group, ROWS), work.dtype)
    for g in range(len(feedback)):
        end = (g + 1) * per_group
        for low in range(g * per_group, end, ROWS):
            high = min(low + ROWS, end)
            n = high - low
            x = values[:n]
            e = np.empty((columns, n), work.dtype)
            for j in range(columns):
                x[:] = work[j, low:high]
                f = feedback[g, j]
                # Four columns at a time: x is loaded and stored once for them.
                s = 0
                while s + 4 <= j:
                    f0, f1, f2, f3 = f[s], f[s + 1], f[s + 2], f[s + 3]
                    e0, e1, e2, e3 = e[s], e[s + 1], e[s + 2], e[s + 3]
                    for r in range(n):
                        x[r] = (((x[r] - f0 * e0[r]) - f1 * e1[r]) - f2 * e2[r]) - f3 * e3[r]
                    s += 4
                while s < j:
                    f0 = f[s]
                    e0 = e[s]
                    for r in range(n):
                        x[r] -= f0 * e0[r]
                    s += 1
                steps = step[min(j, len(step) - 1), low:high]
                offsets = offset[min(j, len(offset) - 1), low:high]
                lows = least[min(j, len(least) - 1), low:high]
                highs = most[min(j, len(most) - 1), low:high]
                q = chosen[j, low:high]
                for r in range(n):
                    moved = x[r] - offsets[r] if has_offset else x[r]
                    whole = moved / steps[r] if steps[r] != 0 else moved - moved
                    if signs:
                        whole = most[0, 0] if moved >= 0 else least[0, 0]
                    else:
                        whole = lows[r] if whole < lows[r] else whole  # noqa: FURB136  # as types stay
                        whole = highs[r] if whole > highs[r] else whole  # noqa: FURB136
                        whole = (whole + magic) - magic
                    value = whole * steps[r]
                    q[r] = value + offsets[r] if has_offset else value
                own = e[j]
                if divisor[g, j] != 0:
                    for r in range(n):
                        own[r] = (x[r] - q[r]) / divisor[g, j]
                else:
                    w = original[j, low:high]
                    for r in range(n):
                        own[r] = w[r] - q[r]
            errors[:, low:high] = e


def load_kernels() -> None:
    """Load the kernel, or compile it, for both types that it is called with."""
    for kind in ROUNDING:
        line: Numbers = np.ones(1, kind)
        block = line[:, None].copy()
        grams = block[None]
        arrays = (block, block, grams, block, block, block, block, block, block, block, line)
        block_path(*arrays, has_offset=False, signs=False)

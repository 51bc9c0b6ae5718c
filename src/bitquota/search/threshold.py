"""The threshold rule: every group takes its smallest width whose error stays below a bar.

References:
    [MixQuant] E. Kloberdanz, W. Le. MixQuant: mixed precision quantization with a bit-width
    optimization search. 2023. arXiv 2309.17341.

The paper gives the rule and no budget: a width is good enough if its error is at most a multiple
(the *quantization error multiplier*) of the error at the reference width. For a budget we take the
smallest multiplier whose choice fits, found exactly among the finitely many that matter.

Pitfall. A bar is no optimum: groups are never traded against each other, and the largest error
decides for all. It is here as a baseline.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from bitquota.candidates.storage import FULL_PRECISION_BITS
from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bitquota.candidates.table import CandidateTable
    from bitquota.matrix import SensitivityMatrix
    from bitquota.search.neighborhood import Limits

REFERENCE_BITS = 8
"""Width whose error is the yardstick, where a group offers it."""


def threshold_choice(
    matrix: SensitivityMatrix, multiplier: float, *, reference_bits: int = REFERENCE_BITS
) -> tuple[int, ...]:
    """Return, for each group, the smallest row with ``s <= multiplier · s_reference``.

    Args:
        matrix: Any measure; only its diagonal is looked at. Weight errors in the paper.
        multiplier: At least 1, so that the reference row itself always passes.
        reference_bits: Width of the reference row; a group without it takes its widest row below
            full precision (or its only row).

    Raises:
        InvalidInput: ``multiplier`` is below 1.

    Cost: O(n).
    """
    if not multiplier >= 1:
        msg = f"the error multiplier must be at least 1; got {multiplier}"
        raise InvalidInput(msg, multiplier=multiplier)
    table = matrix.table
    ratios, size = _ratios(matrix, reference_bits), _bits(table)
    offsets = table.offsets
    choice = []
    for a, b in itertools.pairwise(offsets):
        passing = [k for k in range(b - a) if ratios[a + k] <= multiplier]
        choice.append(min(passing, key=lambda k: (size[a + k], k)))
    return tuple(choice)


def threshold_within(
    matrix: SensitivityMatrix, limits: Limits, *, reference_bits: int = REFERENCE_BITS
) -> tuple[tuple[int, ...], float] | None:
    """Return the threshold choice with the smallest multiplier that keeps ``limits``, and it.

    ``None`` if even the smallest rows exceed the limits. Exact: a choice changes only where the
    multiplier passes the ratio of a row. Cost: O(n²).
    """
    ratios = _ratios(matrix, reference_bits)
    for multiplier in np.unique(np.maximum(ratios[np.isfinite(ratios)], 1.0)):
        choice = threshold_choice(matrix, float(multiplier), reference_bits=reference_bits)
        if limits.allow(matrix.table, choice):
            return choice, float(multiplier)
    return None


def _bits(table: CandidateTable) -> list[float]:
    return [max(c.mean_bits for c in row.candidates) for row in table.rows]


def _ratios(matrix: SensitivityMatrix, reference_bits: int) -> NDArray[np.float64]:
    """Return ``f64[n]``: error over the reference error; 1 or less at the reference row."""
    table, bits = matrix.table, _bits(matrix.table)
    offsets = table.offsets
    ratios = np.empty(len(bits))
    for a, b in itertools.pairwise(offsets):
        rows = range(a, b)
        quantized = [r for r in rows if bits[r] < FULL_PRECISION_BITS] or list(rows)
        exact = [r for r in quantized if bits[r] == reference_bits]
        reference = exact[0] if exact else max(quantized, key=lambda r: bits[r])
        yardstick = float(matrix.diagonal[reference])
        for r in rows:
            error = float(matrix.diagonal[r])
            if error <= yardstick:
                ratios[r] = 1.0
            else:
                # No multiple of nothing is something: such a row never passes.
                ratios[r] = error / yardstick if yardstick > 0 else np.inf
    return ratios

"""Verified floating point for the certificate checker: results with proved error bounds.

Sums run in float64 or in numpy's widest float (64 bits of mantissa on x86), rounded to nearest;
every result is widened by ``γ_k = k u / (1 - k u)`` times the sum of the absolute values that
went in.

References:
    [Hig02] N. J. Higham: Accuracy and Stability of Numerical Algorithms, 2nd edition, 2002
        (lemma 3.1: ``γ_k`` bounds k roundings in any order).
    [Rum06] S. M. Rump: Verification of positive definiteness, BIT 46, 2006 (the idea; the test
        here looks at the residual and so trusts no factorisation routine).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Wide = NDArray[np.longdouble]

UNIT = float(np.finfo(np.longdouble).eps) / 2
"""Largest relative error of one rounding."""

TINY = np.longdouble(2.0) ** -1000
"""More than underflow can cost in any sum here, whatever the width of the widest float."""


_INFLATION = 1 + 1e-10
"""Covers the rounding of sums of non-negative terms and of their conversion to float64."""


def gamma(roundings: int, unit: float = UNIT) -> np.longdouble:
    """Return ``γ_k`` for roundings of relative error ``unit``, itself rounded up."""
    return np.longdouble(roundings * unit * 1.0001)


def wide(array: NDArray[Any]) -> Wide:
    """Return ``array`` in the widest float (int64 may be rounded where that is float64)."""
    return np.asarray(array).astype(np.longdouble)


def round_down(values: Wide) -> NDArray[np.float64]:
    """Return the largest float64 not above each of ``values``; ``-inf`` where none is finite."""
    with np.errstate(over="ignore"):
        near = values.astype(np.float64)
    down = np.where(near <= values, near, np.nextafter(near, -np.inf))
    return np.where(np.isfinite(down), down, -np.inf)


def is_positive_definite(matrix: Wide, error: Wide) -> bool:
    """Return ``True`` only if every symmetric matrix within ``error`` of ``matrix`` is PSD.

    With ``L`` from any Cholesky routine applied to ``S A S - δ I`` (``S`` a diagonal of powers of
    two that brings the diagonal near 1), ``S A S - δ I - L Lᵀ`` is computed together with a bound
    on its rounding. If its norm plus that of the scaled ``error`` is at most ``δ``, the claim
    holds. ``False`` says nothing.

    Args:
        matrix: [k, k], symmetric.
        error: [k, k], non-negative.

    Cost: ``O(k³)``.
    """
    k = len(matrix)
    if k == 0:
        return True
    diagonal = np.diag(matrix).astype(np.float64)
    if not (np.isfinite(matrix.astype(np.float64)).all() and (diagonal > 0).all()):
        return False
    scale = np.ldexp(np.longdouble(1), -np.round(np.log2(diagonal) / 2).astype(np.int64))
    scaled = matrix * scale[:, None] * scale[None, :]
    slack = float((error * scale[:, None] * scale[None, :]).sum(axis=1).max())
    # Cholesky in float64 leaves a residual of a few k u64; twice that, and the known error.
    shift = np.longdouble(1.001 * slack + 4 * (k + 8) * 2.0**-53)
    try:
        factor = wide(np.linalg.cholesky((scaled - shift * np.eye(k)).astype(np.float64)))
    except np.linalg.LinAlgError:
        return False
    product = factor @ factor.T
    magnitude = np.abs(factor) @ np.abs(factor).T
    residual = np.abs(scaled - shift * np.eye(k) - product)
    rounding = gamma(k + 8) * (magnitude + np.abs(scaled) + shift * np.eye(k)) + TINY
    norm = float((residual + rounding).sum(axis=1).max())
    return bool((norm + slack) * _INFLATION <= shift)

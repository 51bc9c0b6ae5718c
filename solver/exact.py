"""Exact arithmetic for the certificate checker: floats as integers over a power of two.

Every finite float is an integer times a power of two, so sums and products of floats are too. Only
the points of a certificate, which are quotients, need a further denominator.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Integers = NDArray[np.object_]

_MANTISSA_BITS = 53


def dyadic(*arrays: NDArray[Any]) -> tuple[list[Integers], int]:
    """Return Python integers ``m`` and one exponent ``e`` with ``array = m * 2**e``, exactly.

    Args:
        arrays: Finite floats, or integers, of any shape. Not empty as a whole.

    Returns:
        One object array of integers per array, and the exponent that they share (at most 0).

    Cost: ``O(size)`` big integers, as wide as the exponents are apart.
    """
    parts: list[tuple[Integers, NDArray[np.int64]]] = []
    exponent = 0
    for array in arrays:
        given = np.asarray(array)
        if given.dtype.kind in "iub":
            parts.append((_objects(given), np.zeros(given.shape, dtype=np.int64)))
            continue
        mantissa, power = np.frexp(given.astype(np.float64))
        whole = np.ldexp(mantissa, _MANTISSA_BITS).astype(np.int64)
        shift = np.where(whole == 0, 0, power.astype(np.int64) - _MANTISSA_BITS)
        exponent = min(exponent, int(shift.min(initial=0)))
        parts.append((_objects(whole), shift))
    scaled = []
    for integers, powers in parts:
        factors = np.array([1 << (s - exponent) for s in powers.ravel().tolist()], dtype=object)
        scaled.append(integers * factors.reshape(integers.shape))
    return scaled, exponent


def _objects(array: NDArray[Any]) -> Integers:
    result: Integers = np.empty(array.shape, dtype=object)
    result.ravel()[:] = [int(v) for v in array.ravel().tolist()]
    return result


def is_positive_semidefinite(matrix: Integers) -> bool:
    """Return whether a symmetric matrix of Python integers is positive semidefinite. Exact.

    Fraction-free elimination (Bareiss 1968): every entry that arises is a minor of the matrix, so
    all divisions leave no remainder. A zero pivot is right only in a zero row.

    Cost: ``O(k³)`` products of integers as wide as a minor, ``k`` the order.
    """
    work = matrix.copy()
    previous = 1
    while len(work):
        pivot = work[0, 0]
        if pivot < 0:
            return False
        if pivot == 0:
            if any(work[0]):
                return False
            work = work[1:, 1:]
            continue
        row = work[0, 1:]
        work = (pivot * work[1:, 1:] - row[:, None] * row[None, :]) // previous
        previous = pivot
    return True

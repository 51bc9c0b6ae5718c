"""Dense linear algebra in pieces, so that a limit can strike between them.

LAPACK works on a matrix of 8,000 rows for many seconds and cannot be interrupted. Small matrices
are one piece and go to it as they are.

Design: docs/design/solver.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.linalg as sla

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Bytes = NDArray[np.uint8]

PIECE = 1e9
"""Floating-point operations of one piece: 30 to 50 ms on one core."""
ENTRIES = 1 << 20
"""Entries of a matrix that are copied or summed at a time."""
_PANEL = 128


class Interrupted(Exception):
    """A limit struck; what was being computed is lost."""


def go_on(halt: Bytes) -> None:
    """Raise ``Interrupted`` where ``halt`` u8[1] is not 0."""
    if halt[0]:
        raise Interrupted


def pieces(n: int, halt: Bytes) -> Iterator[slice]:
    """Yield slices of the rows of a matrix with ``n`` columns and as many rows, 8 MiB at a time.

    Raises:
        Interrupted: ``halt`` was set meanwhile, and the matrix is more than one piece.
    """
    step = max(1, ENTRIES // max(n, 1))
    for at in range(0, n, step):
        if n > step:
            go_on(halt)
        yield slice(at, min(n, at + step))


def product(A: NDArray[Any], B: Floats, halt: Bytes) -> Floats:
    """Return ``A B``.

    Raises:
        Interrupted: ``halt`` was set meanwhile.
    """
    work = 2.0 * A.shape[0] * A.shape[1] * B.shape[1]
    if work <= PIECE:
        whole: Floats = A @ B
        return whole
    step = max(1, int(A.shape[0] * PIECE / work))
    out = np.empty((A.shape[0], B.shape[1]))
    for start in range(0, len(out), step):
        go_on(halt)
        np.matmul(A[start : start + step], B, out=out[start : start + step])
    return out


def cholesky(A: Floats, halt: Bytes) -> Floats:
    """Return the lower Cholesky factor of a symmetric matrix.

    Raises:
        Interrupted: ``halt`` was set meanwhile.
        numpy.linalg.LinAlgError: The matrix is not positive definite.
    """
    n = len(A)
    if n**3 / 3 <= PIECE:
        return np.asarray(np.linalg.cholesky(A), dtype=np.float64)
    L = np.zeros_like(A)
    step = max(_PANEL, int(PIECE / (2.0 * _PANEL * n)))
    for start in range(0, n, step):  # strips, so that a copy is in pieces as well
        go_on(halt)
        L[start : start + step, : start + step] = A[start : start + step, : start + step]
    for a in range(0, n, _PANEL):
        b = min(a + _PANEL, n)
        L[a:b, a:b] = np.linalg.cholesky(L[a:b, a:b])
        # The panel below, then what it takes from the rest, strip by strip.
        for i in range(b, n, step):
            go_on(halt)
            j = min(i + step, n)
            L[i:j, a:b] = sla.solve_triangular(
                L[a:b, a:b], L[i:j, a:b].T, lower=True, check_finite=False
            ).T
            L[i:j, b:j] -= L[i:j, a:b] @ L[b:j, a:b].T
    for start in range(0, n, step):  # strips reach above the diagonal
        L[start : start + step, start : start + step] = np.tril(
            L[start : start + step, start : start + step]
        )
    return L


def inverse(L: Floats, halt: Bytes) -> Floats:
    """Return ``(LLᵀ)⁻¹`` from the lower factor.

    Raises:
        Interrupted: ``halt`` was set meanwhile.
    """
    n = len(L)
    if n**3 <= PIECE:
        # The transpose of a C-ordered lower factor is a Fortran-ordered upper one.
        upper, _ = sla.lapack.dpotri(np.array(L.T, order="F"), lower=0, overwrite_c=1)
        upper = np.triu(upper)
        whole: Floats = upper + np.triu(upper, 1).T
        return np.ascontiguousarray(whole)
    out = np.empty_like(L)
    step = max(16, int(PIECE / (2.0 * n * n)))
    for start in range(0, n, step):
        go_on(halt)
        unit = np.zeros((n, min(step, n - start)))
        unit[np.arange(start, start + unit.shape[1]), np.arange(unit.shape[1])] = 1.0
        out[start : start + step] = sla.cho_solve((L.T, False), unit, check_finite=False).T
    return out

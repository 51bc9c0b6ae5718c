"""Turn a measured matrix into the one to solve, so that the solver does not exploit its noise.

An exact optimum of a noisy, indefinite matrix can be far worse in truth than that of a tamer
one: the solver stacks whatever cross terms are negative, by chance or because the loss saturates.
Each function here returns a new ``SensitivityMatrix`` in which fewer of these are left.

References:
    [CLADO] Deng et al. Mixed-precision quantization with cross-layer dependencies. 2023.
    arXiv 2307.05657 (projection to the positive semidefinite cone).
    [Hill26] Hill. Saturation makes quantization error additive. 2026. arXiv 2607.12266 (the link).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from bitquota.matrix import SensitivityMatrix


def shrink(matrix: SensitivityMatrix) -> SensitivityMatrix:
    """Scale every cross term by its reliability ``c² / (c² + se²)``.

    A term far above its standard error stays, one within it is mostly removed. Exact formula of
    a normal prior with the term's own square as variance (empirical Bayes, one term at a time).
    """
    if matrix.cross is None or matrix.cross_error is None:
        return matrix
    square = matrix.cross**2
    total = square + matrix.cross_error**2
    cross = np.where(total > 0, matrix.cross * square / np.where(total > 0, total, 1.0), 0.0)
    return replace(matrix, cross=cross, provenance=_noted(matrix, "shrink"))


def pessimistic(matrix: SensitivityMatrix, kappa: float) -> SensitivityMatrix:
    """Add ``kappa`` standard errors to every entry: ``mean + κ · standard error``.

    The errors of different entries are added as if they all came true together: an upper
    estimate of the loss at every choice, tight when entries err alike (as they do when a few
    hard samples drive all of them).

    Raises:
        InvalidInput: ``kappa`` is negative.
    """
    if kappa < 0:
        msg = f"kappa must not be negative; got {kappa}"
        raise InvalidInput(msg, kappa=kappa)
    diagonal, cross = matrix.diagonal, matrix.cross
    if matrix.diagonal_error is not None:
        diagonal = diagonal + kappa * matrix.diagonal_error
    if cross is not None and matrix.cross_error is not None:
        cross = cross + kappa * matrix.cross_error
    return replace(
        matrix, diagonal=diagonal, cross=cross, provenance=_noted(matrix, f"pessimistic {kappa}")
    )


def project(matrix: SensitivityMatrix) -> SensitivityMatrix:
    """Clip the negative eigenvalues of ``G = 2 diag(diagonal) + cross`` [CLADO].

    This **changes the objective** (that is its point: it regularises); for convexity alone a
    diagonal shift per group does the same without changing anything. Terms that the projection
    puts between rows of one group are dropped: such rows never meet.
    """
    if matrix.cross is None:
        return matrix
    values, vectors = np.linalg.eigh(2 * np.diag(matrix.diagonal) + matrix.cross)
    clipped = (vectors * np.maximum(values, 0.0)) @ vectors.T
    of = matrix.table.group_of_row
    cross = np.where(of[:, None] == of[None, :], 0.0, (clipped + clipped.T) / 2)
    return replace(
        matrix,
        diagonal=np.diag(clipped) / 2,
        cross=cross,
        diagonal_error=None,
        cross_error=None,
        provenance=_noted(matrix, "project"),
    )


def saturate(matrix: SensitivityMatrix, ceiling: float) -> SensitivityMatrix:
    """Return the matrix in the units in which a saturating loss adds up [Hill26].

    If ``loss = c (1 - Π (1 - aᵢ))`` then ``s = -log(1 - loss/c)`` is a sum over groups. Singles
    and pairs are carried over exactly: ``s_i = s(L_i)`` and ``s_ij - s_i - s_j`` for the cross
    terms, which saturation alone would make negative and which vanish here. The order of plans
    by ``Σ s`` is their order by predicted loss; the numbers are not losses.

    Args:
        matrix: Measured around full precision.
        ceiling: ``c``, at least the largest single or pair loss: the loss of a network that is
            thoroughly broken. Losses are cut at 99.9 % of it.

    Raises:
        InvalidInput: The ceiling is not positive.
    """
    if ceiling <= 0:
        msg = f"a ceiling must be positive; got {ceiling}"
        raise InvalidInput(msg, ceiling=ceiling)
    link = _link(ceiling)
    singles = link(matrix.diagonal)
    cross = None
    if matrix.cross is not None:
        pairs = matrix.cross + matrix.diagonal[:, None] + matrix.diagonal[None, :]
        of = matrix.table.group_of_row
        cross = link(pairs) - singles[:, None] - singles[None, :]
        cross = np.where(of[:, None] == of[None, :], 0.0, (cross + cross.T) / 2)
    return replace(
        matrix,
        diagonal=singles,
        cross=cross,
        constant=0.0,
        diagonal_error=None,
        cross_error=None,
        unit="-log(1 - loss/ceiling)",
        provenance=_noted(matrix, f"saturate {ceiling:.6g}"),
    )


def saturated_loss(score: float, ceiling: float) -> float:
    """Return the loss that a sum of ``saturate`` scores stands for."""
    return ceiling * (1.0 - float(np.exp(-score)))


def _link(ceiling: float) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    def link(loss: NDArray[np.float64]) -> NDArray[np.float64]:
        share = np.minimum(loss / ceiling, 0.999)
        transformed: NDArray[np.float64] = -np.log1p(-share)
        return transformed

    return link


def _noted(matrix: SensitivityMatrix, step: str) -> dict[str, object]:
    earlier = matrix.provenance.get("transformed", [])
    return {**matrix.provenance, "transformed": [*earlier, step]}

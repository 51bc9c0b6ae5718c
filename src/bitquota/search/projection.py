"""A measured matrix made tamer, so that the solver does not exploit its noise.

An exact optimum of a noisy, indefinite matrix can be far worse in truth than that of a tamer
one: the solver stacks whatever cross terms are negative, by chance or because the loss saturates.

References:
    [CLADO] Deng et al. Mixed-precision quantization with cross-layer dependencies. 2023.
    arXiv 2307.05657 (projection to the positive semidefinite cone).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from bitquota.matrix import SensitivityMatrix


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
        provenance={
            **matrix.provenance,
            "transformed": [*matrix.provenance.get("transformed", []), "project"],
        },
    )

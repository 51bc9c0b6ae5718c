"""Weights moved so that a layer makes up for what earlier layers' quantization did to its inputs.

References:
    [QEP] Y. Arai, Y. Ichikawa, "Quantization Error Propagation: Revisiting Layer-Wise Post-Training
    Quantization", 2025, arXiv 2504.09629.

Design: docs/design/rounding.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from torch import Tensor

STRENGTH = 0.75
"""Share of the correction that is applied; all of it fits the calibration set better and other
data worse."""

DAMPING = 0.01
"""Added to the diagonal of the Gram, as a share of its mean."""


def propagated(weights: Tensor, gram_hat: Tensor, cross: Tensor) -> Tensor:
    """Return ``V = W + a W (C - G)(G + d mean(diag G) I)^-1``, f64[rows, columns] [QEP].

    With ``X`` the inputs in the full-precision model and ``Y`` those in the model whose earlier
    layers are quantized, ``G = Y^T Y`` and ``C = X^T Y``. At ``a = 1``, ``d = 0`` it minimises
    ``||X W^T - Y V^T||``. We take ``a = STRENGTH`` and ``d = DAMPING``.

    Args:
        weights: ``W``, f64[rows, columns].
        gram_hat: ``G``, f64[columns, columns], or one per group of consecutive rows,
            f64[groups, columns, columns].
        cross: ``C``, shaped likewise and in the same unit.

    Raises:
        InvalidInput: The shapes do not fit.

    Cost: O(groups columns^3 + rows columns^2).
    """
    rows, columns = weights.shape
    gram, both = ((part[None] if part.ndim == 2 else part).double() for part in (gram_hat, cross))
    shape = (len(gram), columns, columns)
    if gram.shape != shape or both.shape != shape or not len(gram) or rows % len(gram):
        msg = (
            f"gram_hat and cross must be [{columns}, {columns}], or [groups, {columns}, "
            f"{columns}] with groups dividing the {rows} rows; got {list(gram_hat.shape)} and "
            f"{list(cross.shape)}"
        )
        raise InvalidInput(msg, gram_hat=list(gram_hat.shape), cross=list(cross.shape))
    grouped = weights.detach().double().reshape(len(gram), -1, columns)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    damping = DAMPING * diagonal.mean(dim=1)
    # Where no input ever differed from zero there is nothing to make up for.
    damping = torch.where(damping > 0, damping, 1.0)
    asked = grouped @ (both - gram)
    damped = gram.clone()
    damped.diagonal(dim1=1, dim2=2).add_(damping[:, None])
    moved = torch.linalg.solve(damped, asked, left=False)
    found: Tensor = grouped + STRENGTH * moved
    return found.reshape(rows, columns)


class Propagation:
    """What ``propagated`` does to any rows of a weight; the moments are factored once for all.

    Args:
        gram_hat: As of ``propagated``, of one group: f64[1, columns, columns].
        cross: Likewise.

    Cost: O(columns^3), then O(rows columns^2).
    """

    def __init__(self, gram_hat: Tensor, cross: Tensor) -> None:
        gram = gram_hat[0].double()
        self._difference = cross[0].double() - gram
        damping = DAMPING * float(gram.diagonal().mean())
        damped = gram.clone()
        damped.diagonal().add_(damping if damping > 0 else 1.0)
        self._factors, self._pivots = torch.linalg.lu_factor(damped)

    def of(self, weights: Tensor) -> Tensor:
        """Return what some rows become, f64[rows, columns]."""
        rows = weights.detach().double()
        asked = rows @ self._difference
        moved = torch.linalg.lu_solve(self._factors, self._pivots, asked, left=False)
        found: Tensor = rows + STRENGTH * moved
        return found

"""Second moments of few positions, drawn towards those of inputs that are not correlated.

References:
    [LW] O. Ledoit, M. Wolf, "A Well-Conditioned Estimator for Large-Dimensional Covariance
    Matrices", Journal of Multivariate Analysis 88, 2004.

Design: docs/design/rounding.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PRIOR = 0.5
"""Positions without correlation that count beside those seen, for each column."""


def shrink(gram: Tensor, positions: int, *others: Tensor) -> None:
    """Draw a Gram, in place, towards a multiple of the unit matrix; the fewer positions, the more.

    With ``c`` columns, ``n`` positions and ``m`` the mean of the diagonal, ``G`` becomes
    ``G + PRIOR (c / n) m I``: what ``PRIOR c`` further positions would add on average whose inputs
    are uncorrelated and as large as those seen. The unit matrix is [LW]'s target. Their share of
    it, estimated for each matrix, is up to a hundred times smaller where one direction has most of
    the energy, as in language models, and rounds worse there (research/log.md).

    Args:
        gram: ``X^T X``, f64[groups, columns, columns].
        positions: How many rows ``X`` has in each group.
        others: Shaped likewise; the same is added to each. For ``propagated``: inputs of the
            further positions are alike in both models.
    """
    diagonal = gram.diagonal(dim1=1, dim2=2)
    share = PRIOR * gram.shape[-1] / max(1, positions)
    added = share * diagonal.mean(dim=1, keepdim=True)
    for matrix in (gram, *others):
        matrix.diagonal(dim1=1, dim2=2).add_(added)

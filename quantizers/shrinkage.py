"""Second moments of few positions, drawn towards those of inputs that are not correlated.

References:
    [OAS] Y. Chen, A. Wiesel, Y. Eldar, A. Hero, "Shrinkage Algorithms for MMSE Covariance
    Estimation", IEEE Transactions on Signal Processing 58, 2010, arXiv 0907.4698.

Design: docs/design/rounding.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

ALIKE = 2.0
"""Positions for each one that counts as independent: tokens of a text and neighbours in an image
are alike. Between 1 and 2 on networks (research/log.md)."""


def shrink(gram: Tensor, positions: int, *others: Tensor) -> None:
    """Draw a Gram, in place, towards a multiple of the unit matrix; the fewer positions, the more.

    ``G`` becomes ``(1 - r) G + r m I``, ``m`` the mean of its diagonal, with the share that is
    best for normal inputs: with ``c`` columns, ``n = positions / ALIKE``, ``t = tr(G)`` and
    ``u = tr(G^2)``, ``r = ((1 - 2/c) u + t^2) / ((n + 1 - 2/c) (u - t^2 / c))``, at most 1
    [OAS, equation 23]. About ``c / n`` where all directions have a like energy, ``1 / n`` where one
    has most of it. With not many more positions than columns, rounding with feedback would
    otherwise push errors into the directions that the samples happen to miss.

    Args:
        gram: ``X^T X``, f64[groups, columns, columns].
        positions: How many rows ``X`` has in each group.
        others: Shaped likewise, and drawn towards the same. For ``propagated``: the expected
            inputs are alike in both models.
    """
    columns = gram.shape[-1]
    diagonal = gram.diagonal(dim1=1, dim2=2)
    trace, square = diagonal.sum(dim=1), gram.square().sum(dim=(1, 2))
    above = (positions / ALIKE + 1 - 2 / columns) * (square - trace.square() / columns)
    share = ((1 - 2 / columns) * square + trace.square()) / above.clamp_min(1e-300)
    # A multiple of the unit matrix, zero too, stays what it is.
    share = torch.where(above > 0, share, 0.0).clamp(0.0, 1.0)
    added = (share * trace / columns)[:, None]
    for matrix in (gram, *others):
        matrix.mul_(1 - share[:, None, None])
        matrix.diagonal(dim1=1, dim2=2).add_(added)

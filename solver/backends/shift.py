"""A diagonal shift that makes an objective convex and changes no choice's value.

For one-hot ``x``, ``½ Σ_p s_p x_p² = ½ Σ_p s_p x_p``: what is added to the quadratic part is taken
from the linear one. Projecting onto the positive semidefinite matrices instead, as published
solvers of this problem do, changes the values themselves (by up to 22 % on measured matrices).

Design: docs/design/external-solvers.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MARGIN = 1e-9


def convex_shift(cross: NDArray[np.float64], diagonal: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return ``s`` with ``cross + diag(s)`` positive semidefinite and ``s`` small.

    Among shifts ``τ w`` for a few weights ``w`` that follow the rows' scales, with the least ``τ``
    each, the one with the least sum. A plain multiple of the identity is one of them; where scales
    span decades the others are far smaller.

    Args:
        cross: f64[n, n], symmetric, or f64[0, 0] for zeros.
        diagonal: f64[n].

    Returns:
        f64[n], not negative.

    Cost: ``O(n³)``.
    """
    n = len(diagonal)
    if not cross.any():
        return np.zeros(n)
    size = np.abs(cross)
    norms = np.sqrt((cross**2).sum(axis=1))
    weights = [
        np.ones(n),
        norms,
        size.sum(axis=1),
        2 * np.abs(diagonal),
        2 * np.abs(diagonal) + 0.1 * norms,
    ]
    best = np.full(n, np.inf)
    for weight in weights:
        floored = np.maximum(weight, 1e-9 * float(weight.max()) + 1e-300)
        root = np.sqrt(floored)
        least = float(np.linalg.eigvalsh(cross / np.outer(root, root)).min())
        shift = (max(0.0, -least) * (1 + _MARGIN) + _MARGIN) * floored
        if float(shift.sum()) < float(best.sum()):
            best = shift
    return best

"""Rounding with error feedback: each column's rounding error is repaid by the later columns.

References:
    [GPTQ] E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ: Accurate Post-Training
    Quantization for Generative Pre-trained Transformers", 2022, arXiv 2210.17323.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch

from bitquota.errors import InvalidInput
from bitquota.quantizers.column_path import (
    descend,
    energy_order,
    gram_in,
    path,
    path_feedback,
)

if TYPE_CHECKING:
    from torch import Tensor

    from bitquota.quantizers.grid import MatrixGrid

DAMPING = 0.01
"""Added to the diagonal of the Gram, as a share of its mean; multiplied by ten until it helps."""


def gptq(values: Tensor, grid: MatrixGrid, gram: Tensor) -> Tensor:
    """Return values of the grid, as ``values``, with a small ``tr(E G E^T)``, ``E = W - W_q``.

    Greedy: columns are rounded one after the other, the one with the largest ``G_jj`` first, and
    after column ``j`` the columns ``k`` still to come move by ``- (w_j - q_j) / U_jj * U_jk`` with
    ``U`` the upper Cholesky factor of ``(G + damping)^-1`` [GPTQ, equation 3 and section 3.3].
    Scales are fixed before (static groups), so the order of columns leaves no trace in the file.

    Args:
        values: f64[rows, columns].
        grid: Of these rows.
        gram: f64[groups, columns, columns], positive semidefinite, one for each group of
            consecutive rows.

    Raises:
        InvalidInput: A Gram is not positive semidefinite.

    Cost: O(groups columns^3 + n columns^2).
    """
    # float32 chooses the same codes but for a few at middles, in two thirds of the time.
    dtype = torch.float32 if grid.bits <= 8 else torch.float64
    order, factor, divisor, _ = _factored(gram, dtype)
    # Column j moves by err_s U_sj for every s before it, with err_s = (w_s - q_s) / U_ss.
    columns = grid.columns(order, dtype)
    low = values.to(dtype)
    return path(low, columns, order, factor, divisor=divisor).to(values.dtype)


def improved(values: Tensor, found: Tensor, grid: MatrixGrid, gram: Tensor) -> Tensor:
    """Return ``found`` after one round of coordinate descent on ``tr(E G E^T)``.

    Each column in turn takes the level that is best given all others, earlier ones too.

    Args:
        values: f64[rows, columns].
        found: Values of the grid, shaped likewise.
        grid: Of these rows.
        gram: As of ``gptq``.
    """
    dtype = torch.float32 if grid.bits <= 8 else torch.float64
    order, _, _, feedback = _factored(gram, dtype)
    columns = grid.columns(order, dtype)
    better = descend(values.to(dtype), found.to(dtype), columns, order, feedback)
    return better.to(values.dtype)


class _Latest(threading.local):
    """The last Gram that was factored: the candidates of a layer are rounded one after the other.

    It is held, so that no other Gram can come to lie at its address.
    """

    gram: Tensor | None = None
    of: tuple[object, ...] = ()
    found: tuple[Tensor, Tensor, Tensor, Tensor] | None = None


_latest = _Latest()


def forget_factors() -> None:
    """Let the last Gram go that was factored, and its factors."""
    _latest.gram, _latest.of, _latest.found = None, (), None


def _factored(gram: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the order of columns, the factor in it with its diagonal in f64, and the feedback.

    The last is what ``path_feedback`` returns. Cost: memory for three further Grams on the way.
    """
    of = (gram.data_ptr(), gram.shape, gram._version, dtype)  # noqa: SLF001  # counts writes
    if _latest.found is None or _latest.of != of:
        forget_factors()
        order = energy_order(gram)
        factor = inverse_factor(gram, order)
        divisor, factor = factor.diagonal(dim1=1, dim2=2).clone(), factor.to(dtype)
        _latest.found = order, factor, divisor, path_feedback(gram, order).to(dtype)
        _latest.gram, _latest.of = gram, of
    return _latest.found


def inverse_factor(gram: Tensor, order: Tensor) -> Tensor:
    """Return the upper Cholesky factors of the inverses of the damped Grams, columns in ``order``.

    f64[groups, columns, columns].
    """
    mean = gram.diagonal(dim1=1, dim2=2).mean(dim=1)
    # With rows and columns turned around G = L L^T, so G^-1 = U^T U for U = L^-1 turned back.
    damped = gram_in(gram, order.flip(1))
    # Where no input ever differs from zero nothing feeds back.
    silent = mean <= 0
    if bool(silent.any()):
        damped[silent], mean[silent] = torch.eye(gram.shape[1]).to(gram), 0.0
    diagonal, energy = damped.diagonal(dim1=1, dim2=2), damped.diagonal(dim1=1, dim2=2).clone()
    damping = torch.full_like(mean, DAMPING)
    for _ in range(3):
        diagonal.copy_(energy + (damping * mean)[:, None])
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed.any()):
            del damped, diagonal
            inverse = torch.eye(gram.shape[1]).to(gram).repeat(len(gram), 1, 1)
            torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
            del lower
            return inverse.flip(1, 2)
        damping[failed > 0] *= 10
    msg = "inputs_gram must be positive semidefinite, as X^T X is; it is not"
    raise InvalidInput(msg)

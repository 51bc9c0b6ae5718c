"""Rounding with error feedback: each column's rounding error is repaid by the later columns.

References:
    [GPTQ] E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ: Accurate Post-Training
    Quantization for Generative Pre-trained Transformers", 2022, arXiv 2210.17323.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from torch import Tensor

    from bitquota.quantizers.grid import MatrixGrid

DAMPING = 0.01
"""Added to the diagonal of the Gram, as a share of its mean; multiplied by ten until it helps."""

BLOCK = 128
"""Columns whose updates are applied to the rest of the matrix at once."""


def gptq(values: Tensor, grid: MatrixGrid, rows: slice, gram: Tensor) -> Tensor:
    """Return values of the grid, as ``values``, with a small ``tr(E G E^T)``, ``E = W - W_q``.

    Greedy: columns are rounded one after the other, the one with the largest ``G_jj`` first, and
    after column ``j`` the columns ``k`` still to come move by ``- (w_j - q_j) / U_jj * U_jk`` with
    ``U`` the upper Cholesky factor of ``(G + damping)^-1`` [GPTQ, equation 3 and section 3.3].
    Scales are fixed before (static groups), so the order of columns leaves no trace in the file.

    Args:
        values: f64[n, columns], the rows ``rows`` of a matrix.
        grid: Of the whole matrix.
        rows: Which rows of it.
        gram: f64[columns, columns], positive semidefinite.

    Raises:
        InvalidInput: The Gram is not positive semidefinite.

    Cost: O(columns^3 + n columns^2).
    """
    order = gram.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(gram[order][:, order])
    # float32 chooses the same codes but for a few at middles, in two thirds of the time.
    dtype = torch.float32 if grid.bits <= 8 else torch.float64
    # Column j moves by err_s U_sj for every s before it, with err_s = (w_s - q_s) / U_ss.
    turned = grid.turned(rows, order, dtype)
    found = path(values.to(dtype), turned, order, factor.to(dtype), factor.diagonal())
    return found.to(values.dtype)


def path(
    values: Tensor, grid: MatrixGrid, order: Tensor, feedback: Tensor, divisor: Tensor | None
) -> Tensor:
    """Round column by column to the value nearest to ``x_j = w_j - sum_{s before j} e_s F_sj``.

    Args:
        values: ``W``, [n, columns].
        grid: Turned and in ``order``.
        order: i64[columns], the order of rounding.
        feedback: ``F``, [columns, columns] in ``order``; only what is right of the diagonal counts.
        divisor: ``d``, [columns] in ``order``: ``e_s = (x_s - q_s) / d_s``. Without it
            ``e_s = w_s - q_s``.

    Returns:
        The chosen values of the grid, [n, columns], columns as in ``values``.

    Updates within a block of columns are computed when a column is reached, those beyond it once
    for the whole block [GPTQ, section 3.3, "lazy batch-updates"]. Everything lies columns first,
    so that a column is contiguous.
    """
    columns = len(order)
    original = values[:, order].t().contiguous()
    work = original.clone()
    chosen = torch.empty_like(work)
    per_column = None if divisor is None else divisor.tolist()
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.empty_like(work[start:stop])
        inside = feedback[start:stop, start:stop].t().contiguous()
        for j in range(start, stop):
            k = j - start
            x = work[j]
            if k:
                x = torch.addmv(x, errors[:k].t(), inside[k, :k], alpha=-1)
            chosen[j] = grid.line(j).snap(x)
            if per_column is None:
                torch.sub(original[j], chosen[j], out=errors[k])
            else:
                torch.sub(x, chosen[j], out=errors[k]).div_(per_column[j])
        if stop < columns:
            work[stop:].addmm_(feedback[start:stop, stop:].t(), errors, alpha=-1)
    result = torch.empty_like(chosen)
    result[order] = chosen
    return result.t()


def inverse_factor(gram: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped Gram."""
    diagonal = gram.diagonal()
    mean = float(diagonal.mean())
    if mean <= 0:
        # No input ever differs from zero: nothing feeds back.
        return torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    damping = DAMPING
    for _ in range(3):
        damped = gram + torch.diag_embed(torch.full_like(diagonal, damping * mean))
        # With rows and columns turned around G = L L^T, so G^-1 = U^T U for U = L^-1 turned back.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not int(failed):
            unit = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
            upper: Tensor = torch.linalg.solve_triangular(lower, unit, upper=False).flip(0, 1)
            return upper
        damping *= 10
    msg = "inputs_gram must be positive semidefinite, as X^T X is; it is not"
    raise InvalidInput(msg)

"""Round a matrix column by column: what the rounders with feedback share.

References:
    [GPTQ] E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ: Accurate Post-Training
    Quantization for Generative Pre-trained Transformers", 2022, arXiv 2210.17323.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from bitquota.quantizers.grid import GridColumns

BLOCK = 128
"""Columns whose updates are applied to the rest of the matrix at once."""


def path(
    values: Tensor,
    grid: GridColumns,
    order: Tensor,
    feedback: Tensor,
    *,
    divisor: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Round column by column to the value nearest to ``x_j = b_j - sum_{s before j} e_s F_sj``.

    Args:
        values: ``W``, [n, columns].
        grid: In ``order``.
        order: i64[columns], the order of rounding.
        feedback: ``F``, [columns, columns] in ``order``; only what is right of the diagonal counts.
        divisor: ``d``, [columns] in ``order``: ``e_s = (x_s - q_s) / d_s``. Without it
            ``e_s = w_s - q_s``.
        start: ``b``, [n, columns] in ``order``; by default ``W``.

    Returns:
        The chosen values of the grid, [n, columns], columns as in ``values``.

    Updates within a block of columns are computed when a column is reached, those beyond it once
    for the whole block [GPTQ, section 3.3, "lazy batch-updates"]. Everything lies columns first,
    so that a column is contiguous.
    """
    columns = len(order)
    original = values[:, order].t().contiguous()
    work = original.clone() if start is None else start.t().contiguous()
    chosen = torch.empty_like(work)
    per_column = None if divisor is None else divisor.tolist()
    for first in range(0, columns, BLOCK):
        end = min(first + BLOCK, columns)
        errors = torch.empty_like(work[first:end])
        inside = feedback[first:end, first:end].t().contiguous()
        for j in range(first, end):
            k = j - first
            x = work[j]
            if k:
                x = torch.addmv(x, errors[:k].t(), inside[k, :k], alpha=-1)
            chosen[j] = grid.snap(j, x)
            if per_column is None:
                torch.sub(original[j], chosen[j], out=errors[k])
            else:
                torch.sub(x, chosen[j], out=errors[k]).div_(per_column[j])
        if end < columns:
            work[end:].addmm_(feedback[first:end, end:].t(), errors, alpha=-1)
    result = torch.empty_like(chosen)
    result[order] = chosen
    return result.t()


def path_feedback(gram: Tensor, order: Tensor) -> Tensor:
    """Return ``F = -G_sj / G_jj`` in ``order``: what an error of column s asks of column j.

    With the errors ``e_s`` of all other columns given, ``w_j - sum_s e_s F_sj`` is the value of
    column j for which ``e G e^T`` is smallest. A column without energy asks and gets nothing.
    """
    feedback = gram[order[:, None], order]
    energy = feedback.diagonal().clone()
    feedback.neg_().div_(energy.clamp_min(1e-300))
    return feedback.masked_fill_(energy <= 0, 0.0)


def descend(
    values: Tensor, found: Tensor, grid: GridColumns, order: Tensor, feedback: Tensor
) -> Tensor:
    """Return ``found`` after each column, in turn, took its best level given all the others.

    ``tr(E G E^T)`` never grows. Arguments as of ``path``; ``feedback`` from ``path_feedback``.

    Cost: as of a ``path``, and a product of [n, columns] by [columns, columns].
    """
    ordered = values[:, order]
    errors = ordered - found[:, order]  # of the columns after each, which are still to change
    start = ordered - errors @ feedback.tril(-1)
    return path(values, grid, order, feedback, start=start)

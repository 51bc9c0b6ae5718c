"""Round a matrix column by column: what the rounders with feedback share.

References:
    [GPTQ] E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ: Accurate Post-Training
    Quantization for Generative Pre-trained Transformers", 2022, arXiv 2210.17323.

Design: docs/design/rounding.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from bitquota.quantizers.column_kernels import ROUNDING, block_path

if TYPE_CHECKING:
    from numpy.typing import NDArray
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
    compiled = grid.whole is not None and work.device.type == "cpu"
    for first in range(0, columns, BLOCK):
        end = min(first + BLOCK, columns)
        part = slice(first, end)
        given = _Block(
            work[part],
            original[part],
            feedback[part, part].t().contiguous(),
            None if divisor is None else divisor[part],
        )
        round_block = _compiled_block if compiled else _block
        errors = round_block(given, grid, part, chosen[part])
        if end < columns:
            work[end:].addmm_(feedback[part, end:].t(), errors, alpha=-1)
    result = torch.empty_like(chosen)
    result[order] = chosen
    return result.t()


class _Block(NamedTuple):
    """Columns that are rounded before others see their errors; arguments of ``block_path``."""

    work: Tensor
    original: Tensor
    feedback: Tensor
    divisor: Tensor | None


def _compiled_block(block: _Block, grid: GridColumns, part: slice, chosen: Tensor) -> Tensor:
    """Write the chosen values of a block, [columns, rows], and return their errors."""
    whole = grid.whole
    assert whole is not None  # noqa: S101  # the caller looked
    columns, rows = block.work.shape

    def own(of: Tensor) -> NDArray[Any]:
        of = of[part] if len(of) > 1 else of
        return of.expand(-1, rows).contiguous().numpy()

    errors = torch.empty_like(block.work)
    step = own(whole.step)
    divisor = torch.zeros(columns) if block.divisor is None else block.divisor
    block_path(
        block.work.numpy(),
        block.original.numpy(),
        block.feedback.numpy(),
        divisor.to(block.work.dtype).numpy(),
        step,
        step if whole.offset is None else own(whole.offset),
        own(whole.least),
        own(whole.most),
        errors.numpy(),
        chosen.numpy(),
        np.full(1, ROUNDING[step.dtype], step.dtype),
        has_offset=whole.offset is not None,
        signs=whole.signs,
    )
    return errors


def _block(block: _Block, grid: GridColumns, part: slice, chosen: Tensor) -> Tensor:
    """Do so on any device, for any grid."""
    errors = torch.empty_like(block.work)
    per_column = None if block.divisor is None else block.divisor.tolist()
    for k, j in enumerate(range(part.start, part.stop)):
        x = block.work[k]
        if k:
            x = torch.addmv(x, errors[:k].t(), block.feedback[k, :k], alpha=-1)
        chosen[k] = grid.snap(j, x)
        if per_column is None:
            torch.sub(block.original[k], chosen[k], out=errors[k])
        else:
            torch.sub(x, chosen[k], out=errors[k]).div_(per_column[k])
    return errors


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

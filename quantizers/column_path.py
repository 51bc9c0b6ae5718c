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
from bitquota.quantizers.grid import in_order

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

    Consecutive rows form groups of one size, each with its own order, ``F`` and ``d``: the groups
    of a convolution. They are rounded together, because a depthwise one has a row in each.

    Args:
        values: ``W``, [n, columns].
        grid: In ``order``.
        order: i64[groups, columns], the order of rounding.
        feedback: ``F``, [groups, columns, columns] in ``order``; only what is right of the diagonal
            counts.
        divisor: ``d``, [groups, columns] in ``order``: ``e_s = (x_s - q_s) / d_s``. Without it
            ``e_s = w_s - q_s``.
        start: ``b``, [n, columns] in ``order``; by default ``W``.

    Returns:
        The chosen values of the grid, [n, columns], columns as in ``values``.

    Updates within a block of columns are computed when a column is reached, those beyond it once
    for the whole block [GPTQ, section 3.3, "lazy batch-updates"]. Everything lies columns first,
    so that a column is contiguous.
    """
    columns = order.shape[1]
    original = in_order(values, order).t().contiguous()
    work = original.clone() if start is None else start.t().contiguous()
    chosen = torch.empty_like(work)
    compiled = grid.whole is not None and work.device.type == "cpu"
    per_group = len(values) // len(order)
    for first in range(0, columns, BLOCK):
        end = min(first + BLOCK, columns)
        part = slice(first, end)
        given = _Block(
            work[part],
            original[part],
            feedback[:, part, part].transpose(1, 2).contiguous(),
            None if divisor is None else divisor[:, part].contiguous(),
        )
        round_block = _compiled_block if compiled else _block
        errors = round_block(given, grid, part, chosen[part])
        if end < columns:
            for g, own in enumerate(feedback):
                rows = slice(g * per_group, (g + 1) * per_group)
                work[end:, rows].addmm_(own[part, end:].t(), errors[:, rows], alpha=-1)
    result = torch.empty_like(chosen)
    if len(order) == 1:
        result[order[0]] = chosen
    else:
        result.scatter_(0, order.repeat_interleave(per_group, dim=0).t(), chosen)
    return result.t()


def times_gram(rows: Tensor, gram: Tensor) -> Tensor:
    """Return [n, k]: rows [n, columns] times [groups, columns, k], each by that of its group."""
    if len(gram) == 1:
        return rows @ gram[0]
    grouped = rows.reshape(len(gram), -1, rows.shape[1])
    return torch.bmm(grouped, gram).reshape(len(rows), -1)


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
    rows = block.work.shape[1]

    def own(of: Tensor) -> NDArray[Any]:
        of = of[part] if len(of) > 1 else of
        return of.expand(-1, rows).contiguous().numpy()

    errors = torch.empty_like(block.work)
    step = own(whole.step)
    divisor = block.divisor
    if divisor is None:
        divisor = torch.zeros(block.feedback.shape[:2])
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
    columns, rows = block.work.shape
    errors = torch.empty_like(block.work)
    groups = len(block.feedback)
    per_group = rows // groups
    for k in range(columns):
        x = block.work[k]
        if k and groups == 1:
            x = torch.addmv(x, errors[:k].t(), block.feedback[0, k, :k], alpha=-1)
        elif k:
            before = errors[:k].reshape(k, groups, per_group)
            x = x - torch.einsum("gs,sgr->gr", block.feedback[:, k, :k], before).reshape(-1)
        chosen[k] = grid.snap(part.start + k, x)
        if block.divisor is None:
            torch.sub(block.original[k], chosen[k], out=errors[k])
        else:
            divisor = block.divisor[:, k].repeat_interleave(per_group)
            torch.sub(x, chosen[k], out=errors[k]).div_(divisor)
    return errors


def path_feedback(gram: Tensor, order: Tensor) -> Tensor:
    """Return ``F = -G_sj / G_jj`` in ``order``: what an error of column s asks of column j.

    With the errors ``e_s`` of all other columns given, ``w_j - sum_s e_s F_sj`` is the value of
    column j for which ``e G e^T`` is smallest. A column without energy asks and gets nothing.

    Args:
        gram: ``G``, f64[groups, columns, columns].
        order: i64[groups, columns].
    """
    feedback = gram_in(gram, order)
    energy = feedback.diagonal(dim1=1, dim2=2).clone()[:, None]
    feedback.neg_().div_(energy.clamp_min(1e-300))
    return feedback.masked_fill_(energy <= 0, 0.0)


def energy_order(gram: Tensor) -> Tensor:
    """Return i64[groups, columns]: columns by falling ``G_jj``."""
    return gram.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)


def gram_in(gram: Tensor, order: Tensor) -> Tensor:
    """Return a copy of ``[groups, columns, columns]``, rows and columns of each in its order."""
    group = torch.arange(len(gram), device=gram.device)[:, None, None]
    return gram[group, order[:, :, None], order[:, None, :]]


def descend(
    values: Tensor, found: Tensor, grid: GridColumns, order: Tensor, feedback: Tensor
) -> Tensor:
    """Return ``found`` after each column, in turn, took its best level given all the others.

    ``tr(E G E^T)`` never grows. Arguments as of ``path``; ``feedback`` from ``path_feedback``.

    Cost: as of a ``path``, and a product of [n, columns] by [columns, columns].
    """
    ordered = in_order(values, order)
    errors = ordered - in_order(found, order)  # of the columns after each, which still change
    start = ordered - times_gram(errors, feedback.tril(-1))
    return path(values, grid, order, feedback, start=start)

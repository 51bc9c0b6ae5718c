"""Rounding with error feedback: each column's rounding error is repaid by the later columns.

References:
    [GPTQ] E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ: Accurate Post-Training
    Quantization for Generative Pre-trained Transformers", 2022, arXiv 2210.17323.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bitquota.candidates.storage import Granularity, Scheme
from bitquota.errors import InvalidInput
from bitquota.quantizers.grid import levels, nearest_codes, spread

if TYPE_CHECKING:
    from torch import Tensor

DAMPING = 0.01
"""Added to the diagonal of the Gram, as a share of its mean; multiplied by ten until it helps."""

BLOCK = 128
"""Columns whose updates are applied to the rest of the matrix at once."""


def error_feedback_codes(
    values: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bits: int,
    scheme: Scheme,
    inputs_gram: Tensor,
) -> Tensor:
    """Return i32[rows, columns]: codes with a small error of the layer's *output*.

    Minimises ``tr(E G E^T)``, ``E = W - W_q`` and ``G = X^T X``, greedily: columns are rounded one
    after the other, the one with the largest ``G_jj`` first, and after column ``j`` the columns
    ``k`` still to come move by ``- (w_j - q_j) / U_jj * U_jk`` with ``U`` the upper Cholesky factor
    of ``(G + damping)^-1`` [GPTQ, equation 3 and section 3.3]. Unlike the paper, a row whose
    error is larger than after rounding to nearest keeps the nearest codes, so the result is
    never worse on the data that ``G`` came from. A heuristic otherwise.

    Args:
        values: f64[rows, columns].
        scales: As stored, ``[rows or 1, n]``.
        zero_points: Shaped like ``scales``, or ``None``.
        bits: Bit-width.
        scheme: Grid and granularity.
        inputs_gram: ``[columns, columns]``, or ``[groups, columns, columns]`` where each group of
            consecutive rows has its own inputs (grouped convolutions, experts).

    Raises:
        InvalidInput: The Gram has the wrong shape, is not finite, or is not positive
            semidefinite.

    Cost: O(groups columns^3 + rows columns^2).
    """
    rows, columns = values.shape
    gram = inputs_gram.detach().double().to(values.device)
    if gram.ndim == 2:
        gram = gram[None]
    groups = len(gram) if gram.ndim == 3 else 0
    if not groups or gram.shape[1:] != (columns, columns) or rows % groups:
        msg = (
            f"inputs_gram must be [{columns}, {columns}], or [groups, {columns}, {columns}] with "
            f"groups dividing the {rows} rows; got {list(inputs_gram.shape)}"
        )
        raise InvalidInput(msg, shape=list(inputs_gram.shape))
    if not bool(torch.isfinite(gram).all()):
        msg = "inputs_gram must be finite; check the calibration set and the model for NaN"
        raise InvalidInput(msg)
    nearest = nearest_codes(values, scales, zero_points, bits, scheme)
    per_group = rows // groups
    codes = nearest.clone()
    for g in range(groups):
        part = slice(g * per_group, (g + 1) * per_group)
        own = slice(None) if scheme.granularity is Granularity.TENSOR else part
        zeros = None if zero_points is None else zero_points[own]
        grid = (scales[own], zeros, bits, scheme)
        found = _round_columns(values[part], gram[g], grid)
        kept = _output_error(values[part], nearest[part], grid, gram[g])
        fed = _output_error(values[part], found, grid, gram[g])
        codes[part] = torch.where((fed < kept)[:, None], found, nearest[part])
    return codes


def _round_columns(
    values: Tensor, gram: Tensor, grid: tuple[Tensor, Tensor | None, int, Scheme]
) -> Tensor:
    scales, zero_points, bits, scheme = grid
    rows, columns = values.shape
    order = gram.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(gram[order][:, order])
    step, zero = _per_weight(scales, zero_points, rows, columns, scheme)
    step, zero = step[:, order], zero[:, order]
    lowest, highest = (0, 2**bits - 1) if zero_points is not None else levels(bits)
    work = values[:, order].clone()
    codes = torch.empty_like(work)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.empty_like(work[:, start:stop])
        for j in range(start, stop):
            column = work[:, j]
            if bits == 1 and zero_points is None:
                code = torch.where(column >= 0, 1.0, -1.0).to(column)
            else:
                divisor = torch.where(step[:, j] != 0, step[:, j], 1.0)
                code = (torch.round(column / divisor) + zero[:, j]).clamp(lowest, highest)
            codes[:, j] = code
            error = (column - (code - zero[:, j]) * step[:, j]) / factor[j, j]
            work[:, j + 1 : stop] -= error[:, None] * factor[j, j + 1 : stop]
            errors[:, j - start] = error
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result.int()


def _inverse_factor(gram: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped Gram."""
    diagonal = gram.diagonal()
    mean = float(diagonal.mean())
    if mean <= 0:
        # No input ever differs from zero: nothing feeds back.
        return torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    damping = DAMPING
    for _ in range(3):
        damped = gram + torch.diag_embed(torch.full_like(diagonal, damping * mean))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return upper
        damping *= 10
    msg = "inputs_gram must be positive semidefinite, as X^T X is; it is not"
    raise InvalidInput(msg)


def _per_weight(
    scales: Tensor, zero_points: Tensor | None, rows: int, columns: int, scheme: Scheme
) -> tuple[Tensor, Tensor]:
    step = scales.double()
    zero = torch.zeros_like(step) if zero_points is None else zero_points.double()
    return (
        spread(step, columns, scheme).expand(rows, columns),
        spread(zero, columns, scheme).expand(rows, columns),
    )


def _output_error(
    values: Tensor, codes: Tensor, grid: tuple[Tensor, Tensor | None, int, Scheme], gram: Tensor
) -> Tensor:
    """Return f64[rows]: ``e G e^T`` of each row."""
    scales, zero_points, _, scheme = grid
    rows, columns = values.shape
    step, zero = _per_weight(scales, zero_points, rows, columns, scheme)
    error = values - (codes.double() - zero) * step
    return ((error @ gram) * error).sum(dim=1)

"""How values are rounded to a grid whose parameters are known: the rounders, and their guarantee.

Design: docs/design/grids-and-scales.md
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

import torch

from bitquota.candidates.storage import Rounding
from bitquota.errors import InvalidInput
from bitquota.quantizers.column_path import times_gram
from bitquota.quantizers.gpfq import gpfq
from bitquota.quantizers.gptq import gptq

if TYPE_CHECKING:
    from torch import Tensor

    from bitquota.candidates.storage import Scheme
    from bitquota.quantizers.grid import MatrixGrid


class Rounder(StrEnum):
    """Which code a weight gets once the grid is known."""

    NEAREST = "nearest"
    GPTQ = "gptq"
    """Errors are repaid by later columns through the inverse of the inputs' Gram."""
    GPFQ = "gpfq"
    """Each column is the best against the output error of those before it."""


class RounderWithFeedback(Protocol):
    """Rounds so that errors of columns cancel in the layer's output."""

    def __call__(self, values: Tensor, grid: MatrixGrid, gram: Tensor, /) -> Tensor:
        """Return values of the grid with a small ``tr(E G E^T)``, ``E = values - returned``.

        Args:
            values: f64[rows, columns].
            grid: Of these rows.
            gram: f64[groups, columns, columns], positive semidefinite, one for each group of
                consecutive rows.
        """


FEEDBACK: dict[Rounder, RounderWithFeedback] = {Rounder.GPTQ: gptq, Rounder.GPFQ: gpfq}


def rounder_of(rounding: Rounder | str | None, scheme: Scheme) -> Rounder:
    """Return the rounder that is asked for, by default the scheme's.

    Raises:
        InvalidInput: There is no rounder of that name.
    """
    if rounding is None:
        return Rounder.NEAREST if scheme.rounding is Rounding.NEAREST else Rounder.GPTQ
    try:
        return Rounder(rounding)
    except ValueError as err:
        msg = f"rounding must be one of {', '.join(Rounder)}; got '{rounding}'"
        raise InvalidInput(msg, rounding=str(rounding)) from err


def checked_gram(inputs_gram: Tensor | None, rounder: Rounder, values: Tensor) -> Tensor:
    """Return f64[groups, columns, columns]: what a rounder with feedback needs.

    Raises:
        InvalidInput: No Gram, one of another shape than ``values`` need, or not finite.
    """
    rows, columns = values.shape
    if inputs_gram is None:
        msg = (
            f"the rounder '{rounder}' needs inputs_gram, the second moment of the layer's "
            "inputs; got none: collect it on the calibration set, or round to nearest"
        )
        raise InvalidInput(msg, rounder=str(rounder))
    gram = inputs_gram.detach().double().to(values.device)
    gram = gram[None] if gram.ndim == 2 else gram
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
    return gram


def round_codes(values: Tensor, grid: MatrixGrid, rounder: Rounder, gram: Tensor | None) -> Tensor:
    """Return i32[rows, columns]: the codes that a rounder chooses.

    Whatever the rounder, a row whose output error ``e G e^T`` would be larger than with the nearest
    codes keeps those: never worse than nearest on the data that ``G`` came from.

    Args:
        values: f64[rows, columns].
        grid: Its grid.
        rounder: Which.
        gram: From ``checked_gram``, one for each group of consecutive rows; ``None`` for nearest.

    Raises:
        InvalidInput: A Gram is not positive semidefinite.

    Cost: nearest O(rows columns), else O(groups columns^3 + rows columns^2).
    """
    codes = grid.nearest(values)
    if gram is None:
        return codes
    nearest = grid.read(codes)
    fed = FEEDBACK[rounder](values, grid, gram)
    better = _smaller_error(values - fed, values - nearest, gram)
    found = torch.where(better[:, None], fed, nearest)
    # A value of the grid has one nearest code: its own.
    return grid.nearest(found)


CLEAR = 1e-3
"""Output errors in float32 that differ by this share are told apart by it."""


def _smaller_error(one: Tensor, other: Tensor, gram: Tensor) -> Tensor:
    """Return for each row whether ``one`` has the smaller output error."""
    if len(gram) > 1:
        return output_errors(one, gram) < output_errors(other, gram)
    small = gram.float()
    first, second = (output_errors(error.float(), small) for error in (one, other))
    better = first < second
    unclear = (first - second).abs() <= CLEAR * torch.maximum(first, second)
    if bool(unclear.any()):
        rows = unclear.nonzero()[:, 0]
        better[rows] = output_errors(one[rows], gram) < output_errors(other[rows], gram)
    return better


def output_errors(error: Tensor, gram: Tensor) -> Tensor:
    """Return ``e G e^T`` of each row, [n], for one Gram or one for each group of rows."""
    return (times_gram(error, gram if gram.ndim == 3 else gram[None]) * error).sum(dim=1)

"""The grids that weights are rounded to: integers, codebooks, powers of two, small floats.

References:
    [QLoRA] T. Dettmers et al. QLoRA: efficient finetuning of quantized LLMs. NeurIPS 2023. arXiv
    2305.14314, appendix E.
    [PNMQ] V. Chikin, M. Antiukh. Data-free network compression via parametric non-uniform mixed
    precision quantization. CVPR 2022.

Design: docs/design/grids-and-scales.md
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch

from bitquota.candidates.storage import (
    CODEBOOKS,
    FLOATS,
    K_BLOCKS,
    PRUNED_BITS,
    Granularity,
    Grid,
)
from bitquota.quantizers.float_formats import float_codes, float_read, float_values
from bitquota.quantizers.kquants import k_block_steps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from bitquota.candidates.storage import FloatFormat, Scheme


def levels(bits: int) -> tuple[int, int]:
    """Return lowest and highest level of the symmetric grid.

    The full signed range ``-2^(b-1)..2^(b-1)-1``. At one bit that range would be {-1, 0}, which
    can only take weights away; there the grid is {-1, +1} instead, and still fits one bit.
    """
    return (-1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MatrixGrid:
    """What each code of one matrix stands for.

    On a codebook code ``k`` stands for ``table[row, k]``. On every other grid it stands for
    ``step * u(k - zero) + offset`` with ``u`` the identity, or what ``k`` stands for as a power of
    two or a small float.

    Attributes:
        grid: Which of them.
        bits: Bit-width.
        step: Broadcastable to ``[rows, columns]``; 0 where all codes stand for one value.
        zero: Likewise; ``None`` for 0.
        offset: Likewise; ``None`` for 0.
        table: ``[rows or 1, 2^bits]``, ascending; of a codebook only.
        ends: Least and greatest code, ``[rows, 1 or columns]`` each, where rows have different
            widths or weights are left out; else those of the bit-width.
    """

    grid: Grid
    bits: int
    step: Tensor
    zero: Tensor | None = None
    offset: Tensor | None = None
    table: Tensor | None = None
    ends: tuple[Tensor, Tensor] | None = None

    def nearest(self, values: Tensor) -> Tensor:
        """Return i32: the code nearest to each of ``[rows, columns]``, ties to even."""
        if self.table is not None:
            return _nearest_levels(values, self.table).int()
        numbers = numbers_of(self.grid, self.bits)
        if numbers is not None:
            return numbers.codes(values / self.divisor)
        whole = self._whole(values)
        return (whole if self.zero is None else whole + self.zero).int()

    def read(self, codes: Tensor) -> Tensor:
        """Return the values that codes ``[rows, columns]`` stand for, in the dtype of the grid."""
        if self.table is not None:
            return self.table.expand(len(codes), -1).gather(1, codes.long())
        numbers = numbers_of(self.grid, self.bits)
        if numbers is not None:
            return self.step * numbers.read(codes, self.step.dtype)
        whole = codes.to(self.step.dtype)
        if self.zero is not None:
            whole = whole - self.zero
        return whole * self.step if self.offset is None else whole * self.step + self.offset

    def columns(self, order: Tensor, dtype: torch.dtype) -> GridColumns:
        """Return the columns in an order: to be rounded one after the other."""
        return GridColumns(self, order, dtype)

    @property
    def divisor(self) -> Tensor:
        """What values are divided by: where there is no step, every value is the grid's zero."""
        return torch.where(self.step == 0, torch.inf, self.step)

    def _whole(self, values: Tensor) -> Tensor:
        """Return the nearest whole number of steps: the code less its zero point."""
        if self.bits == 1 and self.grid is Grid.SYMMETRIC:
            return torch.where(values >= 0, 1.0, -1.0).to(values.dtype)
        moved = values if self.offset is None else values - self.offset
        least, most = self.ends or code_range(self.grid, self.bits)
        whole = torch.round(moved / self.divisor)
        if self.zero is None:
            return whole.clamp(least, most)  # type: ignore[arg-type]  # both are of one kind
        return torch.minimum(torch.maximum(whole, least - self.zero), most - self.zero)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WholeColumns:
    """Columns of a grid whose codes are whole numbers of steps, ``[columns or 1, rows or 1]``.

    Attributes:
        step: 0 where the only value is the offset.
        offset: ``None`` for 0.
        least: The least whole number of steps.
        most: The greatest.
        signs: Whether these two are the only ones.
    """

    step: Tensor
    offset: Tensor | None
    least: Tensor
    most: Tensor
    signs: bool


class GridColumns:
    """The grid of a matrix, column by column.

    Args:
        grid: Of the matrix.
        order: i64[groups, columns]: column ``j`` here is column ``order[g, j]`` there, for the rows
            of group ``g``.
        dtype: To compute in.

    Attributes:
        whole: The columns, where codes are whole numbers of steps.
    """

    def __init__(self, grid: MatrixGrid, order: Tensor, dtype: torch.dtype) -> None:
        def turn(part: Tensor) -> Tensor:
            part = in_order(part, order) if part.shape[1] > 1 else part
            return part.t().to(dtype).contiguous()

        self._numbers = numbers_of(grid.grid, grid.bits)
        self._table: Tensor | None = None
        self.whole: WholeColumns | None = None
        if grid.table is not None:
            self._table = grid.table.to(dtype).contiguous()
            return
        self._step = turn(grid.step)
        if self._numbers is not None:
            return
        least, most = grid.ends or (
            torch.full_like(grid.step[:1, :1], end) for end in code_range(grid.grid, grid.bits)
        )
        if grid.zero is not None:
            least, most = least - grid.zero, most - grid.zero
        self.whole = WholeColumns(
            step=self._step,
            offset=None if grid.offset is None else turn(grid.offset),
            least=turn(least),
            most=turn(most),
            signs=grid.bits == 1 and grid.grid is Grid.SYMMETRIC,
        )

    @cached_property
    def _divisor(self) -> Tensor:
        """As ``MatrixGrid.divisor``; machine code does without it."""
        return torch.where(self._step == 0, torch.inf, self._step)

    def snap(self, column: int, values: Tensor) -> Tensor:
        """Return the value of the grid nearest to each of ``[rows]``, for one column."""
        if self._table is not None:
            codes = _nearest_levels(values[:, None], self._table)
            return self._table.expand(len(values), -1).gather(1, codes)[:, 0]

        def at(part: Tensor) -> Tensor:
            return part[min(column, len(part) - 1)]

        step, divisor = at(self._step), at(self._divisor)
        if self.whole is None:
            assert self._numbers is not None  # noqa: S101  # a grid is one of the three
            return step * self._numbers.nearest(values / divisor)
        if self.whole.signs:
            return torch.where(values >= 0, step, -step)
        offset = None if self.whole.offset is None else at(self.whole.offset)
        moved = values if offset is None else values - offset
        whole = (moved / divisor).round_().clamp_(at(self.whole.least), at(self.whole.most))
        whole.mul_(step)
        return whole if offset is None else whole.add_(offset)


def in_order(matrix: Tensor, order: Tensor) -> Tensor:
    """Return the columns of ``[n, columns]`` in the order of each group of rows."""
    if len(order) == 1:
        return matrix[:, order[0]]
    return matrix.gather(1, order.repeat_interleave(len(matrix) // len(order), dim=0))


def stacked(grids: Sequence[MatrixGrid], rows: int, columns: int) -> MatrixGrid | None:
    """Return the grid of matrices that stand below each other, or ``None`` if there is none.

    There is one for grids of a kind whose codes are whole numbers of steps, of any bit-widths.

    Args:
        grids: Of matrices of one shape.
        rows: Of each matrix.
        columns: Likewise.
    """
    first = grids[0]
    for grid in grids:
        signs = grid.bits == 1 and grid.grid is Grid.SYMMETRIC
        alike = (grid.zero is None, grid.offset is None) == (
            first.zero is None,
            first.offset is None,
        )
        if grid.grid is not first.grid or not alike or signs or grid.grid in NOT_WHOLE:
            return None

    def together(parts: Sequence[Tensor | None]) -> Tensor | None:
        tensors = [part.expand(rows, columns) for part in parts if part is not None]
        return torch.cat(tensors) if tensors else None

    sparse = any(grid.ends is not None for grid in grids)
    step = together([grid.step for grid in grids])
    assert step is not None  # noqa: S101  # every grid has steps
    least, most = (
        torch.cat(
            [
                step.new_full((rows, columns if sparse else 1), code_range(g.grid, g.bits)[end])
                if g.ends is None
                else g.ends[end].to(step).expand(rows, columns)
                for g in grids
            ]
        )
        for end in (0, 1)
    )
    return MatrixGrid(
        grid=first.grid,
        bits=max(grid.bits for grid in grids),
        step=step,
        zero=together([grid.zero for grid in grids]),
        offset=together([grid.offset for grid in grids]),
        ends=(least, most),
    )


NOT_WHOLE = frozenset({*CODEBOOKS, Grid.POWER_OF_TWO, Grid.NORMAL_FLOAT, *FLOATS})
"""Grids whose codes are no whole numbers of steps."""


def matrix_grid(
    scales: Tensor,
    zero_points: Tensor | None,
    bits: int,
    scheme: Scheme,
    columns: int,
    dtype: torch.dtype = torch.float64,
    *,
    kept: Tensor | None = None,
) -> MatrixGrid:
    """Return the grid that stored parameters describe.

    Args:
        scales: As ``QuantizedWeight`` stores them.
        zero_points: Likewise.
        bits: Bit-width.
        scheme: Grid and granularity.
        columns: Of the matrix.
        dtype: To compute in; float32 reads values exactly as runtimes do.
        kept: bool[rows, columns], which weights may differ from zero, where not all may; of the
            symmetric grid only.
    """
    rows = len(scales)
    if bits == PRUNED_BITS:  # all codes stand for zero
        return MatrixGrid(grid=Grid.SYMMETRIC, bits=2, step=scales.new_zeros(rows, 1, dtype=dtype))
    if scheme.grid is Grid.CODEBOOK:
        table = scales.to(dtype)
        return MatrixGrid(grid=scheme.grid, bits=bits, step=table[:, :1], table=table)
    if scheme.grid is Grid.COMPANDED:
        table = companded_levels(scales.to(dtype), bits)
        return MatrixGrid(grid=scheme.grid, bits=bits, step=table[:, :1], table=table)
    if scheme.grid is Grid.K_BLOCKS:
        step, offset = (
            part.to(dtype).repeat_interleave(K_BLOCKS[bits].sub_block, dim=1)
            for part in k_block_steps(scales, bits)
        )
        return MatrixGrid(grid=scheme.grid, bits=bits, step=step, offset=offset)
    if scheme.grid is Grid.OFFSET:
        pairs = scales.to(dtype).reshape(rows, -1, 2)
        step, offset = (spread(part, columns, scheme) for part in pairs.unbind(2))
        return MatrixGrid(grid=scheme.grid, bits=bits, step=step, offset=offset)
    zero = None if zero_points is None else spread(zero_points.to(dtype), columns, scheme)
    step = spread(scales.to(dtype), columns, scheme)
    ends = None
    if kept is not None:
        least, most = (end * kept.to(dtype) for end in code_range(scheme.grid, bits))
        ends = least, most
    return MatrixGrid(grid=scheme.grid, bits=bits, step=step, zero=zero, ends=ends)


def code_range(grid: Grid, bits: int) -> tuple[int, int]:
    """Return the least and the largest code."""
    if grid is Grid.SYMMETRIC or (grid is Grid.K_BLOCKS and not K_BLOCKS[bits].affine):
        return levels(bits)
    return 0, 2**bits - 1


def nearest_codes(
    values: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, scheme: Scheme
) -> Tensor:
    """Return i32[rows, columns]: the code nearest to each value (ties to even)."""
    return matrix_grid(scales, zero_points, bits, scheme, values.shape[1]).nearest(values)


def _nearest_levels(values: Tensor, table: Tensor) -> Tensor:
    middles = (table[:, 1:] + table[:, :-1]) / 2
    if len(middles) == 1:
        return torch.bucketize(values.contiguous(), middles[0].contiguous())
    return torch.searchsorted(middles.contiguous(), values.contiguous())


class Numbers(Protocol):
    """What codes stand for where that is no integer, in units of the scale."""

    def codes(self, values: Tensor) -> Tensor:
        """Return i32: the code of the number nearest to each value."""

    def nearest(self, values: Tensor) -> Tensor:
        """Return the number nearest to each value."""

    def read(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the number that each code stands for."""


@dataclass(frozen=True, slots=True)
class _Powers:
    bits: int

    def codes(self, values: Tensor) -> Tensor:
        return power_codes(values, self.bits)

    def nearest(self, values: Tensor) -> Tensor:
        return power_values(power_codes(values, self.bits), self.bits).to(values.dtype)

    def read(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return power_values(codes, self.bits).to(dtype)


@dataclass(frozen=True, slots=True)
class _Floats:
    of: FloatFormat

    def codes(self, values: Tensor) -> Tensor:
        return float_codes(values, self.of)

    def nearest(self, values: Tensor) -> Tensor:
        return float_values(values, self.of)

    def read(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        return float_read(codes, self.of, dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Numbers of a table.

    Attributes:
        of: f64[k], ascending.
    """

    of: Tensor

    def codes(self, values: Tensor) -> Tensor:
        """Return i32: the place of the nearest number, the lower one on a tie."""
        return _nearest_levels(values, self.of.to(values)[None]).int()

    def nearest(self, values: Tensor) -> Tensor:
        """Return the nearest number."""
        return self.read(self.codes(values), values.dtype)

    def read(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the number at each place."""
        return self.of.to(codes.device, dtype)[codes.long()]


NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""As [QLoRA] publishes them; what float32 holds."""


def companded_levels(parameters: Tensor, bits: int) -> Tensor:
    """Return ``[g, 2^bits]`` ascending levels ``s sign(k) (|k| / 2^(b-1))^γ`` [PNMQ].

    ``k`` goes from ``-2^(b-1)`` to ``2^(b-1) - 1``; a negative ``s`` turns the levels around, so
    that the extra one serves the heavier tail.

    Args:
        parameters: ``[g, 2]``, ``s`` and ``γ`` of each line.
        bits: 2 to 8.
    """
    exact = parameters.double()
    least, most = levels(bits)
    place = torch.arange(least, most + 1, dtype=torch.float64, device=exact.device) / -least
    made = exact[:, :1] * place.sign() * place.abs() ** exact[:, 1:]
    return made.sort(dim=1).values.to(parameters.dtype)


def numbers_of(grid: Grid, bits: int) -> Numbers | None:
    """Return what the codes of a grid stand for, or ``None`` for integers and codebooks."""
    if grid is Grid.POWER_OF_TWO:
        return _Powers(bits)
    if grid is Grid.NORMAL_FLOAT:
        return Table(torch.tensor(NF4, dtype=torch.float64))
    return _Floats(FLOATS[grid][bits]) if grid in FLOATS else None


def power_codes(values: Tensor, bits: int) -> Tensor:
    """Return i32 codes of ``values`` in units of the scale: sign bit first, then ``k`` of 2^-k.

    The level is the nearest one, not the nearest exponent: between ``2^-k`` and ``2^-k-1`` they
    change at the arithmetic middle, which has the smaller squared error.
    """
    last = 2 ** (bits - 1) - 1
    size = values.abs().clamp(min=2.0 ** -(last + 2))
    exponent = torch.floor(-torch.log2(size / 1.5)).clamp(0, last).int()
    return exponent + torch.where(values < 0, 2 ** (bits - 1), 0).int()


def power_values(codes: Tensor, bits: int) -> Tensor:
    """Return f32: ``+-2^-k`` of each code."""
    half = 2 ** (bits - 1)
    sign = torch.where(codes >= half, -1.0, 1.0)
    return sign * torch.exp2(-(codes % half).float())


def spread(per_scale: Tensor, columns: int, scheme: Scheme) -> Tensor:
    """Return one value per weight (broadcastable to ``[rows, columns]``)."""
    if scheme.granularity is not Granularity.GROUP:
        return per_scale
    assert scheme.group_size is not None  # noqa: S101  # invariant of Scheme
    return per_scale.repeat_interleave(scheme.group_size, dim=1)[:, :columns]

"""How a quantized weight is stored, and how many bits that takes: exact integers, no torch.

A weight is seen as a matrix ``rows x columns``: one row per output channel (or embedding row, or
expert and output), the columns being what is summed over. Scales and zero points follow the
granularity; codes are packed densely, each row padded to ``row_alignment_bits``.

Design: docs/design/budgets.md
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import ClassVar

from bitquota.codec import Document, Form
from bitquota.errors import InvalidInput

FULL_PRECISION_BITS = 32
"""The ``weight_bits`` of a candidate that leaves the layer as it is."""

PRUNED_BITS = 0
"""The ``weight_bits`` of a candidate whose weights are all zero: nothing is stored."""

WEIGHT_BITS = (1, 2, 3, 4, 5, 6, 7, 8, 16, FULL_PRECISION_BITS)

ROW_BITS = (PRUNED_BITS, 2, 3, 4, 5, 6, 7, 8)
"""Bit-widths that rows of one weight may have side by side."""


class Grid(StrEnum):
    """Which values the codes stand for."""

    SYMMETRIC = "symmetric"
    """Integers around zero, times a scale."""
    ASYMMETRIC = "asymmetric"
    """Integers from a zero point on, times a scale."""
    CODEBOOK = "codebook"
    """``2^b`` levels, stored as they are in the format of scales."""
    POWER_OF_TWO = "power_of_two"
    """``+-2^-k`` with ``k = 0..2^(b-1)-1``, times a scale: a product is a shift."""
    OFFSET = "offset"
    """Integers from 0 on, times a scale, plus an offset in the format of scales, as MLX has it."""
    K_BLOCKS = "k_blocks"
    """llama.cpp's super-blocks of 256 weights, whose own scales are integers."""
    FLOAT = "float"
    """Floating-point numbers of 4, 6 or 8 bits (E2M1, E2M3, E4M3), times a scale."""
    FLOAT_RANGE = "float_range"
    """The same with a wider range and coarser steps: E3M2 and E5M2 at 6 and 8 bits."""
    NORMAL_FLOAT = "normal_float"
    """NF4 of QLoRA: 16 quantiles of a normal distribution, times a scale."""
    COMPANDED = "companded"
    """A codebook made of two numbers: ``+-s (|k| / 2^(b-1))^γ``, finer around zero."""

    @property
    def is_integer(self) -> bool:
        """Whether codes are integers to compute with."""
        return self in (Grid.SYMMETRIC, Grid.ASYMMETRIC)


@dataclass(frozen=True, slots=True, kw_only=True)
class FloatFormat:
    """A sign, an exponent and a mantissa, with subnormal numbers.

    Attributes:
        exponent_bits: The exponent's, whose bias is ``2^(bits - 1) - 1``.
        mantissa_bits: The mantissa's.
        largest: The largest number; codes above it stand for none.
    """

    exponent_bits: int
    mantissa_bits: int
    largest: float

    @property
    def least_exponent(self) -> int:
        """The exponent of the smallest number that is not subnormal."""
        return 2 - (1 << (self.exponent_bits - 1))


FLOATS = {
    Grid.FLOAT: {
        4: FloatFormat(exponent_bits=2, mantissa_bits=1, largest=6.0),
        6: FloatFormat(exponent_bits=2, mantissa_bits=3, largest=7.5),
        8: FloatFormat(exponent_bits=4, mantissa_bits=3, largest=448.0),
    },
    Grid.FLOAT_RANGE: {
        6: FloatFormat(exponent_bits=3, mantissa_bits=2, largest=28.0),
        8: FloatFormat(exponent_bits=5, mantissa_bits=2, largest=57344.0),
    },
}
"""By grid and bit-width, as the Open Compute Project publishes them (OCP MX v1.0, OFP8 v1.0)."""

GRID_BITS = {
    Grid.CODEBOOK: tuple(range(1, 9)),
    Grid.POWER_OF_TWO: tuple(range(2, 6)),
    Grid.OFFSET: tuple(range(1, 9)),
    Grid.NORMAL_FLOAT: (4,),
    Grid.COMPANDED: tuple(range(2, 9)),
    Grid.K_BLOCKS: tuple(range(2, 7)),
    **{grid: tuple(formats) for grid, formats in FLOATS.items()},
}
"""Bit-widths of the grids that are not integers. More than 16 powers of two reach further down than
any weight that matters."""


def check_width(grid: Grid, weight_bits: int) -> None:
    """Raise ``InvalidInput`` if a grid does not come in a bit-width."""
    widths = GRID_BITS.get(grid)
    if widths is not None and weight_bits not in widths:
        msg = f"the grid '{grid}' takes {', '.join(map(str, widths))} bits; got {weight_bits}"
        raise InvalidInput(msg, weight_bits=weight_bits, grid=str(grid))


@dataclass(frozen=True, slots=True, kw_only=True)
class KBlock:
    """How a super-block of ``K_BLOCK`` weights is built.

    Attributes:
        sub_block: Weights that share an integer scale.
        scale_bits: Bits of that integer.
        affine: Whether sub-blocks have an integer minimum too, and the block a second fp16 unit.
    """

    sub_block: int
    scale_bits: int
    affine: bool

    @property
    def largest(self) -> int:
        """The largest integer scale; of symmetric blocks it has a sign."""
        return (1 << (self.scale_bits if self.affine else self.scale_bits - 1)) - 1

    @property
    def overhead_bits(self) -> int:
        """Bits of a super-block beside its codes."""
        parts = 2 if self.affine else 1
        return parts * (16 + K_BLOCK // self.sub_block * self.scale_bits)


CODEBOOKS = frozenset({Grid.CODEBOOK, Grid.COMPANDED})
"""Grids with levels of its own for each row or tensor."""

K_BLOCK = 256
K_BLOCKS = {
    2: KBlock(sub_block=16, scale_bits=4, affine=True),
    3: KBlock(sub_block=16, scale_bits=6, affine=False),
    4: KBlock(sub_block=32, scale_bits=6, affine=True),
    5: KBlock(sub_block=32, scale_bits=6, affine=True),
    6: KBlock(sub_block=16, scale_bits=8, affine=False),
}
"""Q2_K to Q6_K by bit-width: 2.625, 3.4375, 4.5, 5.5 and 6.5625 bits per weight."""


class Granularity(StrEnum):
    """Which weights share one scale."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    GROUP = "group"


class ScaleRule(StrEnum):
    """How a scale is fitted to the weights that share it."""

    ABSMAX = "absmax"
    PERCENTILE = "percentile"
    LEAST_SQUARES = "least_squares"
    """Smallest squared error over all scales, negative ones included: a negative scale turns the
    symmetric grid around, so that its one extra level serves the heavier tail."""
    LEAST_SQUARES_POSITIVE = "least_squares_positive"
    """The same over positive scales only, for runtimes that accept no other."""


class ScaleFormat(StrEnum):
    """In which floating-point format scales are stored."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    E8M0 = "e8m0"
    """A power of two, as MXFP4, MXFP6 and MXFP8 have it."""
    E4M3 = "e4m3"
    """A floating-point number of 8 bits, and one power of two in fp32 for the whole tensor, as
    NVFP4 has them."""

    @property
    def bits(self) -> int:
        """Bits of one stored scale."""
        if self in SMALL_SCALES:
            return 8
        return 32 if self is ScaleFormat.FP32 else 16

    @property
    def tensor_bits(self) -> int:
        """Bits for each tensor beside its scales."""
        return 32 if self is ScaleFormat.E4M3 else 0


SMALL_SCALES = frozenset({ScaleFormat.E8M0, ScaleFormat.E4M3})
"""Scales of 8 bits, of floating-point grids alone."""


class Sparsity(StrEnum):
    """Which weights are left out, their places being stored beside those that stay."""

    TWO_OF_FOUR = "2:4"
    """Two of every four neighbours in a row stay, as sparse tensor cores read them."""


SPARSE_BLOCK, SPARSE_KEPT, PLACE_BITS = 4, 2, 2
"""Of ``2:4``: neighbours, how many of them stay, and the bits of a place among them."""


class Rounding(StrEnum):
    """How weights are rounded to the grid once the scale is known."""

    NEAREST = "nearest"
    ERROR_FEEDBACK = "error_feedback"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme(Document):
    """Everything about a weight's quantization except its bit-width.

    Attributes:
        grid: Symmetric (no zero point) or asymmetric (one integer zero point per scale).
        granularity: Which weights share a scale.
        group_size: Columns per scale when ``granularity`` is ``group``; otherwise ``None``.
        scale_rule: How the scale is fitted.
        scale_format: Storage format of the scales.
        rounding: How weights are rounded.
        row_alignment_bits: Each row of codes is padded to a multiple of this; 0 packs the whole
            tensor densely and pads only its end, to a byte.
        row_bits: The bit-width of each row, where rows have different ones; the weight's own
            bit-width is then the widest. Rows of one width are stored together, as a part, and
            the order of the rows beside them.
        sparsity: Which weights are zero, if any; the others are stored with their places.
    """

    FORM: ClassVar[Form] = Form(what="a scheme", left_out=("row_bits", "sparsity"))

    grid: Grid = Grid.SYMMETRIC
    granularity: Granularity = Granularity.CHANNEL
    group_size: int | None = None
    scale_rule: ScaleRule = ScaleRule.LEAST_SQUARES
    scale_format: ScaleFormat = ScaleFormat.FP32
    rounding: Rounding = Rounding.NEAREST
    row_alignment_bits: int = 0
    row_bits: tuple[int, ...] = ()
    sparsity: Sparsity | None = None

    def __post_init__(self) -> None:
        """Check that a group size is given exactly when it is needed."""
        self._check_rows()
        if self.sparsity is not None and not (self.has_zero and not self.row_bits):
            msg = (
                f"sparsity {self.sparsity} belongs to weights on a symmetric grid of one "
                f"bit-width, without alignment, in groups of a multiple of {SPARSE_BLOCK} if in "
                f"groups; got '{self.grid}': leave it out"
            )
            raise InvalidInput(msg, grid=str(self.grid), sparsity=str(self.sparsity))
        if (self.granularity is Granularity.GROUP) != (self.group_size is not None):
            msg = (
                "a group size belongs to granularity 'group' and only to it; got granularity "
                f"'{self.granularity}' with group_size={self.group_size}"
            )
            raise InvalidInput(msg, granularity=str(self.granularity), group_size=self.group_size)
        if self.group_size is not None and self.group_size < 1:
            msg = f"group_size must be at least 1; got {self.group_size}"
            raise InvalidInput(msg, group_size=self.group_size)
        if self.grid in CODEBOOKS and self.granularity is Granularity.GROUP:
            msg = (
                "a codebook belongs to a tensor or an output channel; levels for every group "
                "would take more than the codes: choose granularity 'tensor' or 'channel'"
            )
            raise InvalidInput(msg, granularity=str(self.granularity))
        if self.scale_format in SMALL_SCALES and self.grid not in FLOATS:
            msg = (
                f"scales in {self.scale_format} belong to the grids {', '.join(FLOATS)}; got "
                f"'{self.grid}': choose fp16 scales"
            )
            raise InvalidInput(msg, grid=str(self.grid), scale_format=str(self.scale_format))
        if self.grid is Grid.K_BLOCKS and (
            self.group_size != K_BLOCK
            or self.scale_format is not ScaleFormat.FP16
            or self.row_alignment_bits
        ):
            msg = (
                f"the grid '{self.grid}' has groups of {K_BLOCK}, fp16 scales, no alignment; got "
                f"{self.group_size}, {self.scale_format} and {self.row_alignment_bits}"
            )
            raise InvalidInput(msg, grid=str(self.grid))
        if self.row_alignment_bits not in (0, 8, 16, 32, 64):
            msg = f"row_alignment_bits must be 0, 8, 16, 32 or 64; got {self.row_alignment_bits}"
            raise InvalidInput(msg, row_alignment_bits=self.row_alignment_bits)

    def _check_rows(self) -> None:
        if not self.row_bits:
            return
        if not self.mixes:
            msg = (
                "rows of different bit-widths belong to integer grids with scales per channel or "
                f"group; got '{self.grid}' per {self.granularity}"
            )
            raise InvalidInput(msg, grid=str(self.grid))
        widths = set(self.row_bits)
        if len(widths) < 2 or not widths <= set(ROW_BITS):
            msg = (
                f"row_bits must hold different ones of {', '.join(map(str, ROW_BITS))}; got "
                f"{', '.join(map(str, sorted(widths)))}: leave it out where all rows are alike"
            )
            raise InvalidInput(msg, row_bits=sorted(widths))

    @property
    def mixes(self) -> bool:
        """Whether rows may have different bit-widths: each has integers and scales of its own."""
        return self.grid.is_integer and self.granularity is not Granularity.TENSOR

    @property
    def has_zero(self) -> bool:
        """Whether weights may be left out: every scale has a code for zero, and rows are dense."""
        whole = self.group_size is None or self.group_size % SPARSE_BLOCK == 0
        return self.grid is Grid.SYMMETRIC and not self.row_alignment_bits and whole

    @property
    def of_parts(self) -> Scheme:
        """The scheme of the parts of one bit-width, all of whose weights are stored."""
        return replace(self, row_bits=(), sparsity=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class StorageSize(Document):
    """Bits that one stored weight takes, by what they hold. All are exact integers.

    ``order`` is that of rows which are stored by their bit-widths.
    """

    FORM: ClassVar[Form] = Form(what="a size", derived=("total",), left_out=("order",))

    codes: int
    scales: int = 0
    zero_points: int = 0
    padding: int = 0
    order: int = 0

    def __post_init__(self) -> None:
        """Refuse negative parts."""
        if min(self.codes, self.scales, self.zero_points, self.padding, self.order) < 0:
            msg = f"sizes must not be negative; got {self}"
            raise InvalidInput(msg)

    @property
    def total(self) -> int:
        """All bits together."""
        return self.codes + self.scales + self.zero_points + self.padding + self.order

    def __add__(self, other: StorageSize) -> StorageSize:
        """Add part by part."""
        return StorageSize(
            codes=self.codes + other.codes,
            scales=self.scales + other.scales,
            zero_points=self.zero_points + other.zero_points,
            padding=self.padding + other.padding,
            order=self.order + other.order,
        )


def scales_per_line(weight_bits: int, scheme: Scheme) -> int:
    """Return how many stored values the weights that share a scale have.

    The levels of a codebook; two where an offset or an exponent stands beside the scale.
    """
    if scheme.grid in (Grid.OFFSET, Grid.COMPANDED):
        return 2
    return 2**weight_bits if scheme.grid is Grid.CODEBOOK else 1


def n_scales(rows: int, columns: int, scheme: Scheme) -> int:
    """Return how many scales (or codebooks) a weight has; a last group may be short."""
    if scheme.granularity is Granularity.TENSOR:
        return 1
    if scheme.granularity is Granularity.CHANNEL:
        return rows
    assert scheme.group_size is not None  # noqa: S101  # invariant of Scheme
    return rows * -(-columns // scheme.group_size)


def storage_size(
    rows: int,
    columns: int,
    weight_bits: int,
    scheme: Scheme,
    *,
    full_precision_bits: int = FULL_PRECISION_BITS,
) -> StorageSize:
    """Return the exact storage of a ``rows x columns`` weight at ``weight_bits``.

    Args:
        rows: Output channels.
        columns: Weights per output channel.
        weight_bits: One of ``WEIGHT_BITS``; 32 leaves the weight as it is, without scales.
        scheme: Grid, granularity, formats and alignment.
        full_precision_bits: Bits of one weight when it is left as it is (32, or 16 for a
            half-precision checkpoint).

    Raises:
        InvalidInput: ``weight_bits`` is not one of ``WEIGHT_BITS``, or not of the grid's.
    """
    if weight_bits == PRUNED_BITS:
        return StorageSize(codes=0)
    if weight_bits not in WEIGHT_BITS:
        allowed = ", ".join(map(str, WEIGHT_BITS))
        msg = f"a bit-width must be one of {allowed}; got {weight_bits}"
        raise InvalidInput(msg, weight_bits=weight_bits)
    n_weights = rows * columns
    if weight_bits == FULL_PRECISION_BITS:
        return StorageSize(codes=n_weights * full_precision_bits)
    check_width(scheme.grid, weight_bits)
    if scheme.row_bits:
        return _size_of_parts(rows, columns, weight_bits, scheme)
    codes = n_weights * weight_bits
    if scheme.sparsity is not None:
        check_sparse(columns, weight_bits)
        codes = kept_weights(n_weights) * (weight_bits + PLACE_BITS)
    if scheme.grid is Grid.K_BLOCKS:
        if columns % K_BLOCK:
            msg = f"the grid '{scheme.grid}' needs {K_BLOCK} to divide the row; got {columns}"
            raise InvalidInput(msg, columns=columns)
        blocks = n_weights // K_BLOCK
        return StorageSize(codes=codes, scales=blocks * K_BLOCKS[weight_bits].overhead_bits)
    scale_count = n_scales(rows, columns, scheme)
    zero_point_bits = scale_count * weight_bits if scheme.grid is Grid.ASYMMETRIC else 0
    if scheme.row_alignment_bits:
        padding = rows * (-(columns * weight_bits) % scheme.row_alignment_bits)
        padding += -zero_point_bits % scheme.row_alignment_bits
    else:
        padding = -codes % 8 + -zero_point_bits % 8
    return StorageSize(
        codes=codes,
        scales=(
            scale_count * scales_per_line(weight_bits, scheme) * scheme.scale_format.bits
            + scheme.scale_format.tensor_bits
        ),
        zero_points=zero_point_bits,
        padding=padding,
    )


def kept_weights(n_weights: int) -> int:
    """Return how many of ``n_weights`` (or products) are left with ``2:4``."""
    return n_weights * SPARSE_KEPT // SPARSE_BLOCK


def check_sparse(columns: int, weight_bits: int) -> None:
    """Raise ``InvalidInput`` unless rows of so many weights can have ``2:4``."""
    if columns % SPARSE_BLOCK or not 2 <= weight_bits <= 8:
        msg = (
            f"sparsity {Sparsity.TWO_OF_FOUR} needs {SPARSE_BLOCK} to divide the row, and 2 to 8 "
            f"bits; got {columns} columns and {weight_bits} bits"
        )
        raise InvalidInput(msg, columns=columns, weight_bits=weight_bits)


def _size_of_parts(rows: int, columns: int, weight_bits: int, scheme: Scheme) -> StorageSize:
    """Return what parts of different bit-widths take, and the order of their rows."""
    counts = {bits: scheme.row_bits.count(bits) for bits in sorted(set(scheme.row_bits))}
    if len(scheme.row_bits) != rows or weight_bits != max(counts):
        msg = (
            f"row_bits must hold a bit-width for each of {rows} rows, at most {weight_bits}; got "
            f"{len(scheme.row_bits)}, at most {max(counts)}"
        )
        raise InvalidInput(msg, rows=rows, weight_bits=weight_bits)
    total = StorageSize(codes=0, order=rows * order_bits(rows))
    for bits, n in counts.items():
        total += storage_size(n, columns, bits, scheme.of_parts)
    return total


def order_bits(rows: int) -> int:
    """Return the bits of one entry of an order of rows: whole bytes that can name each."""
    return next(bits for bits in (8, 16, 32) if rows <= 1 << bits)

"""Pack codes into bits and back, exactly as ``storage.storage_size`` counts them.

The bit stream is little-endian: code ``i`` takes the bits ``i b .. (i+1) b - 1``, least
significant bit first, and bit ``k`` of the stream is bit ``k % 8`` of byte ``k // 8``. Codes are
stored without sign: symmetric codes as ``code + 2^(b-1)``, one-bit codes -1 and +1 as 0 and 1,
codes of codebooks, powers of two and small floats as they are.
Of weights with sparsity 2:4 only those are stored that stay: the bits of a code, then two bits of
its place among four neighbours, as one code. Nothing is stored of pruned weights.
Dense packing runs over the whole matrix, row by row, and pads its end to a byte; aligned packing
pads every row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from bitquota.candidates.storage import (
    PLACE_BITS,
    PRUNED_BITS,
    SMALL_SCALES,
    Granularity,
    Grid,
    StorageSize,
    kept_weights,
    n_scales,
    order_bits,
    scales_per_line,
)
from bitquota.errors import InvalidInput
from bitquota.quantizers.float_formats import scale_bytes, scales_of_bytes
from bitquota.quantizers.grid import levels
from bitquota.quantizers.parameters import SCALE_DTYPES
from bitquota.quantizers.sparsity import at_places, with_places
from bitquota.quantizers.weights import QuantizedWeight, pruned

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray
    from torch import Tensor

    from bitquota.candidates.storage import ScaleFormat, Scheme

CODES_AT_ONCE = 1 << 20
"""Codes expanded to single bits at a time (a multiple of 8): bounds memory to 16 MiB."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedWeight:
    """A weight as the bytes that are written to disk.

    Attributes:
        codes: u8[...], the packed codes.
        scales: u8[...], the scales in their format, little-endian; the factor of the tensor first,
            where scales have one.
        zero_points: u8[...], packed like codes without row padding; empty on a symmetric grid.
        rows: Output channels.
        columns: Weights per output channel.
        bits: Bit-width.
        scheme: Everything else.
    """

    codes: NDArray[np.uint8]
    scales: NDArray[np.uint8]
    zero_points: NDArray[np.uint8]
    rows: int
    columns: int
    bits: int
    scheme: Scheme

    @property
    def n_bytes(self) -> int:
        """Bytes of all parts."""
        return len(self.codes) + len(self.scales) + len(self.zero_points)

    @property
    def size(self) -> StorageSize:
        """The same split as ``storage_size``, counted from the bytes that are there."""
        codes = self.rows * self.columns * self.bits
        if self.scheme.sparsity is not None:
            codes = kept_weights(self.rows * self.columns) * (self.bits + PLACE_BITS)
        n_zero_points = 0
        if self.scheme.grid is Grid.ASYMMETRIC:
            n_zero_points = n_scales(self.rows, self.columns, self.scheme)
        zero_points = n_zero_points * self.bits
        stored = 8 * (len(self.codes) + len(self.zero_points))
        return StorageSize(
            codes=codes,
            scales=8 * len(self.scales),
            zero_points=zero_points,
            padding=stored - codes - zero_points,
        )


def pack(weight: QuantizedWeight) -> PackedWeight:
    """Return ``weight`` as bytes. Exact: ``unpack`` gives the same codes, scales, zero points.

    Raises:
        InvalidInput: A code does not fit the bit-width.
    """
    rows, columns = weight.codes.shape
    scheme, bits = weight.scheme, weight.bits
    zero_points = np.zeros(0, dtype=np.uint8)
    if bits == PRUNED_BITS:
        return PackedWeight(
            codes=zero_points, scales=zero_points, zero_points=zero_points, rows=rows,
            columns=columns, bits=bits, scheme=scheme,
        )  # fmt: skip
    if weight.zero_points is not None:
        flat = _unsigned(weight.zero_points, bits, signed=False).reshape(1, -1)
        zero_points = pack_bits(flat, bits, alignment_bits=scheme.row_alignment_bits)
    stored = weight.scales.detach().cpu().contiguous().reshape(-1)
    head = np.zeros(0, dtype=np.uint8)
    if scheme.scale_format in SMALL_SCALES:
        stored, factor = scale_bytes(stored, scheme.scale_format)
        if scheme.scale_format.tensor_bits:
            head = np.array([factor], dtype="<f4").view(np.uint8)
    codes = _unsigned(weight.codes, bits, signed=scheme.grid is Grid.SYMMETRIC)
    width = bits
    if scheme.sparsity is not None:
        codes, width = with_places(codes, weight.codes.cpu().numpy() != 0, bits), bits + PLACE_BITS
    return PackedWeight(
        codes=pack_bits(codes, width, alignment_bits=scheme.row_alignment_bits),
        scales=np.concatenate([head, stored.view(torch.uint8).numpy()]),
        zero_points=zero_points,
        rows=rows,
        columns=columns,
        bits=bits,
        scheme=scheme,
    )


def unpack(packed: PackedWeight) -> QuantizedWeight:
    """Return the weight that ``pack`` was given.

    Raises:
        InvalidInput: The bytes are not as many as shape and bit-width need.
    """
    scheme, bits = packed.scheme, packed.bits
    rows, columns = packed.rows, packed.columns
    if bits == PRUNED_BITS:
        return pruned(rows, columns, scheme)
    count = n_scales(rows, columns, scheme)
    stored = count * scales_per_line(bits, scheme)
    shape = (1, -1) if scheme.granularity is Granularity.TENSOR else (rows, -1)
    wanted = (stored * scheme.scale_format.bits + scheme.scale_format.tensor_bits) // 8
    if len(packed.scales) != wanted:
        msg = (
            f"{stored} scales in {scheme.scale_format} must take {wanted} bytes; "
            f"got {len(packed.scales)}"
        )
        raise InvalidInput(msg)
    if scheme.sparsity is not None:
        stored = kept_weights(columns)
        joined = unpack_bits(packed.codes, rows, stored, bits + PLACE_BITS)
        unsigned = at_places(joined, columns, bits, fill=-levels(bits)[0])
    else:
        unsigned = unpack_bits(
            packed.codes, rows, columns, bits, alignment_bits=scheme.row_alignment_bits
        )
    codes = torch.from_numpy(unsigned.astype(np.int32))
    zero_points = None
    if scheme.grid is Grid.ASYMMETRIC:
        flat = unpack_bits(
            packed.zero_points, 1, count, bits, alignment_bits=scheme.row_alignment_bits
        )
        zero_points = torch.from_numpy(flat.astype(np.int32)).reshape(shape)
    elif scheme.grid is Grid.SYMMETRIC and bits == 1:
        codes = codes * 2 - 1
    elif scheme.grid is Grid.SYMMETRIC:
        codes = codes + levels(bits)[0]
    return QuantizedWeight(
        codes=codes,
        scales=_read_scales(packed.scales, scheme.scale_format).reshape(shape),
        zero_points=zero_points,
        bits=bits,
        scheme=scheme,
    )


PARTS = ("codes", "scales", "zero_points")
"""What a packed weight consists of."""


def packed_tensors(stem: str, weight: QuantizedWeight) -> dict[str, NDArray[np.uint8]]:
    """Return the bytes of ``weight`` by name: ``STEM.codes`` and so on, none of them empty.

    Where rows have several bit-widths, the parts of one width are ``STEM.w2.codes`` and so on, and
    ``STEM.order`` says which rows they have. Nothing is stored of rows of zeros.
    """
    parts = [part for _, part in weight.parts()]
    mixed = bool(weight.scheme.row_bits)
    found: dict[str, NDArray[np.uint8]] = {}
    for part in parts:
        packed = pack(part)
        under = f"{stem}.w{part.bits}" if mixed else stem
        found |= {f"{under}.{what}": getattr(packed, what) for what in PARTS}
    if mixed:
        kind = np.dtype(f"<u{order_bits(len(weight.codes)) // 8}")
        found[f"{stem}.order"] = weight.order().numpy().astype(kind).view(np.uint8)
    return {name: data for name, data in found.items() if len(data)}


def from_packed_tensors(
    stem: str,
    tensors: Mapping[str, NDArray[np.uint8]],
    shape: tuple[int, int],
    bits: int,
    scheme: Scheme,
) -> QuantizedWeight:
    """Return the weight of which ``packed_tensors`` made ``tensors``, rows and columns ``shape``.

    Raises:
        InvalidInput: The bytes are not as many as shape and bit-width need.
        KeyError: The order of the rows is missing.
    """
    nothing = np.zeros(0, dtype=np.uint8)

    def read(under: str, rows: int, width: int, own: Scheme) -> QuantizedWeight:
        data = {what: tensors.get(f"{under}.{what}", nothing) for what in PARTS}
        return unpack(PackedWeight(**data, rows=rows, columns=shape[1], bits=width, scheme=own))

    if not scheme.row_bits:
        return read(stem, shape[0], bits, scheme)
    kind = f"<u{order_bits(shape[0]) // 8}"
    order = torch.from_numpy(tensors[f"{stem}.order"].view(kind).astype(np.int64))
    counts = [(width, scheme.row_bits.count(width)) for width in sorted(set(scheme.row_bits))]
    return QuantizedWeight.of_parts(
        [
            (rows, read(f"{stem}.w{width}", n, width, scheme.of_parts))
            for rows, (width, n) in zip(
                torch.split(order, [n for _, n in counts]), counts, strict=True
            )
        ],
        scheme,
    )


def _read_scales(data: NDArray[np.uint8], scale_format: ScaleFormat) -> Tensor:
    head, codes = np.split(data, [scale_format.tensor_bits // 8])
    stored = torch.from_numpy(codes.copy())
    if scale_format not in SMALL_SCALES:
        return stored.view(SCALE_DTYPES[scale_format])
    factor = float(head.view("<f4")[0]) if len(head) else 1.0
    return scales_of_bytes(stored, scale_format, factor)


def pack_bits(
    codes: NDArray[np.uint16], bits: int, *, alignment_bits: int = 0
) -> NDArray[np.uint8]:
    """Return u8[...]: the bit stream of ``codes: u16[rows, columns]``.

    Args:
        codes: Values below ``2^bits``.
        bits: 1 to 16.
        alignment_bits: Each row is padded to a multiple of this; 0 pads only the end, to a byte.
    """
    rows, columns = codes.shape
    if not alignment_bits:
        flat = codes.reshape(-1)
        parts = [
            np.packbits(_to_bits(flat[k : k + CODES_AT_ONCE], bits).reshape(-1), bitorder="little")
            for k in range(0, len(flat), CODES_AT_ONCE)
        ]
        return np.concatenate(parts)
    padding = -(columns * bits) % alignment_bits
    parts = []
    at_once = max(1, CODES_AT_ONCE // columns)
    for k in range(0, rows, at_once):
        chunk = codes[k : k + at_once]
        row_bits = _to_bits(chunk.reshape(-1), bits).reshape(len(chunk), columns * bits)
        padded = np.pad(row_bits, ((0, 0), (0, padding)))
        parts.append(np.packbits(padded, axis=1, bitorder="little").reshape(-1))
    return np.concatenate(parts)


def unpack_bits(
    packed: NDArray[np.uint8], rows: int, columns: int, bits: int, *, alignment_bits: int = 0
) -> NDArray[np.uint16]:
    """Return u16[rows, columns], the codes that ``pack_bits`` was given.

    Raises:
        InvalidInput: ``packed`` has another length than these codes take.
    """
    row_bits = columns * bits
    if alignment_bits:
        row_bits += -row_bits % alignment_bits
    n_bytes = -(-rows * row_bits // 8)
    if packed.dtype != np.uint8 or packed.shape != (n_bytes,):
        msg = (
            f"{rows} x {columns} codes of {bits} bits must take {n_bytes} bytes; got "
            f"{packed.shape} of {packed.dtype}"
        )
        raise InvalidInput(msg, expected=n_bytes, got=len(packed))
    if not alignment_bits:
        total = rows * columns
        out = np.empty(total, dtype=np.uint16)
        for k in range(0, total, CODES_AT_ONCE):
            n = min(CODES_AT_ONCE, total - k)
            start = k * bits // 8
            piece = packed[start : start + -(-n * bits // 8)]
            stream = np.unpackbits(piece, count=n * bits, bitorder="little")
            out[k : k + n] = _from_bits(stream.reshape(n, bits))
        return out.reshape(rows, columns)
    lines = packed.reshape(rows, row_bits // 8)
    result = np.empty((rows, columns), dtype=np.uint16)
    at_once = max(1, CODES_AT_ONCE // columns)
    for k in range(0, rows, at_once):
        stream = np.unpackbits(
            lines[k : k + at_once], axis=1, count=columns * bits, bitorder="little"
        )
        result[k : k + at_once] = _from_bits(stream.reshape(-1, bits)).reshape(-1, columns)
    return result


def _to_bits(codes: NDArray[np.uint16], bits: int) -> NDArray[np.uint8]:
    """Return u8[n, bits] of zeros and ones, least significant first."""
    shifts = np.arange(bits, dtype=np.uint16)
    return ((codes[:, None] >> shifts) & 1).astype(np.uint8)


def _from_bits(stream: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Return u16[n] of ``stream: u8[n, bits]``."""
    codes = np.zeros(len(stream), dtype=np.uint16)
    for k in range(stream.shape[1]):
        codes |= stream[:, k].astype(np.uint16) << np.uint16(k)
    return codes


def _unsigned(codes: Tensor, bits: int, *, signed: bool) -> NDArray[np.uint16]:
    values = codes.detach().cpu().numpy().astype(np.int64)
    if signed:
        values = (values + 1) // 2 if bits == 1 else values - levels(bits)[0]
    if values.min() < 0 or values.max() >= 2**bits:
        msg = (
            f"codes of {bits} bits must lie in a range of {2**bits} values; got codes from "
            f"{int(codes.min())} to {int(codes.max())}"
        )
        raise InvalidInput(msg, bits=bits)
    return values.astype(np.uint16)

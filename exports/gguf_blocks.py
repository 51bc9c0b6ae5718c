"""The bytes of GGUF's block types: 32 weights with one scale, or super-blocks of 256."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bitquota.candidates.storage import K_BLOCK, K_BLOCKS, Grid
from bitquota.quantizers.kquants import split_parameters

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bitquota.quantizers.weights import QuantizedWeight

BLOCK = 32
TYPES = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}
K_TYPES = {bits: f"Q{bits}_K" for bits in K_BLOCKS}


def type_name(weight: QuantizedWeight) -> str:
    """Return the GGUF type that holds ``weight``."""
    names = K_TYPES if weight.scheme.grid is Grid.K_BLOCKS else TYPES
    return names[weight.bits]


def blocks_of(weight: QuantizedWeight, order: NDArray[np.int64] | None) -> NDArray[np.uint8]:
    """Return ``u8[rows, bytes]`` of the weight's blocks, rows taken in ``order``."""
    made = _k_blocks(weight) if weight.scheme.grid is Grid.K_BLOCKS else _plain_blocks(weight)
    return made if order is None else made[order]


def _plain_blocks(weight: QuantizedWeight) -> NDArray[np.uint8]:
    """Blocks of 32 codes, each behind its fp16 scale."""
    codes = weight.codes.cpu().numpy()
    rows = len(codes)
    grouped = codes.reshape(rows, -1, BLOCK)
    scales = weight.scales.cpu().numpy()
    head = scales.astype("<f2").reshape(rows, -1, 1).view(np.uint8)
    if weight.bits == 8:
        body = grouped.astype(np.int8).view(np.uint8)
        return np.concatenate([head, body], axis=2).reshape(rows, -1)
    unsigned = (grouped + 2 ** (weight.bits - 1)).astype(np.uint8)
    # Byte j holds the low four bits of values j and j + 16.
    low = unsigned & 15
    nibbles = low[:, :, :16] | (low[:, :, 16:] << 4)
    if weight.bits == 4:
        return np.concatenate([head, nibbles], axis=2).reshape(rows, -1)
    fifth = np.packbits(unsigned >> 4, axis=2, bitorder="little")
    return np.concatenate([head, fifth, nibbles], axis=2).reshape(rows, -1)


def _k_blocks(weight: QuantizedWeight) -> NDArray[np.uint8]:
    """Super-blocks: the order of parts differs from type to type."""
    bits = weight.bits
    rows = len(weight.codes)
    n = weight.codes.numel() // K_BLOCK
    shift = 0 if K_BLOCKS[bits].affine else 2 ** (bits - 1)
    codes = (weight.codes.cpu().numpy() + shift).astype(np.uint8).reshape(n, K_BLOCK)
    units, scales, minima = (part.cpu().numpy() for part in split_parameters(weight.scales, bits))
    units = units.astype("<f2").view(np.uint8).reshape(n, -1)
    if bits == 2:
        parts = [(scales | minima << 4).astype(np.uint8), _crumbs(codes), units]
    elif bits == 3:
        parts = [_planes(codes >> 2), _crumbs(codes & 3), _signed_scales(scales), units]
    elif bits == 4:
        parts = [units, _scales_and_minima(scales, minima), _nibbles(codes, 32)]
    elif bits == 5:
        packed = _scales_and_minima(scales, minima)
        parts = [units, packed, _planes(codes >> 4), _nibbles(codes & 15, 32)]
    else:
        body = [_nibbles(codes & 15, 64), _crumbs(codes >> 4)]
        parts = [*body, scales.astype(np.int8).view(np.uint8), units]
    return np.concatenate(parts, axis=1).reshape(rows, -1)


def _crumbs(codes: NDArray[Any]) -> NDArray[np.uint8]:
    """Two bits each: byte i of a half holds values i, i + 32, i + 64 and i + 96 of it."""
    split = codes.reshape(len(codes), 2, 4, 32)
    byte = split[:, :, 0] | split[:, :, 1] << 2 | split[:, :, 2] << 4 | split[:, :, 3] << 6
    packed: NDArray[np.uint8] = byte.reshape(len(codes), 64).astype(np.uint8)
    return packed


def _nibbles(codes: NDArray[Any], run: int) -> NDArray[np.uint8]:
    """Four bits each: a byte holds values that lie ``run`` apart."""
    split = codes.reshape(len(codes), -1, 2, run)
    byte = split[:, :, 0] | split[:, :, 1] << 4
    packed: NDArray[np.uint8] = byte.reshape(len(codes), 128).astype(np.uint8)
    return packed


def _planes(bit: NDArray[Any]) -> NDArray[np.uint8]:
    """One bit each: bit k of byte i is that of value 32 k + i."""
    return np.packbits(bit.reshape(len(bit), 8, 32), axis=1, bitorder="little").reshape(
        len(bit), 32
    )


def _signed_scales(scales: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Sixteen scales of six bits: eight bytes of low nibbles, four of the upper two bits."""
    shifted = (scales + 32).astype(np.uint8)
    low, high = shifted & 15, shifted >> 4
    first = low[:, :8] | low[:, 8:] << 4
    upper = high.reshape(len(scales), 4, 4)
    last = upper[:, 0] | upper[:, 1] << 2 | upper[:, 2] << 4 | upper[:, 3] << 6
    return np.concatenate([first, last], axis=1)


def _scales_and_minima(scales: NDArray[np.int32], minima: NDArray[np.int32]) -> NDArray[np.uint8]:
    """Eight scales and eight minima of six bits in twelve bytes."""
    s, m = scales.astype(np.uint8), minima.astype(np.uint8)
    first = s[:, :4] | s[:, 4:] >> 4 << 6
    second = m[:, :4] | m[:, 4:] >> 4 << 6
    third = (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4
    return np.concatenate([first, second, third], axis=1)

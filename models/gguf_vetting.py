"""GGUF files, vetted before any other reader sees them: what they say, and where their tensors lie.

A header is lengths and counts that a reader believes. Here each is held against the bytes that are
there, so that a file which is cut short, altered or hostile is one sentence and takes no memory.

References:
    GGUF: ggml-org/ggml, its page on GGUF

Design: docs/design/models.md
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from bitquota.errors import InvalidModel
from bitquota.models.gguf_names import gguf_package

if TYPE_CHECKING:
    from pathlib import Path

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MOST_ENTRIES = 100_000
_LONGEST_NAME = 1024
_MOST_DIMENSIONS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """One tensor of a GGUF file.

    Attributes:
        shape: As torch has it, the last dimension being contiguous.
        stored: Name of its type, such as ``Q4_K``.
        offset: Bytes from the start of the file.
        n_bytes: Its size.
    """

    shape: tuple[int, ...]
    stored: str
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """What a GGUF file says beside its values.

    Attributes:
        entries: Numbers and strings by key; an array is its length.
        tensors: By name.
    """

    entries: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the kind of model."""
        return str(self.entries["general.architecture"])


class _Reader:
    """Reads little-endian values and never beyond the end of the file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._size = size

    def take(self, n: int) -> bytes:
        if n > self._size - self._file.tell():
            msg = "it ends in the middle of its header"
            raise ValueError(msg)
        return self._file.read(n)

    def number(self, code: str) -> Any:  # noqa: ANN401  # int, float or bool
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self, most: int | None = None) -> str:
        length = self.number("Q")
        if most is not None and length > most:
            msg = f"a name has {length:,} bytes"
            raise ValueError(msg)
        return self.take(length).decode("utf-8")

    def value(self, kind: int) -> Any:  # noqa: ANN401  # any value of GGUF
        """Return a number or a string, or the length of an array."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            msg = f"it has a value of the unknown type {kind}"
            raise ValueError(msg)
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            self.take(struct.calcsize(f"<{_SCALARS[inner]}") * count)
        elif inner == _STRING:
            if 8 * count > self._size:  # before the loop: each string takes eight bytes
                msg = f"it announces {count:,} strings"
                raise ValueError(msg)
            for _ in range(count):
                self.take(self.number("Q"))
        else:
            msg = f"it has an array of the unknown type {inner}"
            raise ValueError(msg)
        return count

    def count(self, what: str) -> int:
        n: int = self.number("Q")
        if n > _MOST_ENTRIES:
            msg = f"it announces {n:,} {what}"
            raise ValueError(msg)
        return n

    @property
    def position(self) -> int:
        return self._file.tell()


def vet_gguf(path: Path) -> GgufHeader:
    """Return what a GGUF file says, after checking that every byte it speaks of is there.

    Raises:
        InvalidModel: Not a whole little-endian GGUF of version 2 or 3; tensors of unknown types,
            overlapping, or beyond the end; one part of several.
        MissingDependency: gguf is not installed.

    Cost: reads the header.
    """
    gguf = gguf_package()
    sizes = {
        int(kind): (str(kind.name), tuple(gguf.GGML_QUANT_SIZES[kind]))
        for kind in gguf.GGMLQuantizationType
    }
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            header = _header(_Reader(file, size), sizes, size)
    except (OSError, ValueError, struct.error) as err:
        msg = (
            f"a .gguf must be a whole GGUF file; '{path.name}' cannot be read: {err}: it was cut "
            "short or altered, copy or download it again"
        )
        raise InvalidModel(msg, source=str(path)) from err
    if (parts := header.entries.get("split.count", 1)) != 1:
        msg = (
            f"a .gguf must hold the whole model; '{path.name}' is one of {parts} parts: join them "
            "with llama-gguf-split --merge"
        )
        raise InvalidModel(msg, source=str(path), parts=parts)
    return header


def _header(
    reader: _Reader, sizes: dict[int, tuple[str, tuple[int, int]]], size: int
) -> GgufHeader:
    """Read everything in front of the values; raises ``ValueError`` or ``struct.error``."""
    if reader.take(4) != b"GGUF":
        msg = "it does not begin with GGUF"
        raise ValueError(msg)
    if (version := reader.number("I")) not in _VERSIONS:
        msg = f"its version must be 2 or 3, little-endian; it is {version}"
        raise ValueError(msg)
    n_tensors, n_entries = reader.count("tensors"), reader.count("entries")
    entries: dict[str, Any] = {}
    for _ in range(n_entries):
        key = reader.text(_LONGEST_NAME)
        entries[key] = reader.value(reader.number("I"))
    if "general.architecture" not in entries:
        msg = "it does not say its architecture"
        raise ValueError(msg)
    return GgufHeader(entries=entries, tensors=_tensors(reader, n_tensors, entries, sizes, size))


def _tensors(
    reader: _Reader,
    n_tensors: int,
    entries: dict[str, Any],
    sizes: dict[int, tuple[str, tuple[int, int]]],
    size: int,
) -> dict[str, StoredTensor]:
    """Read the table of tensors; raises ``ValueError``.

    Args:
        reader: At its beginning.
        n_tensors: Its length.
        entries: What stands in front of it.
        sizes: Name, weights and bytes of a block of each type.
        size: Of the file.
    """
    alignment = entries.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 16:
        msg = f"its alignment must be between 1 and 65,536; it is {alignment}"
        raise ValueError(msg)
    table = []
    for _ in range(n_tensors):
        name, n_dimensions = reader.text(_LONGEST_NAME), reader.number("I")
        if not 1 <= n_dimensions <= _MOST_DIMENSIONS:
            msg = f"'{name}' has {n_dimensions} dimensions"
            raise ValueError(msg)
        shape = tuple(reader.number("Q") for _ in range(n_dimensions))[::-1]
        table.append((name, shape, reader.number("I"), reader.number("Q")))
    start = -(-reader.position // alignment) * alignment
    found: dict[str, StoredTensor] = {}
    end = start
    for name, shape, kind, offset in sorted(table, key=lambda row: row[3]):
        if kind not in sizes or name in found:
            what = "twice" if name in found else f"with the unknown type {kind}"
            msg = f"it has '{name}' {what}"
            raise ValueError(msg)
        stored, (n_block, n_bytes) = sizes[kind]
        if shape[-1] % n_block or 0 in shape:
            msg = f"rows of '{name}', {shape[-1]:,} long, must be whole blocks of {n_block}"
            raise ValueError(msg)
        begin, length = start + offset, math.prod(shape) // n_block * n_bytes
        if begin < end or begin + length > size:
            msg = f"'{name}' must lie inside the file and in no other tensor"
            raise ValueError(msg)
        end = begin + length
        found[name] = StoredTensor(shape=shape, stored=stored, offset=begin, n_bytes=length)
    return {name: found[name] for name, *_ in table}

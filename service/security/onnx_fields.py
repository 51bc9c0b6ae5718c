"""Whether an ONNX file is whole: its protobuf fields, walked without building any message.

References:
    Protocol Buffers, "Encoding": tags, wire types, and lengths as base-128 varints.
    onnx.proto3: ``ModelProto.graph`` is field 7.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitquota.errors import InvalidModel, TooLarge

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO

MAX_FIELDS = 2_000_000
"""Fields of a model and of its graph: nodes, initializers, inputs, descriptions of values."""

_GRAPH = 7
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def check_onnx(path: Path) -> None:
    """Raise unless every field of a model and of its graph lies within the file.

    Raises:
        InvalidModel: It is torn, is no protobuf, or has no graph.
        TooLarge: It has more fields than ``MAX_FIELDS``.

    Cost: some 2 µs a field; tensors are skipped.
    """
    graph: tuple[int, int] | None = None
    with path.open("rb") as file:
        size = file.seek(0, 2)
        count = 0
        for number, start, length in _fields(file, 0, size):
            count = _counted(count)
            if number == _GRAPH:
                graph = (start, length)
        if graph is None:
            msg = "an ONNX file must hold a graph; this one holds none: export the model again"
            raise InvalidModel(msg)
        for _ in _fields(file, graph[0], graph[0] + graph[1]):
            count = _counted(count)


def _counted(count: int) -> int:
    if count >= MAX_FIELDS:
        msg = f"an ONNX file must have at most {MAX_FIELDS:,} fields; it has more"
        raise TooLarge(msg, limit=MAX_FIELDS)
    return count + 1


def _fields(file: BinaryIO, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield number, start and length of each field between two places of a file."""
    at = start
    while at < end:
        file.seek(at)
        head = file.read(20)
        tag, n = _varint(head, 0, at)
        kind = tag & 7
        if kind == _VARINT:
            length = _varint(head, n, at)[1] - n
        elif kind == _BYTES:
            length, n = _varint(head, n, at)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise _torn(at)
        body = at + n
        if tag >> 3 == 0 or body + length > end:
            raise _torn(at)
        yield tag >> 3, body, length
        at = body + length


def _varint(head: bytes, at: int, where: int) -> tuple[int, int]:
    """Return a number of at most 64 bits and where it ends."""
    value = 0
    for k in range(10):
        if at + k >= len(head):
            break
        value |= (head[at + k] & 0x7F) << 7 * k
        if head[at + k] < 0x80:
            return value, at + k + 1
    raise _torn(where)


def _torn(at: int) -> InvalidModel:
    msg = (
        f"an ONNX file must be whole; at byte {at:,} it goes on past its end or is no protobuf: "
        "upload it again"
    )
    return InvalidModel(msg, byte=at)

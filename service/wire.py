"""Messages between a driver and its evaluator: a JSON head and raw bytes, never a pickle.

One frame is a head length (4 bytes), a head (canonical JSON) that names the lengths of the parts,
and the parts. The evaluator runs models of strangers, so the reader trusts no length.

Design: docs/design/sandbox.md
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING

import numpy as np

from bitquota.canonical import canonical_json
from bitquota.errors import MeasurementFailed, ServiceError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import IO

    from numpy.typing import NDArray

    from bitquota.canonical import JsonObject

MAX_HEAD_BYTES = 64 * 2**20
MAX_VALUES = 4_000_000
"""In a head: a small list takes 60 bytes of memory for two bytes of text."""
MAX_MESSAGE_BYTES = 2**30
"""All parts of one message together."""
_LENGTH = struct.Struct(">I")


def send(stream: IO[bytes], head: JsonObject, parts: Sequence[bytes] = ()) -> None:
    """Write one message and flush."""
    text = canonical_json(head | {"parts": [len(part) for part in parts]}).encode()
    stream.write(b"".join((_LENGTH.pack(len(text)), text, *parts)))
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[JsonObject, list[bytes]] | None:
    """Return the next message, or ``None`` at the end of the stream.

    Raises:
        ServiceError: The stream ended inside a message: the other side was killed.
        MeasurementFailed: It is no such stream.
    """
    first = stream.read(_LENGTH.size)
    if not first:
        return None
    if len(first) < _LENGTH.size:
        raise _cut("it ended inside a length")
    (length,) = _LENGTH.unpack(first)
    if length > MAX_HEAD_BYTES:
        raise _broken(f"a head of {length:,} bytes")
    try:
        text = _exactly(stream, length)
        if sum(map(text.count, (b",", b"[", b"{"))) > MAX_VALUES:
            raise _broken(f"a head of more than {MAX_VALUES:,} values")
        head = json.loads(text, parse_constant=_no_number)
        sizes = head.pop("parts")
        if not all(type(n) is int and n >= 0 for n in sizes) or sum(sizes) > MAX_MESSAGE_BYTES:
            raise _broken("parts of impossible size")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise _broken("a head that is no JSON object") from err
    return head, [_exactly(stream, n) for n in sizes]


def pack(arrays: Mapping[str, NDArray[np.float64]]) -> tuple[JsonObject, list[bytes]]:
    """Return head and parts that carry named float64 arrays."""
    entries = [(name, np.ascontiguousarray(a, dtype="<f8")) for name, a in arrays.items()]
    head = {"entries": [[name, list(a.shape)] for name, a in entries]}
    return head, [a.tobytes() for _, a in entries]


def unpack(head: JsonObject, parts: Sequence[bytes]) -> dict[str, NDArray[np.float64]]:
    """Return the arrays that ``pack`` packed; raises ``MeasurementFailed`` if they do not fit."""
    try:
        return {
            str(name): np.frombuffer(part, dtype="<f8").reshape([int(n) for n in shape])
            for (name, shape), part in zip(head["entries"], parts, strict=True)
        }
    except (ValueError, KeyError, TypeError, OverflowError) as err:
        raise _broken("arrays that do not fit their shapes") from err


def _exactly(stream: IO[bytes], length: int) -> bytes:
    data = stream.read(length)
    if len(data) < length:
        raise _cut("it ended inside a message")
    return data


def _no_number(text: str) -> float:
    raise ValueError(text)


def _cut(what: str) -> ServiceError:
    return ServiceError(f"an evaluator must send whole messages; {what}")


def _broken(what: str) -> MeasurementFailed:
    return MeasurementFailed(f"a worker must send whole messages; got {what}")

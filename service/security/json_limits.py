"""Bounds of JSON that a stranger sent, counted before any of it becomes Python objects.

A megabyte of ``[[],[],…]`` becomes 40 MB of lists. So the text is scanned first, in pieces and
in time proportional to its length, for how deep it nests, how many values it has, and how long
its numbers are; only what passes is parsed.

Design: docs/design/sandbox.md
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bitquota.errors import InvalidInput, TooLarge

if TYPE_CHECKING:
    from numpy.typing import NDArray

_PIECE = 2**20
_FEW = 10_000
"""Quotes of a piece up to which it is split at them."""
_END = b"\0\0"
# A whole string becomes nothing. One that the piece breaks off takes the first of the two NULs
# that end every piece, and leaves the backslash that escapes what comes next, if one does.
_STRING = re.compile(rb'"(?>[^"\\\0]*(?:\\[^\0][^"\\\0]*)*)(?:"|(\\?)\0)', re.DOTALL)
_DIGITS = re.compile(rb"[0-9]+")
_EXPONENT = re.compile(rb"[eE]\+?([0-9]+)")
_NOT_FINITE = re.compile(rb"[NI]")
_WHOLE_STRING = re.compile(rb'"(?>[^"\\]*(?:\\.[^"\\]*)*)(?:"|\\?\Z)', re.DOTALL)
_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


def _steps() -> NDArray[np.int8]:
    """Return by byte how it changes the depth."""
    table = np.zeros(256, np.int8)
    table[list(b"[{")] = 1
    table[list(b"]}")] = -1
    return table


_DEPTH = _steps()


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonLimits:
    """How large a JSON text may be.

    Attributes:
        size: Bytes.
        depth: Objects and lists inside each other.
        values: Values of all kinds, names of members included.
        digits: Digits in a row in a number.
        exponent: Largest power of ten that a number is written with.
    """

    size: int
    depth: int
    values: int
    digits: int
    exponent: int


REQUEST = JsonLimits(size=2**20, depth=16, values=100_000, digits=40, exponent=260)
"""Bodies of requests; ``size`` is the default of a setting."""

DOCUMENT = JsonLimits(size=64 * 2**20, depth=64, values=4_000_000, digits=400, exponent=300)
"""Uploaded plans, and the graphs and headers of uploaded models. A graph of a thousand layers has
some 500,000 values."""


def parse_json(data: bytes, limits: JsonLimits, what: str) -> Any:  # noqa: ANN401  # any JSON
    """Return the value of a JSON text that keeps ``limits``.

    Args:
        data: UTF-8.
        limits: What it must keep.
        what: What it is, for errors: ``a plan``.

    Raises:
        TooLarge: It is longer, deeper, or has more values or longer numbers than permitted.
        InvalidInput: It is no JSON in UTF-8, or has a number that is not finite.
    """
    check_json(data, limits, what)
    try:
        return json.loads(data)
    except RecursionError as err:
        msg = f"{what} must be nested at most {limits.depth} deep; it is deeper"
        raise TooLarge(msg, depth=limits.depth) from err
    except ValueError as err:
        msg = f"{what} must be JSON in UTF-8; got: {err}"
        raise InvalidInput(msg) from err


def check_json(data: bytes, limits: JsonLimits, what: str) -> None:
    """Raise unless a JSON text keeps ``limits``; says nothing about whether it is valid.

    Raises:
        TooLarge: As ``parse_json``.
        InvalidInput: It holds a NUL, as UTF-16 would, or a number that is not finite.

    Cost: some 20 ms a MB; memory of a few MB.
    """
    if len(data) > limits.size:
        raise _over(what, "bytes", limits.size, len(data))
    depth = values = 0
    carry = b""
    for start in range(0, len(data), _PIECE):
        piece = data[start : start + _PIECE]
        if b"\0" in piece:
            msg = f"{what} must be JSON in UTF-8 without NUL characters; got one"
            raise InvalidInput(msg)
        # What is left is structure and numbers.
        text, carry = _outside_strings(carry + piece)
        values += sum(map(text.count, (b",", b":", b"[", b"{")))
        if values > limits.values:
            raise _over(what, "values", limits.values, values)
        heights = np.cumsum(_DEPTH[np.frombuffer(text, np.uint8)], dtype=np.int32)
        if heights.size:
            if depth + int(heights.max()) > limits.depth:
                msg = f"{what} must be nested at most {limits.depth} deep; it is deeper"
                raise TooLarge(msg, depth=limits.depth)
            depth += int(heights[-1])
        _check_numbers(text, limits, what)


def _outside_strings(piece: bytes) -> tuple[bytes, bytes]:
    """Return what of ``piece`` is in no string, and the start of a string that it breaks off."""
    # A matrix in base64 is one long string: without escapes, quotes tell its ends, at ten times
    # the speed. Many short strings would take more memory so.
    if b"\\" not in piece and piece.count(b'"') < _FEW:
        parts = piece.split(b'"')
        return b"".join(parts[::2]), b"" if len(parts) % 2 else b'"'
    text = _STRING.sub(rb"\1", piece + _END)
    if text.endswith(_END):
        return text[:-2], b""
    text = text[:-1]
    return text, b'"\\' if text.endswith(b"\\") else b'"'


def _check_numbers(text: bytes, limits: JsonLimits, what: str) -> None:
    longest = max(map(len, _DIGITS.findall(text)), default=0)
    if longest > limits.digits:
        msg = f"numbers of {what} must have at most {limits.digits} digits; one has {longest:,}"
        raise TooLarge(msg, digits=limits.digits)
    exponent = max(map(int, _EXPONENT.findall(text)), default=0)
    if exponent > limits.exponent or _NOT_FINITE.search(text):
        msg = f"numbers of {what} must be finite and below 1e{limits.exponent}; one is not"
        raise InvalidInput(msg)


def check_texts(data: bytes, what: str) -> None:
    r"""Raise unless every escaped character of a JSON text is one that can be stored.

    ``\u0000`` is none (PostgreSQL takes it in no text), nor is half of a surrogate pair.

    Raises:
        InvalidInput: There is one.
    """
    if b"\\" not in data or b"\\u" not in data:  # the former is found ten times as fast
        return
    for string in _WHOLE_STRING.finditer(data):
        if b"\\u" not in string[0]:
            continue
        try:
            text = json.loads(string[0])
        except ValueError:
            return  # no JSON, as whoever parses it will say
        if _UNSTORABLE.search(text):
            msg = (
                f"texts of {what} must be Unicode without NUL; got an escape that is NUL or half "
                "of a surrogate pair"
            )
            raise InvalidInput(msg)


def _over(what: str, of: str, limit: int, got: int) -> TooLarge:
    msg = f"{what} must have at most {limit:,} {of}; it has {got:,} or more"
    return TooLarge(msg, limit=limit)

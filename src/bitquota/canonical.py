"""Canonical JSON and content digests: equal values give equal bytes.

Keys are sorted, there is no white space, floats are written by ``repr`` (the shortest text that
reads back to the same float64), and NaN and infinity are refused.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np

JsonObject = dict[str, Any]


def canonical_json(value: object) -> str:
    """Return the one text that stands for ``value``.

    Raises:
        ValueError: A float in ``value`` is NaN or infinite.
        TypeError: ``value`` holds something that JSON cannot.
    """
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False
    )


def digest_json(value: object) -> str:
    """Return ``sha256:…`` of the canonical JSON of ``value``."""
    return digest_bytes([canonical_json(value).encode()])


def digest_bytes(chunks: Iterable[bytes | memoryview]) -> str:
    """Return ``sha256:…`` of the concatenated ``chunks``."""
    state = hashlib.sha256()
    for chunk in chunks:
        state.update(chunk)
    return f"sha256:{state.hexdigest()}"


def digest_array(array: np.ndarray[Any, Any]) -> str:
    """Return a digest over dtype, shape and bytes of ``array`` (made C-contiguous first).

    Raises:
        TypeError: ``array`` holds objects, whose bytes are addresses.
    """
    if array.dtype.hasobject:
        msg = f"an array to digest must hold numbers; got dtype {array.dtype}: convert it first"
        raise TypeError(msg)
    header = f"{array.dtype.str}|{array.shape}|".encode()
    return digest_bytes([header, array.tobytes()])

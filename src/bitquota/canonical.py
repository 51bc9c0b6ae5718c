"""Canonical JSON and content digests: equal values give equal bytes.

Keys are sorted, there is no white space, floats are written by ``repr`` (the shortest text that
reads back to the same float64), and NaN and infinity are refused.

Design: docs/design/bytes.md
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    import numpy as np

    from bitquota.errors import BitquotaError

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


def read_json(path: Path, what: str, advice: str, error: type[BitquotaError]) -> Any:  # noqa: ANN401  # any JSON
    """Return the JSON of a file that a person named; ``what`` and ``advice`` complete the message.

    Raises:
        error: The file is missing, may not be read, or holds no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        msg = f"{what} must be readable JSON; '{path}' {why_unreadable(err)}: {advice}"
        raise error(msg, path=str(path)) from err


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield where to write so that ``path`` appears whole or stays as it was.

    What is no regular file, such as ``/dev/stdout`` or a pipe, is written to as it is.

    Raises:
        OSError: It cannot be written; the error names ``path``.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    temporary = path.with_name(f"{path.name}.part")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException as err:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(err, OSError) and err.filename == str(temporary):
            raise OSError(err.errno, err.strerror, str(path)) from err
        raise


def nearest_existing(path: Path) -> Path:
    """Return ``path`` as an absolute path, or the nearest above it that is there."""
    nearest = path.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    return nearest


def write_whole(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path``, whole or not at all; raises ``OSError`` that names ``path``."""
    with replacing(path) as place:
        place.write_bytes(data)


def schema_of(data: object) -> str:
    """Return what stands where a document of ours names its schema, for a person."""
    if not isinstance(data, dict):
        return f"a {type(data).__name__}"
    return f"{data['schema']!r}" if "schema" in data else "an object without a schema"


def why_unreadable(err: Exception) -> str:
    """Return what is wrong with a file that could not be read, as a predicate of its name."""
    match err:
        case FileNotFoundError():
            return "does not exist"
        case IsADirectoryError():
            return "is a folder"
        case OSError():
            return f"cannot be read ({err.strerror or err})"
        case UnicodeDecodeError():
            return "is not UTF-8 text"
        case json.JSONDecodeError():
            return f"is no JSON from line {err.lineno}, column {err.colno} on ({err.msg})"
        case _:
            return f"cannot be read ({err})"


def digest_json(value: object) -> str:
    """Return ``sha256:…`` of the canonical JSON of ``value``."""
    return digest_bytes([canonical_json(value).encode()])


def digest_bytes(chunks: Iterable[bytes | memoryview]) -> str:
    """Return ``sha256:…`` of the concatenated ``chunks``."""
    state = hashlib.sha256()
    for chunk in chunks:
        state.update(chunk)
    return f"sha256:{state.hexdigest()}"


def digest_file(path: Path) -> str:
    """Return ``sha256:…`` of a file, read in pieces."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def digest_array(array: np.ndarray[Any, Any]) -> str:
    """Return a digest over dtype, shape and bytes of ``array`` (made C-contiguous first).

    Raises:
        TypeError: ``array`` holds objects, whose bytes are addresses.
    """
    if array.dtype.hasobject:
        msg = f"an array to digest must hold numbers; got dtype {array.dtype}: convert it first"
        raise TypeError(msg)
    header = f"{array.dtype.str}|{array.shape}|".encode()
    # A view of the bytes where they lie in order: weights of gigabytes are not copied.
    flat = array.reshape(-1) if array.flags.c_contiguous else array.flatten()
    return digest_bytes([header, flat.view("u1").data])

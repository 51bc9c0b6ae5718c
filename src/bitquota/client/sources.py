"""What a client uploads: a file or bytes, hashed and read in pieces."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bitquota.errors import InvalidInput
from bitquota.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Iterator

PIECE = 2**20

Upload = Path | str | bytes | Plan
"""A file, ``sha256:…`` of what is there already, the bytes themselves, or a plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Bytes to send, from a file or from memory.

    Attributes:
        name: For people.
        size: Bytes.
        path: The file, or ``None``.
        data: The bytes, where there is no file.
    """

    name: str
    size: int
    path: Path | None = None
    data: bytes = b""

    def pieces(self, offset: int = 0) -> Iterator[bytes]:
        """Yield everything after ``offset``."""
        if self.path is None:
            for start in range(offset, len(self.data), PIECE):
                yield self.data[start : start + PIECE]
            return
        with self.path.open("rb") as file:
            file.seek(offset)
            while piece := file.read(PIECE):
                yield piece

    def sha256(self) -> str:
        """Return the digest in hexadecimal; reads everything once."""
        digest = hashlib.sha256()
        for piece in self.pieces():
            digest.update(piece)
        return digest.hexdigest()


def source_of(upload: Upload) -> Source:
    """Return what to send; raises ``InvalidInput`` where there is no such file."""
    if isinstance(upload, Plan):
        upload = upload.dumps().encode()
    if isinstance(upload, bytes):
        return Source(name="", size=len(upload), data=upload)
    path = Path(upload)
    if not path.is_file():
        msg = f"an upload must be a file; '{path}' is not: a folder is uploaded as a zip of it"
        raise InvalidInput(msg, path=str(path))
    return Source(name=path.name, size=path.stat().st_size, path=path)

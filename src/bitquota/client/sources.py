"""What a client uploads: a file, a folder or bytes, hashed and read in pieces."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bitquota.errors import InvalidInput
from bitquota.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Iterator

PIECE = 2**20

Upload = Path | str | bytes | Plan
"""A file, a Hugging Face folder, ``sha256:…`` of what is there already, the bytes, or a plan."""

_SHIPPED = ("*.json", "*.safetensors")
"""What is uploaded of a folder: no file that holds code."""

_EPOCH = (1980, 1, 1, 0, 0, 0)
"""One time for all files, so that equal folders make equal archives."""


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


def is_model_folder(path: Path) -> bool:
    """Whether this is a Hugging Face folder."""
    return (path / "config.json").is_file()


def source_of(upload: Upload, scratch: Path) -> Source:
    """Return what to send; a Hugging Face folder becomes an archive in ``scratch``.

    Raises:
        InvalidInput: There is no such file or folder.
    """
    if isinstance(upload, Plan):
        upload = upload.dumps().encode()
    if isinstance(upload, bytes):
        return Source(name="", size=len(upload), data=upload)
    path = Path(upload)
    if is_model_folder(path):
        path = _archive(path, scratch / f"{path.resolve().name}.zip")
    elif not path.is_file():
        msg = f"an upload must be a file or a Hugging Face folder; '{path}' is neither"
        raise InvalidInput(msg, path=str(path))
    return Source(name=path.name, size=path.stat().st_size, path=path)


def _archive(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(p for pattern in _SHIPPED for p in folder.glob(pattern)):
            member = zipfile.ZipInfo(path.name, _EPOCH)
            member.file_size = path.stat().st_size
            with path.open("rb") as file, archive.open(member, "w") as packed:
                while piece := file.read(PIECE):
                    packed.write(piece)
    return target

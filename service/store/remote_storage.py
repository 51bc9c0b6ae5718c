"""Where stored files lie for good when not in the data folder: any place that fsspec can reach.

The data folder then holds uploads on their way and verified copies. A file is written to the
storage before any row names it, under the digest of its bytes, and never changed.

Design: docs/design/jobs.md
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from bitquota.errors import InvalidInput, MissingDependency, NotFound, ServiceError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_S3_PART_BYTES = 8 * 2**20
"""Parts of an upload to S3, two of which are in memory; 80 GB fit into its 10,000 parts."""

_FRESH_S = 900.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """One stored file: its name, bytes, and when it was written (seconds since 1970)."""

    name: str
    size: int
    modified: float


class Storage(Protocol):
    """Whole files by name. Names are the 64 digits of a digest.

    Attributes:
        place: Its address, without secrets, for people.
    """

    place: str

    def put(self, name: str, path: Path, *, now: float) -> None:
        """Store a file whole or not at all, so that it counts as written at ``now``.

        Raises:
            ServiceError: The storage cannot be reached or refuses.
        """
        ...

    def get(self, name: str, path: Path) -> None:
        """Copy a stored file to ``path``; raises ``NotFound`` or ``ServiceError``."""
        ...

    def entries(self) -> Iterator[Stored]:
        """List everything; raises ``ServiceError``."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file, if it is there; raises ``ServiceError``."""
        ...


class FsspecStorage:
    """A folder of any file system that fsspec knows, such as ``s3://bucket/prefix``.

    Credentials come from where its driver looks for them (``AWS_…`` variables for S3).

    Args:
        url: The folder.

    Raises:
        MissingDependency: Its driver is not installed.
        InvalidInput: fsspec does not know such an address.
    """

    def __init__(self, url: str) -> None:
        self._scheme = urlsplit(url).scheme
        try:
            import fsspec

            options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
            self._fs, self._root = fsspec.core.url_to_fs(url, **options)
        except ImportError as err:
            msg = (
                f"files at '{_shown(url)}' need fsspec and its driver ({err}); for S3 install it "
                "with: pip install 'bitquota[s3]'"
            )
            raise MissingDependency(msg, extra="s3") from err
        except ValueError as err:
            msg = f"BITQUOTA_BLOB_URL must be an address that fsspec knows; got '{_shown(url)}'"
            raise InvalidInput(msg) from err
        self.place = _shown(url)

    def put(self, name: str, path: Path, *, now: float) -> None:
        """Store a file; one that was written lately is left as it is. See ``Storage.put``."""
        target = self._path(name)
        with self._wrapped("written to"):
            with contextlib.suppress(FileNotFoundError):
                known = _stored(name, self._fs.info(target))
                if known.size == path.stat().st_size and now - known.modified < _FRESH_S:
                    return
            if self._scheme in {"s3", "s3a"}:
                # Whole or not at all: an object appears when its last part was accepted.
                self._fs.put_file(str(path), target, chunksize=_S3_PART_BYTES, max_concurrency=2)
                return
            beside = f"{target}.part"
            self._fs.makedirs(self._fs._parent(target), exist_ok=True)  # noqa: SLF001  # fsspec has no other
            self._fs.put_file(str(path), beside)
            self._fs.mv(beside, target)

    def get(self, name: str, path: Path) -> None:
        """Copy a stored file to ``path``; see ``Storage.get``."""
        with self._wrapped("read"):
            try:
                self._fs.get_file(self._path(name), str(path))
            except FileNotFoundError as err:
                msg = f"the stored file sha256:{name} must exist; it does not: upload it again"
                raise NotFound(msg, digest=f"sha256:{name}") from err

    def entries(self) -> Iterator[Stored]:
        """List everything; see ``Storage.entries``."""
        with self._wrapped("listed"):
            self._fs.invalidate_cache()
            try:
                found = self._fs.find(self._root, detail=True)
            except FileNotFoundError:
                found = {}
        for path, info in sorted(found.items()):
            name = path.rpartition("/")[2]
            if len(name) == 64:
                yield _stored(name, info)

    def remove(self, name: str) -> None:
        """Remove a file; see ``Storage.remove``."""
        with self._wrapped("changed"), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name[:2]}/{name}"

    @contextlib.contextmanager
    def _wrapped(self, what: str) -> Iterator[None]:
        try:
            yield
        except (NotFound, FileNotFoundError):
            raise
        except Exception as err:  # drivers raise their own kinds
            said = " ".join(str(err).split())[:300]
            msg = f"the file storage '{self.place}' must be {what}; it says: {said}"
            raise ServiceError(msg, place=self.place) from err


def _stored(name: str, info: dict[str, Any]) -> Stored:
    modified = 0.0
    for key in ("LastModified", "mtime", "created", "updated", "last_modified"):
        value = info.get(key)
        if isinstance(value, datetime):
            modified = value.timestamp()
        elif isinstance(value, int | float):
            modified = float(value)
        if modified:
            break
    return Stored(name=name, size=int(info.get("size") or 0), modified=modified)


def _shown(url: str) -> str:
    """Return an address without what might be a password."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

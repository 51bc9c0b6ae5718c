"""Content-addressed files: written whole or not at all, found by their SHA-256."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import shutil
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bitquota.canonical import digest_file
from bitquota.errors import Conflict, NotFound, ServiceError, StorageFull, TooLarge
from bitquota.service.store.remote_storage import FsspecStorage, Storage
from bitquota.service.store.storage_errors import FULL, storage_told

if TYPE_CHECKING:
    from pathlib import Path
    from typing import BinaryIO

    from bitquota.service.settings import Settings
_PREFIX = "sha256:"
_READ = 2**20
_IN_USE_S = 3600.0


@dataclass(slots=True, kw_only=True)
class Incoming:
    """A file on its way in: hashed while it is written, invisible until it is kept.

    Not safe for two threads at once.
    """

    path: Path
    limit: int
    size: int = 0
    kept_when_broken: bool = False
    _file: BinaryIO
    _hash: hashlib._Hash = field(default_factory=hashlib.sha256)

    def expect(self, size: int) -> None:
        """Raise ``TooLarge`` if ``size`` more bytes would exceed the limit."""
        if self.size + size > self.limit:
            msg = f"an upload must be at most {self.limit:,} bytes; this one has more"
            raise TooLarge(msg, limit=self.limit)

    def write(self, chunk: bytes | memoryview) -> None:
        """Append ``chunk``; raises ``TooLarge`` as ``expect`` does."""
        self.expect(len(chunk))
        with storage_told():
            self._file.write(chunk)
        self._hash.update(chunk)
        self.size += len(chunk)

    @property
    def digest(self) -> str:
        """Digest of what was written so far."""
        return _PREFIX + self._hash.hexdigest()

    def flush(self) -> None:
        """Bring everything to the disk and close the file."""
        if not self._file.closed:
            with storage_told():
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()

    def close(self) -> None:
        """Close the file, readable for others."""
        with storage_told():
            self._file.close()

    def discard(self) -> None:
        """Remove what was written; does nothing once the file was kept."""
        with contextlib.suppress(OSError):  # a full disk: what is left to write is not wanted
            self._file.close()
        self.path.unlink(missing_ok=True)


class BlobStore:
    """Files named by their digest, in a folder; or elsewhere, with copies in the folder.

    Args:
        root: The folder.
        storage: Where files lie for good, if not in the folder.
    """

    def __init__(self, root: Path, storage: Storage | None = None) -> None:
        self.root = root
        self.storage = storage
        self._incoming = root / "incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)

    def incoming(self, limit: int) -> Incoming:
        """Return a new file to write to, of at most ``limit`` bytes."""
        path = self._incoming / secrets.token_hex(16)
        with storage_told():
            return Incoming(path=path, limit=limit, _file=path.open("xb"))

    def check_room(self, size: int, spare: int) -> None:
        """Raise ``StorageFull`` unless ``size`` bytes can come and leave ``spare`` free."""
        if self.free() < size + spare:
            raise StorageFull(FULL, bytes=size)

    def free(self) -> int:
        """Return the bytes that are free on the folder's disk."""
        return shutil.disk_usage(self._incoming).free

    def resume(self, owner: str, name: str, offset: int, limit: int) -> Incoming:
        """Return ``owner``'s partial file ``name``, to go on after its first ``offset`` bytes.

        Raises:
            Conflict: The file has another size, or somebody else is writing to it.

        Cost: reads what is there once, for the digest.
        """
        path = self._partial(owner, name)
        with storage_told():
            file = path.open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            file.close()
            msg = "one request at a time must send the pieces of an upload; another is doing so"
            raise Conflict(msg) from err
        size = file.tell()
        if size != offset:
            file.close()
            msg = f"the next piece of this upload must begin at byte {size}; it begins at {offset}"
            raise Conflict(msg, received=size)
        incoming = Incoming(path=path, limit=limit, size=size, kept_when_broken=True, _file=file)
        with path.open("rb") as written:
            while chunk := written.read(_READ):
                incoming._hash.update(chunk)  # noqa: SLF001  # of this module
        return incoming

    def received(self, owner: str, name: str) -> int:
        """Return the bytes that are there of ``owner``'s partial file ``name``."""
        try:
            return self._partial(owner, name).stat().st_size
        except FileNotFoundError:
            return 0

    def partial_bytes(self, owner: str, *, but: str = "") -> int:
        """Return the bytes of all partial files of ``owner``, except that called ``but``."""
        other = self._partial(owner, but)
        found = self._incoming.glob(self._partial(owner, "").name[:22] + "*")
        total = 0
        for path in found:
            with contextlib.suppress(FileNotFoundError):
                total += path.stat().st_size if path != other else 0
        return total

    def _partial(self, owner: str, name: str) -> Path:
        # Hashes, because the names are made of what a client sent.
        first, second = (hashlib.sha256(text.encode()).hexdigest() for text in (owner, name))
        return self._incoming / f"part-{first[:16]}-{second}"

    def keep(self, incoming: Incoming) -> str:
        """Make an incoming file visible under its digest, which is returned.

        A file that is there already is left as it is.
        """
        incoming.flush()
        digest = incoming.digest
        if self.storage is not None:
            self.storage.put(digest.removeprefix(_PREFIX), incoming.path, now=time.time())
        return self._settle(incoming.path, digest)

    def _settle(self, path: Path, digest: str) -> str:
        target = self.place(digest)
        if target.exists():
            # A collection spares young files: this one may be about to be named by a row.
            os.utime(target)
            path.unlink(missing_ok=True)
            return digest
        with storage_told():
            target.parent.mkdir(parents=True, exist_ok=True)
            path.chmod(0o440)
            path.replace(target)
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        return digest

    def put(self, data: bytes) -> str:
        """Keep ``data`` and return its digest."""
        incoming = self.incoming(len(data))
        try:
            incoming.write(data)
            return self.keep(incoming)
        except BaseException:
            incoming.discard()
            raise

    def path(self, digest: str) -> Path:
        """Return where the file of ``digest`` lies here; fetched and verified where it must be.

        Raises:
            NotFound: There is no such file.
            ServiceError: The storage cannot be reached, or holds other bytes.
        """
        place = self.place(digest)
        if self.storage is not None:
            return self._copy(self.storage, digest, place)
        if not place.is_file():
            msg = f"the stored file {digest} must exist; it does not: upload it again"
            raise NotFound(msg, digest=digest)
        return place

    def _copy(self, storage: Storage, digest: str, place: Path) -> Path:
        """Return the copy of a stored file, made if it is not there and verified when made."""
        try:
            os.utime(place)  # a copy that was used lately is not removed
        except FileNotFoundError:
            fetched = self._incoming / secrets.token_hex(16)
            try:
                storage.get(digest.removeprefix(_PREFIX), fetched)
                if (got := digest_file(fetched)) != digest:
                    msg = f"the storage must return the bytes of {digest}; it returned others"
                    raise ServiceError(msg, digest=digest, got=got)
                self._settle(fetched, digest)
            finally:
                fetched.unlink(missing_ok=True)
        return place

    def trim(self, limit: int, now: float) -> int:
        """Remove copies, those first that were not used for longest; return their bytes.

        Until at most ``limit`` bytes are left, and none that was used within the hour. Does
        nothing where the folder is the storage.
        """
        return 0 if self.storage is None else trim_copies(self.root, limit, now)

    def read(self, digest: str) -> bytes:
        """Return the whole file of ``digest``; raises ``NotFound``."""
        return self.path(digest).read_bytes()

    def place(self, digest: str) -> Path:
        """Return where the file of ``digest`` lies here if it does; raises ``NotFound``."""
        name = digest.removeprefix(_PREFIX)
        if len(name) != 64 or set(name) - set("0123456789abcdef"):
            msg = f"a digest must read 'sha256:' and 64 hexadecimal digits; got {digest!r}"
            raise NotFound(msg, digest=digest)
        return self.root / name[:2] / name


def trim_copies(root: Path, limit: int, now: float) -> int:
    """Remove files of a folder of copies; see ``BlobStore.trim``."""
    copies = []
    for path in root.glob("[0-9a-f][0-9a-f]/*"):
        with contextlib.suppress(FileNotFoundError):
            copies.append((path.stat().st_mtime, path.stat().st_size, path))
    left = sum(size for _, size, _ in copies)
    removed = 0
    for used, size, path in sorted(copies):
        if left - removed <= limit or now - used < _IN_USE_S:
            break
        path.unlink(missing_ok=True)
        removed += size
    return removed


def blob_store(settings: Settings) -> BlobStore:
    """Return the store that the settings name; raises what ``FsspecStorage`` does."""
    return BlobStore(settings.data_dir / "blobs", storage_of(settings))


def storage_of(settings: Settings) -> Storage | None:
    """Return where files lie if not in the data folder; raises what ``FsspecStorage`` does."""
    if not settings.blob_url:
        return None
    return FsspecStorage(settings.blob_url)

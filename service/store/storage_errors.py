"""What a disk says, as the error that a client is told."""

from __future__ import annotations

import errno
from contextlib import contextmanager
from typing import TYPE_CHECKING

from bitquota.errors import InvalidInput, StorageFull, Unavailable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from bitquota.errors import BitquotaError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_READ_ONLY = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})
FULL = (
    "the server's disk must have room for what is sent; it is full: tell its operator, or delete "
    "uploads that are no longer needed"
)
READ_ONLY = (
    "the server must be able to write to its data folder; it is read-only: its operator must fix "
    "that, nothing was changed"
)
_PROBE = b"x" * 4096


def storage_error(error: OSError) -> BitquotaError | None:
    """Return the error that a client is told, or ``None`` if it is not about the disk."""
    if error.errno in _FULL:
        return StorageFull(FULL)
    if error.errno in _READ_ONLY:
        return Unavailable(READ_ONLY)
    return None


@contextmanager
def storage_told() -> Iterator[None]:
    """Raise ``StorageFull`` or ``Unavailable`` for what a full or read-only disk raises."""
    try:
        yield
    except OSError as err:
        if (told := storage_error(err)) is None:
            raise
        raise told from err


def require_writable(folder: Path) -> None:
    """Raise ``InvalidInput`` unless a folder can be made and written to.

    Called before anything else is opened, so that an operator reads a sentence.
    """
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(_PROBE)
        probe.unlink()
    except OSError as err:
        why = "its disk is full" if err.errno in _FULL else err.strerror or str(err)
        msg = (
            f"the data folder must be one that the server can write to; '{folder}': {why}. Name "
            "another with BITQUOTA_DATA_DIR, or let this user write there"
        )
        raise InvalidInput(msg, path=str(folder)) from err

"""The ledger of measurements: what was measured once is never measured again.

An entry is a float64 array under a key that names everything it depends on (weights, samples,
base point, candidates, correction, loss, code version), so that it can never be stale and may be
shared between jobs, budgets and machines. Entries are written in transactions: after ``kill -9``
everything committed is there and nothing is half-written.

Design: docs/design/measurement-cache.md
"""

from __future__ import annotations

import io
import sqlite3
import threading
import zipfile
import zlib
from typing import TYPE_CHECKING, Self

import numpy as np

from bitquota.canonical import digest_json, replacing, why_unreadable
from bitquota.context import Ledger, checked_entry
from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from numpy.typing import NDArray

_FORMAT = 2
"""In format 1 keys named models by their weights alone, so that another graph found them too."""
_BUSY_TIMEOUT_S = 60.0
_KEYS_PER_QUERY = 500


def ledger_key(parts: object) -> str:
    """Return the key of a measurement: the digest of the canonical JSON of all it depends on."""
    return digest_json(parts)


class SqliteLedger:
    """A ledger in one SQLite file; several processes may read and write it at once.

    Write-ahead log with ``synchronous=normal``: a killed process loses nothing that was
    committed; a power cut may lose the last transactions but never leaves a torn file.
    """

    def __init__(self, path: Path) -> None:
        """Open ``path``, creating it if it is not there.

        ``superseded`` is the number of entries that an earlier release wrote, when the file is
        opened for the first time since: nothing asks for them any more.

        Raises:
            InvalidInput: The file is not such a ledger.
        """
        self.path = path
        # The connection may be used from the thread that runs the job; the lock serialises.
        self._lock = threading.Lock()
        try:
            self._connection = sqlite3.connect(
                path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")
            version = self._connection.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, 1, _FORMAT):
                msg = f"a ledger must have format {_FORMAT} or older; '{path}' has {version}"
                raise InvalidInput(msg, path=str(path))
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS entries "
                "(key TEXT PRIMARY KEY, shape TEXT NOT NULL, data BLOB NOT NULL) WITHOUT ROWID"
            )
            self._connection.execute(f"PRAGMA user_version={_FORMAT}")
            self.superseded = len(self) if version == 1 else 0
        except sqlite3.DatabaseError as err:
            msg = f"a ledger must be an SQLite file that Bitquota wrote; '{path}': {err}"
            raise InvalidInput(msg, path=str(path)) from err

    def __enter__(self) -> Self:
        """Return the ledger."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file; committed entries stay."""
        self._connection.close()

    def __len__(self) -> int:
        """Return the number of entries."""
        with self._lock:
            return int(self._connection.execute("SELECT count(*) FROM entries").fetchone()[0])

    def get(self, key: str) -> NDArray[np.float64] | None:
        """Return the array under ``key``, or ``None``."""
        return self.get_many([key]).get(key)

    def get_many(self, keys: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """Return the arrays of those ``keys`` that are there."""
        found: dict[str, NDArray[np.float64]] = {}
        for start in range(0, len(keys), _KEYS_PER_QUERY):
            part = list(keys[start : start + _KEYS_PER_QUERY])
            marks = ",".join("?" * len(part))
            query = f"SELECT key, shape, data FROM entries WHERE key IN ({marks})"  # noqa: S608  # marks only
            with self._lock:
                rows = self._connection.execute(query, part).fetchall()
            for key, shape, data in rows:
                size = tuple(int(s) for s in shape.split(",") if s)
                found[key] = np.frombuffer(data, dtype="<f8").reshape(size)
        return found

    def put(self, key: str, array: NDArray[np.float64]) -> None:
        """Store one array in a transaction of its own."""
        self.put_many({key: array})

    def put_many(self, entries: Mapping[str, NDArray[np.float64]]) -> None:
        """Store several arrays in one transaction: all of them or none."""
        rows = []
        for key, array in entries.items():
            values = checked_entry(key, array)
            rows.append((key, ",".join(map(str, values.shape)), values.tobytes()))
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._connection.executemany("INSERT OR IGNORE INTO entries VALUES (?,?,?)", rows)
                self._connection.execute("COMMIT")
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise

    def keys(self) -> list[str]:
        """Return all keys in order."""
        with self._lock:
            rows = self._connection.execute("SELECT key FROM entries ORDER BY key").fetchall()
        return [row[0] for row in rows]


_EXPORT_FORMAT = b"bitquota/ledger/1\n"
_EXPORT_HEAD = "format"


def export_entries(ledger: SqliteLedger, path: Path) -> int:
    """Write every entry to ``path``, a byte-stable archive that ``import_entries`` reads.

    Equal ledgers give equal bytes, whatever the order in which they were filled. Keys are
    digests of everything a measurement depends on, so entries mean the same on any machine.

    Returns:
        The number of entries.
    """
    keys = ledger.keys()
    with replacing(path) as place, zipfile.ZipFile(place, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(zipfile.ZipInfo(_EXPORT_HEAD), _EXPORT_FORMAT)
        for start in range(0, len(keys), _KEYS_PER_QUERY):
            found = ledger.get_many(keys[start : start + _KEYS_PER_QUERY])
            for key in sorted(found):
                member = io.BytesIO()
                np.lib.format.write_array(member, found[key], allow_pickle=False)
                archive.writestr(zipfile.ZipInfo(f"{key}.npy"), member.getvalue())
    return len(keys)


def import_entries(ledger: Ledger, path: Path) -> int:
    """Add the entries of an exported archive; those already there stay as they are.

    Returns:
        The number of entries in the archive.

    Raises:
        InvalidInput: Not such an archive, or an entry is damaged; then nothing is added.
    """
    entries: dict[str, NDArray[np.float64]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if _EXPORT_HEAD not in names or archive.read(_EXPORT_HEAD) != _EXPORT_FORMAT:
                raise _no_export(path, "is another archive")
            for name in names:
                if name == _EXPORT_HEAD:
                    continue
                array = np.lib.format.read_array(io.BytesIO(archive.read(name)), allow_pickle=False)
                entries[name.removesuffix(".npy")] = array
    except zipfile.BadZipFile as err:
        # What is no archive at all, or one that was cut short.
        raise _no_export(path, "is none, or is damaged") from err
    except InvalidInput:
        raise
    except (OSError, ValueError, EOFError, zlib.error, NotImplementedError, RuntimeError) as err:
        raise _no_export(path, why_unreadable(err)) from err
    ledger.put_many(entries)
    return len(entries)


def _no_export(path: Path, what: str) -> InvalidInput:
    msg = (
        f"an archive of measurements must be what 'bitquota ledger export' writes; '{path}' {what}"
    )
    return InvalidInput(msg, path=str(path))

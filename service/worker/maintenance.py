"""Keeping a server's data in order: collecting what nothing refers to, backups, verification."""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import sqlalchemy as sa

from bitquota.canonical import digest_file
from bitquota.codec import Document
from bitquota.errors import BitquotaError, Conflict, InvalidInput
from bitquota.service.jobs.job import JobStatus
from bitquota.service.jobs.training_checkpoints import FOLDER
from bitquota.service.store.blobs import BlobStore, blob_store
from bitquota.service.store.database import artifacts, deliveries, events, idempotency, jobs
from bitquota.service.worker.processes import remove_abandoned

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.engine import Connection

    from bitquota.service.settings import Settings
    from bitquota.service.store.database import Database
    from bitquota.service.store.remote_storage import Storage

GRACE_S = 3600.0
"""How long a file stays that nothing refers to: its row may be on the way."""

_ENDED = [s.value for s in JobStatus if s.final]


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected(Document):
    """What one collection removed."""

    jobs: int = 0
    uploads: int = 0
    files: int = 0
    bytes: int = 0
    scratch: int = 0


def collect(settings: Settings, database: Database, now: float) -> Collected:
    """Remove old jobs, unused uploads, and files that nothing refers to.

    Rows go first; a file goes only when no row names it and it is older than ``GRACE_S``, so that
    an interrupted collection leaves nothing dangling. Ledgers are kept: they are small, and what
    is in them never has to be measured again.
    """
    n_jobs, n_uploads = database.write(lambda connection: _remove_rows(connection, settings, now))
    used = database.read(_used_digests)
    files = n_bytes = 0
    for path in _stored_files(settings.data_dir / "blobs"):
        with contextlib.suppress(FileNotFoundError):
            known = path.stat()
            if f"sha256:{path.name}" not in used and now - known.st_mtime > GRACE_S:
                path.unlink()
                files, n_bytes = files + 1, n_bytes + known.st_size
    store = blob_store(settings)
    if store.storage is not None:
        for entry in store.storage.entries():
            if f"sha256:{entry.name}" not in used and now - entry.modified > GRACE_S:
                store.storage.remove(entry.name)
                files, n_bytes = files + 1, n_bytes + entry.size
        store.trim(settings.blob_cache_bytes, now)
    remove_checkpoints(settings.data_dir / FOLDER, database)
    scratch = remove_abandoned(settings.data_dir / "scratch")
    return Collected(jobs=n_jobs, uploads=n_uploads, files=files, bytes=n_bytes, scratch=scratch)


def remove_checkpoints(folders: Path, database: Database) -> None:
    """Remove the checkpoints of jobs that have ended, where their driver could not."""
    found = sorted(folders.glob("*"))  # before the rows: a job is there before its folder is
    query = sa.select(jobs.c.id).where(jobs.c.status.not_in(_ENDED))
    going_on = set(database.read(lambda connection: connection.execute(query).scalars().all()))
    for folder in found:
        if folder.name not in going_on:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_rows(connection: Connection, settings: Settings, now: float) -> tuple[int, int]:
    old = sa.select(jobs.c.id).where(
        jobs.c.status.in_(_ENDED), jobs.c.finished_at < now - settings.job_retention_s
    )
    for table, column in (
        (events, events.c.job),
        (deliveries, deliveries.c.job),
        (idempotency, idempotency.c.job),
    ):
        connection.execute(table.delete().where(column.in_(old)))
    n_jobs = connection.execute(jobs.delete().where(jobs.c.id.in_(old))).rowcount
    n_uploads = connection.execute(
        artifacts.delete().where(
            artifacts.c.used_at < now - settings.upload_retention_s, ~_needed()
        )
    ).rowcount
    return n_jobs, n_uploads


def _needed() -> sa.Exists:
    """Whether a job that has not ended needs an upload."""
    return sa.exists().where(
        jobs.c.tenant == artifacts.c.tenant,
        jobs.c.status.not_in(_ENDED),
        sa.or_(
            jobs.c.model == artifacts.c.digest,
            jobs.c.dataset == artifacts.c.digest,
            jobs.c.inputs.contains(artifacts.c.digest),
        ),
    )


def remove_upload(database: Database, tenant: str, kind: str, digest: str) -> bool:
    """Remove a tenant's upload and return whether it was there.

    Its file goes at the next collection, unless somebody else uploaded the same.

    Raises:
        Conflict: A job that has not ended needs it.
    """
    where = sa.and_(
        artifacts.c.tenant == tenant, artifacts.c.kind == kind, artifacts.c.digest == digest
    )

    def work(connection: Connection) -> bool:
        if connection.execute(sa.select(artifacts.c.digest).where(where, _needed())).first():
            msg = f"an upload must not be needed by a job that has not ended; {digest} is"
            raise Conflict(msg, digest=digest)
        return bool(connection.execute(artifacts.delete().where(where)).rowcount)

    return database.write(work)


def _used_digests(connection: Connection) -> set[str]:
    used = set(connection.execute(sa.select(artifacts.c.digest)).scalars())
    for model, dataset, inputs, results in connection.execute(
        sa.select(jobs.c.model, jobs.c.dataset, jobs.c.inputs, jobs.c.results)
    ):
        used |= {model, dataset}
        for text in (inputs, results or "{}"):
            for value in json.loads(text).values():
                used |= set(value) if isinstance(value, list) else {value}
    return used


def _stored_files(root: Path) -> Iterator[Path]:
    for pattern in ("[0-9a-f][0-9a-f]/*", "incoming/*"):
        yield from sorted(root.glob(pattern))


def backup(settings: Settings, target: Path) -> None:
    """Copy everything into a new folder that a server can be started on; servers may be running.

    The database goes first: every file that it names was on the disk before it was named. With
    PostgreSQL only files are copied; ``pg_dump`` the database *before*. Files that lie elsewhere
    (``BITQUOTA_BLOB_URL``) stay there: that storage has its own ways of keeping them.

    Raises:
        InvalidInput: The folder is there already.
    """
    try:
        target.mkdir(parents=True)
    except FileExistsError as err:
        msg = f"a backup must go to a folder that does not exist yet; '{target}' does"
        raise InvalidInput(msg, path=str(target)) from err
    source = settings.data_dir
    if not settings.database_url:
        _copy_sqlite(source / "bitquota.db", target / "bitquota.db")
    for ledger in sorted(source.glob("ledgers/*/*.sqlite")):
        place = target / ledger.relative_to(source)
        place.parent.mkdir(parents=True)
        _copy_sqlite(ledger, place)
    for blob in _stored_files(source / "blobs") if not settings.blob_url else ():
        if blob.parent.name != "incoming":
            place = target / blob.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # collected meanwhile: nothing names it
                shutil.copy2(blob, place)


def _copy_sqlite(source: Path, target: Path) -> None:
    with (
        contextlib.closing(sqlite3.connect(source)) as old,
        contextlib.closing(sqlite3.connect(target)) as new,
    ):
        old.backup(new)


def verify(settings: Settings, database: Database) -> list[str]:
    """Return a sentence for each stored file that is missing or damaged.

    Cost: reads every file once.
    """
    storage = blob_store(settings).storage
    if storage is not None:
        return _verify_storage(storage, database)
    root = settings.data_dir / "blobs"
    present = {f"sha256:{p.name}": p for p in root.glob("[0-9a-f][0-9a-f]/*")}
    missing = sorted({d for d in database.read(_used_digests) if d} - set(present))
    wrong = [f"{digest} is named by the database and missing on the disk" for digest in missing]
    wrong += [
        f"{digest} has other bytes than its name says"
        for digest, path in sorted(present.items())
        if digest_file(path) != digest
    ]
    return wrong


def _verify_storage(storage: Storage, database: Database) -> list[str]:
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        store = BlobStore(Path(folder), storage)  # copies that are there prove nothing
        for digest in sorted({d for d in database.read(_used_digests) if d}):
            try:
                store.path(digest).unlink()
            except BitquotaError as error:
                wrong.append(f"{digest}: {error.message}")
    return wrong

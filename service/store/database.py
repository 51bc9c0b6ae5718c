"""The tables of the service and the one way to reach them, on SQLite or PostgreSQL.

Reads and writes are functions of a connection, run in one transaction each. A write takes
SQLite's lock at its start, so that it never fails half-way for want of it, and is run again when
the connection breaks: every such function must be safe to run twice.

Design: docs/design/jobs.md
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from typing import TYPE_CHECKING, Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from bitquota.errors import BitquotaError, StorageFull, Unavailable
from bitquota.service.store.storage_errors import FULL, READ_ONLY

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Connection, Engine

T = TypeVar("T")

metadata = sa.MetaData()

artifacts = sa.Table(
    "artifacts",
    metadata,
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("kind", sa.String(16), primary_key=True),
    sa.Column("digest", sa.String(80), primary_key=True),
    sa.Column("format", sa.String(32), nullable=False),
    sa.Column("name", sa.String(255), nullable=False, server_default=""),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("used_at", sa.Float, nullable=False),
)

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("model", sa.String(80)),
    sa.Column("dataset", sa.String(80)),
    sa.Column("inputs", sa.Text, nullable=False, server_default="{}"),
    sa.Column("request", sa.Text, nullable=False),
    sa.Column("labels", sa.Text, nullable=False, server_default="{}"),
    sa.Column("priority", sa.Integer, nullable=False, server_default="0"),
    sa.Column("deadline", sa.Float),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("started_at", sa.Float),
    sa.Column("finished_at", sa.Float),
    sa.Column("cancel_requested", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("epoch", sa.Integer, nullable=False, server_default="0"),
    sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
    sa.Column("fruitless", sa.Integer, nullable=False, server_default="0"),
    sa.Column("measured", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("lease_owner", sa.String(160)),
    sa.Column("lease_until", sa.Float),
    sa.Column("progress", sa.Text),
    sa.Column("error", sa.Text),
    sa.Column("results", sa.Text),
    sa.Column("result_bytes", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("peak_bytes", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("version", sa.Integer, nullable=False, server_default="1"),
    sa.Column("worker_s", sa.Float, nullable=False, server_default="0"),
    sa.Column("webhook", sa.Text),
    sa.Index("jobs_by_tenant", "tenant", "id"),
    # Whose turn it is, and how many jobs of a tenant wait and run.
    sa.Index("jobs_by_turn", "status", "tenant", "priority", "id"),
    sa.Index("jobs_by_deadline", "status", "deadline"),
    # What quotas ask before every submission must not read every job that is kept.
    sa.Index("jobs_of_tenant_by_end", "tenant", "finished_at"),
    sa.Index(
        "jobs_of_tenant_with_results",
        "tenant",
        "result_bytes",
        sqlite_where=sa.text("result_bytes > 0"),
        postgresql_where=sa.text("result_bytes > 0"),
    ),
)

events = sa.Table(
    "events",
    metadata,
    sa.Column("job", sa.String(40), primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("type", sa.String(32), nullable=False),
    sa.Column("data", sa.Text, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
)

idempotency = sa.Table(
    "idempotency",
    metadata,
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("fingerprint", sa.String(80), nullable=False),
    sa.Column("job", sa.String(40), nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
)

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("name", sa.String(255), nullable=False, server_default=""),
    sa.Column("secret_sha256", sa.String(64), nullable=False),
    sa.Column("scopes", sa.String(255), nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("expires_at", sa.Float),
    sa.Column("revoked_at", sa.Float),
    sa.Column("max_priority", sa.Integer, nullable=False, server_default="0"),
    sa.Index("api_keys_by_tenant", "tenant"),
)

tenants = sa.Table(
    "tenants",
    metadata,
    sa.Column("tenant", sa.String(64), primary_key=True),
    sa.Column("max_running", sa.Integer),
    sa.Column("max_queued", sa.Integer),
    sa.Column("max_stored_bytes", sa.BigInteger),
    sa.Column("max_worker_s", sa.Float),
    sa.Column("webhook_secret", sa.String(128)),
    sa.Column("served_at", sa.Float),
)

ended_sessions = sa.Table(
    "ended_sessions",
    metadata,
    sa.Column("nonce", sa.String(32), primary_key=True),
    sa.Column("until", sa.Float, nullable=False),
)

deliveries = sa.Table(
    "deliveries",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("job", sa.String(40), nullable=False),
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("host", sa.String(255), nullable=False, server_default=""),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("next_at", sa.Float),
    sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
    sa.Column("delivered_at", sa.Float),
    sa.Column("error", sa.Text),
    sa.Index(
        "deliveries_by_turn",
        "tenant",
        "next_at",
        sqlite_where=sa.text("next_at IS NOT NULL"),
        postgresql_where=sa.text("next_at IS NOT NULL"),
    ),
)

audit = sa.Table(
    "audit",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("tenant", sa.String(64), nullable=False),
    sa.Column("actor", sa.String(64), nullable=False),
    sa.Column("action", sa.String(64), nullable=False),
    sa.Column("subject", sa.String(128), nullable=False, server_default=""),
    sa.Column("request", sa.String(64), nullable=False, server_default=""),
    sa.Index("audit_by_tenant", "tenant", "id"),
)

_WRITE = "bitquota_write"
_RETRIES = 6
_BACKOFF_S = 0.1
_RETRY_AFTER_S = 2
_LONGEST_S = 45.0
"""Seconds after which nothing is tried again: who waits for the answer has given up by then."""

_LOOK_S = 3.0


def open_engine(url: str) -> Engine:
    """Return an engine for ``url``: SQLite in WAL mode with full syncs, or PostgreSQL."""
    if not url.startswith("sqlite"):
        # No ping before use: what fails on a dead connection is run again on a new one.
        return sa.create_engine(url, pool_size=10, max_overflow=30)
    engine = sa.create_engine(
        url,
        connect_args={"timeout": 30.0, "check_same_thread": False, "isolation_level": None},
        pool_size=10,
        max_overflow=30,
    )

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _record: object) -> None:  # noqa: ANN401
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A deferred transaction that reads first and writes later fails at once when another
        # writer came between; one that takes the lock first waits for its turn.
        writing = connection.get_execution_options().get(_WRITE, False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")

    return engine


def _why(error: BaseException | None) -> str | None:
    """Return what keeps SQLite from writing, as far as it is known what that is."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    return {
        sqlite3.SQLITE_BUSY: "it is locked by another program",
        sqlite3.SQLITE_LOCKED: "it is locked by another program",
        sqlite3.SQLITE_FULL: "the disk is full",
        sqlite3.SQLITE_READONLY: "it is read-only",
        sqlite3.SQLITE_CANTOPEN: "its file cannot be opened",
    }.get(code)


def _raise_lasting(error: BaseException | None) -> None:
    """Raise what does not pass by trying again: a disk that is full or read-only."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        raise StorageFull(FULL) from error
    if code == sqlite3.SQLITE_READONLY:
        raise Unavailable(READ_ONLY) from error


class Database:
    """Runs functions of a connection in transactions of their own."""

    def __init__(self, url: str) -> None:
        self.engine = open_engine(url)
        # PostgreSQL shows each statement of a transaction the newest committed rows anyway, so
        # that a reading one is worth nothing and costs two more round trips.
        self._reading = (
            self.engine.execution_options(isolation_level="AUTOCOMMIT")
            if self.postgres
            else self.engine
        )
        # SQLite lets waiting writers poll for its lock, unfairly and asleep up to .1 s at a time;
        # those of one process queue up here instead.
        self._one_writer = contextlib.nullcontext() if self.postgres else threading.Lock()

    @property
    def postgres(self) -> bool:
        """Whether several hosts can share this database."""
        return self.engine.dialect.name == "postgresql"

    def create(self) -> None:
        """Bring the tables to the form that this version needs, by its migrations.

        Servers that start at the same time wait for each other.
        """
        from bitquota.service.store.migrate import upgrade

        self.write(upgrade)

    def read(self, work: Callable[[Connection], T]) -> T:
        """Return ``work(connection)`` in a transaction that does not write."""
        return self._run(work, writing=False)

    def write(self, work: Callable[[Connection], T]) -> T:
        """Return ``work(connection)`` and commit; ``work`` may run more than once."""
        with self._one_writer:
            return self._run(work, writing=True)

    def unready(self) -> str | None:
        """Return why no job can be stored at the moment, or ``None`` if one can."""
        try:
            if self.postgres:
                recovering = sa.text("SELECT pg_is_in_recovery()")
                if self.read(lambda connection: connection.execute(recovering).scalar()):
                    return "it only answers reads"
                return None
            # A connection of its own, which does not wait as long for the lock as submissions do.
            with contextlib.closing(
                sqlite3.connect(
                    str(self.engine.url.database), timeout=_LOOK_S, isolation_level=None
                )
            ) as connection:
                connection.execute("BEGIN IMMEDIATE")
                connection.execute("UPDATE jobs SET version = version WHERE 0")
                connection.execute("ROLLBACK")
        except sqlite3.Error as err:
            return _why(err) or str(err)
        except BitquotaError as err:
            return err.message
        return None

    def _run(self, work: Callable[[Connection], T], *, writing: bool) -> T:
        until = time.monotonic() + _LONGEST_S
        for attempt in range(_RETRIES):
            try:
                with (self.engine if writing else self._reading).connect() as connection:
                    if writing:
                        connection = connection.execution_options(**{_WRITE: True})  # noqa: PLW2901
                    with connection.begin():
                        return work(connection)
            except DBAPIError as err:
                # Two writers that insert the same row: the second finds the first's on its
                # next run, because each looks before it inserts.
                passing = err.connection_invalidated or isinstance(
                    err, OperationalError | IntegrityError
                )
                if not passing:
                    raise
                _raise_lasting(err.orig)
                if attempt == _RETRIES - 1 or time.monotonic() > until:
                    msg = "the database must be reachable; it is not at the moment, try again"
                    cause = type(err.orig).__name__
                    raise Unavailable(msg, cause=cause, retry_after_s=_RETRY_AFTER_S) from err
                time.sleep(_BACKOFF_S * 2**attempt)
        raise AssertionError

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

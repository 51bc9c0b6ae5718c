from __future__ import annotations

import pytest

from bitquota.service.store.database import Database
from live_postgres import LivePostgres
from live_server import LiveServer


@pytest.fixture(scope="session")
def postgres():
    """A real PostgreSQL, or a reason to skip."""
    cluster = LivePostgres()
    if cluster.reason:
        pytest.skip(cluster.reason)
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def migrated(tmp_path_factory):
    """An SQLite file with all tables and no rows, to be copied."""
    path = tmp_path_factory.mktemp("migrated") / "empty.db"
    made = Database(f"sqlite:///{path}")
    made.create()
    made.close()
    return path


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """One server for all tests that leave it running and need no settings of their own."""
    with LiveServer(tmp_path_factory.mktemp("server") / "data") as running:
        yield running

from __future__ import annotations

import pytest

from bitquota.service.store.database import Database
from live_postgres import LivePostgres
from live_server import LiveServer, train_and_export


@pytest.fixture(scope="session")
def digits_files(tmp_path_factory):
    """A trained network as .pt2 and its calibration set as .npz."""
    return train_and_export(tmp_path_factory.mktemp("digits"))


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


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One server for all tests of a module that leave it running."""
    with LiveServer(tmp_path_factory.mktemp("server") / "data") as running:
        yield running

from __future__ import annotations

import threading

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from bitquota.errors import ServiceError, Unavailable
from bitquota.service.api.problem_responses import problem_response
from bitquota.service.jobs.job_store import JobStore
from bitquota.service.store.artifacts import ArtifactStore
from bitquota.service.store.database import Database, artifacts, metadata
from bitquota.service.store.formats import ArtifactKind
from bitquota.service.store.migrate import configuration


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/service.db"
    return request.getfixturevalue("postgres").new_database()


@pytest.fixture
def database(url):
    opened = Database(url)
    yield opened
    opened.close()


class TestCreate:
    def test_migrations_make_what_the_code_expects(self, database):
        database.create()
        with database.engine.connect() as connection:
            context = MigrationContext.configure(connection)
            assert compare_metadata(context, metadata) == []

    def test_rows_of_the_first_form_are_kept(self, database):
        """Jobs that were ordered before the second migration have no further inputs."""

        def first_form(connection):
            command.upgrade(configuration(connection), "0001")
            connection.execute(
                sa.text(
                    "INSERT INTO jobs (id, tenant, kind, status, request, created_at) "
                    "VALUES ('job_1', 'ann', 'plan', 'queued', '{}', 0)"
                )
            )

        database.write(first_form)
        database.create()
        job = JobStore(database, lambda: 0.0).get("ann", "job_1")
        assert (job.inputs, job.result_bytes) == ({}, 0)

    def test_again_changes_nothing(self, database):
        database.create()
        database.create()

    def test_servers_that_start_together_wait_for_each_other(self, url):
        failures = []

        def start():
            opened = Database(url)
            try:
                opened.create()
            except Exception as error:  # noqa: BLE001  # the thread must not hide it
                failures.append(error)
            finally:
                opened.close()

        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []


class TestWrite:
    def test_what_fails_half_way_leaves_nothing(self, database):
        database.create()

        def work(connection):
            connection.execute(sa.text("INSERT INTO tenants (tenant) VALUES ('ann')"))
            raise ServiceError("stop")

        with pytest.raises(ServiceError):
            database.write(work)
        count = database.read(lambda c: c.execute(sa.text("SELECT count(*) FROM tenants")))
        assert count is not None
        with database.engine.connect() as connection:
            assert connection.execute(sa.text("SELECT count(*) FROM tenants")).scalar() == 0

    def test_many_writers_at_once(self, database):
        """Each looks before it inserts; who comes second finds the row of the first."""
        database.create()
        store = ArtifactStore(database, lambda: 0.0)
        results, failures = [], []

        def record():
            try:
                made = store.record(
                    "ann", ArtifactKind.MODEL, "sha256:0", format_name="pt2", name="", size=1
                )
                results.append(made[1])
            except Exception as error:  # noqa: BLE001  # the thread must not hide it
                failures.append(error)

        threads = [threading.Thread(target=record) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert results.count(True) == 1
        with database.engine.connect() as connection:
            assert len(connection.execute(artifacts.select()).all()) == 1

    def test_survives_a_crash_of_postgresql(self, postgres):
        opened = Database(postgres.new_database())
        opened.create()
        store = ArtifactStore(opened, lambda: 0.0)
        store.record("ann", ArtifactKind.MODEL, "sha256:0", format_name="pt2", name="", size=1)
        postgres.crash()
        back = threading.Timer(0.5, postgres.resume)
        back.start()
        found = store.get("ann", ArtifactKind.MODEL, "sha256:0")
        back.join()
        opened.close()
        assert found.size == 1


class TestUnavailable:
    def test_database_that_stays_away_is_a_503_with_a_wait(self, tmp_path, monkeypatch):
        """The folder of an SQLite file vanishes; pauses are cut short."""
        monkeypatch.setattr("bitquota.service.store.database._BACKOFF_S", 0.0)
        opened = Database(f"sqlite:///{tmp_path}/gone/service.db")
        with pytest.raises(Unavailable, match="reachable") as caught:
            opened.read(lambda connection: connection.execute(sa.text("SELECT 1")))
        opened.close()
        answer = problem_response(caught.value)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")

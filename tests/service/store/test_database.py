from __future__ import annotations

import threading

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from bitquota.errors import InvalidInput, ServiceError, Unavailable
from bitquota.service.api.problem_responses import problem_response
from bitquota.service.jobs.job import NewJob
from bitquota.service.jobs.job_store import JobStore
from bitquota.service.store.artifacts import ArtifactStore
from bitquota.service.store.database import Database, artifacts, deliveries, metadata
from bitquota.service.store.formats import ArtifactKind
from bitquota.service.store.migrate import configuration, downgrade


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

    def test_a_form_of_a_later_release_is_refused(self, database):
        """In one sentence, and nothing is changed."""
        database.create()
        later = sa.text("UPDATE alembic_version SET version_num = '9999'")
        database.write(lambda connection: connection.execute(later))
        with pytest.raises(InvalidInput, match="form 9999 of a later one"):
            database.create()

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


class TestDowngrade:
    @staticmethod
    def rows(connection, names):
        """Every row of the tables, with the columns that they have now."""
        found = {}
        for name in names:
            table = sa.Table(name, sa.MetaData(), autoload_with=connection)
            rows = connection.execute(sa.select(table).order_by(*table.primary_key)).mappings()
            found[name] = [dict(row) for row in rows]
        return found

    @staticmethod
    def form(connection):
        """Columns and indices of every table."""
        look = sa.inspect(connection)
        return {
            name: (
                {column["name"] for column in look.get_columns(name)},
                {index["name"] for index in look.get_indexes(name)},
            )
            for name in look.get_table_names()
        }

    def test_one_step_back_and_forward_with_jobs_in_flight(self, database, url, tmp_path):
        """The form before is that of a new database; no row is lost on either way."""
        database.create()
        store = JobStore(database, lambda: 5.0)
        uploads = ArtifactStore(database, lambda: 5.0)
        for digest, kind in (("m", ArtifactKind.MODEL), ("d", ArtifactKind.DATASET)):
            uploads.record("ann", kind, digest, format_name="npz", name="", size=7)
        for _ in range(2):
            values = {"kind": "plan", "request": {}, "labels": {}}
            store.create(NewJob(tenant="ann", model="m", dataset="d", **values))
        running = store.claim("me", 1e9)
        delivery = {
            "id": "d", "tenant": "ann", "job": running.id, "url": "https://example.com/hook",
            "host": "example.com", "body": "{}", "created_at": 1.0, "next_at": 2.0,
        }  # fmt: skip
        database.write(lambda c: c.execute(deliveries.insert().values(delivery)))
        before = database.read(lambda c: self.rows(c, metadata.tables))

        newest, older = database.write(downgrade)
        assert newest > older
        back = Database(f"sqlite:///{tmp_path}/older.db")
        back.write(lambda c: command.upgrade(configuration(c), older))
        if not database.postgres:  # whose own names differ
            assert back.read(self.form) == database.read(self.form)
        back.close()
        kept = database.read(lambda c: self.rows(c, metadata.tables))
        for name, rows in before.items():
            columns = set().union(*map(set, kept[name]))
            assert [{k: v for k, v in row.items() if k in columns} for row in rows] == kept[name]

        database.create()
        assert before == database.read(lambda c: self.rows(c, metadata.tables))
        assert store.claim("other", 1e9) is not None

    def test_first_form_has_none_before(self, database):
        database.write(lambda c: command.upgrade(configuration(c), "0001"))
        with pytest.raises(InvalidInput, match="is the first"):
            database.write(downgrade)


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

    def test_survives_a_crash_of_postgresql(self, postgres, monkeypatch):
        # As long as a busy machine takes to recover.
        monkeypatch.setattr("bitquota.service.store.database._RETRIES", 10)
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

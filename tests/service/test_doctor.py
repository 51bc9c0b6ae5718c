"""``bitquota admin doctor`` says what is there, and what is missing and how to get it."""

from __future__ import annotations

import sqlite3
from dataclasses import replace

import pytest
import sqlalchemy as sa
from typer.testing import CliRunner

from bitquota.errors import InvalidInput
from bitquota.service import admin_commands
from bitquota.service.doctor import doctor
from bitquota.service.settings import Settings
from bitquota.service.store.database import Database


@pytest.fixture
def settings(tmp_path):
    return Settings(data_dir=tmp_path)


@pytest.fixture
def database(settings):
    made = Database(settings.url)
    made.create()
    yield made
    made.close()


def finding(what, settings):
    return {f.what: f for f in doctor(settings)}[what]


class TestDoctor:
    def test_looks_at_everything(self, settings, database):
        assert [f.what for f in doctor(settings)] == [
            "database", "data folder", "blob store", "engine", "sandbox", "limits",
            "compiled kernels", "telemetry",
        ]  # fmt: skip

    def test_default_is_well(self, settings, database):
        found = {f.what: f for f in doctor(settings)}
        assert found["database"].good
        assert "sqlite, schema 0" in found["database"].detail
        assert found["blob store"].detail == "in the data folder"
        assert found["engine"].good
        assert "1 x 1 workers" in found["engine"].detail
        assert "no control group" in found["limits"].detail

    def test_engine_that_is_none(self, settings, database):
        found = finding("engine", replace(settings, engine="dask"))
        assert not found.good
        assert "local, ray" in found.detail

    def test_cluster_without_a_token(self, settings, database, monkeypatch):
        for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("RAY_AUTH_MODE", "token")  # what connect() sets is put back
        found = finding("engine", replace(settings, engine="ray"))
        assert not found.good
        assert "BITQUOTA_RAY_TOKEN_FILE" in found.detail

    def test_files_in_another_folder(self, settings, database, tmp_path):
        pytest.importorskip("fsspec")
        url = f"file://{tmp_path / 'elsewhere'}"
        found = finding("blob store", replace(settings, blob_url=url))
        assert found.good
        assert "0 files, 0 B" in found.detail

    def test_storage_that_is_none(self, settings, database):
        found = finding("blob store", replace(settings, blob_url="nonsense://x"))
        assert not found.good

    def test_control_group_that_is_none(self, settings, database, tmp_path):
        found = finding("limits", replace(settings, cgroup=str(tmp_path / "none")))
        assert not found.good
        assert "BITQUOTA_CGROUP" in found.detail

    def test_traces_are_told_of(self, settings, database, monkeypatch):
        pytest.importorskip("opentelemetry.sdk")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://user:secret@collector:4318")
        found = finding("telemetry", settings)
        assert found.good
        assert found.detail == "traces go to collector:4318"

    def test_command_fails_when_something_needed_is_missing(self, tmp_path, monkeypatch):
        monkeypatch.setenv("BITQUOTA_ENGINE", "dask")
        done = CliRunner().invoke(admin_commands.app, ["doctor", "--data-dir", str(tmp_path)])
        assert done.exit_code == 1
        assert "LOOK  engine: dask" in done.output

    def test_makes_nothing(self, tmp_path):
        """Looking at a place where no server has run leaves it as it was."""
        place = tmp_path / "data"
        found = {f.what: f for f in doctor(Settings(data_dir=place))}
        assert found["database"].good
        assert found["data folder"].good
        assert "the first start makes it" in found["data folder"].detail
        assert not place.exists()

    def test_leaves_an_older_schema_as_it_is(self, settings, database):
        """A server that is running on it may not know a newer one."""
        database.write(
            lambda c: c.execute(sa.text("UPDATE alembic_version SET version_num='0001'"))
        )
        assert finding("database", settings).detail == "sqlite, schema 0001"

    def test_empty_database(self, tmp_path):
        """One that was made beforehand, as PostgreSQL's is."""
        sqlite3.connect(tmp_path / "bitquota.db").close()
        assert "none yet" in finding("database", Settings(data_dir=tmp_path)).detail


class TestPasswordFile:
    def test_becomes_part_of_the_url(self, tmp_path):
        file = tmp_path / "password"
        file.write_text("p@ss/word\n")
        settings = Settings(
            database_url="postgresql+psycopg://bitquota@host/name",
            database_password_file=str(file),
        )
        assert settings.url == "postgresql+psycopg://bitquota:p%40ss%2Fword@host/name"
        assert "p@ss" not in str(settings.to_environment())

    def test_missing_file(self, tmp_path):
        settings = Settings(database_url="postgresql://h/n", database_password_file=str(tmp_path))
        with pytest.raises(InvalidInput, match="BITQUOTA_DATABASE_PASSWORD_FILE"):
            _ = settings.url

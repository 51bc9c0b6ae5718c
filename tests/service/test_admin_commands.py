"""``bitquota admin`` makes nothing by looking, and says what it leaves out."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from bitquota.errors import InvalidInput
from bitquota.service import admin_commands


@pytest.fixture
def nowhere(tmp_path):
    """A data folder that is not there."""
    return tmp_path / "data"


@pytest.fixture
def data(tmp_path, migrated):
    """A data folder without keys."""
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(migrated, folder / "bitquota.db")
    return folder


def call(folder, *arguments):
    line = [*arguments, "--data-dir", str(folder)]
    return CliRunner().invoke(admin_commands.app, line, catch_exceptions=False)


class TestListKeys:
    def test_without_a_server(self, nowhere):
        """Where no server has run there are no keys, and still no folder."""
        done = call(nowhere, "keys", "list")
        assert done.exit_code == 0
        assert done.stdout == ""
        assert f"no keys: there is no server's data in {nowhere}" in done.stderr
        assert not nowhere.exists()

    def test_without_keys(self, data):
        """The way to make one is named; standard output stays empty for programs."""
        done = call(data, "keys", "list")
        assert done.stdout == ""
        assert "no keys: 'bitquota admin keys create TENANT'" in done.stderr

    def test_without_keys_of_a_tenant(self, data):
        """Others may have some."""
        call(data, "keys", "create", "bob")
        assert "no keys of tenant 'ann'" in call(data, "keys", "list", "--tenant", "ann").stderr
        assert call(data, "keys", "list").stderr == ""


class TestOpened:
    @pytest.mark.parametrize(
        "command",
        [("audit",), ("gc",), ("verify",), ("jobs", "list", "ann"), ("quotas", "show", "ann"),
         ("keys", "revoke", "k"), ("backup", "b")],
        ids=" ".join,
    )  # fmt: skip
    def test_mistyped_folder_becomes_no_server(self, nowhere, command):
        """The folder is named, and is not made."""
        with pytest.raises(InvalidInput, match=f"'{nowhere}' holds none"):
            call(nowhere, *command)
        assert not nowhere.exists()

    def test_first_key_makes_it(self, nowhere):
        """Keys are made before a server that others reach is started."""
        assert call(nowhere, "keys", "create", "ann").exit_code == 0
        assert (nowhere / "bitquota.db").exists()

    def test_first_key_is_made_once(self, nowhere):
        """As a pod does before each start."""
        made, again = (call(nowhere, "keys", "create", "ann", "--if-none") for _ in range(2))
        assert json.loads(made.stdout)["key"].startswith("bq_")
        assert (again.exit_code, again.stdout) == (0, "")
        assert len(call(nowhere, "keys", "list").stdout.splitlines()) == 1


class TestDoctor:
    def test_makes_nothing(self, nowhere):
        """A place can be looked at before a server is started there."""
        done = call(nowhere, "doctor")
        assert "data folder" in done.stdout
        assert not nowhere.exists()


class TestBackup:
    def test_says_what_it_wrote(self, data, tmp_path):
        """One line: everything is in it."""
        done = call(data, "backup", str(tmp_path / "copy"))
        assert done.stderr == f"wrote {tmp_path / 'copy'}\n"

    def test_says_what_lies_elsewhere(self, data, tmp_path, monkeypatch):
        """Files at another address are not copied, and nobody may believe that they were."""
        pytest.importorskip("fsspec")
        monkeypatch.setenv("BITQUOTA_BLOB_URL", f"file://{tmp_path / 'bucket'}")
        done = call(data, "backup", str(tmp_path / "copy"))
        assert done.exit_code == 0
        assert f"NOT in the backup: uploads and results at file://{tmp_path}" in done.stderr

"""Files that commands write: what was there is named, and what is not theirs is left alone."""

from __future__ import annotations

import json
import os
import threading

import pytest

from bitquota.cli.written import Written, former_matrix, former_plan, require_folder
from bitquota.errors import InvalidInput


def write(text):
    return lambda path: path.write_text(text)


class TestSave:
    def test_new(self, tmp_path, capsys):
        """Folders are made on the way."""
        Written.at(tmp_path / "a" / "r.md", "--out").save(write("x"))
        assert (tmp_path / "a" / "r.md").read_text() == "x"
        assert capsys.readouterr().err == f"wrote {tmp_path / 'a' / 'r.md'}\n"

    def test_again_the_same(self, tmp_path, capsys):
        """Nothing was lost, and that is said."""
        (tmp_path / "r.md").write_text("x")
        Written.at(tmp_path / "r.md", "--out").save(write("x"))
        assert capsys.readouterr().err.endswith("r.md (as it was)\n")

    def test_another(self, tmp_path, capsys):
        """What was replaced is named."""
        (tmp_path / "p.json").write_text(
            json.dumps({"schema": "bitquota/plan/1", "budgets": [{"text": "4 bits"}]})
        )
        Written.at(tmp_path / "p.json", "--out", former=former_plan).save(write("x"))
        assert capsys.readouterr().err.endswith("p.json (replaced a plan for 4 bits)\n")

    def test_long_paths_stay_whole(self, tmp_path, capsys, monkeypatch):
        """A path can be copied from the message, whatever the width and the letters."""
        monkeypatch.setenv("COLUMNS", "20")
        path = tmp_path / "a long [red]name.json"
        Written.at(path, "--out").save(write("x"))
        assert capsys.readouterr().err == f"wrote {path}\n"


class TestAt:
    def test_empty_file(self, tmp_path):
        """What mktemp makes may be written to, whatever should be in it."""
        (tmp_path / "p.json").touch()
        assert Written.at(tmp_path / "p.json", "-o", former=former_plan).former

    def test_pipe(self, tmp_path):
        """A pipe is written to and never read or replaced."""
        os.mkfifo(tmp_path / "pipe")
        reader = threading.Thread(target=(tmp_path / "pipe").read_text)
        reader.start()
        Written.at(tmp_path / "pipe", "-o", former=former_plan).save(write("x"))
        reader.join()
        assert (tmp_path / "pipe").is_fifo()

    @pytest.mark.parametrize("content", ["text", "[]", '{"schema": "bitquota/lock/1"}'])
    def test_no_plan_is_never_replaced_by_one(self, tmp_path, content):
        """Somebody's other file is left alone."""
        (tmp_path / "p.json").write_text(content)
        with pytest.raises(InvalidInput, match="only a plan is replaced by a plan"):
            Written.at(tmp_path / "p.json", "-o", former=former_plan)

    def test_no_matrix_is_never_replaced_by_one(self, tmp_path):
        """Calibration data, say, which are .npz as well."""
        import numpy as np

        np.savez(tmp_path / "c.npz", x=np.zeros(3))
        with pytest.raises(InvalidInput, match="only a sensitivity matrix"):
            Written.at(tmp_path / "c.npz", "-o", former=former_matrix)


class TestRequireFolder:
    def test_below_a_file(self, tmp_path):
        """The file that is in the way is named."""
        (tmp_path / "f").touch()
        with pytest.raises(InvalidInput, match="/f' is no folder"):
            require_folder(tmp_path / "f" / "g" / "h", "--out")

    def test_to_be_made(self, tmp_path):
        """Folders that are not there yet are no fault, and are not made."""
        require_folder(tmp_path / "a" / "b", "--out")
        assert not (tmp_path / "a").exists()

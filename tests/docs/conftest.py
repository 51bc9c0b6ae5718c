"""Commands of a page as a function."""

from __future__ import annotations

import shlex
import sys

import pytest

from bitquota.cli import main


@pytest.fixture
def run_command(repository, tmp_path, monkeypatch, capsys):
    """Return a function that runs one line of a page in an empty folder; it must succeed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(repository))
    # Sandboxed commands are other processes, which load torch anew: tests/cli/test_sandboxed.py.
    monkeypatch.setenv("BITQUOTA_SANDBOX", "off")

    def run(command: str) -> None:
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code
        assert not code, f"{command}: {capsys.readouterr()}"

    return run

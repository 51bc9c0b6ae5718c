"""The command line as a function."""

from __future__ import annotations

import os
import sys

import pytest

from bitquota.cli import main

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture
def bitquota(monkeypatch, tmp_path, capsys):
    """Return a function that runs the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("BITQUOTA_SANDBOX", "off")  # its output would go past capsys

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bitquota", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run

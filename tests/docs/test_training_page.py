"""The page on training: its commands run in order, its tables name what exists."""

from __future__ import annotations

import re
import shlex
import sys

import pytest

from bitquota.cli import main
from bitquota.plan import Plan
from bitquota.training.learn import RECIPES
from bitquota.training.weight_quantizers import METHODS


@pytest.fixture(scope="module")
def page(repository):
    return (repository / "docs" / "training.md").read_text()


class TestTrainingPage:
    def test_commands(self, page, repository, tmp_path, monkeypatch, capsys):
        """Every command runs and passes, with one epoch each; plans keep their budgets."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.syspath_prepend(str(repository))
        blocks = re.findall(r"^```sh\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
        commands = "".join(blocks).splitlines()
        assert len(commands) >= 6
        for command in commands:
            short = re.sub(r"--epochs \d", "--epochs 1", command)
            monkeypatch.setattr(sys, "argv", shlex.split(short))
            code = 0
            try:
                main()
            except SystemExit as stop:
                code = stop.code
            assert not code, f"{command}: {capsys.readouterr()}"
        for name in ("trained", "learned", "onward", "both", "resolved"):
            plan = Plan.load(tmp_path / name / "plan.json")
            assert plan.average_bits <= 2.5
            assert plan.measured.accuracy > 0.5
            assert (tmp_path / name / "trained.safetensors").exists()
        both = Plan.load(tmp_path / "both" / "plan.json")
        assert sum(a.candidate.activation_size_bits for a in both.assignments) <= 3 * 1024 * 8

    def test_tables(self, page):
        """Every method and recipe has its line, and no other has."""
        for heading, known in (("--method", METHODS), ("--recipe", RECIPES)):
            table = page.partition(f"| `{heading}` |")[2].split("\n\n")[0]
            assert list(known) == re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)

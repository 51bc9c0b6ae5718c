"""The page on CI: its commands run, its YAML is valid, its tables name what exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bitquota.ci.lock import Lock
from bitquota.cli import main
from markdown_pages import blocks


@pytest.fixture(scope="module")
def page(repository):
    return (repository / "docs" / "quickstart-ci.md").read_text()


class TestQuickstartCi:
    def test_commands(self, page, run_command, tmp_path, monkeypatch):
        """Every command runs in order and passes; the lock file and the JUnit file are there."""
        monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
        commands = "".join(blocks(page, "sh")).splitlines()

        assert len(commands) >= 5
        for command in commands:
            run_command(command)
        assert Lock.load(tmp_path / "bitquota.lock.json").limits.not_worse_than == "uniform"
        assert (tmp_path / "bitquota-junit.xml").exists()

    def test_workflow(self, page, repository, tmp_path):
        """The workflow keeps GitHub's schema, and gives the action inputs that it has."""
        github, gitlab, pre_commit = (yaml.safe_load(b) for b in blocks(page, "yaml"))
        (tmp_path / "workflow.yml").write_text(blocks(page, "yaml")[0])
        done = subprocess.run(
            [
                Path(sys.executable).with_name("check-jsonschema"),
                "--builtin-schema",
                "vendor.github-workflows",
                tmp_path / "workflow.yml",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        action = yaml.safe_load((repository / "action.yml").read_text())
        step = github["jobs"]["bitquota"]["steps"][1]
        assert done.returncode == 0, done.stdout
        assert set(step["with"]) <= set(action["inputs"])
        template = (repository / gitlab["include"][0]["remote"].rpartition("/main/")[2]).read_text()
        assert all(f"{name}:" in template for name in gitlab["bitquota-check"]["variables"])
        hooks = yaml.safe_load((repository / ".pre-commit-hooks.yaml").read_text())
        assert pre_commit["repos"][0]["hooks"][0]["id"] == hooks[0]["id"]

    def test_limits(self, page, capsys, monkeypatch):
        """The table names every limit of ``bitquota check``, and nothing else."""
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setenv("NO_COLOR", "1")
        monkeypatch.setattr(sys, "argv", ["bitquota", "check", "--help"])
        with pytest.raises(SystemExit):
            main()
        offered = set(re.findall(r"(--[a-z-]+)", capsys.readouterr().out))
        table = set(re.findall(r"^\| `(--[a-z-]+)", page, flags=re.MULTILINE))
        assert table <= offered
        starts = "--max-", "--not-", "--base", "--plan", "--table"
        limits = {o for o in offered if o.startswith(starts)}
        assert limits == table

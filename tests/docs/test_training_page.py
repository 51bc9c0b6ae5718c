"""The page on training: its commands run in order, its tables name what exists."""

from __future__ import annotations

import re

import pytest

from bitquota.plan import Plan
from bitquota.request import ROBUST
from bitquota.training.learn import RECIPES
from bitquota.training.weight_quantizers import METHODS
from markdown_pages import blocks


@pytest.fixture(scope="module")
def page(repository):
    return (repository / "docs" / "training.md").read_text()


class TestTrainingPage:
    def test_commands(self, page, run_command, tmp_path):
        """Every command runs and passes, with one epoch each; plans keep their budgets."""
        commands = "".join(blocks(page, "sh")).splitlines()
        assert len(commands) >= 6
        for command in commands:
            run_command(re.sub(r"--epochs \d", "--epochs 1", command))
        for name in ("trained", "learned", "onward", "both", "resolved"):
            plan = Plan.load(tmp_path / name / "plan.json")
            assert plan.average_bits <= 2.5
            assert plan.measured.accuracy > 0.5
            assert (tmp_path / name / "trained.safetensors").exists()
        assert (tmp_path / "nested" / "nested.safetensors").exists()
        assert Plan.load(tmp_path / "robust-plan.json").average_bits <= 2.5
        assert Plan.load(tmp_path / "nested" / "W3" / "plan.json").average_bits == 3
        both = Plan.load(tmp_path / "both" / "plan.json")
        assert sum(a.candidate.activation_size_bits for a in both.assignments) <= 3 * 1024 * 8

    def test_tables(self, page):
        """Every method and recipe has its line, and no other has."""
        for heading, known in (("--method", METHODS), ("--recipe", RECIPES), ("--robust", ROBUST)):
            table = page.partition(f"| `{heading}` |")[2].split("\n\n")[0]
            assert list(known) == re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)

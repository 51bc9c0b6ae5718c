"""The quickstarts for a CNN and a language model: every command and every block of Python runs."""

from __future__ import annotations

import shlex

import pytest
from typer.main import get_command

from bitquota.cli.app import app as cli
from bitquota.exports.export_report import ExportReport
from bitquota.plan import Plan
from markdown_pages import blocks


@pytest.fixture
def run(repository, run_command, monkeypatch, capsys):
    """Return a function that runs a page in an empty folder and returns what Python printed."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run_page(name: str) -> str:
        page = (repository / "docs" / name).read_text()
        for command in "".join(blocks(page, "sh")).splitlines():
            if command.startswith("python -m examples.tiny_llama"):
                from examples import tiny_llama

                tiny_llama.main(["--steps", "20"])
                continue
            run_command(command)
        capsys.readouterr()
        for block in blocks(page, "python"):
            exec(compile(block, name, "exec"), {})  # noqa: S102  # our own documentation
        return capsys.readouterr().out

    return run_page


class TestQuickstartCnn:
    def test_page(self, run, tmp_path):
        """The file runs in ONNX Runtime alone and takes the plan's bytes."""
        printed = run("quickstart-cnn.md")
        plan = Plan.load(tmp_path / "plan.json")
        report = ExportReport.load(tmp_path / "exported")
        assert "(1, 10)" in printed
        assert plan.average_bits <= 3.5
        quantized = [a.candidate for a in plan.assignments if a.candidate.weight_bits < 32]
        assert sum(c.size_bits for c in quantized) == report.payload_bits


class TestMilliseconds:
    def test_commands_take_their_options(self, repository):
        """The page's options are the commands' own; tests/exports/test_profile.py runs them."""
        app = get_command(cli)
        lines = "".join(
            blocks((repository / "docs/milliseconds.md").read_text(), "sh")
        ).splitlines()
        assert ["profile", "plan", "export", "lock", "check"] == [x.split()[1] for x in lines]
        for line in lines:
            _, name, *words = shlex.split(line)
            known = {option for p in app.commands[name].params for option in p.opts}
            assert {word for word in words if word.startswith("--")} <= known


class TestQuickstartLlm:
    def test_page(self, run, tmp_path):
        """Both files hold what was planned; the recipe names every layer."""
        printed = run("quickstart-llm.md")
        assert "[1, 8, 256]" in printed
        for name, folder in (
            ("plan.json", "tiny-llama-gguf"),
            ("packed.json", "tiny-llama-packed"),
        ):
            plan, report = Plan.load(tmp_path / name), ExportReport.load(tmp_path / folder)
            quantized = [a for a in plan.assignments if a.candidate.weight_bits < 32]
            assert sum(a.candidate.size_bits for a in quantized) == report.payload_bits
            assert report.difference.maximum < 1e-5
            if name == "packed.json":
                recipe = (tmp_path / "recipe" / "recipe.yaml").read_text()
                assert all(a.layer.name in recipe for a in quantized)

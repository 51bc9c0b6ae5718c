"""The quickstarts for a CNN and a language model: every command and every block of Python runs."""

from __future__ import annotations

import pytest

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
    def test_page(self, run, tmp_path):
        """From a table to a receipt with a prediction beside a time."""
        run("milliseconds.md")
        plan = Plan.load(tmp_path / "plan.json")
        timed = ExportReport.load(tmp_path / "exported").timed
        assert plan.spent(plan.budgets[0]) == timed.predicted_ns <= 10**6
        assert 0 < timed.measured_ns


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

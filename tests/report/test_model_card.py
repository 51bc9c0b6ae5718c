"""The README of an exported folder."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from bitquota.exports.export_report import ExportReport, TextRun
from bitquota.plan import Plan
from bitquota.report.model_card import CARD_FILE, write_card

RAN = TextRun(
    runtime="llama.cpp", version="1", n_windows=2, n_tokens=128, relative=1e-3, explained=1e-3,
    kl=1e-5, log_likelihood=-2.5, planned_log_likelihood=-2.5, same_top=1.0, texts=3,
    texts_alike=3, prompt_tokens_per_second=900.0, tokens_per_second=90.0,
)  # fmt: skip


@pytest.fixture
def plan(repository):
    return Plan.load(repository / "tests/golden/plan-target-ort-cpu.json")


@pytest.fixture
def made(repository):
    found = json.loads((repository / "tests/golden/receipt.json").read_text())
    return replace(ExportReport.from_json(found), runtime={"name": "onnxruntime", "version": "1"})


def test_hubs_read_it(plan, made, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    write_card(tmp_path, plan, replace(made, exporter="gguf", text_run=RAN))
    data = hub.ModelCard.load(tmp_path / CARD_FILE).data
    assert ("gguf", "text-generation") == (data.library_name, data.pipeline_tag)
    assert {"bitquota", "quantized", "gguf"} <= set(data.tags)


def test_says_files_losses_and_how_to_run_them(plan, made, tmp_path):
    write_card(tmp_path, plan, replace(made, exporter="onnx-qdq"))
    card = (tmp_path / CARD_FILE).read_text()
    assert "onnxruntime.InferenceSession('./model.onnx')" in card
    assert all(f"| `{file.name}` |" in card for file in made.files)
    assert all(baseline.name in card for baseline in plan.baselines)
    assert f"Plan `{plan.digest()}`" in card
    assert "pipeline_tag" not in card

"""Folders for ONNX Runtime GenAI and OpenVINO GenAI: run with a cache, and what is refused."""

from __future__ import annotations

import sys

import numpy as np
import onnx
import pytest
import torch

from bitquota.errors import ExportFailed, InvalidInput, InvalidPlan, MissingDependency
from bitquota.exports.export import export_plan, open_export, prepare_export
from bitquota.models.calibration import CalibrationSet
from bitquota.models.load import load_model
from bitquota.models.running import primary_output
from format_networks import plan_with
from language_folders import LINEAR, LLAMA3, folder, tokenizer

pytestmark = pytest.mark.slow  # two runtimes, and the builder of one of them, are imported

WINDOWS = CalibrationSet(
    inputs=(torch.randint(0, 64, (3, 40), generator=torch.Generator().manual_seed(0)),)
)


def model_of(path, kind="llama", *, texts=False, **config):
    """A random model; the builder takes layers of as many rows as there are tokens for the head."""
    settings = {"initializer_range": 0.2, "vocab_size": 80} | config
    source = folder(path / "m", kind, **settings)
    if texts:
        tokenizer().save(str(source / "tokenizer.json"))
    return load_model(str(source))


def continued(module, n: int) -> list[int]:
    """The most probable tokens behind the first window, without a cache."""
    tokens = WINDOWS.inputs[0][0].tolist()
    for _ in range(n):
        with torch.no_grad():
            logits = primary_output(module(torch.tensor([tokens])))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[-n:]


@pytest.fixture
def genai():
    """Skip where the extra is not installed."""
    pytest.importorskip("onnxruntime_genai", reason="the extra 'genai' is not installed")


@pytest.mark.usefixtures("genai")
class TestGenaiFolder:
    @pytest.mark.parametrize(
        ("kind", "config"),
        [
            ("llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
            ("mistral", {"head_dim": 32, "sliding_window": None, "rope_parameters": LINEAR}),
            ("qwen3", {"head_dim": 32}),
        ],
    )
    def test_families_and_mixed_widths(self, tmp_path, kind, config):
        """The graph and GenAI compute what fake quantization does."""
        model = model_of(tmp_path, kind, **config)
        plan = plan_with(model, WINDOWS.inputs, target="ort-genai", seed=3)
        assert {2, 4, 8} <= {a.candidate.weight_bits for a in plan.assignments}
        report = export_plan(model, plan, tmp_path / "o", target="ort-genai", samples=WINDOWS)
        assert report.difference.relative < 1e-5
        assert report.text_run.relative < 1e-5
        assert (3, 120) == (report.text_run.n_windows, report.text_run.n_tokens)
        module, _, _ = open_export(model, tmp_path / "o")
        prepared = prepare_export(model, plan, samples=WINDOWS)
        assert torch.allclose(module(WINDOWS.inputs[0]), prepared.reference, atol=1e-4)

    def test_tied_weight_is_stored_once_and_texts_are_split(self, tmp_path):
        """The output layer multiplies with the blocks that tokens are looked up in."""
        model = model_of(tmp_path, texts=True, vocab_size=320, tie_word_embeddings=True)
        plan = plan_with(model, WINDOWS.inputs, target="ort-genai", bits=(4,))
        report = export_plan(model, plan, tmp_path / "o", target="ort-genai", samples=WINDOWS)
        nodes = onnx.load(str(tmp_path / "o" / "model.onnx")).graph.node
        products = {n.input[1] for n in nodes if n.op_type == "MatMulNBits"}
        [looked_up] = [n for n in nodes if n.op_type == "GatherBlockQuantized"]
        [flat] = [n for n in nodes if list(n.output) == [looked_up.input[0]]]
        assert flat.input[0] in products
        ran = report.text_run
        assert (ran.texts, ran.texts_alike) == (10, 10)

    def test_continues_with_its_cache_as_torch_does_without(self, tmp_path):
        """Token by token, the most probable ones are the plan's."""
        from bitquota.exports.genai_folder import Genai

        model = model_of(tmp_path)
        plan = plan_with(model, WINDOWS.inputs, target="ort-genai", bits=(2, 8))
        export_plan(model, plan, tmp_path / "o", target="ort-genai", samples=WINDOWS)
        module = prepare_export(model, plan, samples=WINDOWS).module
        found, _ = Genai(tmp_path / "o").continue_greedily(WINDOWS.inputs[0][0].tolist(), 8)
        assert continued(module, 8) == found

    def test_unknown_family(self, tmp_path):
        """The builder's own words say why."""
        model = model_of(tmp_path, "olmo2")
        plan = plan_with(model, WINDOWS.inputs, target="ort-genai")
        with pytest.raises(ExportFailed, match=r"builder must take .* not currently supported"):
            export_plan(model, plan, tmp_path / "o", target="ort-genai", samples=WINDOWS)
        assert not (tmp_path / "o").exists()

    def test_sliding_window_that_the_builder_leaves_out(self, tmp_path):
        """Windows of samples may be shorter, so comparing outputs would not tell."""
        model = model_of(tmp_path, "mistral", sliding_window=90)
        plan = plan_with(model, WINDOWS.inputs, target="ort-genai")
        with pytest.raises(ExportFailed, match=r"see 90 tokens back"):
            export_plan(model, plan, tmp_path / "o", target="ort-genai", samples=WINDOWS)

    def test_graph_that_computes_something_else(self, tmp_path):
        """With as many tokens as rows of a layer the builder takes that layer for the head."""
        model = model_of(tmp_path, vocab_size=64)
        plan = plan_with(model, WINDOWS.inputs, target="ort-genai")
        with pytest.raises(ExportFailed, match="must compute what"):
            export_plan(model, plan, tmp_path / "o", target="ort-genai", samples=WINDOWS)

    def test_changed_or_doubled_weight(self, tmp_path):
        """A weight that the graph lacks, or has twice, is named."""
        from bitquota.exports import genai_graph

        model = model_of(tmp_path)
        plan = plan_with(model, WINDOWS.inputs, target="ort-genai", bits=(4,))
        prepared = prepare_export(model, plan, samples=WINDOWS)
        graph = genai_graph.decoder_graph(prepared, "onnx-genai")
        name = graph.initializer_of["model.layers.0.mlp.up_proj"]
        [tensor] = [t for t in graph.model.graph.initializer if t.name == name]
        values = onnx.numpy_helper.to_array(tensor)
        turned = onnx.numpy_helper.from_array(np.ascontiguousarray(values.T), "again")
        graph.model.graph.initializer.append(turned)
        with pytest.raises(ExportFailed, match="once; it is twice"):
            genai_graph.matched(graph.model, prepared)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values * 2, name))
        graph.model.graph.initializer.pop()
        with pytest.raises(InvalidPlan, match="up_proj' as it is"):
            genai_graph.matched(graph.model, prepared)


class TestOpenvinoGenai:
    @pytest.mark.parametrize(
        ("kind", "config"),
        [
            ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
            ("qwen2", {"num_key_value_heads": 4}),
            ("mistral", {"head_dim": 32, "sliding_window": None, "rope_parameters": LINEAR}),
        ],
    )
    def test_families_with_state(self, tmp_path, kind, config):
        """Windows, and tokens one by one with the state, are what fake quantization computes."""
        pytest.importorskip("openvino_genai", reason="the extra 'genai' is not installed")
        from bitquota.exports.openvino_genai import Genai

        model = model_of(tmp_path, kind, texts=True, **({"vocab_size": 320} | config))
        plan = plan_with(model, WINDOWS.inputs, target="openvino-cpu", seed=3)
        assert {2, 4, 8} <= {a.candidate.weight_bits for a in plan.assignments}
        out = tmp_path / "o"
        report = export_plan(model, plan, out, format_name="openvino-genai", samples=WINDOWS)
        ran = report.text_run
        assert report.difference.relative < 1e-5
        assert (10, 10) == (ran.texts, ran.texts_alike)
        assert ran.relative < 1e-5
        found, _ = Genai(out).continue_greedily(WINDOWS.inputs[0][0].tolist(), 8)
        assert continued(prepare_export(model, plan, samples=WINDOWS).module, 8) == found


class TestRefusals:
    def test_not_installed(self, tmp_path, monkeypatch):
        """The message names the extra."""
        monkeypatch.setitem(sys.modules, "onnxruntime_genai.models.builder", None)
        model = model_of(tmp_path)
        plan = plan_with(model, WINDOWS.inputs, target="ort-genai")
        with pytest.raises(MissingDependency, match=r"bitquota\[genai\]"):
            export_plan(model, plan, tmp_path / "o", target="ort-genai", samples=WINDOWS)

    def test_other_schemes(self, tmp_path):
        """Scales per channel have no blocks."""
        model = model_of(tmp_path)
        plan = plan_with(model, WINDOWS.inputs, target="openvino-cpu", bits=(4,))
        with pytest.raises(InvalidPlan, match="--target ort-genai"):
            export_plan(model, plan, tmp_path / "o", format_name="onnx-genai", samples=WINDOWS)

    @pytest.mark.parametrize("format_name", ["onnx-genai", "openvino-genai"])
    def test_no_folder(self, tmp_path, tied, format_name):
        """A model that is not a Hugging Face folder has no decoder."""
        plan = plan_with(tied, (WINDOWS.inputs[0] % 8,), bits=(32,))
        with pytest.raises(InvalidInput, match="Hugging Face folder"):
            export_plan(tied, plan, tmp_path / "o", format_name=format_name)

    def test_no_tokenizer(self, tmp_path):
        """OpenVINO GenAI opens no folder without one."""
        model = model_of(tmp_path)
        plan = plan_with(model, WINDOWS.inputs, target="openvino-cpu", bits=(4,))
        with pytest.raises(InvalidInput, match=r"there is no tokenizer\.json"):
            export_plan(model, plan, tmp_path / "o", format_name="openvino-genai")

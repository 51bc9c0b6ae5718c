"""From a model to files and back by commands alone: inspect, plan, export, evaluate."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest

from bitquota.candidates.table import Candidate
from bitquota.candidates.targets import TARGETS
from bitquota.models.load import load_model
from bitquota.plan import Plan
from onnx_graphs import image_graph

FAST = ["--samples", "24", "--holdout", "24", "--no-refine"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An ONNX file that torch never saw, and sixty-four samples of which half are labelled."""
    folder = tmp_path_factory.mktemp("onnx")
    model = image_graph(folder / "camera.onnx")
    x = np.random.default_rng(5).normal(size=(64, 3, 8, 8)).astype(np.float32)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    y = session.run(None, {"x": x})[0].argmax(1)
    np.savez(folder / "calibration.npz", x=x[:48])
    np.savez(folder / "test.npz", x=x[32:], y=y[32:])
    return folder


class TestInspect:
    def test_table(self, bitquota, images):
        """Layers carry the names of the graph; legal widths and real sizes stand beside them."""
        code, out, _ = bitquota("inspect", images / "camera.onnx", "--target", "ort-cpu")
        assert code == 0
        for name in ("stem", "stage/depthwise", "classify"):
            assert name in out
        assert "8×3×3×3" in out
        assert "int2,int4,int8,float" in out
        assert "Target ort-cpu: smallest whole model" in out
        assert "Its runtime takes the inputs of these layers: as they are." in out
        assert "Also possible, as options of plan: --row-widths, --allow prune." in out

    def test_json(self, bitquota, llama_folder):
        """Every layer has its formats with exact sizes; ties and exclusions have reasons."""
        code, out, _ = bitquota("inspect", llama_folder, "--target", "ct-vllm-humming", "--json")
        found = json.loads(out)
        assert code == 0
        layers = {layer["name"]: layer for layer in found["layers"]}
        query = layers["model.layers.0.self_attn.q_proj"]
        assert [2, 3, 4, 5, 6, 7, 8, 32] == [f["weight_bits"] for f in query["formats"]]
        assert 64 * 64 * 4 + 2 * 64 * 16 == query["formats"][2]["size_bits"]
        assert query["group"] == layers["model.layers.0.self_attn.k_proj"]["group"]
        assert query["n_macs"] > 0
        embedding = layers["model.embed_tokens"]
        assert "kind embedding" in embedding["kept_in_full_precision"]
        assert ["lm_head.weight"] == embedding["aliases"]
        assert found["suggestion"]["applied"]
        assert found["totals"]["smallest_bits"] < found["totals"]["full_precision_bits"]

    def test_suggestions_without_a_target(self, bitquota, llama_folder):
        """Usual ties are shown as options to copy; nothing is applied."""
        code, out, _ = bitquota("inspect", llama_folder)
        assert code == 0
        assert "--tie q_proj,k_proj,v_proj" in out
        assert "lm_head.weight: counted once" in out

    def test_digest_is_asked_for(self, bitquota, llama_folder):
        """Of a folder the weights are read for it alone."""
        assert json.loads(bitquota("inspect", llama_folder, "--json")[1])["model_digest"] is None
        known = load_model(str(llama_folder)).digest
        code, out, _ = bitquota("inspect", llama_folder, "--digest")
        assert code == 0
        assert f"Digest: {known}" in out

    def test_nothing_to_run(self, bitquota):
        """A factory has no example: layers are listed, operations are not counted."""
        code, out, _ = bitquota("inspect", "format_networks:tiny_net")
        assert code == 0
        assert "depthwise" in out
        assert "give --samples" in out
        assert "MACs" not in out

    def test_unknown_target(self, bitquota, images):
        """The message lists what there is."""
        code, _, err = bitquota("inspect", images / "camera.onnx", "--target", "gameboy")
        assert code == 2
        assert "ort-cpu" in err


class TestTargets:
    def test_all_are_listed(self, bitquota):
        """One line each, and everything as JSON."""
        _, out, _ = bitquota("targets")
        assert all(name in out for name in TARGETS)
        _, text, _ = bitquota("targets", "--json")
        assert list(TARGETS) == [t["name"] for t in json.loads(text)]


class TestOnnxInOnnxOut:
    def test_chain(self, bitquota, tmp_path, images):
        """Planned, exported twice alike, run by ONNX Runtime alone, and scored beside the plan."""
        model = images / "camera.onnx"
        code, _, err = bitquota(
            "plan", model, images / "calibration.npz", "-b", "4 bits", "--target", "ort-cpu", *FAST
        )
        assert code == 0, err
        plan = Plan.load(tmp_path / "plan.json")
        assert "ort-cpu" == plan.target.name
        assert TARGETS["ort-cpu"].version == plan.target.version
        assert set(plan.weight_bits) <= {2, 4, 8, 32}
        for out in ("a", "b"):
            code, text, err = bitquota("export", model, "plan.json", "--out", out, "--json")
            assert code == 0, err
        made = json.loads(text)
        assert made["payload_bits"] == plan.size_bits
        assert made["difference"]["relative"] < 1e-6
        for file in (tmp_path / "a").iterdir():
            assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()

        written = onnx.load(tmp_path / "a" / "model.onnx")
        source = onnx.load(model)
        assert [v.name for v in source.graph.input] == [v.name for v in written.graph.input]
        assert [v.name for v in source.graph.output] == [v.name for v in written.graph.output]
        held = {t.name: t.data_type for t in written.graph.initializer}
        widths = {a.layer.name: a.candidate.weight_bits for a in plan.assignments}
        for name, initializer in (("stem", "w0"), ("stage/depthwise", "w1"), ("classify", "w2")):
            wanted = getattr(onnx.TensorProto, f"INT{widths[name]}")
            assert held[f"{initializer}.codes"] == wanted

        code, text, err = bitquota(
            "evaluate", model, images / "test.npz", "--plan", "plan.json", "--exported", "a",
            "--correction-data", images / "calibration.npz", "--json",
        )  # fmt: skip
        assert code == 0, err
        scores = {score["kind"]: score for score in json.loads(text)}
        assert {"full precision", "plan", "exported", "uniform"} == set(scores)
        assert scores["full precision"]["metrics"]["top1"]["mean"] == 1.0
        for metric, estimate in scores["exported"]["differences"]["plan.json"].items():
            assert abs(estimate["mean"]) < 1e-5, metric
        assert scores["uniform"]["size_bits"] <= plan.size_bits
        assert scores["uniform"]["name"] in scores["plan"]["differences"]

    def test_table_of_a_report(self, bitquota, tmp_path, images):
        """Planned and stored sizes, overhead, difference and options in a few lines."""
        model = images / "camera.onnx"
        bitquota("plan", model, images / "calibration.npz", "-b", "8 bits", "-t", "ort-cpu", *FAST)
        code, out, err = bitquota(
            "export", model, "plan.json", "-o", "a", "--samples", images / "test.npz"
        )
        assert code == 0
        assert "wrote a" in err
        assert "as planned" in out
        assert "on 32 samples: differs from fake-quantization by at most" in " ".join(out.split())
        assert "session.qdq_matmulnbits_accuracy_level=1" in out

    def test_illegal_width(self, bitquota, images):
        """A width that ONNX cannot store is refused before anything is measured."""
        code, _, err = bitquota(
            "plan", images / "camera.onnx", images / "calibration.npz", "-b", "4 bits",
            "-t", "ort-cpu", "--bits", "3,5", *FAST,
        )  # fmt: skip
        assert code == 2
        assert "'ort-cpu' stores 2, 4, 8, 32 bits; none of [3, 5]" in err

    def test_scheme_beside_a_target(self, bitquota, images):
        """A target brings its own quantizer."""
        code, _, err = bitquota(
            "plan", images / "camera.onnx", images / "calibration.npz", "-b", "4 bits",
            "-t", "ort-cpu", "--grid", "asymmetric", *FAST,
        )  # fmt: skip
        assert code == 2
        assert "brings its own quantizer" in err


class TestExport:
    def test_broken_tie(self, bitquota, tmp_path, llama_folder):
        """A plan whose q differs from k and v by hand is refused with all three named."""
        from bitquota.models.load import load_model
        from format_networks import plan_with

        model = load_model(str(llama_folder))
        plan = plan_with(model, model.example_inputs, target="gguf-py", bits=(4,))
        data = plan.to_json()
        place = next(
            k for k, a in enumerate(plan.assignments) if a.layer.name.endswith("0.self_attn.q_proj")
        )
        layer = plan.assignments[place].layer
        scheme = plan.assignments[place].candidate.scheme
        data["assignments"][place]["candidate"] = Candidate.of(layer, 8, scheme).to_json()
        del data["digest"], data["totals"]
        (tmp_path / "broken.json").write_text(json.dumps(data))
        code, _, err = bitquota(
            "export", llama_folder, "broken.json", "-o", "x", "--target", "gguf-py"
        )
        assert code == 2
        assert "q_proj=W8" in err
        assert "k_proj=W4" in err
        assert "v_proj=W4" in err
        assert not (tmp_path / "x").exists()

    def test_changed_files(self, bitquota, tmp_path, images):
        """Exported files that are no longer those of the export report are not scored."""
        model = images / "camera.onnx"
        bitquota("plan", model, images / "calibration.npz", "-b", "8 bits", "-t", "ort-cpu", *FAST)
        bitquota("export", model, "plan.json", "-o", "a")
        with (tmp_path / "a" / "model.onnx").open("ab") as file:
            file.write(b"x")
        code, _, err = bitquota("evaluate", model, images / "test.npz", "--exported", "a")
        assert code == 1
        assert "'model.onnx' in 'a' is missing or was changed" in err

    def test_neither_format_nor_target(self, bitquota, images):
        """A plan for no target needs one of the two."""
        model = images / "camera.onnx"
        bitquota("plan", model, images / "calibration.npz", "-b", "4 bits", "--bits", "4", *FAST)
        code, _, err = bitquota("export", model, "plan.json", "-o", "a")
        assert code == 2
        assert "a format or a target" in err

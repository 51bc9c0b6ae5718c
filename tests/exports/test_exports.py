"""Exports: what is written is what was planned, and it computes what fake-quantization computes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch

from bitquota.candidates.storage import Granularity, Grid, Rounding, ScaleFormat, Scheme
from bitquota.candidates.table import Candidate, enumerate_candidates
from bitquota.candidates.targets import TARGETS
from bitquota.corrections import Correction
from bitquota.errors import ExportFailed, InvalidInput, InvalidPlan, StalePlan
from bitquota.exports.export import EXPORTERS, export_plan, load_export, prepare_export
from bitquota.exports.export_report import Difference
from bitquota.exports.names import EXPORT_FORMATS
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.models.load import load_model
from bitquota.plan import Assignment, Plan
from format_networks import plan_with, tiny_net, write_llama
from onnx_graphs import image_graph, token_graph
from refusals import refused

RANDOM = torch.Generator().manual_seed(3)
IMAGES = CalibrationSet(inputs=(torch.randn(6, 3, 8, 8, generator=RANDOM),))
TOKENS = CalibrationSet(
    inputs=(torch.randint(0, 32, (6, 9), generator=torch.Generator().manual_seed(3)),)
)


@pytest.fixture(scope="module")
def net():
    """The tiny convolutional network."""
    return load_model("format_networks:tiny_net")


@pytest.fixture(scope="module")
def llama(llama_folder):
    """The tiny Llama."""
    return load_model(str(llama_folder))


@pytest.fixture(scope="module")
def onnx_images(tmp_path_factory):
    """An ONNX file that torch never saw."""
    return load_model(str(image_graph(tmp_path_factory.mktemp("onnx") / "m.onnx")))


@pytest.fixture(scope="module")
def onnx_tokens(tmp_path_factory):
    """Another one, with a tied embedding."""
    return load_model(str(token_graph(tmp_path_factory.mktemp("onnx") / "m.onnx")))


@pytest.fixture(scope="module")
def tied():
    """A torch model with a tied head whose products have and have not a bias."""
    return load_model("format_networks:tied_tokens")


def target_plan(model, samples, target: str, seed: int, bits=None) -> Plan:
    """A plan of random legal formats."""
    return plan_with(model, samples.inputs, target=target, seed=seed, bits=bits)


CASES = [
    ("net", "ref-int", IMAGES),
    ("llama", "ref-int", TOKENS),
    ("llama", "ct-vllm-humming", TOKENS),
    ("llama", "ct-vllm-marlin", TOKENS),
    ("llama", "gguf-py", TOKENS),
    ("net", "ort-cpu", IMAGES),
    ("tied", "ort-cpu", TOKENS),
    ("onnx_images", "ort-cpu", IMAGES),
    ("onnx_tokens", "ort-cpu", TOKENS),
    ("net", "openvino-cpu", IMAGES),
    ("onnx_images", "openvino-cpu", IMAGES),
    ("onnx_tokens", "openvino-cpu", TOKENS),
    ("onnx_images", "ref-int", IMAGES),
    ("net", "mcu", IMAGES),
    ("onnx_images", "tensorrt", IMAGES),
]


@pytest.mark.parametrize(
    ("source", "target", "samples"), CASES, ids=[f"{a}-{b}" for a, b, _ in CASES]
)
class TestEveryRuntime:
    def test_bytes_and_outputs(self, request, tmp_path, source, target, samples):
        """Stored bits equal the plan's, outputs equal fake-quantization's."""
        model = request.getfixturevalue(source)
        plan = target_plan(model, samples, target, seed=len(source) + len(target))
        report = export_plan(model, plan, tmp_path / "out", target=target, samples=samples)
        quantized = [a for a in plan.assignments if a.candidate.weight_bits < 32]
        assert [a.layer.name for a in quantized] == [t.layer for t in report.tensors]
        assert sum(a.candidate.size_bits for a in quantized) == report.payload_bits
        assert report.difference.relative < 2e-6
        assert report.difference.maximum < 1e-5
        written = {
            p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")
        }
        assert {f.name for f in report.files} | {"plan.json", "receipt.json"} == written
        assert plan == Plan.load(tmp_path / "out" / "plan.json")


class TestDeterminism:
    @pytest.mark.parametrize(
        ("source", "target", "samples"),
        [
            ("onnx_images", "ort-cpu", IMAGES),
            ("net", "ref-int", IMAGES),
            ("llama", "gguf-py", TOKENS),
            ("llama", "ct-vllm-humming", TOKENS),
        ],
    )
    def test_two_exports_are_byte_identical(self, request, tmp_path, source, target, samples):
        """The same plan gives the same bytes, export report included."""
        model = request.getfixturevalue(source)
        plan = target_plan(model, samples, target, seed=5)
        for name in ("a", "b"):
            export_plan(model, plan, tmp_path / name, target=target, samples=samples)
        for path in (tmp_path / "a").iterdir():
            assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


class TestRefInt:
    @pytest.mark.parametrize("bits", [1, 3, 7, 16])
    @pytest.mark.parametrize("grid", [Grid.SYMMETRIC, Grid.ASYMMETRIC])
    def test_any_width_and_grid(self, net, tmp_path, bits, grid):
        """Widths and grids that no other format has."""
        scheme = Scheme(grid=grid, granularity=Granularity.GROUP, group_size=5)
        plan = plan_with(net, IMAGES.inputs, bits=(bits,), scheme=scheme)
        report = export_plan(net, plan, tmp_path / "o", format_name="ref-int", samples=IMAGES)
        assert plan.size_bits == report.payload_bits
        assert report.difference.maximum == 0.0

    def test_corrections_are_in_the_file(self, net, tmp_path):
        """Folded batch norms and corrected biases are exported, and the difference is still 0."""
        folded = replace(
            plan_of_folded(net),
            corrections=(Correction.FOLD_BATCH_NORM, Correction.BIAS_CORRECTION),
        )
        report = export_plan(
            net,
            folded,
            tmp_path / "o",
            format_name="ref-int",
            samples=IMAGES,
            correction_data=IMAGES,
        )
        assert report.difference.maximum == 0.0
        loaded = load_export(
            net, folded, tmp_path / "o", format_name="ref-int", correction_data=IMAGES
        )
        names = dict(loaded.named_buffers())
        assert not any("running_mean" in name for name in names)


def plan_of_folded(model) -> Plan:
    """A plan for the model with its batch norms folded."""
    from bitquota.quantizers.corrections import fold_batch_norm

    module = fold_batch_norm(model.module, IMAGES.inputs)
    inventory = discover(module, IMAGES.inputs, model_digest=model.digest)
    table = enumerate_candidates(inventory, (4,))
    return Plan(
        model_digest=model.digest,
        assignments=tuple(
            Assignment(layer=la, candidate=row.candidates[0])
            for la, row in zip(inventory.layers, table.rows, strict=True)
        ),
        unquantized=inventory.unquantized,
    )


class TestOnnxQdq:
    def test_types_and_batch_norm(self, net, tmp_path):
        """Codes have the planned type; batch norms behind convolutions went into the scales."""
        plan = plan_with(net, IMAGES.inputs, bits=(2,))
        export_plan(net, plan, tmp_path / "o", format_name="onnx-qdq", samples=IMAGES)
        model = onnx.load(tmp_path / "o" / "model.onnx")
        kinds = {
            t.name: onnx.TensorProto.DataType.Name(t.data_type) for t in model.graph.initializer
        }
        assert kinds["conv.weight.codes"] == kinds["head.weight.codes"] == "INT2"
        assert "BatchNormalization" not in {n.op_type for n in model.graph.node}
        assert model.opset_import[0].version == 25

    @pytest.mark.parametrize(
        "scheme",
        [
            Scheme(granularity=Granularity.TENSOR),
            Scheme(grid=Grid.ASYMMETRIC),
            Scheme(scale_format=ScaleFormat.FP16),
            Scheme(scale_format=ScaleFormat.BF16),
            Scheme(granularity=Granularity.TENSOR, grid=Grid.ASYMMETRIC),
        ],
        ids=["tensor", "zero points", "fp16", "bf16", "tensor zero point"],
    )
    @pytest.mark.parametrize("bits", [2, 4, 8])
    def test_schemes(self, onnx_images, tmp_path, scheme, bits):
        """Scales per tensor, zero points, and half-precision scales."""
        plan = plan_with(onnx_images, IMAGES.inputs, bits=(bits,), scheme=scheme)
        report = export_plan(
            onnx_images, plan, tmp_path / "o", format_name="onnx-qdq", samples=IMAGES
        )
        assert plan.size_bits == report.payload_bits
        assert report.difference.maximum < 1e-5

    def test_two_bits_with_rows_that_do_not_fill_bytes(self, onnx_images, tmp_path):
        """Ten outputs at two bits, which ONNX Runtime reads wrongly unless a Reshape hides them."""
        plan = plan_with(onnx_images, IMAGES.inputs, bits=(2,))
        report = export_plan(
            onnx_images, plan, tmp_path / "o", format_name="onnx-qdq", samples=IMAGES
        )
        assert report.difference.maximum < 1e-5
        nodes = onnx.load(tmp_path / "o" / "model.onnx").graph.node
        operators = [n.op_type for n in nodes]
        assert (operators.count("Reshape"), operators.count("Transpose")) == (1, 0)

    def test_transposed_convolution_in_groups(self, tmp_path):
        """A weight whose output channels lie on no axis goes through a Reshape."""
        model = load_model("format_networks:upsampler")
        samples = CalibrationSet(inputs=(torch.randn(3, 4, 5, 5),))
        plan = plan_with(model, samples.inputs, bits=(4,))
        report = export_plan(model, plan, tmp_path / "o", format_name="onnx-qdq", samples=samples)
        assert report.difference.maximum < 1e-5
        assert plan.size_bits == report.payload_bits

    def test_width_without_a_type(self, net, tmp_path):
        """Three bits have no ONNX type; the layers are named and nothing is written."""
        plan = plan_with(net, IMAGES.inputs, bits=(3,))
        with refused(InvalidPlan, layers=["conv", "depthwise", "head"]):
            export_plan(net, plan, tmp_path / "o", format_name="onnx-qdq", samples=IMAGES)
        assert list(tmp_path.iterdir()) == []

    def test_needs_a_sample_to_trace(self, net, tmp_path):
        """A module without an example cannot be traced."""
        plan = plan_with(net, IMAGES.inputs, bits=(4,))
        with pytest.raises(InvalidInput, match="provide samples"):
            export_plan(net, plan, tmp_path / "o", format_name="onnx-qdq")


class TestMatMulNBits:
    @pytest.mark.parametrize("bits", [2, 4, 8])
    @pytest.mark.parametrize("source", ["onnx_tokens", "tied"])
    def test_blocks_are_written_out(self, request, tmp_path, source, bits):
        """Products with blocks are nodes of their own, at the plan's bytes; the rest is QDQ."""
        model = request.getfixturevalue(source)
        plan = target_plan(model, TOKENS, "ort-cpu", seed=1, bits=(bits,))
        report = export_plan(
            model, plan, tmp_path / "o", format_name="onnx-matmulnbits", samples=TOKENS
        )
        blocked = [a for a in plan.assignments if a.candidate.scheme.group_size]
        nodes = onnx.load(tmp_path / "o" / "model.onnx").graph.node
        written = [n for n in nodes if n.op_type == "MatMulNBits"]
        assert len(blocked) == len(written)
        assert len(blocked) < len(plan.assignments)
        assert {bits} == {a.i for n in written for a in n.attribute if a.name == "bits"}
        assert plan.size_bits == report.payload_bits
        assert report.difference.relative < 2e-6

    def test_gemm_with_a_bias(self, tmp_path):
        """A Gemm becomes a product and an Add."""
        model = load_model(str(image_graph(tmp_path / "m.onnx", channels=32)))
        plan = target_plan(model, IMAGES, "ort-cpu", seed=1, bits=(4,))
        report = export_plan(
            model, plan, tmp_path / "o", format_name="onnx-matmulnbits", samples=IMAGES
        )
        nodes = [n.op_type for n in onnx.load(tmp_path / "o" / "model.onnx").graph.node]
        assert nodes[-2:] == ["MatMulNBits", "Add"]
        assert report.difference.relative < 2e-6


class TestCompressedTensors:
    def test_zero_points(self, llama, tmp_path):
        """Asymmetric grids are refused with the layers named."""
        scheme = Scheme(
            grid=Grid.ASYMMETRIC,
            granularity=Granularity.GROUP,
            group_size=32,
            row_alignment_bits=32,
        )
        target = TARGETS["ct-vllm-humming"]
        inventory = target.prepare(discover(llama.module, TOKENS.inputs, model_digest=llama.digest))
        table = enumerate_candidates(inventory, (3, 5), scheme=scheme)
        plan = plan_with(llama, TOKENS.inputs, table=table, inventory=inventory, seed=2)
        with pytest.raises(InvalidPlan, match=r"symmetric, .*q_proj"):
            export_plan(llama, plan, tmp_path / "o", format_name="compressed-tensors")

    def test_config_names_every_layer(self, llama, tmp_path):
        """Each quantized layer stands in one group, every other linear layer under ignore."""
        plan = target_plan(llama, TOKENS, "ct-vllm-humming", seed=1)
        export_plan(llama, plan, tmp_path / "o", target="ct-vllm-humming", samples=TOKENS)
        config = json.loads((tmp_path / "o" / "config.json").read_text())["quantization_config"]
        grouped = {
            n: g["weights"]["num_bits"]
            for g in config["config_groups"].values()
            for n in g["targets"]
        }
        planned = {
            a.layer.name: a.candidate.weight_bits
            for a in plan.assignments
            if a.candidate.weight_bits < 32
        }
        assert planned == grouped
        assert not set(grouped) & set(config["ignore"])

    def test_broken_tie_is_refused(self, llama, tmp_path):
        """A plan whose q and k differ is refused with the layers named, nothing written."""
        plan = target_plan(llama, TOKENS, "ct-vllm-humming", seed=1)
        first = plan.assignments[0]
        other = 8 if first.candidate.weight_bits != 8 else 4
        changed = Candidate.of(first.layer, other, first.candidate.scheme)
        if first.candidate.weight_bits == 32:
            scheme = TARGETS["ct-vllm-humming"].formats_for(first.layer)[0].scheme
            changed = Candidate.of(first.layer, other, scheme)
        broken = replace(
            plan, assignments=(replace(first, candidate=changed), *plan.assignments[1:])
        )
        with pytest.raises(InvalidPlan, match=r"q_proj=W\d.*k_proj="):
            export_plan(llama, broken, tmp_path / "o", target="ct-vllm-humming", samples=TOKENS)
        assert list(tmp_path.iterdir()) == []

    def test_needs_a_folder(self, net, tmp_path):
        """A model that is no Hugging Face folder has no config to extend."""
        plan = plan_with(net, IMAGES.inputs, bits=(4,))
        with pytest.raises(InvalidInput, match="Hugging Face folder"):
            export_plan(net, plan, tmp_path / "o", format_name="compressed-tensors")


class TestGguf:
    def test_reader_finds_every_type(self, llama, tmp_path):
        """The gguf package reads the planned type of every tensor; the recipe agrees."""
        import gguf

        plan = target_plan(llama, TOKENS, "gguf-py", seed=4)
        export_plan(llama, plan, tmp_path / "o", target="gguf-py", samples=TOKENS)
        reader = gguf.GGUFReader(str(tmp_path / "o" / "model.gguf"))
        types = {t.name: t.tensor_type.name for t in reader.tensors}
        names = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0", 32: "F32"}
        planned = {a.layer.name: names[a.candidate.weight_bits] for a in plan.assignments}
        assert planned["model.layers.1.self_attn.q_proj"] == types["blk.1.attn_q.weight"]
        assert planned["model.layers.0.mlp.down_proj"] == types["blk.0.ffn_down.weight"]
        recipe = dict(
            line.split("=") for line in (tmp_path / "o" / "tensor-types.txt").read_text().split()
        )
        for pattern, kind in recipe.items():
            name = pattern.strip("^$").replace("\\", "")
            assert types[name].lower() == kind

    def test_queries_are_reordered(self, llama, tmp_path):
        """Q rows are stored with rotated pairs adjacent, as llama.cpp's converter does."""
        import gguf

        plan = plan_with(llama, TOKENS.inputs, target="gguf-py", bits=(8,))
        export_plan(llama, plan, tmp_path / "o", target="gguf-py", samples=TOKENS)
        reader = gguf.GGUFReader(str(tmp_path / "o" / "model.gguf"))
        (found,) = [t for t in reader.tensors if t.name == "blk.0.attn_q.weight"]
        values = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type).copy())
        weight = llama.module.get_parameter("model.layers.0.self_attn.q_proj.weight").detach()
        # Head size 16: row 1 of the file is row 8 of the first head.
        assert torch.allclose(values[1], weight[8], atol=2e-3)
        assert torch.allclose(values[2], weight[1], atol=2e-3)


class TestGgufK:
    @pytest.mark.slow
    def test_super_blocks_where_256_divides(self, tmp_path):
        """Every K type is found by the reader; rows of 320 take blocks of 32."""
        import gguf

        model = load_model(str(write_llama(tmp_path / "m", width=256, inner=320)))
        plan = target_plan(model, TOKENS, "gguf-k", seed=2)
        report = export_plan(model, plan, tmp_path / "o", target="gguf-k", samples=TOKENS)
        assert plan.size_bits - report.payload_bits == sum(
            a.candidate.size_bits for a in plan.assignments if a.candidate.weight_bits == 32
        )
        assert report.difference.maximum == 0.0
        types = {
            t.name: t.tensor_type.name
            for t in gguf.GGUFReader(str(tmp_path / "o" / "model.gguf")).tensors
        }
        planned = {a.layer.name: a.candidate for a in plan.assignments}
        stored = {t.layer: types[t.tensor] for t in report.tensors}
        for name, kind in stored.items():
            wide = planned[name].scheme.group_size == 256
            suffix = "_K" if wide else "_0"
            assert f"Q{planned[name].weight_bits}{suffix}" == kind
        assert len({k for k in stored.values() if k.endswith("_K")}) >= 3
        assert not any(k.endswith("_K") for n, k in stored.items() if "down_proj" in n)

    def test_other_formats_refuse(self, tmp_path):
        """Nothing but GGUF has super-blocks."""
        model = load_model(str(write_llama(tmp_path / "m", width=256, inner=320)))
        plan = target_plan(model, TOKENS, "gguf-k", seed=2, bits=(4, 5))
        with pytest.raises(InvalidPlan, match="k_blocks"):
            export_plan(model, plan, tmp_path / "o", format_name="ref-int", samples=TOKENS)


class TestConfigFiles:
    @pytest.mark.parametrize(
        ("format_name", "file"),
        [
            ("gptqmodel-config", "quantize_config.json"),
            ("autoround-config", "layer_config.json"),
            ("llm-compressor-recipe", "recipe.yaml"),
            ("torchao-config", "torchao_config.json"),
            ("mlx-config", "mlx_quantization.json"),
            ("coreml-config", "coreml_config.json"),
        ],
    )
    def test_every_layer_is_named(self, llama, tmp_path, format_name, file):
        """Each quantized layer stands in the file, with its own width where it differs."""
        plan = plan_with(llama, TOKENS.inputs, target="ct-vllm-marlin", bits=(4, 8), seed=3)
        report = export_plan(llama, plan, tmp_path / "o", format_name=format_name)
        text = (tmp_path / "o" / file).read_text()
        json.loads(text)
        common = 4 if format_name == "gptqmodel-config" else None
        for a in plan.assignments:
            name = a.layer.name.replace(".", r"\\.") if common else a.layer.name
            widths = {b.candidate.weight_bits for b in plan.assignments}
            assert widths == {4, 8}
            if common is None:
                assert name in text
        assert report.difference is None
        assert report.notes

    @pytest.mark.parametrize(
        ("target", "file"),
        [
            ("mlx", "mlx_quantization.json"),
            ("torchao", "torchao_config.json"),
            ("coreml", "coreml_config.json"),
        ],
    )
    def test_targets_of_other_tools(self, llama, tmp_path, target, file):
        """The target's own plan, with its own grid, becomes its configuration."""
        plan = plan_with(llama, TOKENS.inputs, target=target, bits=(4, 8), seed=3)
        report = export_plan(llama, plan, tmp_path / "o", target=target)
        text = (tmp_path / "o" / file).read_text()
        assert TARGETS[target].exporter == report.exporter
        assert all(f'"{a.layer.name}"' in text for a in plan.assignments)

    def test_gptq_rules_are_anchored(self, llama, tmp_path):
        """Rules name whole modules; what is left out has a negative rule."""
        import re

        plan = plan_with(llama, TOKENS.inputs, target="ct-vllm-marlin", bits=(4, 8), seed=3)
        export_plan(llama, plan, tmp_path / "o", format_name="gptqmodel-config")
        config = json.loads((tmp_path / "o" / "quantize_config.json").read_text())
        for a in plan.assignments:
            hits = [
                rule
                for pattern, rule in config["dynamic"].items()
                if pattern.startswith("+:") and re.match(pattern[2:], a.layer.name)
            ]
            assert a.candidate.weight_bits == (hits[0]["bits"] if hits else config["bits"])

    def test_cannot_be_run(self, llama, tmp_path):
        """A configuration holds no weights."""
        plan = plan_with(llama, TOKENS.inputs, bits=(4,))
        with refused(InvalidInput, format="mlx-config"):
            load_export(llama, plan, tmp_path, format_name="mlx-config")


class TestExportFormats:
    def test_are_the_exporters(self):
        """The list that needs no torch names them all, in their order."""
        assert tuple(EXPORTERS) == EXPORT_FORMATS


class TestExportPlan:
    def test_stale(self, net, llama, tmp_path):
        """A plan of another model is refused."""
        plan = plan_with(net, IMAGES.inputs, bits=(4,))
        with pytest.raises(StalePlan, match="the model it was made for"):
            export_plan(llama, plan, tmp_path / "o", format_name="ref-int")

    def test_folder_in_use(self, net, tmp_path):
        """Nothing is written over."""
        (tmp_path / "mine.txt").write_text("x")
        plan = plan_with(net, IMAGES.inputs, bits=(4,))
        with pytest.raises(InvalidInput, match="new or empty"):
            export_plan(net, plan, tmp_path, format_name="ref-int")

    def test_neither_format_nor_target(self, net, tmp_path):
        """One of the two is needed."""
        with pytest.raises(InvalidInput, match="a format or a target"):
            export_plan(net, plan_with(net, IMAGES.inputs, bits=(4,)), tmp_path / "o")

    def test_unknown_format(self, net, tmp_path):
        """The message lists them all."""
        with refused(InvalidInput, format="x"):
            export_plan(
                net, plan_with(net, IMAGES.inputs, bits=(4,)), tmp_path / "o", format_name="x"
            )

    def test_error_feedback(self, net):
        """Codes that depend on the measurement's inputs are refused, not silently re-rounded."""
        scheme = Scheme(rounding=Rounding.ERROR_FEEDBACK)
        with pytest.raises(InvalidInput, match="rounding with feedback"):
            prepare_export(net, plan_with(net, IMAGES.inputs, bits=(4,), scheme=scheme))

    def test_damaged_file_is_noticed(self, net, tmp_path):
        """A flipped byte in the codes changes what the files compute."""
        plan = plan_with(net, IMAGES.inputs, bits=(4,))
        export_plan(net, plan, tmp_path / "o", format_name="ref-int", samples=IMAGES)
        path = tmp_path / "o" / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-40] ^= 0xFF
        path.write_bytes(data)
        prepared = prepare_export(net, plan, samples=IMAGES)
        module = EXPORTERS["ref-int"].load(prepared, tmp_path / "o")
        assert prepared.difference(module).maximum > 0


class TestExportReport:
    def test_wrong_size_names_the_layer(self, net, tmp_path):
        """A weight of other bytes than planned is an error."""
        plan = plan_with(net, IMAGES.inputs, bits=(4,))
        report = export_plan(net, plan, tmp_path / "o", format_name="ref-int")
        wrong = replace(report.tensors[1], actual_bits=8)
        with refused(ExportFailed, layers=["depthwise"]):
            replace(report, tensors=(report.tensors[0], wrong, report.tensors[2])).require()

    def test_wrong_output(self, net, tmp_path):
        """Outputs that differ by more than rounding are an error."""
        plan = plan_with(net, IMAGES.inputs, bits=(4,))
        report = export_plan(net, plan, tmp_path / "o", format_name="ref-int")
        for relative in (0.01, float("nan")):
            gap = Difference(maximum=1.0, relative=relative, n_samples=6)
            with pytest.raises(ExportFailed, match="differ by"):
                replace(report, difference=gap).require()

    def test_container_is_what_is_left(self, net, tmp_path):
        """Payload, other tensors and container make up the file."""
        plan = plan_with(net, IMAGES.inputs, bits=(4,))
        report = export_plan(net, plan, tmp_path / "o", format_name="ref-int")
        held = (report.payload_bits + report.unquantized_bits) // 8
        assert report.total_bytes == held + report.container_bytes
        assert tiny_net().norm.weight.numel() * 32 * 4 <= report.unquantized_bits
        assert Path(tmp_path / "o" / "receipt.json").read_text().endswith("}\n")

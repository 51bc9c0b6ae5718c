"""Exports: what is written is what was planned, and it computes what fake-quantization computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from bitquota.candidates.storage import Granularity, Grid, Rounding, Scheme
from bitquota.candidates.table import enumerate_candidates
from bitquota.corrections import Correction
from bitquota.errors import BitquotaError, ExportFailed, InvalidInput, InvalidPlan, StalePlan
from bitquota.exports.export import EXPORTERS, export_plan, load_export, prepare_export
from bitquota.exports.export_report import Difference
from bitquota.exports.names import EXPORT_FORMATS, FOLDER_FORMATS
from bitquota.models.discovery import discover
from bitquota.plan import Assignment, Plan
from bitquota.service.web.chart_tasks import export_choices
from export_cases import IMAGES, TOKENS, target_plan
from format_networks import plan_with, tiny_net
from refusals import refused

CASES = [
    ("net", "ref-int", IMAGES),
    ("llama", "ref-int", TOKENS),
    ("llama", "ct-vllm-humming", TOKENS),
    ("llama", "ct-vllm-marlin", TOKENS),
    ("llama", "ct-vllm-nvfp4", TOKENS),
    ("llama", "ct-vllm-mxfp4", TOKENS),
    ("llama", "modelopt", TOKENS),
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
        """The same plan gives the same bytes, export report included, but for measured speeds."""
        model = request.getfixturevalue(source)
        plan = target_plan(model, samples, target, seed=5)
        for name in ("a", "b"):
            report = export_plan(model, plan, tmp_path / name, target=target, samples=samples)
            if report.text_run is not None:
                speeds = {"tokens_per_second": 1.0, "prompt_tokens_per_second": 1.0}
                report = replace(report, text_run=replace(report.text_run, **speeds))
                report.save(tmp_path / name)
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


class TestExportFormats:
    def test_are_the_exporters(self):
        """The list that needs no torch names them all, in their order."""
        assert tuple(EXPORTERS) == EXPORT_FORMATS

    @pytest.mark.parametrize("name", EXPORT_FORMATS)
    def test_need_a_folder_or_not(self, net, tmp_path, name):
        """A module in memory is refused by those that extend a folder's config, and by no other."""
        plan = plan_with(net, IMAGES.inputs, bits=(4,))
        said = ""
        try:
            export_plan(net, plan, tmp_path / "out", format_name=name, samples=IMAGES)
        except BitquotaError as error:
            said = str(error)
        assert said if name in FOLDER_FORMATS else "folder" not in said


class TestExportChoices:
    def test_need_no_folder_where_there_is_none(self, net):
        """Where nothing is known of the model, all are offered."""
        plan = target_plan(net, IMAGES, "ort-cpu", seed=0)
        names = {f: {c["name"] for c in export_choices([plan], f)} for f in ("pt2", "onnx", "")}
        assert names["pt2"] == names["onnx"] == names[""] - FOLDER_FORMATS
        assert {"ort-cpu (target)", "openvino"} <= names["pt2"]
        assert "gguf" in names[""]

    def test_what_a_format_cannot_hold_is_refused_as_the_export_refuses_it(self, net, tmp_path):
        """Plan by plan, in the export's own words."""
        plans = [plan_with(net, IMAGES.inputs, bits=(bits,)) for bits in (3, 4)]
        for choice in export_choices(plans, "pt2"):
            for k, (plan, why) in enumerate(zip(plans, choice["refused"], strict=True)):
                names = dict.fromkeys(("format", "target")) | choice["request"]
                out = tmp_path / f"{choice['name']}-{k}"
                said = None
                try:
                    export_plan(
                        net, plan, out, format_name=names["format"], target=names["target"],
                        samples=IMAGES,
                    )  # fmt: skip
                except InvalidPlan as error:
                    said = error.message
                assert why == said, choice

    def test_gguf_needs_an_architecture_that_it_knows(self, net):
        """As the config of the folder names it."""
        plans = [plan_with(net, IMAGES.inputs, bits=(4,))]
        refused = {
            kind: next(
                c for c in export_choices(plans, "huggingface-zip", kind) if c["name"] == "gguf"
            )
            for kind in ("llama", "gpt2")
        }
        assert "GGUF is written here for llama" in refused["gpt2"]["refused"][0]
        assert "blocks" in refused["llama"]["refused"][0]


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

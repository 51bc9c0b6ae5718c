"""Exports to ONNX: which nodes and types a weight becomes."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import nn

from bitquota.candidates.storage import Granularity, Grid, ScaleFormat, Scheme
from bitquota.errors import InvalidInput, InvalidPlan
from bitquota.exports.export import export_plan
from bitquota.models.calibration import CalibrationSet
from bitquota.models.load import load_model
from bitquota.models.loaded import finish
from export_cases import IMAGES, TOKENS, target_plan
from format_networks import plan_with
from onnx_graphs import image_graph
from refusals import refused


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

    def test_equal_tensors(self, tmp_path):
        """Exporters store them once: biases of batch norms as they begin, and equal weights."""
        torch.manual_seed(0)
        twins = [nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)]
        twins[1].load_state_dict(twins[0].state_dict())
        parts = [part for conv in twins for part in (conv, nn.BatchNorm2d(3), nn.ReLU())]
        module = nn.Sequential(*parts, nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Flatten())
        for part in module:
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.uniform_(-1, 1)
        model = finish(module.eval(), source="twins", architecture="Twins")
        samples = CalibrationSet(inputs=(torch.randn(4, 3, 8, 8),))
        plan = plan_with(model, samples.inputs, bits=(4,))
        report = export_plan(model, plan, tmp_path / "o", format_name="onnx-qdq", samples=samples)
        assert report.difference.relative < 1e-5

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

"""Codebooks and powers of two: held to the bit where a runtime can read them, else refused."""

from itertools import cycle

import pytest

from bitquota.candidates.storage import Granularity, Grid, ScaleFormat, Scheme
from bitquota.candidates.table import Candidate
from bitquota.errors import InvalidPlan
from bitquota.exports.export import export_plan
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.models.identity import model_fingerprint
from bitquota.models.loaded import LoadedModel
from bitquota.plan import Assignment, Plan
from digits_network import digits, trained_digits_net

SCHEMES = {
    "tensor": Scheme(grid=Grid.CODEBOOK, granularity=Granularity.TENSOR),
    "tensor-fp16": Scheme(
        grid=Grid.CODEBOOK, granularity=Granularity.TENSOR, scale_format=ScaleFormat.FP16
    ),
    "channel": Scheme(grid=Grid.CODEBOOK),
}
POWERS = Scheme(grid=Grid.POWER_OF_TWO)


@pytest.fixture(scope="module")
def model():
    """The trained network as the exporters take it."""
    module = trained_digits_net()
    return LoadedModel(
        module=module, digest=model_fingerprint(module), source="digits", architecture="DigitsNet"
    )


@pytest.fixture(scope="module")
def samples():
    """Images to compare on."""
    return CalibrationSet(inputs=(digits()[0][:16],))


def plan_of(model, samples, scheme, widths):
    inventory = discover(model.module, samples.inputs, model_digest=model.digest)
    return Plan(
        model_digest=model.digest,
        assignments=tuple(
            Assignment(layer=la, candidate=Candidate.of(la, bits, scheme))
            for la, bits in zip(inventory.layers, cycle(widths), strict=False)
        ),
        unquantized=inventory.unquantized,
    )


class TestExportPlan:
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_onnx_looks_levels_up(self, model, samples, scheme, tmp_path):
        """ONNX Runtime computes what fake-quantization does, from the plan's own bytes."""
        pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
        plan = plan_of(model, samples, SCHEMES[scheme], (2, 4, 8))
        report = export_plan(model, plan, tmp_path / "out", format_name="onnx-qdq", samples=samples)
        assert plan.size_bits == sum(t.actual_bits for t in report.tensors)
        assert report.difference.relative < 1e-5

    @pytest.mark.parametrize("scheme", [*SCHEMES.values(), POWERS], ids=[*SCHEMES, "powers"])
    def test_ref_int_holds_every_grid(self, model, samples, scheme, tmp_path):
        """Any width, read back by us."""
        plan = plan_of(model, samples, scheme, (2, 3, 5))
        report = export_plan(model, plan, tmp_path / "out", format_name="ref-int", samples=samples)
        assert plan.size_bits == sum(t.actual_bits for t in report.tensors)
        assert 0.0 == report.difference.relative

    @pytest.mark.parametrize(
        ("scheme", "format_name", "able"),
        [
            (SCHEMES["tensor"], "openvino", "ref-int, onnx-qdq, onnx-matmulnbits"),
            (SCHEMES["tensor"], "torchao-config", "ref-int, onnx-qdq, onnx-matmulnbits"),
            (POWERS, "onnx-qdq", "ref-int"),
        ],
    )
    def test_refused_where_nothing_reads_it(
        self, model, samples, scheme, format_name, able, tmp_path
    ):
        """The message names the formats that can hold it; nothing is written."""
        plan = plan_of(model, samples, scheme, (4,))
        with pytest.raises(InvalidPlan, match=f"these formats have: {able}$"):
            export_plan(model, plan, tmp_path / "out", format_name=format_name)
        assert not (tmp_path / "out").exists()

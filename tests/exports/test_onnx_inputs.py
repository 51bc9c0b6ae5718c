"""Inputs of layers on their grids in ONNX files, and the kernels that runtimes choose for them."""

from __future__ import annotations

import copy
from collections import Counter
from typing import TYPE_CHECKING

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from bitquota.candidates.storage import Scheme
from bitquota.candidates.table import Candidate
from bitquota.exports.export import EXPORTERS, export_plan, open_export, prepare_export
from bitquota.exports.export_report import TOLERANCE
from bitquota.models.calibration import CalibrationSet
from bitquota.models.load import finish
from bitquota.models.loaded import inventory_of
from bitquota.plan import Assignment, Plan
from bitquota.quantizers.activations import ActivationQuantizer, quantize_inputs_of

if TYPE_CHECKING:
    from pathlib import Path

    from bitquota.models.loaded import LoadedModel


class Net(nn.Module):
    """Convolutions behind one another, two that read one tensor, and products with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.right = nn.Conv2d(8, 8, 1)
        self.tokens = nn.Linear(64, 16)
        self.plain = nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take ``[n, 3, 8, 8]``."""
        x = torch.relu(self.second(torch.relu(self.first(x))))
        x = torch.relu(self.left(x) + self.right(x))
        x = torch.relu(self.tokens(x.flatten(2)))  # three axes
        return self.head(self.plain(x).mean(dim=1))


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    """The network, with weights that fill their grids."""
    torch.manual_seed(0)
    return finish(Net().eval(), source="net", architecture="Net")


SAMPLES = CalibrationSet(inputs=(torch.randn(24, 3, 8, 8, generator=torch.manual_seed(1)),))


class Block(nn.Module):
    """A residual block with a depthwise convolution, whose branch grows what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.depth = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.back = nn.Conv2d(32, 16, 1)
        with torch.no_grad():
            for layer in (self.wide, self.depth, self.back):
                layer.weight.mul_(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take ``[n, 16, h, w]``."""
        act = nn.functional.hardswish
        return x + self.back(act(self.depth(act(self.wide(x)))))


def plan_at(
    model: LoadedModel, weights: list[int], inputs: list[int], samples: CalibrationSet = SAMPLES
) -> Plan:
    """The plan that takes these bit-widths in turn, layer after layer."""
    inventory = inventory_of(model.module, model, samples.first(2))
    return Plan(
        model_digest=model.digest,
        assignments=tuple(
            Assignment(
                layer=la,
                candidate=Candidate.of(
                    la, weights[k % len(weights)], Scheme(), inputs[k % len(inputs)]
                ),
            )
            for k, la in enumerate(inventory.layers)
        ),
        unquantized=inventory.unquantized,
    )


def kernels(file: Path, folder: Path) -> Counter[str]:
    """How often ONNX Runtime runs each operator, once it has fused them."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "fused.onnx")
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "fused.onnx").graph.node)


class TestQuantizedInputs:
    @pytest.mark.parametrize("weights", [[8], [4], [2, 4, 8]], ids=str)
    def test_integers_are_multiplied(self, model, weights, tmp_path):
        """Products with inputs of 8 bits or fewer run on integers, whatever the weights' width."""
        plan = plan_at(model, weights, [8, 4, 8, 8, 6, 8])
        report = export_plan(model, plan, tmp_path / "out", format_name="onnx-qdq", samples=SAMPLES)
        assert report.difference is not None
        assert report.difference.relative <= 1e-3
        found = kernels(tmp_path / "out" / "model.onnx", tmp_path)
        assert found["MatMulIntegerToFloat"] == 3
        assert found["QLinearConv"] == 1  # first: only its output goes to a grid at once
        assert any("grids of the plan" in note for note in report.notes)
        module, _, _ = open_export(model, tmp_path / "out")
        assert module(SAMPLES.inputs[0][:3]).shape == (3, 5)

    def test_wide_inputs_are_multiplied_as_numbers(self, model, tmp_path):
        """Inputs of 16 bits are on their grid, and no kernel for integers takes them."""
        plan = plan_at(model, [8], [16])
        report = export_plan(model, plan, tmp_path / "out", format_name="onnx-qdq", samples=SAMPLES)
        assert report.difference is not None
        assert report.difference.relative <= 1e-4
        found = kernels(tmp_path / "out" / "model.onnx", tmp_path)
        assert not found["MatMulIntegerToFloat"] + found["QLinearConv"]

    def test_readers_of_one_tensor_share_its_grid(self, model, tmp_path):
        """``left`` and ``right`` read the same codes."""
        plan = plan_at(model, [8], [8])
        prepared = prepare_export(model, plan, samples=SAMPLES, holds_inputs=ActivationQuantizer)
        assert prepared.activations["left"] == prepared.activations["right"]
        EXPORTERS["onnx-qdq"].export(prepared, tmp_path)
        graph = onnx.load(tmp_path / "model.onnx").graph
        assert sum(node.op_type == "QuantizeLinear" for node in graph.node) == 6

    def test_other_formats_leave_inputs_to_the_runtime(self, model, tmp_path):
        """A file without grids is compared with the plan's weights alone, and says so."""
        report = export_plan(
            model, plan_at(model, [4], [8]), tmp_path / "o", format_name="ref-int", samples=SAMPLES
        )
        assert any("calibration" in note for note in report.notes)

    def test_a_deep_network_may_differ_by_more_than_half_of_what_grids_change(self, tmp_path):
        """Each of 37 layers turns over values at the edges of the next one's steps.

        Half of the change by 8-bit inputs does not cover what torch itself makes of weights that
        move by their last digits; the tolerance does. A shallow network gets none of it.
        """
        torch.manual_seed(0)
        deep = finish(
            nn.Sequential(*(Block() for _ in range(12)), nn.Flatten(), nn.Linear(1024, 5)).eval(),
            source="deep",
            architecture="Sequential",
        )
        data = CalibrationSet(inputs=(torch.randn(32, 16, 8, 8, generator=torch.manual_seed(1)),))
        plan = plan_at(deep, [8], [8], data)
        prepared = prepare_export(deep, plan, samples=data, holds_inputs=ActivationQuantizer)
        report = export_plan(deep, plan, tmp_path / "o", format_name="onnx-qdq", samples=data)
        assert prepared.edge_noise > 0.25 * prepared.input_noise
        assert report.tolerance == pytest.approx(TOLERANCE + 2 * prepared.edge_noise)

        moved = copy.deepcopy(prepared.module)
        for name, grid in prepared.activations.items():
            quantize_inputs_of(moved, name, grid)
        noise = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for la in plan.inventory.layers:
                weight = moved.get_parameter(la.weight_name)
                weight.mul_(1 + 1e-6 * torch.randn(weight.shape, generator=noise))
            apart = moved(*data.inputs) - prepared.reference
        relative = float(apart.norm() / prepared.reference.norm())
        assert 0.25 * prepared.input_noise < relative < report.tolerance

    def test_openvino_reads_it(self, model, tmp_path):
        """The same file runs on integers in OpenVINO."""
        openvino = pytest.importorskip("openvino")
        plan = plan_at(model, [4], [8])
        prepared = prepare_export(model, plan, samples=SAMPLES, holds_inputs=ActivationQuantizer)
        EXPORTERS["onnx-qdq"].export(prepared, tmp_path)
        core = openvino.Core()
        compiled = core.compile_model(
            core.read_model(str(tmp_path / "model.onnx")),
            "CPU",
            {"INFERENCE_PRECISION_HINT": "f32"},
        )
        (found,) = compiled(prepared.inputs[0].numpy()).values()
        apart = (torch.from_numpy(found) - prepared.reference).norm() / prepared.reference.norm()
        assert float(apart) <= 0.5 * prepared.input_noise + 1e-3
        kinds = [node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()]
        ran = Counter(
            str(kind["runtimePrecision"].astype(str))
            for kind in kinds
            if str(kind["layerType"].astype(str)) in {"Convolution", "FullyConnected"}
        )
        assert ran["u8"] + ran["i8"] >= 6

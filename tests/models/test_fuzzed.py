"""Random models through inspect, plan and export, and the kinds of fault that they brought up."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from bitquota.candidates.storage import Scheme
from bitquota.candidates.table import Candidate
from bitquota.exports.export import export_plan
from bitquota.models.binding import bound
from bitquota.models.calibration import CalibrationSet
from bitquota.models.load import load_model
from bitquota.models.loaded import finish, inventory_of
from bitquota.models.outputs import outputs_of
from bitquota.models.samples import load_calibration
from bitquota.plan import Assignment, Plan
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate
from bitquota.sensitivity.outputs import read_outputs
from bitquota.sensitivity.runners.make import make_runner
from format_networks import TiedTokens
from model_fuzzer import in_children, report, run_file
from onnx_graphs import numbers


@pytest.mark.slow
def test_seeds_give_the_right_numbers_or_a_refusal():
    """Two dozen of the seeds that ``make fuzz`` runs."""
    outcomes = in_children(range(64, 88), math.inf)
    assert [o for o in outcomes if o.result == "failed"] == [], report(outcomes, 0)
    assert sum(o.result == "ok" for o in outcomes) >= 18, report(outcomes, 0)


def save(path, nodes, tensors, *, x=("n", 8), y=None, inputs=(), opset=21, kind=1, contrib=False):
    """Write a graph from ``x`` to ``y``."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", kind, x), *inputs],
        [value("y", kind, y)],
        [numpy_helper.from_array(v, k) for k, v in tensors.items()],
    )
    imports = [helper.make_opsetid("", opset)]
    if contrib:
        imports.append(helper.make_opsetid("com.microsoft", 1))
    model = helper.make_model(graph, opset_imports=imports)
    model.ir_version = 8
    onnx.save(model, path)
    return path


def same_as_file(path, given, *, tolerance=1e-5):
    """Load ``path`` and compare all outputs with those of the file itself."""
    model = load_model(str(path))
    samples = CalibrationSet(
        inputs=tuple(torch.from_numpy(v) for v in given.values()), names=tuple(given)
    )
    found = outputs_of(model.module, bound(model, samples).inputs)
    for name, expected in run_file(path, given).items():
        assert np.allclose(found[name].numpy(), expected, atol=tolerance), name
    return model, samples


class TestNames:
    @pytest.mark.parametrize("name", ["onnx_source", "_sessions", "is_transposed.weight", "nf"])
    def test_a_tensor_may_be_called_as_an_attribute_of_ours(self, tmp_path, name):
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Add", ["h", name], ["y"]),
        ]
        path = save(tmp_path / "m.onnx", nodes, {"w": numbers(8, 4), name: numbers(4)})
        same_as_file(path, {"x": numbers(5, 8)})

    def test_a_node_may_be_called_as_the_value_that_another_makes(self, tmp_path):
        """The values in front of a recurrent layer are made by nodes that the reader adds."""
        nodes = [
            helper.make_node("GRU", ["x", "w", "r"], ["", "h"], "memory", hidden_size=4),
            helper.make_node("Squeeze", ["h", "axis"], ["s"], "w"),
            helper.make_node("Identity", ["s"], ["y"], "r"),
        ]
        tensors = {"w": numbers(1, 12, 8), "r": numbers(1, 12, 4), "axis": np.array([0])}
        path = save(tmp_path / "m.onnx", nodes, tensors, x=(3, "n", 8))
        assert len(load_model(str(path)).module.onnx_layers) == 6

    @pytest.mark.parametrize("name", ["y", "labels"])
    def test_a_member_called_as_labels_is_an_input_where_the_model_has_it(self, tmp_path, name):
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Cast", [name], ["c"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["h", "c"], ["out"]),
        ]
        value = helper.make_tensor_value_info
        graph = helper.make_graph(
            nodes,
            "g",
            [value("x", 1, ["n", 8]), value(name, TensorProto.INT64, ["n", 1])],
            [value("out", 1, None)],
            [numpy_helper.from_array(numbers(8, 4), "w")],
        )
        imports = [helper.make_opsetid("", 21)]
        model = helper.make_model(graph, opset_imports=imports, ir_version=10)
        onnx.save(model, tmp_path / "m.onnx")
        np.savez(tmp_path / "c.npz", **{"x": numbers(5, 8), name: np.arange(5)[:, None]})
        samples = bound(
            load_model(str(tmp_path / "m.onnx")), load_calibration(str(tmp_path / "c.npz"))
        )
        assert samples.names == ("x", name)
        assert samples.labels is None


class TestFolding:
    def test_squeeze_of_one_axis_leaves_the_others(self, tmp_path):
        """Before opset 13 its axes are an attribute, and the last dimension is 1 as well."""
        nodes = [
            helper.make_node("Squeeze", ["stored"], ["w"], axes=[0]),
            helper.make_node("GRU", ["x", "w", "r"], ["h", ""], hidden_size=4),
            helper.make_node("Identity", ["h"], ["y"]),
        ]
        tensors = {"stored": numbers(1, 1, 12, 1), "r": numbers(1, 12, 4)}
        path = save(tmp_path / "m.onnx", nodes, tensors, x=("n", 5, 1), opset=11)
        same_as_file(path, {"x": numbers(5, 5, 1)})

    def test_a_declared_initializer_that_is_folded_is_no_input(self, tmp_path):
        nodes = [
            helper.make_node("Split", ["w", "sizes"], ["a", "b"], axis=1),
            helper.make_node("MatMul", ["x", "a"], ["h"]),
            helper.make_node("MatMul", ["x", "b"], ["g"]),
            helper.make_node("Mul", ["h", "g"], ["y"]),
        ]
        tensors = {"w": numbers(8, 6), "sizes": np.array([3, 3])}
        declared = [helper.make_tensor_value_info("w", 1, [8, 6])]
        path = save(tmp_path / "m.onnx", nodes, tensors, inputs=declared)
        model, _ = same_as_file(path, {"x": numbers(5, 8)})
        assert len(model.module.onnx_layers) == 2


class TestBodies:
    def test_a_body_reads_an_initializer_that_is_declared_as_an_input(self, tmp_path):
        made = [helper.make_tensor_value_info("t", 1, None)]
        body = helper.make_graph([helper.make_node("MatMul", ["h", "inner"], ["t"])], "b", [], made)
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("If", ["yes"], ["y"], then_branch=body, else_branch=body),
        ]
        tensors = {"w": numbers(8, 4), "inner": numbers(4, 4), "yes": np.array(True)}
        declared = [helper.make_tensor_value_info("inner", 1, [4, 4])]
        path = save(tmp_path / "m.onnx", nodes, tensors, inputs=declared)
        same_as_file(path, {"x": numbers(5, 8)})

    def test_a_scan_runs_behind_a_changed_layer(self, tmp_path):
        value = helper.make_tensor_value_info
        body = helper.make_graph(
            [helper.make_node("Add", ["s", "v"], ["t"]), helper.make_node("Tanh", ["t"], ["o"])],
            "step",
            [value("s", 1, None), value("v", 1, None)],
            [value("t", 1, None), value("o", 1, None)],
        )
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["h"], "first"),
            helper.make_node("MatMul", ["h", "v2"], ["g"], "second"),
            helper.make_node("Scan", ["zero", "g"], ["last", "y"], body=body, num_scan_inputs=1),
        ]
        tensors = {"w": numbers(8, 4), "v2": numbers(4, 4), "zero": np.zeros(4, np.float32)}
        path = save(tmp_path / "m.onnx", nodes, tensors)
        model, samples = same_as_file(path, {"x": numbers(6, 8)})
        runner = make_runner(model.module, inventory_of(model.module, model, samples), samples)
        state = runner.start(0, {})
        assert torch.allclose(runner.output(state, {}), runner.reference(0))


class TestHalfPrecision:
    def test_a_softmax_in_float16_is_undone(self, tmp_path):
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Softmax", ["h"], ["y"], axis=1),
        ]
        tensors = {"w": 5 * numbers(8, 4, kind=np.float16)}
        path = save(tmp_path / "m.onnx", nodes, tensors, kind=TensorProto.FLOAT16)
        samples = CalibrationSet(inputs=(torch.from_numpy(numbers(9, 8)),))
        (output,) = read_outputs(load_model(str(path)), samples).outputs
        assert (output.loss, output.undone) == ("kl", "softmax")

    def test_an_export_may_differ_by_more_than_one_in_float32(self, tmp_path):
        nodes = [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Tanh", ["h"], ["t"]),
            helper.make_node("MatMul", ["t", "w2"], ["y"]),
        ]
        tensors = {k: numbers(8, 8, kind=np.float16, seed=s) for s, k in enumerate(("w", "w2"))}
        path = save(tmp_path / "m.onnx", nodes, tensors, kind=TensorProto.FLOAT16)
        model = load_model(str(path))
        samples = CalibrationSet(inputs=(torch.from_numpy(numbers(9, 8)),))
        request = PlanRequest(
            budgets=("8 bits",), target="ort-cpu", refine=False, samples=4, holdout_samples=4
        )
        found = allocate(model, samples, request)
        (plan,), model = found.plans, found.with_weights(model)
        made = export_plan(model, plan, tmp_path / "out", target="ort-cpu", samples=samples)
        assert made.tolerance == 1e-2
        assert made.difference.relative < 1e-2


class TestFusedOperators:
    @pytest.mark.parametrize(
        ("operator", "shape", "attributes", "x"),
        [
            ("FusedMatMul", (4, 8), {"transB": 1, "alpha": 0.5}, (5, 8)),
            ("FusedGemm", (8, 4), {"activation": "Relu"}, (5, 8)),
            ("FusedConv", (4, 8, 1, 1), {"activation": "Relu"}, (5, 8, 2, 2)),
        ],
    )
    def test_their_weights_are_layers(self, tmp_path, operator, shape, attributes, x):
        """As ONNX Runtime's own optimiser writes them."""
        given = ["x", "w", *(["b"] if operator == "FusedGemm" else [])]
        nodes = [helper.make_node(operator, given, ["y"], domain="com.microsoft", **attributes)]
        tensors = {"w": numbers(*shape)} | ({"b": numbers(4)} if len(given) > 2 else {})
        path = save(tmp_path / "m.onnx", nodes, tensors, x=("n", *x[1:]), contrib=True)
        model, samples = same_as_file(path, {"x": numbers(*x)})
        (layer,) = inventory_of(model.module, model, samples).layers
        places = math.prod(x[2:])
        assert (layer.n_weights, layer.n_macs) == (32, 32 * places)


class FixedLength(nn.Module):
    """Six tokens, no more and no less."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(17, 4), nn.Linear(24, 3)

    def forward(self, ids):
        return self.head(self.embed(ids).flatten(1))


@pytest.mark.slow
class TestLengths:
    @pytest.mark.parametrize(("make", "fixed"), [(FixedLength, True), (TiedTokens, False)])
    def test_an_export_takes_the_lengths_that_the_model_takes(self, tmp_path, make, fixed):
        model = finish(make(), source="m", architecture="m")
        samples = CalibrationSet(inputs=(torch.arange(54).reshape(9, 6) % 17,))
        request = PlanRequest(
            budgets=("8 bits",), target="ort-cpu", refine=False, samples=4, holdout_samples=4
        )
        made = allocate(model, samples, request)
        (plan,), model = made.plans, made.with_weights(model)
        export_plan(model, plan, tmp_path / "out", target="ort-cpu", samples=samples)
        (given,) = onnx.load(tmp_path / "out" / "model.onnx").graph.input
        batch, length = given.type.tensor_type.shape.dim
        assert not batch.dim_value
        assert length.dim_value == (6 if fixed else 0)


class Unread(nn.Module):
    """A layer that never runs, in a module that torch traces from its source code only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(1, 16))
        self.never = nn.Linear(3, 2)
        self.head = nn.Linear(16, 8)

    def forward(self, x):
        product = torch.bmm(x.reshape(len(x), -1, 1), self.w.expand(len(x), -1, -1))
        return self.head(product.reshape(*x.shape[:-1], -1))


class Volume(nn.Module):
    """Convolutions without a bias, for which torch's exporter makes one up."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv3d(1, 2, 2, bias=False)
        self.second = nn.Conv3d(2, 3, 1, stride=2, bias=False, padding_mode="circular")

    def forward(self, x):
        return self.second(self.first(x)).flatten(1)


@pytest.mark.slow
class TestWhatTorchWrites:
    @pytest.mark.parametrize(
        ("net", "shape"),
        [(Unread(), (9, 1)), (Volume(), (9, 1, 4, 3, 4))],
        ids=["unread", "conv3d"],
    )
    def test_is_exported(self, tmp_path, net, shape):
        """Whatever torch's exporter leaves out or makes up."""
        model = finish(net.eval(), source="m", architecture="m")
        samples = CalibrationSet(inputs=(torch.from_numpy(numbers(*shape)),))
        inventory = inventory_of(model.module, model, samples)
        plan = Plan(
            model_digest=model.digest,
            assignments=tuple(
                Assignment(layer=la, candidate=Candidate.of(la, 8, Scheme()))
                for la in inventory.layers
            ),
            unquantized=inventory.unquantized,
        )
        report = export_plan(model, plan, tmp_path / "out", format_name="onnx-qdq", samples=samples)
        assert report.difference.relative < 1e-5
        written = {tensor.layer for tensor in report.tensors}
        assert written == {la.name for la in inventory.layers if la.n_macs}

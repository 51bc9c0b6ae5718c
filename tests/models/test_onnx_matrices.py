"""Weights of LSTM, GRU, RNN, Einsum and batched MatMul in ONNX graphs: each matrix is a layer."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from bitquota.candidates.layers import LayerKind
from bitquota.candidates.storage import Granularity, Scheme
from bitquota.candidates.table import Candidate
from bitquota.candidates.targets import TARGETS
from bitquota.exports.export import export_plan
from bitquota.models.calibration import CalibrationSet
from bitquota.models.load import load_model
from bitquota.models.loaded import inventory_of
from bitquota.plan import Assignment, Plan
from bitquota.sensitivity.runners.make import make_runner
from onnx_graphs import numbers, run

node = helper.make_node
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def written(path, nodes, tensors, shape):
    """Write a graph from ``x`` of this shape per sample to ``y``."""
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in tensors],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return path


def recurrent(path, operator, *, directions=1):
    """Write 5 steps of 6 numbers through 8 hidden units; the mean over the directions."""
    n = GATES[operator] * 8
    way = "bidirectional" if directions == 2 else "forward"
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        node(operator, ["t", "W", "R", "B"], ["all", "last"], "cell",
             hidden_size=8, direction=way),
        node("ReduceMean", ["last", "first"], ["h"], keepdims=0),
        node("MatMul", ["h", "head"], ["y"], "head"),
    ]  # fmt: skip
    tensors = [
        ("W", numbers(directions, n, 6)), ("R", numbers(directions, n, 8, seed=1)),
        ("B", numbers(directions, 2 * n, seed=2)), ("head", numbers(8, 3, seed=3)),
        ("first", np.array([0])),
    ]  # fmt: skip
    return written(path, nodes, tensors, [5, 6])


def contraction(path, weight, make, shape):
    """Write one operator between ``x`` and the constant ``w``."""
    return written(path, [make], [("w", weight)], shape)


CONTRACTIONS = {
    # Name: weight, operator, shape of a sample, rows, columns, MACs of a sample.
    "heads": (
        numbers(6, 2, 4), node("Einsum", ["x", "w"], ["y"], "e", equation="bsd,dhk->bshk"),
        [5, 6], 8, 6, 5 * 8 * 6,
    ),
    "back": (
        numbers(2, 4, 6), node("Einsum", ["x", "w"], ["y"], "e", equation="bshk,hkd->bsd"),
        [5, 2, 4], 6, 8, 5 * 6 * 8,
    ),
    "between": (
        numbers(4, 6, 2), node("Einsum", ["x", "w"], ["y"], "e", equation="bsd,kdh->bhks"),
        [5, 6], 8, 6, 5 * 8 * 6,
    ),
    "weight first": (
        numbers(7, 6), node("Einsum", ["w", "x"], ["y"], "e", equation="od,bd->bo"),
        [6], 7, 6, 7 * 6,
    ),
    "batched right": (
        numbers(3, 6, 4), node("MatMul", ["x", "w"], ["y"], "e"), [3, 5, 6], 12, 6, 3 * 5 * 6 * 4,
    ),
    "batched left": (
        numbers(3, 4, 6), node("MatMul", ["w", "x"], ["y"], "e"), [3, 6, 5], 12, 6, 3 * 5 * 6 * 4,
    ),
}  # fmt: skip


def planned(model, samples, bits=4, scheme=None):
    """Return a plan with every layer at one width."""
    inventory = inventory_of(model.module, model, samples)
    return Plan(
        model_digest=model.digest,
        assignments=tuple(
            Assignment(layer=la, candidate=Candidate.of(la, bits, scheme or Scheme()))
            for la in inventory.layers
        ),
        unquantized=inventory.unquantized,
    )


def samples_of(*shape):
    """Return six samples."""
    return CalibrationSet(inputs=(torch.from_numpy(numbers(6, *shape, seed=5)),))


class TestRecurrent:
    @pytest.mark.parametrize("directions", [1, 2])
    @pytest.mark.parametrize("operator", GATES)
    def test_each_gate_is_a_layer(self, tmp_path, operator, directions):
        """All bytes but the biases are quantizable, and all products are counted."""
        path = recurrent(tmp_path / "m.onnx", operator, directions=directions)
        model, samples = load_model(str(path)), samples_of(5, 6)
        (x,) = samples.inputs
        with torch.no_grad():
            assert np.allclose(run(path, x.numpy()), model.module(x), atol=1e-6)
        inventory = inventory_of(model.module, model, samples)
        layers = [la for la in inventory.layers if la.kind is LayerKind.RECURRENT]
        assert len(layers) == 2 * GATES[operator] * directions
        assert {(la.rows, la.columns) for la in layers} == {(8, 6), (8, 8)}
        steps = 5
        assert sum(la.n_macs for la in layers) == steps * directions * GATES[operator] * 8 * 14
        assert not [t for t in inventory.unquantized if t.reason == "read by no node"]

    @pytest.mark.parametrize("bits", [2, 4, 8])
    @pytest.mark.parametrize("operator", GATES)
    def test_export_runs(self, tmp_path, operator, bits):
        """The file gives what fake-quantization gives, and is not the float model."""
        path = recurrent(tmp_path / "m.onnx", operator, directions=2)
        model, samples = load_model(str(path)), samples_of(5, 6)
        receipt = export_plan(
            model, planned(model, samples, bits), tmp_path / "out", format_name="onnx-qdq",
            samples=samples,
        )  # fmt: skip
        assert receipt.difference.relative < 1e-5
        x = samples.inputs[0].numpy()
        assert np.abs(run(path, x) - run(tmp_path / "out/model.onnx", x)).max() > 1e-5

    def test_gates_may_differ(self, tmp_path):
        """One gate at 2 bits changes what fake-quantizing that gate alone changes."""
        path = recurrent(tmp_path / "m.onnx", "LSTM")
        model, samples = load_model(str(path)), samples_of(5, 6)
        inventory = inventory_of(model.module, model, samples)
        runner = make_runner(model.module, inventory, samples)
        layer = inventory.layer("cell.R.f")
        candidate = Candidate.of(layer, 2, Scheme())
        changed = runner.start(0, {layer.name: candidate}).output
        edited = onnx.load(str(path))
        tensor = edited.graph.initializer[1]
        array = numpy_helper.to_array(tensor).copy()
        array[0, 16:24] = runner.weights(candidate)  # ONNX stacks i, o, f, c
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        onnx.save(edited, str(tmp_path / "edited.onnx"))
        expected = run(tmp_path / "edited.onnx", samples.inputs[0].numpy())
        assert np.allclose(expected, changed, atol=1e-6)
        assert not np.allclose(expected, runner.reference(0), atol=1e-4)

    def test_target(self, tmp_path):
        """What the menu of ort-cpu offers for a gate is exported and runs."""
        path = recurrent(tmp_path / "m.onnx", "GRU")
        model, samples = load_model(str(path)), samples_of(5, 6)
        target = TARGETS["ort-cpu"]
        inventory = target.prepare(inventory_of(model.module, model, samples))
        for legal in target.formats_for(inventory.layer("cell.W.z")):
            plan = planned(model, samples, legal.weight_bits, legal.scheme)
            folder = tmp_path / legal.name
            receipt = export_plan(model, plan, folder, format_name="onnx-qdq", samples=samples)
            assert receipt.difference.relative < 1e-5


class TestContractions:
    @pytest.mark.parametrize("name", CONTRACTIONS)
    def test_found_and_exported(self, tmp_path, name):
        """Rows are outputs, products are counted, and the export computes the same."""
        weight, make, shape, rows, columns, macs = CONTRACTIONS[name]
        path = contraction(tmp_path / "m.onnx", weight, make, shape)
        model, samples = load_model(str(path)), samples_of(*shape)
        (x,) = samples.inputs
        with torch.no_grad():
            assert np.allclose(run(path, x.numpy()), model.module(x), atol=1e-6)
        for scheme in (Scheme(), Scheme(granularity=Granularity.GROUP, group_size=2)):
            plan = planned(model, samples, 4, scheme)
            (layer,) = plan.inventory.layers
            assert (layer.kind, layer.rows, layer.columns) == (
                LayerKind.CONTRACTION, rows, columns,
            )  # fmt: skip
            assert layer.n_macs == macs
            folder = tmp_path / str(scheme.granularity)
            receipt = export_plan(model, plan, folder, format_name="onnx-qdq", samples=samples)
            assert receipt.difference.relative < 1e-5
            gap = np.abs(run(path, x.numpy()) - run(folder / "model.onnx", x.numpy())).max()
            assert 1e-4 < gap < 1

    def test_elementwise_is_no_layer(self, tmp_path):
        """An Einsum that sums over no axis of the constant multiplies no matrix."""
        make = [
            node("Einsum", ["x", "w"], ["h"], "e", equation="bd,d->bd"),
            node("MatMul", ["h", "v"], ["y"], "m"),
        ]
        path = written(tmp_path / "m.onnx", make, [("w", numbers(6)), ("v", numbers(6, 2))], [6])
        model = load_model(str(path))
        assert [la.name for la in inventory_of(model.module, model, samples_of(6)).layers] == ["m"]

"""Graphs as exporters write them: what is found, what is counted, and what the export runs."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from bitquota.candidates.storage import Scheme
from bitquota.candidates.table import Candidate
from bitquota.errors import InvalidModel, UnsafeModel
from bitquota.exports.export import export_plan
from bitquota.models.calibration import CalibrationSet
from bitquota.models.load import load_model
from bitquota.models.loaded import inventory_of
from bitquota.models.onnx import reading
from bitquota.plan import Assignment, Plan
from onnx_graphs import numbers, run

node = helper.make_node


def written(path, nodes, tensors, *, n_in=16, kind=TensorProto.FLOAT, batch="n", functions=()):
    """Write a graph from ``x`` to ``y``."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, [batch, n_in])],
        [helper.make_tensor_value_info("y", kind, None)],
        [
            t if isinstance(t, onnx.TensorProto) else numpy_helper.from_array(t[1], t[0])
            for t in tensors
        ],
    )
    domains = [helper.make_opsetid(f.domain, 1) for f in functions]
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 21), *domains],
        ir_version=10,
        functions=list(functions),
    )
    onnx.save(model, str(path))
    return path


def behind(*steps, end=("MatMul", {})):
    """Return nodes that lead from the initializer ``w`` to a product with ``x``."""
    nodes, name = [], "w"
    for k, (operator, attributes) in enumerate(steps):
        inputs = [name, "shape"] if operator == "Reshape" else [name]
        nodes.append(node(operator, inputs, [f"v{k}"], **attributes))
        name = f"v{k}"
    return [*nodes, node(end[0], ["x", name], ["y"], "product", **end[1])]


FLIP = ("Transpose", {"perm": [1, 0]})
WIDE = ("Cast", {"to": TensorProto.FLOAT})
SHAPE = ("shape", np.array([16, 24]))

VIEWS = {
    "identity": (behind(("Identity", {})), numbers(16, 24), []),
    "transposed": (behind(FLIP), numbers(24, 16), []),
    "twice": (behind(FLIP, FLIP), numbers(16, 24), []),
    "reshaped": (behind(("Reshape", {})), numbers(16, 4, 6), [SHAPE]),
    "float16": (behind(WIDE), numbers(16, 24, kind=np.float16), []),
    "bfloat16": (behind(WIDE, FLIP), numbers(24, 16, kind=ml_dtypes.bfloat16), []),
    "masked": (
        [node("Mul", ["w", "mask"], ["v"]), node("MatMul", ["x", "v"], ["y"], "product")],
        numbers(16, 24),
        [("mask", (numbers(16, 24, seed=1) > 0).astype(np.float32))],
    ),
    "weight norm": (
        [
            node("ReduceL2", ["w", "axis"], ["n"], keepdims=1),
            node("Div", ["w", "n"], ["u"]),
            node("Mul", ["u", "g"], ["v"]),
            node("Gemm", ["x", "v"], ["y"], "product", transB=1),
        ],
        numbers(24, 16),
        [("g", numbers(24, 1, seed=1)), ("axis", np.array([1]))],
    ),
}


def planned(model, samples, bits=4):
    """Return a plan with every layer at one width."""
    inventory = inventory_of(model.module, model, samples)
    return Plan(
        model_digest=model.digest,
        assignments=tuple(
            Assignment(layer=la, candidate=Candidate.of(la, bits, Scheme()))
            for la in inventory.layers
        ),
        unquantized=inventory.unquantized,
    )


def round_trip(path, x, folder, bits=4):
    """Quantize every layer, export, and compare the file with fake-quantization."""
    model = load_model(str(path))
    samples = CalibrationSet(inputs=(torch.from_numpy(x.astype(np.float32)),))
    plan = planned(model, samples, bits)
    report = export_plan(model, plan, folder, format_name="onnx-qdq", samples=samples)
    return plan.inventory, report


class TestWeightsBehindOtherNodes:
    @pytest.mark.parametrize("name", VIEWS)
    def test_found_and_exported(self, tmp_path, name):
        """The layer is what the product reads; the file and its export compute the same."""
        nodes, weight, more = VIEWS[name]
        path = written(tmp_path / "m.onnx", nodes, [("w", weight), *more])
        x = numbers(6, 16, seed=2)
        model = load_model(str(path))
        with torch.no_grad():
            assert np.allclose(run(path, x), model.module(torch.from_numpy(x)), atol=1e-5)
        inventory, report = round_trip(path, x, tmp_path / "out")
        (layer,) = inventory.layers
        assert {layer.rows, layer.columns} == {24, 16}
        assert layer.rows == 24
        assert layer.n_macs == 24 * 16
        assert report.difference.relative < 1e-5
        gap = np.abs(run(path, x) - run(tmp_path / "out/model.onnx", x)).max()
        assert 1e-4 < gap < 1  # 4 bits are seen

    def test_half_precision_is_counted_and_kept(self, tmp_path):
        """A weight behind a Cast counts 16 bits, and is written so where a plan leaves it."""
        nodes, weight, _ = VIEWS["float16"]
        path = written(tmp_path / "m.onnx", nodes, [("w", weight)])
        model = load_model(str(path))
        x = torch.from_numpy(numbers(6, 16, seed=2))
        samples = CalibrationSet(inputs=(x,))
        plan = planned(model, samples, 32)
        assert plan.inventory.full_precision_bits == 16 * 24 * 16
        report = export_plan(model, plan, tmp_path / "out", format_name="onnx-qdq", samples=samples)
        assert report.unquantized_bits == report.planned_unquantized_bits == 16 * 24 * 16
        assert np.allclose(run(path, x.numpy()), run(tmp_path / "out/model.onnx", x.numpy()))

    def test_tied_in_two_layouts_stays_one(self, tmp_path):
        """A weight that is read as it is and transposed is one layer of half the bytes."""
        nodes = [
            node("Transpose", ["w"], ["v"], perm=[1, 0]),
            node("MatMul", ["x", "w"], ["h"], "in"),
            node("MatMul", ["h", "v"], ["y"], "out"),
        ]
        path = written(tmp_path / "m.onnx", nodes, [("w", numbers(16, 24))])
        inventory, report = round_trip(path, numbers(6, 16, seed=2), tmp_path / "out")
        assert [la.n_macs for la in inventory.layers] == [2 * 16 * 24]
        assert report.difference.relative < 1e-5


class TestTensorTypes:
    @pytest.mark.parametrize("kind", [np.float16, np.float64])
    def test_computed_in_other_types(self, tmp_path, kind):
        """The export computes in the type of the graph."""
        number = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
        path = written(
            tmp_path / "m.onnx", behind(), [("w", numbers(16, 24, kind=kind))], kind=number
        )
        _, report = round_trip(path, numbers(6, 16, seed=2), tmp_path / "out")
        assert report.difference.relative < 1e-3
        assert run(tmp_path / "out/model.onnx", numbers(6, 16, kind=kind)).dtype == kind

    def test_bfloat16_arithmetic_is_refused(self, tmp_path):
        """No kernel of ONNX Runtime's CPU provider multiplies it."""
        path = written(
            tmp_path / "m.onnx", behind(), [("w", numbers(16, 24, kind=ml_dtypes.bfloat16))],
            kind=TensorProto.BFLOAT16,
        )  # fmt: skip
        with pytest.raises(InvalidModel, match="bfloat16"):
            load_model(str(path))

    def test_every_tensor_is_counted(self, tmp_path):
        """Empty ones, texts and 4-bit integers that torch has no type for."""
        four = helper.make_tensor("four", TensorProto.INT4, [5], [1, 2, 3, 4, 5])
        text = helper.make_tensor("text", TensorProto.STRING, [2], [b"ab", b"cde"])
        path = written(
            tmp_path / "m.onnx", behind(),
            [("w", numbers(16, 24)), four, text, ("roi", np.zeros(0, np.float32))],
        )  # fmt: skip
        model = load_model(str(path))
        x = torch.from_numpy(numbers(2, 16))
        rest = inventory_of(model.module, model, CalibrationSet(inputs=(x,))).unquantized
        assert {t.name: t.size_bits for t in rest} == {"four": 24, "text": 40, "roi": 0}


class TestWhereWeightsStand:
    def test_constant_nodes(self, tmp_path):
        """A weight in a Constant node is a layer like any other."""
        value = numpy_helper.from_array(numbers(16, 24), "any")
        nodes = [node("Constant", [], ["w"], value=value), *behind()]
        path = written(tmp_path / "m.onnx", nodes, [])
        inventory, report = round_trip(path, numbers(6, 16, seed=2), tmp_path / "out")
        assert [(la.name, la.n_weights) for la in inventory.layers] == [("product", 16 * 24)]
        assert report.difference.relative < 1e-5

    def test_sparse_initializers(self, tmp_path):
        """They become dense, and are counted so."""
        dense = numbers(16, 24) * (numbers(16, 24, seed=1) > 0)
        where = np.flatnonzero(dense)
        path = written(tmp_path / "m.onnx", behind(), [("w", dense)])
        model = onnx.load(str(path))
        values = numpy_helper.from_array(dense.ravel()[where], "w")
        indices = numpy_helper.from_array(where.astype(np.int64), "i")
        del model.graph.initializer[:]
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [16, 24]))
        onnx.save(model, str(tmp_path / "s.onnx"))
        x = numbers(6, 16, seed=2)
        loaded = load_model(str(tmp_path / "s.onnx"))
        with torch.no_grad():
            assert np.allclose(run(path, x), loaded.module(torch.from_numpy(x)), atol=1e-5)

    def test_sparse_tensors_are_bounded(self, tmp_path):
        """A few bytes may not become terabytes."""
        path = written(tmp_path / "m.onnx", behind(), [("w", numbers(16, 24))])
        model = onnx.load(str(path))
        values = numpy_helper.from_array(np.ones(1, np.float32), "huge")
        indices = numpy_helper.from_array(np.zeros(1, np.int64), "i")
        model.graph.sparse_initializer.append(
            helper.make_sparse_tensor(values, indices, [2**20, 2**20])
        )
        onnx.save(model, str(path))
        with pytest.raises(InvalidModel, match="when dense"):
            load_model(str(path))

    def test_local_functions(self, tmp_path):
        """The weight inside one is found; two calls of it share one weight."""
        value = numpy_helper.from_array(numbers(16, 16), "any")
        function = helper.make_function(
            "own", "Block", ["a"], ["b"],
            [node("Constant", [], ["w"], value=value), node("MatMul", ["a", "w"], ["b"])],
            [helper.make_opsetid("", 21)],
        )  # fmt: skip
        nodes = [
            node("Block", ["x"], ["h"], domain="own"),
            node("Block", ["h"], ["y"], domain="own"),
        ]
        path = written(tmp_path / "m.onnx", nodes, [], functions=[function])
        inventory, report = round_trip(path, numbers(6, 16, seed=2), tmp_path / "out")
        assert [(la.n_weights, la.n_macs) for la in inventory.layers] == [(256, 512)]
        assert report.difference.relative < 1e-5

    def test_functions_that_explode_are_refused(self, tmp_path):
        """Twenty functions that each call the next one twice are a million nodes."""
        opset = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
        functions = [
            helper.make_function(
                "own", f"F{k}", ["a"], ["b"],
                [node(f"F{k + 1}", ["a"], ["c"], domain="own"),
                 node(f"F{k + 1}", ["c"], ["b"], domain="own")], opset,
            )
            for k in range(20)
        ]  # fmt: skip
        functions.append(
            helper.make_function("own", "F20", ["a"], ["b"], [node("Neg", ["a"], ["b"])], opset)
        )
        nodes = [node("F0", ["x"], ["h"], domain="own"), node("MatMul", ["h", "w"], ["y"])]
        path = written(tmp_path / "m.onnx", nodes, [("w", numbers(16, 4))], functions=functions)
        with pytest.raises(InvalidModel, match="nodes"):
            reading.read_normalized(path)

    def test_function_that_calls_itself(self, tmp_path):
        """Refused before anything is inlined."""
        opset = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
        loop = helper.make_function(
            "own", "F", ["a"], ["b"], [node("F", ["a"], ["b"], domain="own")], opset
        )
        nodes = [node("F", ["x"], ["h"], domain="own"), node("MatMul", ["h", "w"], ["y"])]
        path = written(tmp_path / "m.onnx", nodes, [("w", numbers(16, 4))], functions=[loop])
        with pytest.raises(InvalidModel, match="call themselves"):
            reading.read_normalized(path)

    def test_bodies_are_counted_and_named(self, tmp_path):
        """A weight inside an If is no layer, but its bytes and its place are told."""
        out = helper.make_tensor_value_info("o", TensorProto.FLOAT, None)
        then = helper.make_graph(
            [node("MatMul", ["h", "inner"], ["o"])], "then", [], [out],
            [numpy_helper.from_array(numbers(24, 8), "inner")],
        )  # fmt: skip
        other = helper.make_graph([node("MatMul", ["h", "own"], ["o"])], "else", [], [out])
        nodes = [
            node("MatMul", ["x", "w"], ["h"], "first"),
            node("ReduceSum", ["x"], ["s"], keepdims=0),
            node("Greater", ["s", "zero"], ["c"]),
            node("If", ["c"], ["y"], "branch", then_branch=then, else_branch=other),
        ]
        tensors = [("w", numbers(16, 24)), ("own", numbers(24, 8)), ("zero", np.float32(0))]
        path = written(tmp_path / "m.onnx", nodes, tensors)
        inventory, report = round_trip(path, numbers(6, 16, seed=2), tmp_path / "out")
        assert [la.name for la in inventory.layers] == ["first"]
        held = {t.name: (t.size_bits, t.reason) for t in inventory.unquantized}
        inside = "used inside the body of If 'branch'"
        assert held["inner"] == held["own"] == (24 * 8 * 32, inside)
        assert report.difference.relative < 1e-5

    def test_foreign_operators_in_bodies_are_refused(self, tmp_path):
        """The list of domains holds for bodies and for functions too."""
        out = helper.make_tensor_value_info("o", TensorProto.FLOAT, None)
        graph = helper.make_graph([node("Evil", ["h"], ["o"], domain="evil")], "b", [], [out])
        nodes = [
            node("MatMul", ["x", "w"], ["h"]),
            node("If", ["c"], ["y"], then_branch=graph, else_branch=graph),
        ]
        path = written(tmp_path / "m.onnx", nodes, [("w", numbers(16, 4)), ("c", np.array(True))])
        with pytest.raises(UnsafeModel, match="evil"):
            load_model(str(path))


class TestNames:
    @pytest.mark.parametrize(
        "first", ["layers.0", "type", "train", "half.fc", "forward", "state.layers", "weight", "."]
    )
    def test_names_of_a_modules_own_attributes(self, tmp_path, first):
        """They are names of layers like any other, and come back in the export."""
        nodes = [
            node("Gemm", ["x", f"{first}.weight", f"{first}.bias"], ["h"], transB=1),
            node("MatMul", ["h", "head.weight"], ["y"]),
        ]
        tensors = [
            (f"{first}.weight", numbers(24, 16)), (f"{first}.bias", numbers(24)),
            ("head.weight", numbers(24, 4)),
        ]  # fmt: skip
        path = written(tmp_path / "m.onnx", nodes, tensors)
        inventory, report = round_trip(path, numbers(6, 16, seed=2), tmp_path / "out")
        assert len(inventory.layers) == 2
        assert report.difference.relative < 1e-5
        held = {t.name for t in onnx.load(str(tmp_path / "out/model.onnx")).graph.initializer}
        assert {f"{first}.weight.codes", f"{first}.bias"} <= held

    def test_two_nodes_of_one_name(self, tmp_path):
        """Both are layers, each with its own weight."""
        nodes = [
            node("MatMul", ["x", "a"], ["h"], "same"),
            node("MatMul", ["h", "b"], ["y"], "same"),
        ]
        path = written(tmp_path / "m.onnx", nodes, [("a", numbers(16, 24)), ("b", numbers(24, 4))])
        inventory, report = round_trip(path, numbers(6, 16, seed=2), tmp_path / "out")
        assert [la.n_macs for la in inventory.layers] == [16 * 24, 24 * 4]
        assert report.difference.relative < 1e-5

    def test_names_of_scales_are_taken(self, tmp_path):
        """The export finds others."""
        nodes = [
            node("MatMul", ["x", "w"], ["h"]), node("Mul", ["h", "w.scales"], ["m"]),
            node("Relu", ["m"], ["w.codes"]), node("MatMul", ["w.codes", "v"], ["y"]),
        ]  # fmt: skip
        tensors = [("w", numbers(16, 24)), ("w.scales", numbers(24)), ("v", numbers(24, 4))]
        path = written(tmp_path / "m.onnx", nodes, tensors)
        _, report = round_trip(path, numbers(6, 16, seed=2), tmp_path / "out")
        assert report.difference.relative < 1e-5


class TestShapes:
    def test_batch_of_minus_one(self, tmp_path):
        """Some exporters write it where any size will do."""
        path = written(tmp_path / "m.onnx", behind(), [("w", numbers(16, 24))], batch=-1)
        x = torch.from_numpy(numbers(5, 16))
        model = load_model(str(path))
        assert model.module(x).shape == (5, 24)
        assert model.example_inputs[0].shape == (2, 16)

    def test_fixed_batch_is_exported(self, tmp_path):
        """The file keeps its batch; it is verified in pieces."""
        path = written(tmp_path / "m.onnx", behind(), [("w", numbers(16, 24))], batch=4)
        _, report = round_trip(path, numbers(6, 16, seed=2), tmp_path / "out")
        assert report.difference.relative < 1e-5
        assert report.difference.n_samples == 6

"""If nodes that declared shapes decide."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from bitquota.candidates.storage import Scheme
from bitquota.candidates.table import Candidate
from bitquota.exports.export import export_plan
from bitquota.models.calibration import CalibrationSet
from bitquota.models.load import load_model
from bitquota.models.loaded import inventory_of
from bitquota.models.onnx.reading import read_normalized
from bitquota.plan import Assignment, Plan
from onnx_graphs import numbers

value = helper.make_tensor_value_info
node = helper.make_node


def branch(name, nodes, result):
    """Return a body that takes nothing and returns one value."""
    return helper.make_graph(nodes, name, [], [value(result, TensorProto.FLOAT, None)])


def asks(of, at, number, made):
    """Return nodes for "is the size of axis ``at`` of ``of`` equal to ``number``?"."""
    return [
        node("Shape", [of], [f"{made}.shape"]),
        node("Gather", [f"{made}.shape", f"at{at}"], [f"{made}.size"], axis=0),
        node("Squeeze", [f"{made}.size"], [f"{made}.scalar"]),
        node("Equal", [f"{made}.scalar", f"is{number}"], [f"{made}.equal"]),
        node("Cast", [f"{made}.equal"], [made], to=TensorProto.BOOL),
    ]


def network(path, nodes, *, columns=8, described=()):
    """Write a graph from ``x`` and ``state`` ``[2, n, 8]`` to ``y``."""
    tensors = {
        "w": numbers(8, 8), "w2": numbers(8, 8, seed=1), "at0": np.array([0]), "at1": np.array([1]),
        "is2": np.array(2), "is8": np.array(8), "is9": np.array(9),
    }  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", 1, ["n", columns]), value("state", 1, ["n", 2, 8])],
        [value("y", 1, ["n", 8])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
        value_info=described,
    )
    opsets = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def product(x, w, made):
    """Return a matrix product behind a transposition of its weight."""
    return [node("Transpose", [w], [f"{made}.t"]), node("MatMul", [x, f"{made}.t"], [made], made)]


YES = branch("yes", product("x", "w", "p"), "p")
NO = branch("no", [node("Neg", ["x"], ["q"])], "q")


def kinds(path):
    """Return the operators of the normalised graph."""
    return [n.op_type for n in read_normalized(path).model.graph.node]


class TestResolveBranches:
    def test_layers_of_the_branch_are_found_and_exported(self, tmp_path):
        """A condition on a declared size leaves one branch, also one within another."""
        both = branch("both", [*product("x", "w", "p"), *product("p", "w2", "z")], "z")
        inner = [
            *asks("state", 1, 2, "c2"),
            node("If", ["c2"], ["r"], then_branch=both, else_branch=NO),
        ]
        within = branch("within", inner, "r")
        outer = node("If", ["c"], ["y"], "ask", then_branch=within, else_branch=NO)
        path = network(tmp_path / "m.onnx", [*asks("state", 1, 2, "c"), outer])
        assert "If" not in kinds(path)
        model = load_model(str(path))
        x, state = (torch.from_numpy(numbers(9, *shape, seed=5)) for shape in ((8,), (2, 8)))
        samples = CalibrationSet(inputs=(x, state), names=("x", "state"))
        inventory = inventory_of(model.module, model, samples)
        assert [(la.n_weights, la.n_macs) for la in inventory.layers] == [(64, 64), (64, 64)]
        session = onnxruntime.InferenceSession(str(path))
        (expected,) = session.run(None, {"x": x.numpy(), "state": state.numpy()})
        assert np.allclose(expected, model.module(x, state), atol=1e-6)

        plan = Plan(
            model_digest=model.digest,
            assignments=tuple(
                Assignment(layer=la, candidate=Candidate.of(la, 8, Scheme()))
                for la in inventory.layers
            ),
            unquantized=inventory.unquantized,
        )
        form = {"format_name": "onnx-qdq", "samples": samples}
        report = export_plan(model, plan, tmp_path / "out", **form)
        assert report.difference.relative < 1e-5
        made = onnx.load(tmp_path / "out" / "model.onnx").graph
        assert [v.name for v in made.output] == ["y"]
        assert {t.name for t in made.initializer} >= {"w.codes", "w2.codes"}

    def test_branches_side_by_side_with_the_same_names(self, tmp_path):
        """Their values stay apart, and one that is not decided keeps its own."""
        undecided = [
            node("ReduceSum", ["y2"], ["s"], keepdims=0), node("Greater", ["s", "s"], ["never"]),
            node("If", ["never"], ["y"], then_branch=YES, else_branch=branch(
                "no", [node("Neg", ["y2"], ["p"])], "p")),
        ]  # fmt: skip
        nodes = [
            *asks("state", 1, 2, "c"),
            node("If", ["c"], ["y1"], then_branch=YES, else_branch=NO),
            node("If", ["c"], ["y3"], then_branch=YES, else_branch=NO),
            node("Add", ["y1", "y3"], ["y2"]), *undecided,
        ]  # fmt: skip
        path = network(tmp_path / "m.onnx", nodes)
        assert kinds(path).count("If") == 1
        x, state = numbers(3, 8, seed=5), numbers(3, 2, 8)
        session = onnxruntime.InferenceSession(str(path))
        (expected,) = session.run(None, {"x": x, "state": state})
        found = load_model(str(path)).module(torch.from_numpy(x), torch.from_numpy(state))
        assert np.allclose(expected, found, atol=1e-6)

    def test_a_branch_that_returns_what_it_is_given(self, tmp_path):
        """Its value keeps its name, and the output its own."""
        same = helper.make_graph([], "same", [], [value("x", TensorProto.FLOAT, None)])
        nodes = [
            *asks("state", 1, 9, "c"),
            node("If", ["c"], ["r"], then_branch=YES, else_branch=same),
            node("MatMul", ["r", "w2"], ["y"], "last"),
        ]
        path = network(tmp_path / "m.onnx", nodes)
        assert "If" not in kinds(path)
        x, state = torch.from_numpy(numbers(3, 8, seed=5)), torch.zeros(3, 2, 8)
        found = load_model(str(path)).module(x, state)
        assert np.allclose(x.numpy() @ numbers(8, 8, seed=1), found, atol=1e-6)

    @pytest.mark.parametrize("case", ["open size", "stated in between", "data"])
    def test_what_is_not_declared_decides_nothing(self, tmp_path, case):
        """Sizes that are open, that a file states of a value in between, and data."""
        described, columns, asked = [], 8, asks("x", 0, 2, "c")
        if case == "stated in between":
            columns, described = "k", [value("h", 1, ["n", 9])]
            asked = [node("Neg", ["x"], ["h"]), *asks("h", 1, 9, "c")]
        if case == "data":
            asked = [node("ReduceMax", ["x"], ["m"], keepdims=0), node("Cast", ["m"], ["c"], to=9)]
        nodes = [
            *asked, node("If", ["c"], ["h2"], then_branch=NO, else_branch=YES),
            node("MatMul", ["h2", "w2"], ["y"], "last"),
        ]  # fmt: skip
        path = network(tmp_path / "m.onnx", nodes, columns=columns, described=described)
        assert "If" in kinds(path)
        assert [la.name for la in load_model(str(path)).module.onnx_layers] == ["last"]

"""Edges between layers, from the names of values in a model's file."""

import json

import onnx
import pytest
import torch
from torch import nn

from bitquota.models.discovery import discover
from bitquota.models.load import load_model
from bitquota.service.web.layer_graph import graph_task, layer_edges
from format_networks import write_pt2


def edges(calls, weights="abcd"):
    """Layers by letter: weight ``A`` is that of layer ``a``."""
    known = {letter.upper(): k for k, letter in enumerate(weights)}
    order, found = layer_edges(["x"], known, [(list(r), list(w)) for r, w in calls])
    return "".join(weights[k] for k in order), {weights[a] + weights[b] for a, b in found}


class TestLayerEdges:
    def test_branches_join(self):
        """What is no layer passes on what it reads."""
        calls = [("xA", "p"), ("pB", "q"), ("pC", "r"), ("qr", "s"), ("sD", "t")]
        assert edges(calls) == ("abcd", {"ab", "ac", "bd", "cd"})

    def test_a_connection_past_a_block_is_left_out(self):
        calls = [("xA", "p"), ("pB", "q"), ("pq", "r"), ("rC", "s"), ("rs", "t"), ("tD", "u")]
        assert edges(calls) == ("abcd", {"ab", "bc", "cd"})

    def test_a_layer_that_is_used_twice_is_not_in_front_of_itself(self):
        assert edges([("xA", "p"), ("pB", "q"), ("qA", "r"), ("rC", "s")]) == (
            "abc", {"ab", "ac"},
        )  # fmt: skip

    def test_a_transposed_weight_is_the_weight(self):
        assert edges([("B", "w"), ("xA", "p"), ("pw", "q")]) == ("ab", {"ab"})


class Branches(nn.Module):
    """The second branch stands first among the modules."""

    def __init__(self):
        super().__init__()
        self.second = nn.Linear(4, 4)
        self.first = nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        y = self.first(x)
        return self.last(torch.relu(self.second(y)) + y)


class TestGraphTask:
    def ask(self, tmp_path, inventory, model, file_format):
        (tmp_path / "inventory.json").write_text(json.dumps(inventory.to_json()))
        order = {"model": model, "format": file_format}
        _, found = graph_task(order | {"inventory": str(tmp_path / "inventory.json")}, None)
        return json.loads(found)

    @pytest.fixture
    def saved(self, tmp_path):
        x = torch.randn(2, 4)
        path = write_pt2(Branches().eval(), (x,), tmp_path / "model.pt2")
        return path, discover(load_model(str(path)).module, (x,))

    def test_pt2(self, tmp_path, saved):
        path, inventory = saved
        found = self.ask(tmp_path, inventory, str(path), "pt2")
        assert found == {"order": ["first", "second", "last"], "edges": [[0, 1], [1, 2]]}

    def test_onnx(self, tmp_path, saved):
        """Initializers have the names of the weights."""
        _, inventory = saved
        make = onnx.helper.make_node
        nodes = [
            make("Gemm", ["x", "first.weight"], ["y"], transB=1),
            make("Gemm", ["y", "second.weight"], ["z"], transB=1),
            make("Gemm", ["y", "last.weight"], ["u"], transB=1),
            make("Concat", ["z", "u"], ["out"], axis=1),
        ]
        value = onnx.helper.make_tensor_value_info
        stored = [
            onnx.helper.make_tensor(la.weight_name, 1, la.weight_shape, [0.0] * la.n_weights)
            for la in inventory.layers
        ]
        graph = onnx.helper.make_graph(
            nodes, "g", [value("x", 1, ["N", 4])], [value("out", 1, None)], stored
        )
        path = tmp_path / "model.onnx"
        path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
        found = self.ask(tmp_path, inventory, str(path), "onnx")
        assert found == {"order": ["first", "second", "last"], "edges": [[0, 1], [0, 2]]}

    @pytest.mark.parametrize("kind", ["gone", "broken", "folder"])
    def test_without_a_graph_the_order_remains(self, tmp_path, saved, kind):
        _, inventory = saved
        (tmp_path / "broken").write_bytes(b"PK nothing")
        path = None if kind == "gone" else str(tmp_path / "broken")
        found = self.ask(
            tmp_path, inventory, path, "huggingface-zip" if kind == "folder" else "pt2"
        )
        assert found == {"order": [la.name for la in inventory.layers], "edges": None}

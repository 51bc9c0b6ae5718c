"""Where scaled channels go in ONNX graphs."""

from __future__ import annotations

import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from bitquota.models.channel_flow import ChannelPair, Reader
from bitquota.models.discovery import discover
from bitquota.models.load import load_model
from bitquota.models.onnx.channel_flow import onnx_channel_pairs
from onnx_graphs import image_graph, numbers, residual_graph, save
from sensitivity_networks import Residual

IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def read(path, x):
    module = load_model(str(path)).module
    return module, discover(module, (x,)), (x,)


def dense(path, middle, *, outputs=("y",), tensors=()):
    """Save ``x @ a``, some nodes from ``h`` to ``r``, and ``r @ b``."""
    nodes = [
        helper.make_node("MatMul", ["x", "a.weight"], ["h"]),
        *(helper.make_node(*node) for node in middle),
        helper.make_node("MatMul", ["r", "b.weight"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "dense",
        [value("x", TensorProto.FLOAT, ["n", 16])],
        [value(name, TensorProto.FLOAT, ["n", 16]) for name in outputs],
        [
            numpy_helper.from_array(numbers(16, 16, seed=k), f"{name}.weight")
            for k, name in enumerate("ab")
        ] + [numpy_helper.from_array(array, name) for name, array in tensors],
    )  # fmt: skip
    return save(graph, path, 21)


class TestOnnxChannelPairs:
    def test_through_activations_pooling_and_flattening(self, tmp_path):
        found = onnx_channel_pairs(*read(image_graph(tmp_path / "m.onnx"), IMAGES))
        assert [(p.layer, p.channels, p.readers) for p in found] == [
            ("stem", 8, (Reader(layer="stage/depthwise"),)),
            ("stage/depthwise", 8, (Reader(layer="classify"),)),
        ]
        assert [p.bias for p in found] == ["stem.bias", None]

    def test_batch_norms_scale_but_sums_do_not(self, tmp_path):
        path = residual_graph(tmp_path / "m.onnx", Residual())
        assert onnx_channel_pairs(*read(path, IMAGES)) == [
            ChannelPair(
                weight="norm.weight", bias="norm.bias", channels=6,
                readers=(Reader(layer="inner"), Reader(layer="side")),
            )
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("middle", "places"),
        [
            ([("Relu", ["h"], ["r"])], ["a.weight"]),
            ([("Tanh", ["h"], ["r"])], []),
            ([("Add", ["h", "x"], ["r"])], []),
            ([("Add", ["h", "v"], ["r"])], ["a.weight"]),
            ([("Add", ["h", "v"], ["s"]), ("Mul", ["s", "v"], ["r"])], []),
            ([("Mul", ["h", "v"], ["r"])], ["a.weight", "v"]),
            ([("Mul", ["v", "h"], ["s"]), ("Mul", ["s", "v"], ["r"])], ["a.weight"]),
        ],
        ids=["relu", "bends", "sum", "bias", "shared bias", "scale", "shared scale"],
    )
    def test_what_is_between(self, middle, places, tmp_path):
        path = dense(tmp_path / "m.onnx", middle, tensors=[("v", numbers(16, seed=7) + 2)])
        found = onnx_channel_pairs(*read(path, torch.randn(4, 16)))
        assert [p.weight for p in found] == places

    def test_not_where_the_file_returns_it(self, tmp_path):
        path = dense(tmp_path / "m.onnx", [("Relu", ["h"], ["r"])], outputs=("y", "r"))
        assert len(onnx.load(path).graph.output) == 2
        assert onnx_channel_pairs(*read(path, torch.randn(4, 16))) == []

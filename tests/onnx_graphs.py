"""ONNX files that torch never saw, written node by node."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from pathlib import Path


def image_graph(path: Path, *, batch: int | str = "n", opset: int = 21, seed: int = 0) -> Path:
    """Conv, depthwise Conv, pooling, Gemm without transB: 8x8 images to 10 logits."""
    rng = np.random.default_rng(seed)

    def constant(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.normal(size=shape).astype(np.float32) * 0.3, name)

    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["h0"], "stem", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["h0"], ["r0"]),
        helper.make_node("Conv", ["r0", "w1"], ["h1"], "stage/depthwise", group=8),
        helper.make_node("Relu", ["h1"], ["r1"]),
        helper.make_node("GlobalAveragePool", ["r1"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w2", "b2"], ["logits"], "classify"),
    ]
    graph = helper.make_graph(
        nodes,
        "images",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 10])],
        [
            constant("w0", 8, 3, 3, 3), constant("b0", 8), constant("w1", 8, 1, 3, 3),
            constant("w2", 8, 10), constant("b2", 10),
        ],
    )  # fmt: skip
    return save(graph, path, opset)


def token_graph(path: Path, *, opset: int = 21, seed: int = 1) -> Path:
    """Gather, MatMul, and a head tied to the embedding by a Transpose: tokens to logits."""
    rng = np.random.default_rng(seed)
    embedding = rng.normal(size=(32, 64)).astype(np.float32)
    mix = rng.normal(size=(64, 64)).astype(np.float32) / 8
    nodes = [
        helper.make_node("Gather", ["embed.weight", "ids"], ["e"], "lookup"),
        helper.make_node("MatMul", ["e", "mix"], ["m"], "mixer"),
        helper.make_node("Tanh", ["m"], ["t"]),
        helper.make_node("Transpose", ["embed.weight"], ["head"], perm=[1, 0]),
        helper.make_node("MatMul", ["t", "head"], ["out"], "unembed"),
    ]
    graph = helper.make_graph(
        nodes,
        "tokens",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "t"])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", "t", 32])],
        [numpy_helper.from_array(embedding, "embed.weight"), numpy_helper.from_array(mix, "mix")],
    )
    return save(graph, path, opset)


def save(graph: onnx.GraphProto, path: Path, opset: int) -> Path:
    """Write a model of ``graph``."""
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 10
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path

"""ONNX files that torch never saw, written node by node."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from pathlib import Path


def numbers(*shape: int, seed: int = 0, kind: object = np.float32) -> np.ndarray:
    """Return normal numbers of any type."""
    return (np.random.default_rng(seed).normal(size=shape) * 0.3).astype(kind)


def run(path, x) -> np.ndarray:
    """Run a file as it is."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def image_graph(
    path: Path, *, batch: int | str = "n", opset: int = 21, seed: int = 0, channels: int = 8
) -> Path:
    """Conv, depthwise Conv, pooling, Gemm without transB: 8x8 images to 10 logits."""
    rng = np.random.default_rng(seed)

    def constant(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.normal(size=shape).astype(np.float32) * 0.3, name)

    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["h0"], "stem", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["h0"], ["r0"]),
        helper.make_node("Conv", ["r0", "w1"], ["h1"], "stage/depthwise", group=channels),
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
            constant("w0", channels, 3, 3, 3), constant("b0", channels),
            constant("w1", channels, 1, 3, 3), constant("w2", channels, 10), constant("b2", 10),
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


def residual_graph(path: Path, module, *, batch: int | str = "n", opset: int = 21) -> Path:
    """The network ``sensitivity_networks.Residual`` with its weights, batch norms kept."""
    state = {k: v.detach().numpy() for k, v in module.state_dict().items() if v.ndim}

    def norm(name: str, given: str, made: str) -> onnx.NodeProto:
        parts = ("weight", "bias", "running_mean", "running_var")
        return helper.make_node(
            "BatchNormalization", [given, *(f"{name}.{p}" for p in parts)], [made], name
        )

    nodes = [
        helper.make_node("Conv", ["x", "stem.weight"], ["s"], "stem", pads=[1, 1, 1, 1]),
        norm("norm", "s", "n"),
        helper.make_node("Relu", ["n"], ["a"]),
        helper.make_node(
            "Conv", ["a", "inner.weight", "inner.bias"], ["i"], "inner", pads=[1, 1, 1, 1]
        ),
        norm("inner_norm", "i", "m"),
        helper.make_node("Relu", ["m"], ["y"]),
        helper.make_node("Conv", ["a", "side.weight", "side.bias"], ["d"], "side"),
        helper.make_node("Add", ["y", "d"], ["sum"]),
        helper.make_node("GlobalAveragePool", ["sum"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "head.weight", "head.bias"], ["out"], "head", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "residual",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [batch, 5])],
        [numpy_helper.from_array(v, k) for k, v in state.items()],
    )
    return save(graph, path, opset)


def odd_graph(path: Path, *, seed: int = 2) -> Path:
    """Operators that nothing here interprets: LSTM, If with outer values, NonZero-free TopK."""
    rng = np.random.default_rng(seed)

    def constant(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.normal(size=shape).astype(np.float32) * 0.3, name)

    value = helper.make_tensor_value_info
    one, two = (
        helper.make_graph(
            [helper.make_node(kind, ["h"], [f"{kind}.out"])],
            kind,
            [],
            [value(f"{kind}.out", TensorProto.FLOAT, None)],
        )
        for kind in ("Softsign", "Mish")
    )
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["e"], "first"),
        helper.make_node("Add", ["e", "shift"], ["eb"]),
        helper.make_node("Transpose", ["eb"], ["t"], perm=[1, 0, 2]),
        helper.make_node("LSTM", ["t", "W", "R"], ["", "hn"], "memory", hidden_size=6),
        helper.make_node("Squeeze", ["hn", "zero"], ["h"]),
        helper.make_node("Size", ["h"], ["size"]),
        helper.make_node("Greater", ["size", "limit"], ["many"]),
        helper.make_node("If", ["many"], ["b"], "branch", then_branch=one, else_branch=two),
        helper.make_node("TopK", ["b", "three"], ["top", "where"]),
        helper.make_node("MatMul", ["top", "last"], ["out"], "last"),
    ]
    graph = helper.make_graph(
        nodes,
        "odd",
        [value("x", TensorProto.FLOAT, ["n", 5, 4])],
        [value("out", TensorProto.FLOAT, ["n", 7])],
        [
            constant("first", 4, 8), constant("shift", 8), constant("W", 1, 24, 8),
            constant("R", 1, 24, 6), constant("last", 3, 7),
            numpy_helper.from_array(np.array([0]), "zero"),
            numpy_helper.from_array(np.array(10**6), "limit"),
            numpy_helper.from_array(np.array([3]), "three"),
        ],
    )  # fmt: skip
    return save(graph, path, 22)


def endless_graph(path: Path) -> Path:
    """A Gemm and a Loop of 2**62 rounds: inputs of 4 numbers to 4 numbers, never."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["still"]),
            helper.make_node("Neg", ["v"], ["next"]),
        ],
        "round",
        [
            helper.make_tensor_value_info("k", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
    )
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w"], ["h"], "classify"),
            helper.make_node("Loop", ["rounds", "true", "h"], ["out"], body=body),
        ],
        "endless",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", 4])],
        [
            numpy_helper.from_array(np.eye(4, dtype=np.float32), "w"),
            numpy_helper.from_array(np.array(2**62), "rounds"),
            numpy_helper.from_array(np.array(True), "true"),
        ],
    )
    return save(graph, path, 21)


def save(graph: onnx.GraphProto, path: Path, opset: int) -> Path:
    """Write a model of ``graph``."""
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 10
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path

"""ONNX graphs with layers of every kind and of odd shapes, whose outputs stand side by side.

The output is one row per sample, in which each layer has a segment of its own: a layer that a
runtime computes wrongly shows, however small its part of the whole.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

WIDTH = 160
"""Numbers of each sample; a layer reads as many of them as it takes."""

TYPES = {
    "float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "float64": TensorProto.DOUBLE,
}  # fmt: skip

MATRICES = ((1, 7), (5, 1), (3, 33), (7, 30), (1, 32), (5, 64), (6, 128), (4, 8), (1, 1))
"""Outputs and inputs: one row, one column, odd ones, one block, several, no whole block."""

CONVOLUTIONS = {
    1: (((6, 2, 5), 3, (6, 7)), ((1, 3, 1), 1, (3, 5)), ((3, 1, 4), 3, (3, 6))),
    2: (
        ((5, 3, 3, 3), 1, (3, 4, 5)), ((7, 1, 3, 5), 7, (7, 3, 5)), ((1, 2, 3, 1), 1, (2, 3, 3)),
        ((4, 3, 1, 1), 2, (6, 2, 3)), ((3, 32, 1, 1), 1, (32, 2, 2)),
    ),
    3: (((2, 1, 3, 5, 7), 1, (1, 3, 5, 7)), ((3, 1, 1, 2, 2), 3, (3, 2, 3, 2))),
}  # fmt: skip
"""By rank: shape of the weight, groups, and the shape of what it reads."""

TRANSPOSED = {
    1: (((6, 3, 4), 2, (6, 5)), ((1, 1, 3), 1, (1, 4))),
    2: (((4, 3, 3, 2), 1, (4, 2, 3)), ((3, 1, 2, 2), 3, (3, 3, 2)), ((2, 1, 1, 3), 1, (2, 3, 3))),
    3: (((2, 1, 3, 5, 7), 1, (2, 1, 2, 1)), ((4, 2, 1, 2, 1), 4, (4, 1, 2, 2))),
}

TABLES = ((7, 5), (1, 3), (9, 32), (3, 1), (6, 64))
"""Rows and columns of embeddings."""


class _Builder:
    def __init__(self, kind: int) -> None:
        self.kind = kind
        self.dtype = helper.tensor_dtype_to_np_dtype(kind)
        self.rng = np.random.default_rng(7)
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []
        self.parts: list[str] = []

    def node(self, operator: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def numbers(self, name: str, *values: int) -> str:
        if name not in {t.name for t in self.tensors}:
            self.tensors.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def weight(self, name: str, *shape: int) -> str:
        values = (self.rng.standard_normal(shape) * 0.5).astype(self.dtype)
        self.tensors.append(numpy_helper.from_array(values, name))
        return name

    def given(self, name: str, shape: Sequence[int]) -> str:
        """The first numbers of each sample in a shape."""
        n = math.prod(shape)
        cut = self.node("Slice", ["x", "zero", self.numbers(f"n{n}", n), "one"], f"{name}.cut")
        return self.node("Reshape", [cut, self.numbers(f"{name}.in", -1, *shape)], f"{name}.x")

    def indices(self, name: str, n: int, below: int) -> str:
        """Row numbers made of the first numbers of each sample."""
        cut = self.given(name, (n,))
        whole = self.node("Cast", [cut], f"{name}.whole", to=TensorProto.INT64)
        return self.node("Mod", [whole, self.numbers(f"below{below}", below)], f"{name}.ids")

    def done(self, value: str) -> None:
        """Make a segment of ``value``."""
        self.parts.append(self.node("Flatten", [value], f"{value}.part"))


def _products(b: _Builder, c: int) -> None:
    for k, (rows, columns) in enumerate(MATRICES):
        name = f"gemm{k}.{c}"
        weight, bias = b.weight(f"{name}.weight", rows, columns), b.weight(f"{name}.bias", rows)
        b.done(b.node("Gemm", [b.given(name, (columns,)), weight, bias], name, transB=1))
        name = f"matmul{k}.{c}"
        weight = b.weight(f"{name}.weight", columns, rows)
        b.done(b.node("MatMul", [b.given(name, (columns,)), weight], name))


def _convolutions(b: _Builder, c: int) -> None:
    for operator, cases in (("Conv", CONVOLUTIONS), ("ConvTranspose", TRANSPOSED)):
        for rank, shapes in cases.items():
            for k, (shape, groups, given) in enumerate(shapes):
                name = f"{operator.lower()}{rank}d{k}.{c}"
                weight = b.weight(f"{name}.weight", *shape)
                b.done(b.node(operator, [b.given(name, given), weight], name, group=groups))


def _tables(b: _Builder, c: int) -> None:
    for k, (rows, columns) in enumerate(TABLES):
        name = f"table{k}.{c}"
        weight = b.weight(f"{name}.weight", rows, columns)
        b.done(b.node("Gather", [weight, b.indices(name, 3, rows)], name))
    for k, (rows, columns) in enumerate(((5, 7), (6, 32))):
        name = f"tied{k}.{c}"
        weight = b.weight(f"{name}.weight", rows, columns)
        found = b.node("Gather", [weight, b.indices(name, 2, rows)], f"{name}.found")
        turned = b.node("Transpose", [weight], f"{name}.turned", perm=[1, 0])
        b.done(b.node("MatMul", [found, turned], name))


def _recurrent(b: _Builder, c: int) -> None:
    cases = (("LSTM", 4, 5, 3, 1), ("GRU", 3, 1, 2, 2), ("RNN", 1, 3, 1, 1), ("LSTM", 4, 1, 1, 2))
    for k, (operator, gates, inputs, hidden, ways) in enumerate(cases):
        name = f"{operator.lower()}{k}.{c}"
        steps = b.node("Transpose", [b.given(name, (2, inputs))], f"{name}.steps", perm=[1, 0, 2])
        w = b.weight(f"{name}.W", ways, gates * hidden, inputs)
        r = b.weight(f"{name}.R", ways, gates * hidden, hidden)
        settings = {"hidden_size": hidden, "direction": "bidirectional" if ways > 1 else "forward"}
        outputs = ["", f"{name}.h"]
        b.nodes.append(helper.make_node(operator, [steps, w, r], outputs, name, **settings))
        b.done(b.node("Transpose", [f"{name}.h"], f"{name}.last", perm=[1, 0, 2]))


def _contractions(b: _Builder, c: int) -> None:
    cases = (("bi,oi->bo", (3, 5), (5,)), ("bhi,hio->bho", (2, 3, 5), (2, 3)),
             ("bij,kij->bk", (1, 3, 5), (3, 5)), ("bi,io->bo", (7, 1), (7,)))  # fmt: skip
    for k, (equation, shape, given) in enumerate(cases):
        name = f"einsum{k}.{c}"
        inputs = [b.given(name, given), b.weight(f"{name}.weight", *shape)]
        b.done(b.node("Einsum", inputs, name, equation=equation))
    for k, (shape, given) in enumerate((((2, 3, 5), (2, 1, 3)), ((3, 7, 1), (3, 2, 7)))):
        name = f"batched{k}.{c}"
        inputs = [b.given(name, given), b.weight(f"{name}.weight", *shape)]
        b.done(b.node("MatMul", inputs, name))


FAMILIES = {
    "products": _products, "convolutions": _convolutions, "tables": _tables,
    "recurrent": _recurrent, "contractions": _contractions,
}  # fmt: skip


def menu_graph(
    path: Path, *, copies: int, dtype: str = "float32", families: Sequence[str] | None = None
) -> dict[str, int]:
    """Write a graph that holds every layer ``copies`` times.

    Returns:
        The length of each layer's segment of the output, in order.
    """
    b = _Builder(TYPES[dtype])
    b.numbers("zero", 0), b.numbers("one", 1)
    for family in families or FAMILIES:
        for c in range(copies):
            FAMILIES[family](b, c)
    b.nodes.append(helper.make_node("Concat", b.parts, ["y"], "y", axis=1))
    graph = helper.make_graph(
        b.nodes,
        "menu",
        [helper.make_tensor_value_info("x", b.kind, ["n", WIDTH])],
        [helper.make_tensor_value_info("y", b.kind, ["n", None])],
        b.tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    shapes = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    dims = {v.name: v.type.tensor_type.shape.dim for v in shapes.graph.value_info}
    return {part.removesuffix(".part"): dims[part][1].dim_value for part in b.parts}

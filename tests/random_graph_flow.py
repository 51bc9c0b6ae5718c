"""Blocks with bodies, functions, shared and fused weights, and how random ONNX graphs end."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from random_graph_blocks import (
    attention,
    conv,
    conv_transpose,
    einsum,
    flatten,
    gemm,
    heads,
    matmul,
    matmul_left,
    matmul_vector,
    new_input,
    norm,
    pointwise,
    pool,
    recurrent,
    residual,
    second_input,
    to_sequence,
    upsample,
)
from random_graphs import TYPES, Builder, RandomGraph, Value

DOMAIN = "local"
CONTRIB = "com.microsoft"


def condition(b: Builder, x: Value) -> Value | None:
    """An If whose bodies hold weights of their own, or read those outside."""
    inside = []
    c, outer = x.shape[-1], b.weight(x.shape[-1], x.shape[-1])
    for k, kind in enumerate(("Tanh", "Relu")):
        names = [b.free(f"branch{k}.{n}") for n in range(3)]
        held = [numpy_helper.from_array(b.numbers(c, c, scale=0.3), names[2])]
        own = b.chance(0.5)
        nodes = [
            helper.make_node("MatMul", [x.name, names[2] if own else outer], [names[0]]),
            helper.make_node(kind, [names[0]], [names[1]]),
        ]
        made = [helper.make_tensor_value_info(names[1], TYPES[b.dtype], None)]
        inside.append(helper.make_graph(nodes, kind, [], made, held if own else []))
    size = b.node("Size", [x.name])
    many = b.node("Greater", [size, b.constant(np.array(int(b.pick((0, 10**6)))))])
    y = b.node("If", [many], then_branch=inside[0], else_branch=inside[1])
    return Value(y, x.shape)


def loop(b: Builder, x: Value) -> Value | None:
    """A product with one weight, twice."""
    weight = b.weight(x.shape[-1], x.shape[-1])
    names = [b.free(f"round.{n}") for n in range(6)]
    k, go, v, still, product, after = names
    nodes = [
        helper.make_node("Identity", [go], [still]),
        helper.make_node("MatMul", [v, weight], [product]),
        helper.make_node("Tanh", [product], [after]),
    ]
    body = helper.make_graph(
        nodes, "round",
        [helper.make_tensor_value_info(k, TensorProto.INT64, []),
         helper.make_tensor_value_info(go, TensorProto.BOOL, []),
         helper.make_tensor_value_info(v, TYPES[b.dtype], None)],
        [helper.make_tensor_value_info(still, TensorProto.BOOL, []),
         helper.make_tensor_value_info(after, TYPES[b.dtype], None)],
    )  # fmt: skip
    rounds = b.constant(np.array(2, np.int64), "rounds")
    y = b.node("Loop", [rounds, b.constant(np.array(True)), x.name], body=body)
    return Value(y, x.shape)


def function(b: Builder, x: Value) -> Value | None:
    """A local function, with its weight inside or handed in, called once or twice."""
    if b.opset < 13:
        return None
    c, name = x.shape[-1], f"Layer{len(b.functions)}"
    own = b.chance(0.5)
    nodes = []
    if own:
        value = numpy_helper.from_array(b.numbers(c, c, scale=0.3), "w")
        nodes.append(helper.make_node("Constant", [], ["w"], value=value))
    nodes += [helper.make_node("MatMul", ["x", "w"], ["h"], "product"),
              helper.make_node("Tanh", ["h"], ["y"])]  # fmt: skip
    imports = [helper.make_opsetid("", b.opset)]
    given = ["x"] if own else ["x", "w"]
    b.functions.append(helper.make_function(DOMAIN, name, given, ["y"], nodes, imports))
    y = x.name
    for _ in range(int(b.pick((1, 2)))):
        y = b.node(name, [y, *([] if own else [b.weight(c, c)])], domain=DOMAIN)
    return Value(y, x.shape)


def scan(b: Builder, x: Value) -> Value | None:
    """A running state, one product for each step."""
    if len(x.shape) != 2:
        return None
    c, (state, step, product, total, after, out) = (
        x.shape[1],
        [b.free(f"scan.{k}") for k in range(6)],
    )
    weight = b.weight(c, c)
    nodes = [
        helper.make_node("MatMul", [step, weight], [product]),
        helper.make_node("Add", [state, product], [total]),
        helper.make_node("Tanh", [total], [after]),
        helper.make_node("Identity", [after], [out]),
    ]
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        nodes, "step",
        [value(state, TYPES[b.dtype], None), value(step, TYPES[b.dtype], None)],
        [value(after, TYPES[b.dtype], None), value(out, TYPES[b.dtype], None)],
    )  # fmt: skip
    turned = b.node("Transpose", [x.name], perm=[1, 0, 2])
    first = b.axes("Squeeze", b.node("Slice", [turned, *map(b.integers, (0, 1, 0))]), [0])
    start = b.node("Mul", [first, b.constant(np.array(0, b.dtype))])
    final, y = b.free("final"), b.free("steps")
    b.nodes.append(
        helper.make_node("Scan", [start, turned], [final, y], body=body, num_scan_inputs=1)
    )
    return Value(b.node("Transpose", [y], perm=[1, 0, 2]), x.shape)


def split_weight(b: Builder, x: Value) -> Value | None:
    """One weight cut in parts that are multiplied one by one, as of fused projections."""
    n, m = x.shape[-1], int(b.pick((2, 5)))
    parts = [b.free(f"part{k}") for k in range(3)]
    whole = b.weight(n, 3 * m, wanted="qkv.weight")
    sizes = [b.integers(m, m, m)] if b.opset >= 13 else []
    flags = {} if b.opset >= 13 else {"split": [m, m, m]}
    b.nodes.append(helper.make_node("Split", [whole, *sizes], parts, axis=1, **flags))
    y = [b.node("MatMul", [x.name, part]) for part in parts]
    return Value(b.node("Add", [b.node("Mul", y[:2]), y[2]]), (*x.shape[:-1], m))


def joined_weight(b: Builder, x: Value) -> Value | None:
    """A weight put together of two."""
    n, m = x.shape[-1], int(b.pick((2, 8)))
    both = b.node("Concat", [b.weight(n, m), b.weight(n, m)], axis=1)
    return Value(b.node("MatMul", [x.name, both]), (*x.shape[:-1], 2 * m))


def low_rank(b: Builder, x: Value) -> Value | None:
    """A weight with an update of low rank that was not merged."""
    n, m = x.shape[-1], int(b.pick((3, 8)))
    update = b.node("MatMul", [b.weight(n, 2, wanted="lora_A.weight"), b.weight(2, m)])
    return Value(b.node("MatMul", [x.name, b.node("Add", [b.weight(n, m), update])]),
                 (*x.shape[:-1], m))  # fmt: skip


def one_weight(b: Builder, x: Value) -> Value | None:
    """One tensor as weight of two operators of other kinds, or twice of one node."""
    n = x.shape[-1]
    weight = b.weight(n, n, wanted="tied.weight")
    y = b.node("MatMul", [x.name, weight])
    if len(x.shape) == 1:
        y = b.node("Gemm", [b.node("Tanh", [y]), weight], transB=int(b.chance(0.5)))
    else:
        y = b.node("MatMul", [b.node("Tanh", [y]), b.node("Transpose", [weight], perm=[1, 0])])
    return Value(y, x.shape)


def fused(b: Builder, x: Value) -> Value | None:
    """Operators that ONNX Runtime's own optimiser writes."""
    if b.dtype is not np.float32:
        return None
    n, m = x.shape[-1], int(b.pick((4, 8)))
    if len(x.shape) == 3 and b.chance(0.5):
        given = [x.name, b.weight(m, x.shape[0], 1, 1, wanted="conv.weight")]
        return Value(
            b.node("FusedConv", given, domain=CONTRIB, activation="Relu"), (m, *x.shape[1:])
        )
    if len(x.shape) == 1 and b.chance(0.5):
        given = [x.name, b.weight(n, m), b.vector(m)]
        return Value(b.node("FusedGemm", given, domain=CONTRIB, activation="Relu"), (m,))
    turned = int(b.chance(0.5))
    weight = b.weight(*((m, n) if turned else (n, m)))
    y = b.node("FusedMatMul", [x.name, weight], domain=CONTRIB, transB=turned, alpha=0.5)
    return Value(y, (*x.shape[:-1], m))


def unused(b: Builder, x: Value) -> Value | None:
    """An input or a tensor that nothing reads, or a value that is made for nothing."""
    how = int(b.rng.integers(4))
    if how == 0 and len(b.samples) < 3:
        array = b.rng.integers(0, 2, (b.n_samples, 2)).astype(b.pick((np.int32, np.int64)))
        kind = TensorProto.INT32 if array.dtype == np.int32 else TensorProto.INT64
        new_input(b, "unused", array, kind)
    elif how == 1:
        b.constant(b.numbers(7, 9), "unused.weight")
    elif how == 2:
        b.constant(np.zeros((0, 4), np.float32), "empty")
    else:
        b.node("Tanh", [b.node("MatMul", [x.name, b.weight(x.shape[-1], 3)])])
    return x


def flags(b: Builder, x: Value) -> Value | None:
    """A second input of another type: booleans, bytes, or float64."""
    if len(b.samples) > 2:
        return None
    kind, number = b.pick(
        ((np.bool_, TensorProto.BOOL), (np.uint8, TensorProto.UINT8), (np.float64, 11))
    )
    array = (b.rng.random((b.n_samples, *[1] * len(x.shape))) > 0.5).astype(kind)
    wide = b.node("Cast", [new_input(b, b.pick(("mask", "y", "labels")), array, number)],
                  to=TYPES[b.dtype])  # fmt: skip
    return Value(b.node("Mul", [x.name, wide]), x.shape)


def quantized(b: Builder, x: Value) -> Value | None:
    """A pair that quantizes and dequantizes: the file is quantized already, which is refused."""
    if b.dtype is not np.float32 or b.chance(0.85):
        return None
    scale, zero = b.constant(np.float32(0.05)), b.constant(np.array(0, np.int8))
    codes = b.node("QuantizeLinear", [x.name, scale, zero])
    return Value(b.node("DequantizeLinear", [codes, scale, zero]), x.shape)


BLOCKS = (
    gemm, gemm, matmul, matmul, matmul, matmul_left, matmul_vector, heads, einsum, einsum, conv,
    conv, conv, conv_transpose, recurrent, recurrent, attention, pointwise, pointwise, pointwise,
    norm, norm, pool, flatten, to_sequence, upsample, residual, second_input, condition, loop, scan,
    function, quantized, split_weight, joined_weight, low_rank, one_weight, fused, unused, flags,
)  # fmt: skip
SAFE_IN_DOUBLE = frozenset(
    {gemm, matmul, matmul_left, heads, einsum, flatten, residual, second_input, function,
     to_sequence, split_weight, joined_weight, low_rank}
)  # fmt: skip
"""Blocks of operators that ONNX Runtime's CPU provider has in float64."""
SAFE_IN_OLD = frozenset({gemm, matmul, conv, conv_transpose, recurrent, norm, flatten, residual})
"""Blocks of operators that were the same at opset 9."""


def finish_graph(b: Builder, ends: list[Value]) -> RandomGraph:
    """Return the graph that ends in ``ends``."""
    if not b.shared:  # nothing to quantize is refused: seen often enough
        ends[0] = matmul(b, ends[0]) or ends[0]
    outputs = []
    for k, end in enumerate(ends):
        y, shape = end.name, list(end.shape)
        kind = b.pick(("plain", "plain", "plain", "softmax", "sigmoid", "argmax", "identity"))
        if kind == "softmax":
            axis = 1 if b.opset < 13 else int(b.pick((-1, 1)))
            y = b.node("Softmax", [y], axis=axis)
        elif kind == "sigmoid" and b.dtype is not np.float64:
            y = b.node("Sigmoid", [y])
        elif kind == "argmax" and k and shape[-1] > 1:
            y = b.node("ArgMax", [y], axis=-1, keepdims=0)
            shape.pop()
        if kind in ("identity", "plain") or y in {v.name for v in outputs}:
            y = b.node("Identity", [y])
        integer = b.nodes[-1].op_type == "ArgMax"
        described: Any = b.pick(([None, *shape], ["batch", *shape], ["n", *["?"] * len(shape)]))
        elem = TensorProto.INT64 if integer else TYPES[b.dtype]
        outputs.append(helper.make_tensor_value_info(y, elem, described))
    b.rng.shuffle(outputs)  # type: ignore[arg-type]

    # The batch: any size, a fixed one, or -1 as some exporters write it.
    batch: Any = b.pick(("batch", "batch", "", 1, 4, 5, -1))
    b.features.append(f"batch {batch}")
    for value in b.given:
        if value.name in b.samples:
            dim = value.type.tensor_type.shape.dim[0]
            dim.Clear()
            if isinstance(batch, int):
                dim.dim_value = batch
            elif batch:
                dim.dim_param = batch
    for value in outputs:
        shape = value.type.tensor_type.shape
        if isinstance(batch, int) and shape.dim:
            shape.dim[0].Clear()
            shape.dim[0].dim_value = batch
    graph = helper.make_graph(
        b.nodes, "random", b.given, outputs, b.initializers, sparse_initializer=b.sparse
    )
    imports = [helper.make_opsetid("", b.opset)]
    if any(node.domain == CONTRIB for node in b.nodes):
        imports.append(helper.make_opsetid(CONTRIB, 1))
    if b.functions:
        imports.append(helper.make_opsetid(DOMAIN, 1))
    model = helper.make_model(graph, opset_imports=imports, functions=b.functions)
    model.ir_version = 10 if b.functions or b.opset > 18 else int(b.pick((7, 8, 10)))
    return RandomGraph(model=model, inputs=b.samples, features=b.features)

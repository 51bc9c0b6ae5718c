"""The blocks that random ONNX graphs are made of; each takes a value and returns one, or ``None``.

A block refuses (``None``) a value of a shape that it has no use for, before it adds anything.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, helper

from random_graphs import TYPES, Builder, Value


def new_input(b: Builder, wanted: str, array: np.ndarray, kind: int) -> str:
    name = b.free(wanted)
    b.samples[name] = array
    b.given.append(helper.make_tensor_value_info(name, kind, [None, *array.shape[1:]]))
    return name


def _floats(b: Builder, *shape: int) -> Value:
    array = b.numbers(b.n_samples, *shape)
    return Value(new_input(b, "x", array, TYPES[b.dtype]), shape)


def vectors(b: Builder) -> Value:
    return _floats(b, int(b.pick((1, 3, 8, 13, 32))))


def sequences(b: Builder) -> Value:
    return _floats(b, int(b.pick((1, 5, 7))), int(b.pick((1, 4, 6, 12))))


def images(b: Builder) -> Value:
    return _floats(b, int(b.pick((1, 3, 4))), int(b.pick((1, 6, 9))), int(b.pick((2, 8))))


def signals(b: Builder) -> Value:
    return _floats(b, int(b.pick((1, 2, 6))), int(b.pick((5, 16))))


def volumes(b: Builder) -> Value:
    return _floats(b, int(b.pick((1, 2))), 4, int(b.pick((3, 5))), 4)


def tokens(b: Builder) -> Value:
    steps, words, width = int(b.pick((1, 6))), int(b.pick((2, 17, 32))), int(b.pick((4, 7)))
    kind = b.pick((np.int64, np.int32))
    ids = b.rng.integers(0, words, (b.n_samples, steps)).astype(kind)
    number = TensorProto.INT64 if kind is np.int64 else TensorProto.INT32
    mask = None
    if b.chance(0.3):  # a mask that is declared first
        given = (b.rng.random((b.n_samples, steps)) > 0.2).astype(np.int64)
        mask = new_input(b, "attention_mask", given, TensorProto.INT64)
    name = new_input(b, "input_ids", ids, number)
    table = b.weight(words, width, wanted="embed.weight")
    if b.chance(0.15):  # stored [width, words]
        x = b.node("Gather", [b.weight(width, words, wanted="embed.weight"), name], axis=1)
        x = b.node("Transpose", [x], perm=[1, 2, 0])
    else:
        x = b.node("Gather", [table, name], **b.pick(({}, {"axis": 0})))
    if b.chance(0.3):  # positions
        x = b.node("Add", [x, b.constant(b.numbers(1, steps, width), "position.weight")])
    if mask is not None:
        wide = b.axes("Unsqueeze", b.node("Cast", [mask], to=TYPES[b.dtype]), [2])
        x = b.node("Mul", [x, wide])
    if b.chance(0.3):  # a head that is tied to the embedding
        hidden = b.node("MatMul", [x, b.weight(width, width)])
        head = b.node("Transpose", [table], perm=[1, 0])
        return Value(b.node("MatMul", [b.node("Tanh", [hidden]), head]), (steps, words))
    return Value(x, (steps, width))


INPUTS = (vectors, vectors, sequences, sequences, images, images, signals, volumes, tokens, tokens)


def _width(b: Builder) -> int:
    return int(b.pick((1, 2, 3, 5, 8, 16, 31, 32, 64)))


def gemm(b: Builder, x: Value) -> Value | None:
    if len(x.shape) != 1:
        return None
    n, m = x.shape[0], _width(b)
    attributes: dict[str, Any] = {}
    if turned := b.chance(0.5):
        attributes["transB"] = 1
    if b.chance(0.2):
        attributes |= {"alpha": 0.5, "beta": float(b.pick((0.0, 2.0)))}
    if b.opset > 10 and b.chance(0.15):  # the weight on the left: (W x')' of it
        left = b.weight(*((n, m) if turned else (m, n)), wanted="fc.weight")
        flags = {"transB": 1} | ({"transA": 1} if turned else {})
        return Value(b.node("Transpose", [b.node("Gemm", [left, x.name], **flags)]), (m,))
    given = [x.name, b.weight(*((m, n) if turned else (n, m)), wanted="fc.weight")]
    if b.opset < 11 or b.chance(0.6):
        wide = b.constant(b.numbers(1, m), "c")
        given.append(b.pick((b.vector(m, "fc.bias"), wide, "" if b.opset > 10 else wide)))
    if given[-1] == "":
        given.pop()
    return Value(b.node("Gemm", given, **attributes), (m,))


def matmul(b: Builder, x: Value) -> Value | None:
    n, m = x.shape[-1], _width(b)
    y = b.node("MatMul", [x.name, b.weight(n, m)])
    if b.chance(0.5):
        pair = [y, b.vector(m)]
        y = b.node("Add", pair if b.chance(0.5) else pair[::-1])
    return Value(y, (*x.shape[:-1], m))


def matmul_left(b: Builder, x: Value) -> Value | None:
    """The weight on the left: W x, over the next to last axis."""
    if len(x.shape) < 2:
        return None
    m = _width(b)
    return Value(
        b.node("MatMul", [b.weight(m, x.shape[-2]), x.name]), (*x.shape[:-2], m, x.shape[-1])
    )


def matmul_vector(b: Builder, x: Value) -> Value | None:
    """A weight of one dimension."""
    if len(x.shape) < 2 or x.shape[-2] * x.shape[-1] < 2:
        return None
    return Value(b.node("MatMul", [x.name, b.vector(x.shape[-1], "v.weight")]), x.shape[:-1])


def heads(b: Builder, x: Value) -> Value | None:
    """One matrix for each head: a batched product."""
    if len(x.shape) != 2:
        return None
    (t, c), h, e = x.shape, int(b.pick((1, 2, 3))), int(b.pick((2, 5)))
    wide = b.axes("Unsqueeze", x.name, [1])
    shape = b.pick(((h, c, e), (1, h, c, e)))
    y = b.node("MatMul", [wide, b.weight(*shape, wanted="heads.weight")])
    y = b.node("Transpose", [y], perm=[0, 2, 1, 3])
    return Value(b.node("Reshape", [y, b.integers(0, 0, -1)]), (t, h * e))


def einsum(b: Builder, x: Value) -> Value | None:
    if b.opset < 12 or b.dtype is np.float16:
        return None
    m, h = _width(b), int(b.pick((1, 3)))
    if len(x.shape) == 1:
        equation = b.pick(("nc,cd->nd", "nc,dc->nd", "nc, cd -> nd", "cd,nc->nd"))
        side = [x.name, b.weight(*((m, x.shape[0]) if "dc" in equation else (x.shape[0], m)))]
        shape = (m,)
    elif len(x.shape) == 2:
        t, c = x.shape
        equation, sizes, shape = b.pick(
            (
                ("ntc,cd->ntd", (c, m), (t, m)),
                ("ntc,hdc->nthd", (h, m, c), (t, h, m)),
                ("ntc,tcd->ntd", (t, c, m), (t, m)),
                ("ntc,td->ndc", (t, m), (m, c)),
                ("ntc,tc->nt", (t, c), (t,)),
                ("...c,cd->...d", (c, m), (t, m)),
            )
        )
        side = [x.name, b.weight(*sizes, wanted="einsum.weight")]
    else:
        return None
    if equation.startswith("cd,nc"):
        side = side[::-1]
    return Value(b.node("Einsum", side, equation=equation), shape)


def conv(b: Builder, x: Value) -> Value | None:
    if not 2 <= len(x.shape) <= 4:
        return None
    c, *space = x.shape
    groups = b.pick([g for g in (1, 1, c, 2) if c % g == 0])
    m = groups * int(b.pick((1, 2, 3, 5)))
    kernel = [int(b.pick([k for k in (1, 3, 5, 7) if k <= s + 2])) for s in space]
    strides = [int(b.pick((1, 1, 2))) for _ in space]
    attributes: dict[str, Any] = {"group": groups, "strides": strides}
    dilations = [int(b.pick((1, 1, 2))) if k == 3 and s >= 5 else 1
                 for k, s in zip(kernel, space, strict=True)]  # fmt: skip
    if max(dilations) > 1:
        attributes["dilations"] = dilations
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    if max(dilations) == 1 and b.chance(0.3):
        attributes["auto_pad"] = "SAME_UPPER"
        sizes = [-(-s // t) for s, t in zip(space, strides, strict=True)]
    else:
        before = [int(b.rng.integers(0, r // 2 + 1)) for r in reach]
        after = [max(int(b.rng.integers(0, r // 2 + 1)), r - s - p)
                 for r, s, p in zip(reach, space, before, strict=True)]  # fmt: skip
        attributes["pads"] = [*before, *after]
        padded = [s + p + q for s, p, q in zip(space, before, after, strict=True)]
        sizes = [(s - r) // t + 1 for s, r, t in zip(padded, reach, strides, strict=True)]
    if b.chance(0.5):
        attributes["kernel_shape"] = kernel
    given = [x.name, b.weight(m, c // groups, *kernel, wanted="conv.weight")]
    if b.chance(0.5):
        given.append(b.vector(m, "conv.bias"))
    y = b.node("Conv", given, **attributes)
    if b.chance(0.3):
        y = _batch_norm(b, y, m)
    return Value(y, (m, *sizes))


def conv_transpose(b: Builder, x: Value) -> Value | None:
    if not 2 <= len(x.shape) <= 4 or max(x.shape[1:]) > 40:
        return None
    c, *space = x.shape
    groups = b.pick([g for g in (1, 1, c) if c % g == 0])
    m = int(b.pick((1, 2, 3)))
    kernel = [int(b.pick((1, 2, 3))) for _ in space]
    strides = [int(b.pick((1, 2))) for _ in space]
    given = [x.name, b.weight(c, m, *kernel, wanted="up.weight")]
    if b.chance(0.5):
        given.append(b.vector(m * groups))
    attributes: dict[str, Any] = {}
    sizes = [(s - 1) * t + k for s, t, k in zip(space, strides, kernel, strict=True)]
    if min(sizes) > 2 and min(kernel) > 1 and b.chance(0.4):
        attributes["pads"] = [1, 0] * len(space)
        ends = np.array(attributes["pads"]).reshape(2, -1).sum(axis=0)
        sizes = [s - int(p) for s, p in zip(sizes, ends, strict=True)]
    if min(strides) > 1 and b.chance(0.5):
        attributes["output_padding"] = [1] * len(space)
        sizes = [s + 1 for s in sizes]
    y = b.node("ConvTranspose", given, group=groups, strides=strides, **attributes)
    return Value(y, (m * groups, *sizes))


def recurrent(b: Builder, x: Value) -> Value | None:
    if len(x.shape) != 2:
        return None
    kind, gates = b.pick((("LSTM", 4), ("GRU", 3), ("RNN", 1)))
    (t, c), hidden = x.shape, int(b.pick((1, 3, 8)))
    ways = b.pick((("forward", 1), ("reverse", 1), ("bidirectional", 2)))
    turned = b.node("Transpose", [x.name], perm=[1, 0, 2])
    attributes: dict[str, Any] = {"hidden_size": hidden, "direction": ways[0]}
    if kind == "GRU" and b.chance(0.5):
        attributes["linear_before_reset"] = 1
    given = [
        turned,
        b.weight(ways[1], gates * hidden, c, wanted="W"),
        b.weight(ways[1], gates * hidden, hidden, wanted="R"),
    ]
    if b.chance(0.5):
        given.append(b.constant(b.numbers(ways[1], 2 * gates * hidden, scale=0.1), "B"))
    if b.chance(0.4):
        # Only the last state.
        name, state = b.free("steps"), b.free("state")
        b.nodes.append(helper.make_node(kind, given, ["" if b.chance(0.5) else name, state],
                                        b.pick(("", "memory")), **attributes))  # fmt: skip
        last = b.node("Transpose", [state], perm=[1, 0, 2])
        return Value(b.node("Reshape", [last, b.integers(0, -1)]), (ways[1] * hidden,))
    y = b.node(kind, given, **attributes)
    y = b.node("Transpose", [y], perm=[2, 0, 1, 3])
    return Value(b.node("Reshape", [y, b.integers(0, 0, -1)]), (t, ways[1] * hidden))


def attention(b: Builder, x: Value) -> Value | None:
    if len(x.shape) != 2:
        return None
    c = x.shape[1]
    q, k, v = (b.node("MatMul", [x.name, b.weight(c, c, wanted=f"{n}_proj.weight")]) for n in "qkv")
    scores = b.node("MatMul", [q, b.node("Transpose", [k], perm=[0, 2, 1])])
    mixed = b.node("MatMul", [b.node("Softmax", [scores], axis=2), v])
    return Value(b.node("Add", [x.name, mixed]), x.shape)


def pointwise(b: Builder, x: Value) -> Value | None:
    kinds = ["Relu", "Tanh", "Sigmoid", "LeakyRelu", "Softsign", "Neg", "Identity", "Dropout",
             "Clip", "PRelu"]  # fmt: skip
    kind = b.pick(kinds)
    if kind == "Clip":  # an input left out, and an initializer without elements nearby
        return Value(b.node("Clip", [x.name, "", b.constant(np.array(2, b.dtype))]), x.shape)
    if kind == "PRelu":
        return Value(b.node("PRelu", [x.name, b.vector(1, "slope")]), x.shape)
    return Value(b.node(kind, [x.name]), x.shape)


def norm(b: Builder, x: Value) -> Value | None:
    if b.opset < 17 or (len(x.shape) >= 2 and b.chance(0.5)):
        return Value(_batch_norm(b, x.name, x.shape[0]), x.shape)
    c = x.shape[-1]
    given = [x.name, b.constant(b.numbers(c, scale=0.2) + b.dtype(1), "ln.weight")]
    if b.chance(0.7):
        given.append(b.vector(c, "ln.bias"))
    return Value(b.node("LayerNormalization", given, axis=-1), x.shape)


def _batch_norm(b: Builder, x: str, c: int) -> str:
    one = b.dtype(1)
    given = [
        b.constant(b.numbers(c, scale=0.2) + one, "norm.weight"), b.vector(c, "norm.bias"),
        b.vector(c, "mean"), b.constant(np.abs(b.numbers(c)) + one, "var"),
    ]  # fmt: skip
    return b.node("BatchNormalization", [x, *given], epsilon=1e-3)


def pool(b: Builder, x: Value) -> Value | None:
    if not 2 <= len(x.shape) <= 4:
        return None
    c, *space = x.shape
    if b.chance(0.5):
        y = b.node("GlobalAveragePool", [x.name])
        return Value(b.node("Flatten", [y]), (c,))
    if min(space) < 2:
        return None
    kind = b.pick(("MaxPool", "AveragePool"))
    y = b.node(kind, [x.name], kernel_shape=[2] * len(space), strides=[2] * len(space))
    return Value(y, (c, *[s // 2 for s in space]))


def flatten(b: Builder, x: Value) -> Value | None:
    size = int(np.prod(x.shape))
    if len(x.shape) < 2 or size > 600:
        return None
    if b.chance(0.5):
        return Value(b.node("Flatten", [x.name]), (size,))
    return Value(b.node("Reshape", [x.name, b.integers(0, -1)]), (size,))


def to_sequence(b: Builder, x: Value) -> Value | None:
    """Channels last, one step for each place."""
    if len(x.shape) != 3 or x.shape[1] * x.shape[2] > 80:
        return None
    c, h, w = x.shape
    y = b.node("Reshape", [x.name, b.integers(0, c, h * w)])
    return Value(b.node("Transpose", [y], perm=[0, 2, 1]), (h * w, c))


def upsample(b: Builder, x: Value) -> Value | None:
    """Resize, whose region of interest is a tensor without elements."""
    if len(x.shape) != 3 or max(x.shape[1:]) > 20:
        return None
    roi = b.constant(np.zeros(0, np.float32), "roi")
    scales = b.constant(np.array([1, 1, 2, 2], np.float32), "scales")
    y = b.node("Resize", [x.name, roi, scales], mode="nearest")
    return Value(y, (x.shape[0], 2 * x.shape[1], 2 * x.shape[2]))


def residual(b: Builder, x: Value) -> Value | None:
    side = matmul(b, x) if b.chance(0.7) else None
    if side is None or side.shape != x.shape:
        return Value(b.node("Mul", [x.name, b.constant(b.numbers(*x.shape))]), x.shape)
    return Value(b.node("Add", [x.name, side.name]), x.shape)


def second_input(b: Builder, x: Value) -> Value | None:
    if len(x.shape) > 2 or len(b.samples) > 2:
        return None
    other = _floats(b, int(b.pick((1, 4))))
    side = b.node("MatMul", [other.name, b.weight(other.shape[0], x.shape[-1])])
    if len(x.shape) == 2:
        side = b.axes("Unsqueeze", side, [1])
    return Value(b.node("Add", [x.name, side]), x.shape)

"""Random ONNX graphs: a seed gives a file's model and inputs that ONNX Runtime takes.

A graph starts from one of several kinds of input, goes through a few blocks of
``random_graph_blocks``, and ends in one to three outputs. Here are names, types, and the ways in
which exporters store a weight.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

Shape = tuple[int, ...]

ODD_NAMES = (
    "weight", "bias", "train", "type", "forward", "forward.weight", "layers.0.weight",
    "layers.0.bias", "layers.1", "layers", "fc.weight", "fc.weight.scales", "fc.weight.codes",
    "a/b/c", "/model/fc/MatMul", "größe.weight", "重み", "😀.weight", "a b", ".", "..", ".weight",
    "weight.weight", "x.", "0", "1.weight", "__class__", "_modules", "state_dict", "modules",
    "parameters.weight", "onnx_layers", "onnx_source", "T_destination", "logits", "output",
    "input_ids", "a::b", "a,b", "re:.*", "x=1", "a*", "[0]", "model.fc.weight_quantized", "%s",
    "{}", "fc.weight_1", "call_super_init.weight", "dump_patches", "'", '"', "a\\b", "n" * 300,
)  # fmt: skip
"""Names that files may hold, and that are something else in a module, a pattern or a path."""

TYPES: dict[Any, int] = {
    np.float32: TensorProto.FLOAT,
    np.float16: TensorProto.FLOAT16,
    np.float64: TensorProto.DOUBLE,
}
OPSETS = (9, 11, 13, 14, 17, 18, 19, 20, 21, 22)


@dataclass(frozen=True, slots=True)
class Value:
    """A value of the graph: its name, and its shape without the batch in front."""

    name: str
    shape: Shape


@dataclass(slots=True, kw_only=True)
class RandomGraph:
    """A model and what it is run on.

    Attributes:
        model: ``onnx.ModelProto``.
        inputs: Samples by input name, batch first.
        features: What it was made of, for a report.
    """

    model: Any
    inputs: dict[str, np.ndarray]
    features: list[str]


@dataclass(slots=True)
class Builder:
    """A graph under construction.

    Attributes:
        rng: Decides everything.
        odd: Share of names that are odd.
    """

    rng: np.random.Generator
    opset: int
    dtype: Any
    odd: float
    n_samples: int
    nodes: list[Any] = field(default_factory=list)
    initializers: list[Any] = field(default_factory=list)
    sparse: list[Any] = field(default_factory=list)
    given: list[Any] = field(default_factory=list)
    functions: list[Any] = field(default_factory=list)
    samples: dict[str, np.ndarray] = field(default_factory=dict)
    features: list[str] = field(default_factory=list)
    shared: dict[Shape, str] = field(default_factory=dict)
    taken: set[str] = field(default_factory=set)

    def chance(self, probability: float) -> bool:
        """Return true with this probability."""
        return bool(self.rng.random() < probability)

    def pick(self, options: Any) -> Any:
        """Return one of ``options``."""
        return options[int(self.rng.integers(len(options)))]

    def free(self, wanted: str) -> str:
        """Return a name for a value that no other has."""
        name = self.pick(ODD_NAMES) if self.chance(self.odd) else wanted
        k = 0
        unique = name
        while unique in self.taken:
            k += 1
            unique = f"{name}_{k}"
        self.taken.add(unique)
        return unique

    def node(self, operator: str, given: list[str], n: int = 1, **attributes: Any) -> str:
        """Add a node; return its first output."""
        made = [self.free(f"{operator}.{len(self.nodes)}") for _ in range(n)]
        # Nodes need no name, and several may have the same.
        name = self.pick(("", "", "twice", self.pick(ODD_NAMES), f"{operator}_{len(self.nodes)}"))
        self.nodes.append(helper.make_node(operator, given, made, name, **attributes))
        return made[0]

    def constant(self, array: np.ndarray, wanted: str = "constant") -> str:
        """Store numbers that are no weight."""
        name = self.free(wanted)
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def integers(self, *values: int) -> str:
        """Store a shape, or axes."""
        return self.constant(np.array(values, np.int64), "integers")

    def numbers(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        """Return normal numbers in the type of the graph."""
        return (self.rng.normal(size=shape) * scale).astype(self.dtype)

    def vector(self, n: int, wanted: str = "bias") -> str:
        """Store a bias or the like."""
        return self.constant(self.numbers(n, scale=0.1), wanted)

    def weight(self, *shape: int, wanted: str = "layer.weight") -> str:
        """Store a weight in one of the ways of exporters; return the name that is multiplied."""
        if shape in self.shared and self.chance(0.3):
            self.features.append("shared weight")
            return self.shared[shape]
        fan_in = max(1, int(np.prod(shape)) // max(shape))
        values = self.numbers(*shape, scale=1 / np.sqrt(fan_in))
        how = self.pick(STORED)
        if how is not _plain:
            self.features.append(how.__name__.strip("_"))
        name = str(how(self, values, wanted))
        self.shared[shape] = name
        return name

    def axes(self, operator: str, x: str, axes: list[int], **attributes: Any) -> str:
        """Add an operator whose axes became an input at opset 13, or 18 where it reduces."""
        since = 18 if operator.startswith("Reduce") and operator != "ReduceSum" else 13
        if self.opset >= since:
            return self.node(operator, [x, self.integers(*axes)], **attributes)
        return self.node(operator, [x], axes=axes, **attributes)


def _plain(b: Builder, values: np.ndarray, wanted: str) -> str:
    return b.constant(values, wanted)


def _declared_input(b: Builder, values: np.ndarray, wanted: str) -> str:
    """An initializer that may be overridden, as all were before IR version 4."""
    name = b.constant(values, wanted)
    b.given.append(helper.make_tensor_value_info(name, TYPES[b.dtype], list(values.shape)))
    return name


def _constant_node(b: Builder, values: np.ndarray, wanted: str) -> str:
    return b.node("Constant", [], value=numpy_helper.from_array(values, b.pick(("", wanted))))


def _identity(b: Builder, values: np.ndarray, wanted: str) -> str:
    return b.node("Identity", [b.weight(*values.shape, wanted=wanted)])


def _cast(b: Builder, values: np.ndarray, wanted: str) -> str:
    kinds = [TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.FLOAT, TensorProto.BFLOAT16]
    kind = b.pick(kinds if b.opset >= 13 else kinds[:3])
    stored = values.astype(helper.tensor_dtype_to_np_dtype(kind))
    return b.node("Cast", [b.constant(stored, wanted)], to=TYPES[b.dtype])


def _transposed(b: Builder, values: np.ndarray, wanted: str) -> str:
    order = [int(k) for k in b.rng.permutation(values.ndim)]
    stored = np.ascontiguousarray(values.transpose(order))
    back = [int(k) for k in np.argsort(order)]
    return b.node("Transpose", [b.constant(stored, wanted)], perm=back)


def _reshaped(b: Builder, values: np.ndarray, wanted: str) -> str:
    flat = b.constant(values.reshape(b.pick(((-1,), (1, -1), (values.shape[0], -1)))), wanted)
    return b.node("Reshape", [flat, b.integers(*values.shape)])


def _masked(b: Builder, values: np.ndarray, wanted: str) -> str:
    mask = b.constant((b.rng.random(values.shape) > 0.3).astype(b.dtype), "mask")
    return b.node("Mul", [b.constant(values, wanted), mask])


def _squeezed(b: Builder, values: np.ndarray, wanted: str) -> str:
    return b.axes("Squeeze", b.constant(values[None], wanted), [0])


def _sparse(b: Builder, values: np.ndarray, wanted: str) -> str:
    if b.dtype is not np.float32:  # ONNX Runtime has no other
        return _plain(b, values, wanted)
    kept = np.sort(b.rng.permutation(values.size)[: max(1, values.size // 4)])
    name = b.free(wanted)
    indices = numpy_helper.from_array(kept.astype(np.int64), f"{name} indices")
    data = numpy_helper.from_array(values.reshape(-1)[kept], name)
    b.sparse.append(helper.make_sparse_tensor(data, indices, list(values.shape)))
    return name


def _normed(b: Builder, values: np.ndarray, wanted: str) -> str:
    """Weight normalisation written out: g v / |v|."""
    stored = b.constant(values, wanted)
    axes = list(range(1, values.ndim))
    norm = b.axes("ReduceL2", stored, axes, keepdims=1)
    size = b.constant(np.abs(b.numbers(values.shape[0], *[1] * len(axes))) + b.dtype(0.5), "g")
    return b.node("Mul", [b.node("Div", [stored, norm]), size])


def _read_twice(b: Builder, values: np.ndarray, wanted: str) -> str:
    """A weight that something else reads too."""
    name = b.constant(values, wanted)
    b.node("ReduceSum", [name], keepdims=0)
    return name


STORED = (
    *[_plain] * 14, _declared_input, _constant_node, _constant_node, _identity, _cast, _cast,
    _transposed, _transposed, _reshaped, _masked, _squeezed, _sparse, _normed, _read_twice,
)  # fmt: skip


def random_graph(seed: int) -> RandomGraph:
    """Return the graph of ``seed``."""
    from random_graph_blocks import INPUTS
    from random_graph_flow import BLOCKS, SAFE_IN_DOUBLE, SAFE_IN_OLD, finish_graph

    rng = np.random.default_rng(seed)
    dtype = (np.float32, np.float32, np.float32, np.float32, np.float16, np.float64)[
        int(rng.integers(6))
    ]
    b = Builder(
        rng=rng,
        opset=OPSETS[int(rng.integers(len(OPSETS)))],
        dtype=dtype,
        odd=(0.0, 0.1, 0.6)[int(rng.integers(3))],
        n_samples=int(rng.integers(9, 14)),
    )
    b.features += [f"opset {b.opset}", np.dtype(dtype).name]

    # Blocks that take what the last one gave; further ends branch off on the way.
    x = b.pick(INPUTS)(b)
    ends = []
    offered = [
        block
        for block in BLOCKS
        if (dtype is not np.float64 or block in SAFE_IN_DOUBLE)
        and (b.opset > 10 or block in SAFE_IN_OLD)
    ]
    for _ in range(int(rng.integers(1, 7))):
        for _ in range(8):
            block = b.pick(offered)
            made = block(b, x)
            if made is not None:
                b.features.append(block.__name__)
                x = made
                if b.chance(0.1):
                    ends.append(x)
                break
    return finish_graph(b, [x, *ends[:2]])

"""Where the weights of an ONNX graph stand, and what each of its nodes does with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from bitquota.candidates.layers import LayerKind
from bitquota.errors import InvalidModel

if TYPE_CHECKING:
    from collections.abc import Mapping

_QUANTIZED = frozenset(
    {"DequantizeLinear", "QuantizeLinear", "MatMulNBits", "QLinearConv", "QLinearMatMul",
     "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "QGemm", "GatherBlockQuantized"}
)  # fmt: skip

_VIEWS = frozenset({"Identity", "Cast", "Transpose"})
"""What folding leaves because the weight is read in two ways, as of a tied embedding."""


CONVOLUTIONS: dict[int, type[nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


TRANSPOSED: dict[int, type[nn.Module]] = {
    3: nn.ConvTranspose1d,
    4: nn.ConvTranspose2d,
    5: nn.ConvTranspose3d,
}


FLOATS: dict[int, Any] = {1: np.float32, 10: np.float16, 11: np.float64}
"""Element types of weights: ONNX's number to numpy's type."""

BFLOAT16 = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxLayer:
    """Where one quantizable weight stands in an ONNX graph.

    Attributes:
        name: Name of the layer: the initializer without ``.weight``, or the node's.
        kind: What the node does with it.
        initializer: The weight.
        nodes: Names (or output names) of all nodes that use it, in graph order.
        inputs: The activation (or indices) that each of them reads.
        groups: Of a convolution.
    """

    name: str
    kind: LayerKind
    initializer: str
    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    groups: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One matrix ``[outputs, inputs]`` that was taken out of a weight.

    Attributes:
        name: Of the layer.
        kind: ``RECURRENT`` or ``CONTRACTION``.
        node: Name of the node that multiplies with it.
        data: The activation that the node reads.
    """

    name: str
    kind: LayerKind
    node: str
    data: str


@dataclass(slots=True)
class _Found:
    """A weight while the graph is searched."""

    kind: LayerKind
    groups: int
    nodes: list[str] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)


def find_layers(
    model: Any,  # noqa: ANN401  # onnx.ModelProto
    matrices: Mapping[str, Matrix] | None = None,
) -> tuple[OnnxLayer, ...]:
    """Return the quantizable weights of a graph: Conv, ConvTranspose, Gemm, MatMul, Gather.

    Args:
        model: The graph.
        matrices: Further ones, by initializer (see ``matrices``).

    Raises:
        InvalidModel: The graph is already quantized, or has none.
    """
    import onnx

    graph = model.graph
    if quantized := sorted({n.op_type for n in graph.node} & _QUANTIZED):
        msg = (
            f"a model must be in floating point to be measured; this one has {quantized[0]} nodes: "
            "provide the model from before quantization"
        )
        raise InvalidModel(msg, operators=quantized)
    floats = {t.name: t for t in graph.initializer if t.data_type in FLOATS and 0 not in t.dims}

    # Nodes that pass a weight on are followed to those that multiply with it.
    views: dict[str, tuple[str, bool]] = {}
    found: dict[str, _Found] = {}
    for node in graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type in _VIEWS and node.input:
            if (view := _weight_view(node, attributes, floats, views)) is not None:
                views[node.output[0]] = view
            continue
        place = _weight_place(node, attributes, floats, views)
        if place is None:
            continue
        kind, initializer, data = place
        known = found.setdefault(initializer, _Found(kind, int(attributes.get("group", 1))))
        known.nodes.append(node.name or node.output[0])
        known.inputs.append(data)

    # Matrices that were taken out of larger weights are layers too.
    matrices = matrices or {}
    for initializer, matrix in matrices.items():
        found[initializer] = _Found(matrix.kind, 1, [matrix.node], [matrix.data])
    if not found:
        raise _nothing_found(graph)
    return _named(found, matrices)


def _named(found: dict[str, _Found], matrices: Mapping[str, Matrix]) -> tuple[OnnxLayer, ...]:
    """Return what was found as layers, each under a name of its own."""
    taken: set[str] = set()
    layers = []
    for initializer, item in found.items():
        if initializer in matrices:
            name = _layer_name("", matrices[initializer].name, taken)
        else:
            name = _layer_name(initializer, item.nodes[0], taken)
        taken.add(name)
        layers.append(
            OnnxLayer(
                name=name,
                kind=item.kind,
                initializer=initializer,
                nodes=tuple(item.nodes),
                inputs=tuple(item.inputs),
                groups=item.groups,
            )
        )
    return tuple(layers)


def _nothing_found(graph: Any) -> InvalidModel:  # noqa: ANN401  # onnx.GraphProto
    msg = (
        "an ONNX model must have Conv, ConvTranspose, Gemm, MatMul, Einsum, Gather, LSTM, GRU or "
        "RNN nodes with constant weights; found none"
    )
    halves = [t.name for t in graph.initializer if t.data_type == BFLOAT16 and len(t.dims) > 1]
    if halves:
        msg = (
            f"the weights of an ONNX model must be float32, float16 or float64 where they are "
            f"multiplied, because ONNX Runtime has no bfloat16 arithmetic on CPUs; '{halves[0]}' "
            "is bfloat16: export the model in float32 or float16"
        )
    return InvalidModel(msg)


def readers(graph: Any) -> dict[str, list[Any]]:  # noqa: ANN401  # onnx.GraphProto
    """Return the nodes of the graph that read each value, for themselves or in their bodies."""
    found: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in sources_of(node):
            found.setdefault(name, []).append(node)
    return found


def sources_of(node: Any) -> tuple[str, ...]:  # noqa: ANN401  # onnx.NodeProto
    """Return what a node reads, the outer values that its subgraphs use included."""
    names = dict.fromkeys(name for name in node.input if name)
    for attribute in node.attribute:
        for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            own = {v.name for v in graph.input} | {t.name for t in graph.initializer}
            for inner in graph.node:
                names.update(dict.fromkeys(s for s in sources_of(inner) if s not in own))
                own.update(inner.output)
            # A subgraph may return an outer value as it is.
            names.update(dict.fromkeys(v.name for v in graph.output if v.name not in own))
    return tuple(names)


def reason_of(name: str, users: list[Any]) -> str:
    """Return why the initializer ``name`` is no layer, as far as its readers tell."""
    if not users:
        return "read by no node"
    node = users[0]
    if name not in node.input:
        return f"used inside the body of {node.op_type} '{node.name}'"
    if node.op_type in ("BatchNormalization", "LayerNormalization", "GroupNormalization"):
        return "scale, bias or statistics of a normalization"
    place = list(node.input).index(name)
    if (node.op_type in ("Conv", "ConvTranspose", "Gemm") and place == 2) or (
        node.op_type in ("LSTM", "GRU", "RNN") and place == 3
    ):
        return "bias"
    return f"read by {node.op_type}, which multiplies no activations with it"


def _weight_view(
    node: Any,  # noqa: ANN401  # onnx.NodeProto
    attributes: dict[str, Any],
    floats: dict[str, Any],
    views: dict[str, tuple[str, bool]],
) -> tuple[str, bool] | None:
    """Return the weight that ``node`` only passes on, and whether it is transposed by then."""
    source, turned = views.get(node.input[0], (node.input[0], False))
    if source not in floats or attributes.get("to", 1) not in FLOATS:
        return None
    if node.op_type != "Transpose":
        return source, turned
    swaps = len(floats[source].dims) == 2 and list(attributes.get("perm", [1, 0])) == [1, 0]
    return (source, not turned) if swaps else None


def _weight_place(
    node: Any,  # noqa: ANN401  # onnx.NodeProto
    attributes: dict[str, Any],
    floats: dict[str, Any],
    views: dict[str, tuple[str, bool]],
) -> tuple[LayerKind, str, str] | None:
    """Return what ``node`` does with which initializer, and the activation that it reads."""
    inputs = list(node.input)
    # What ONNX Runtime's optimiser writes multiplies in the same way.
    operator = node.op_type.removeprefix("Fused")
    if operator in ("Conv", "ConvTranspose") and len(inputs) > 1:
        name, _ = views.get(inputs[1], (inputs[1], False))
        rank = len(floats[name].dims) if name in floats else 0
        if rank not in CONVOLUTIONS:
            return None
        prefix = "conv" if operator == "Conv" else "conv_transpose"
        return LayerKind(f"{prefix}{rank - 2}d"), name, inputs[0]
    if operator in ("Gemm", "MatMul"):
        for place in (1, 0):
            name = inputs[place]
            # A weight on the right is [in, out] unless it is transposed on the way.
            name, swapped = views.get(name, (name, False))
            if name not in floats or len(floats[name].dims) != 2:
                continue
            swapped ^= bool(attributes.get("transB" if place else "transA", 0))
            outputs_first = swapped if place else not swapped
            kind = LayerKind.LINEAR if outputs_first else LayerKind.LINEAR_TRANSPOSED
            return kind, name, inputs[1 - place]
    if node.op_type == "Gather":
        name, swapped = views.get(inputs[0], (inputs[0], False))
        dims = floats[name].dims if name in floats else ()
        if len(dims) == 2 and attributes.get("axis", 0) == 0 and not swapped:
            return LayerKind.EMBEDDING, name, inputs[1]
    return None


def _layer_name(initializer: str, node: str, taken: set[str]) -> str:
    """Name a layer after its parameter where that has a name, else after its node."""
    name = initializer.removesuffix(".weight") if initializer.endswith(".weight") else node
    parts = [part for part in name.split(".") if part]
    name = ".".join(parts) or "layer"
    unique, k = name, 1
    while unique in taken:
        k += 1
        unique = f"{name}_{k}"
    return unique


@dataclass(frozen=True, slots=True, kw_only=True)
class FedTensor:
    """A tensor of the module that is an input of the graph.

    Attributes:
        name: In the graph.
        path: In the module.
        dtype: numpy type in the graph.
    """

    name: str
    path: str
    dtype: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """Where a layer's mean output can be moved without changing the graph.

    Attributes:
        node: The node that computes the layer.
        path: Tensor of the module to change, one value per output channel.
        factor: What it changes by for a shift of one: 1 for a bias, -1 for the mean of the batch
            norm behind.
        channel_axis: Axis of the node's output that counts channels.
        applies_at_once: Whether the node's own output moves (else only what follows it).
    """

    node: str
    path: str
    factor: float
    channel_axis: int
    applies_at_once: bool

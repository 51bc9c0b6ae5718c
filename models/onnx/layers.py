"""Where the weights of an ONNX graph stand, and what each of its nodes does with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from bitquota.candidates.layers import LayerKind
from bitquota.errors import InvalidModel

_QUANTIZED = frozenset(
    {"DequantizeLinear", "QuantizeLinear", "MatMulNBits", "QLinearConv", "QLinearMatMul",
     "ConvInteger", "MatMulInteger", "DynamicQuantizeLinear", "QGemm", "GatherBlockQuantized"}
)  # fmt: skip


CONVOLUTIONS: dict[int, type[nn.Module]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


TRANSPOSED: dict[int, type[nn.Module]] = {
    3: nn.ConvTranspose1d,
    4: nn.ConvTranspose2d,
    5: nn.ConvTranspose3d,
}


FLOATS: dict[int, Any] = {1: np.float32, 10: np.float16, 11: np.float64}
"""Element types of weights: ONNX's number to numpy's type."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxLayer:
    """Where one quantizable weight stands in an ONNX graph.

    Attributes:
        name: Name of the layer: the initializer without ``.weight``, or the node's.
        kind: What the node does with it.
        initializer: The weight.
        nodes: Names (or output names) of all nodes that use it, in graph order.
        groups: Of a convolution.
    """

    name: str
    kind: LayerKind
    initializer: str
    nodes: tuple[str, ...]
    groups: int = 1


def find_layers(model: Any) -> tuple[OnnxLayer, ...]:  # noqa: ANN401  # onnx.ModelProto
    """Return the quantizable weights of a graph: Conv, ConvTranspose, Gemm, MatMul, Gather.

    Raises:
        InvalidModel: The graph is already quantized, or has none.
    """
    import onnx

    graph = model.graph
    if quantized := sorted({n.op_type for n in graph.node} & _QUANTIZED):
        msg = (
            f"a model must be in floating point to be measured; this one has {quantized[0]} nodes: "
            "hand in the model from before quantization"
        )
        raise InvalidModel(msg, operators=quantized)
    floats = {t.name: t for t in graph.initializer if t.data_type in FLOATS}
    transposed: dict[str, str] = {}
    found: dict[str, tuple[LayerKind, list[str], int]] = {}
    for node in graph.node:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type in ("Identity", "Transpose") and node.input[0] in floats:
            source = floats[node.input[0]]
            swaps = node.op_type == "Transpose" and len(source.dims) == 2
            if swaps and list(attributes.get("perm", [1, 0])) == [1, 0]:
                transposed[node.output[0]] = node.input[0]
            continue
        place = _weight_place(node, attributes, floats, transposed)
        if place is None:
            continue
        kind, initializer = place
        label = node.name or node.output[0]
        known = found.setdefault(initializer, (kind, [], int(attributes.get("group", 1))))
        known[1].append(label)
    if not found:
        msg = (
            "an ONNX model must have Conv, ConvTranspose, Gemm, MatMul or Gather nodes with "
            "constant weights; found none"
        )
        raise InvalidModel(msg)
    taken: set[str] = set()
    layers = []
    for initializer, (kind, nodes, groups) in found.items():
        name = _layer_name(initializer, nodes[0], taken)
        taken.add(name)
        layers.append(
            OnnxLayer(
                name=name, kind=kind, initializer=initializer, nodes=tuple(nodes), groups=groups
            )
        )
    return tuple(layers)


def _weight_place(
    node: Any,  # noqa: ANN401  # onnx.NodeProto
    attributes: dict[str, Any],
    floats: dict[str, Any],
    transposed: dict[str, str],
) -> tuple[LayerKind, str] | None:
    inputs = list(node.input)
    if node.op_type in ("Conv", "ConvTranspose") and len(inputs) > 1 and inputs[1] in floats:
        rank = len(floats[inputs[1]].dims)
        if rank not in CONVOLUTIONS:
            return None
        prefix = "conv" if node.op_type == "Conv" else "conv_transpose"
        return LayerKind(f"{prefix}{rank - 2}d"), inputs[1]
    if node.op_type in ("Gemm", "MatMul"):
        for place in (1, 0):
            name = inputs[place]
            # A weight on the right is [in, out] unless it is transposed on the way.
            swapped = name in transposed
            name = transposed.get(name, name)
            if name not in floats or len(floats[name].dims) != 2:
                continue
            swapped ^= bool(attributes.get("transB" if place else "transA", 0))
            outputs_first = swapped if place else not swapped
            return LayerKind.LINEAR if outputs_first else LayerKind.LINEAR_TRANSPOSED, name
    if node.op_type == "Gather" and inputs[0] in floats:
        dims = floats[inputs[0]].dims
        if len(dims) == 2 and attributes.get("axis", 0) == 0:
            return LayerKind.EMBEDDING, inputs[0]
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

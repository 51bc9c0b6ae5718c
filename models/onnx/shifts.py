"""Where corrections can act in an ONNX graph without changing it: statistics, biases, sums."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bitquota.candidates.layers import LayerKind
from bitquota.models.onnx.layers import FLOATS, Shift

if TYPE_CHECKING:
    from collections.abc import Collection

    from bitquota.models.onnx.layers import OnnxLayer


def statistics_of(proto: Any, initializers: dict[str, Any]) -> set[str]:  # noqa: ANN401  # ModelProto
    """Return the initializers that hold means and variances of batch norms."""
    found: set[str] = set()
    for node in proto.graph.node:
        if node.op_type == "BatchNormalization":
            names = node.input[3:5]
            if all(n in initializers and initializers[n].data_type in FLOATS for n in names):
                found.update(names)
    return found


def scale_of(node: Any, vectors: Collection[str]) -> list[str]:  # noqa: ANN401  # onnx.NodeProto
    """Return the weight and the bias of a norm, or nothing if they are not among ``vectors``.

    What an RMS norm ends in is written as ``Mul``.
    """
    if node.op_type in ("BatchNormalization", "LayerNormalization"):
        names = [name for name in node.input[1:3] if name]
        return names if all(name in vectors for name in names) else []
    return [n for n in node.input if n in vectors][:1] if node.op_type == "Mul" else []


def scales_of(
    graph: Any,  # noqa: ANN401  # onnx.GraphProto
    used: dict[str, list[Any]],
    initializers: dict[str, Any],
) -> set[str]:
    """Return weights and biases of norms that nothing else reads."""
    vectors = {
        name
        for name, tensor in initializers.items()
        if tensor.data_type in FLOATS and len(tensor.dims) == 1 and tensor.dims[0] > 1
    }
    found = {name for node in graph.node for name in scale_of(node, vectors)}
    return {name for name in found if len(used[name]) == 1}


def added_of(
    layers: tuple[OnnxLayer, ...],
    nodes: dict[str, Any],
    used: dict[str, list[Any]],
    initializers: dict[str, Any],
) -> set[str]:
    """Return the one-dimensional constants that are added right behind a layer, and only there."""
    found: set[str] = set()
    for layer in layers:
        if len(layer.nodes) == 1 and (add := added_behind(nodes[layer.nodes[0]], used)) is not None:
            for name in add.input:
                tensor = initializers.get(name)
                if tensor is None or len(tensor.dims) != 1 or tensor.data_type not in FLOATS:
                    continue
                if len(used[name]) == 1:
                    found.add(name)
    return found


def added_behind(node: Any, used: dict[str, list[Any]]) -> Any:  # noqa: ANN401  # onnx.NodeProto
    """Return the Add that alone reads what a MatMul puts out, or ``None``."""
    users = used.get(node.output[0], [])
    wanted = node.op_type == "MatMul" and len(users) == 1 and users[0].op_type == "Add"
    return users[0] if wanted else None


def shift_of(
    layer: OnnxLayer,
    nodes: dict[str, Any],
    used: dict[str, list[Any]],
    fed: dict[str, str],
    outputs: set[str],
) -> Shift | None:
    """Return where the mean output of a layer can be moved, if there is a place.

    The layer's own bias; what is added right behind a MatMul; or the mean of a batch norm that
    alone reads the layer's output.
    """
    if len(layer.nodes) != 1 or layer.kind is LayerKind.EMBEDDING:
        return None
    node = nodes[layer.nodes[0]]
    axis = 1 if node.op_type in ("Conv", "ConvTranspose") else -1

    def at(name: str, factor: float, *, at_once: bool) -> Shift:
        return Shift(
            node=layer.nodes[0],
            path=fed[name],
            factor=factor,
            channel_axis=axis,
            applies_at_once=at_once,
        )

    if node.op_type in ("Conv", "ConvTranspose", "Gemm"):
        bias = node.input[2] if len(node.input) > 2 else ""
        beta = next((a.f for a in node.attribute if a.name == "beta"), 1.0)
        if bias in fed and len(used[bias]) == 1 and beta:
            return at(bias, 1.0 / beta, at_once=True)
    add = added_behind(node, used)
    for name in () if add is None or node.output[0] in outputs else add.input:
        if name in fed:
            return at(name, 1.0, at_once=False)
    users = used.get(node.output[0], [])
    if len(users) == 1 and users[0].op_type == "BatchNormalization" and axis == 1:
        mean = users[0].input[3]
        if mean in fed and len(used[mean]) == 1:
            return at(mean, -1.0, at_once=False)
    return None

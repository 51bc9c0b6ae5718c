"""Make a traced ONNX graph small: fold constants, shorten names, absorb batch norms into scales.

Design: docs/design/targets.md
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bitquota.candidates.storage import Granularity, ScaleFormat
from bitquota.errors import MissingDependency
from bitquota.models.layout import CONVOLUTIONS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from bitquota.candidates.layers import Layer
    from bitquota.quantizers.weights import QuantizedWeight


def fold_constants(program: Any) -> Any:  # noqa: ANN401  # ONNXProgram to onnx.ModelProto
    """Return the program's graph with everything computed that depends on no input and no weight.

    Biases of zeros that torch made up for convolutions without one are left out: those of three
    dimensions have a shape that ONNX Runtime refuses.

    Raises:
        MissingDependency: onnxscript is not installed.
    """
    try:
        import onnx_ir
        from onnx_ir.passes import common
        from onnxscript import optimizer
    except ImportError as err:
        msg = "exporting a torch model to ONNX needs onnxscript: pip install bitquota[onnx]"
        raise MissingDependency(msg) from err
    model = program.model
    own = set(model.graph.initializers)
    weights = {
        name for name, value in model.graph.initializers.items() if len(value.shape or ()) > 1
    }

    def should_fold(node: Any) -> bool | None:  # noqa: ANN401  # onnx_ir.Node
        reads_weight = any(v is not None and v.name in weights for v in node.inputs)
        return False if reads_weight and node.op_type != "Shape" else None

    optimizer.fold_constants(model, should_fold=should_fold)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for node in model.graph:
        bias = node.inputs[2] if node.op_type == "Conv" and len(node.inputs) > 2 else None
        if bias is None or bias.name in own or bias.const_value is None:
            continue
        if not bias.const_value.numpy().any():
            node.resize_inputs(2)
    common.RemoveUnusedNodesPass()(model)
    # Equal constants are stored once. Tensors of the model are not touched: a layer keeps its
    # weight and a batch norm its bias though another has an equal one.
    first: dict[tuple[Any, ...], Any] = {}
    for name, value in [*model.graph.initializers.items()]:
        if name not in own and not value.is_graph_output():
            held = value.const_value
            key = held.dtype, tuple(held.shape), held.tobytes()
            if (kept := first.setdefault(key, value)) is not value:
                value.replace_all_uses_with(kept)
                del model.graph.initializers[name]
    return onnx_ir.to_proto(model)


def shorten_names(graph: Any) -> None:  # noqa: ANN401  # onnx.GraphProto
    """Rename what the tracer named: values between nodes, and nodes (which need no name)."""
    kept = {v.name for v in (*graph.input, *graph.output)} | {t.name for t in graph.initializer}
    short: dict[str, str] = {}
    for node in graph.node:
        node.name = ""
        for name in node.output:
            if name and name not in kept:
                short[name] = f"t{len(short)}"
    for node in graph.node:
        for names in (node.input, node.output):
            for k, name in enumerate(names):
                names[k] = short.get(name, name)


def absorb_batch_norms(
    model: Any,  # noqa: ANN401  # onnx.ModelProto
    weights: Mapping[str, QuantizedWeight],
    layers: Mapping[str, Layer],
    initializer_of: Mapping[str, str],
) -> dict[str, QuantizedWeight]:
    """Multiply batch norms behind quantized convolutions into their scales and biases.

    ``BN(conv(x; s q) + b) = conv(x; (s f) q) + (b - m) f + beta`` with ``f = g / sqrt(v + eps)``:
    the codes stay, so nothing is quantized anew. Only for scales in float32 per channel.

    Returns:
        The weights with their new scales; the graph is changed in place.
    """
    import onnx

    graph = model.graph
    held = {t.name: t for t in graph.initializer}
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    outputs = {v.name for v in graph.output}
    absorbed = dict(weights)
    removed = []
    for layer_name, weight in weights.items():
        readers = users.get(initializer_of[layer_name], [])
        if not _scales_take_factors(layers[layer_name], weight) or len(readers) != 1:
            continue
        convolution = readers[0]
        norm = _following_norm(convolution, users, held)
        if norm is None or convolution.output[0] in outputs:
            continue

        # The batch norm's factor goes into the scales, the rest into its own bias.
        gamma, beta, mean, variance = (_values(held[name]) for name in norm.input[1:5])
        epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
        factor = gamma / np.sqrt(variance + epsilon)
        bias_name = _bias(convolution)
        bias = _values(held[bias_name]) if bias_name else np.zeros(len(factor))
        shifted = ((bias - mean) * factor + beta).astype(np.float32)
        # Exporters store equal tensors once: other batch norms may read this one's bias.
        name = f"{initializer_of[layer_name]}.absorbed_bias"
        graph.initializer.append(onnx.numpy_helper.from_array(shifted, name))
        scales = weight.scales.double() * torch.from_numpy(factor)[:, None]
        absorbed[layer_name] = replace(weight, scales=scales.float())

        # The convolution takes the batch norm's place.
        inputs = [*convolution.input[:2], name]
        del convolution.input[:]
        convolution.input.extend(inputs)
        convolution.output[0] = norm.output[0]
        removed.append(norm)
    for norm in removed:
        graph.node.remove(norm)
    drop_unused(graph)
    return absorbed


def _scales_take_factors(layer: Layer, weight: QuantizedWeight) -> bool:
    """Whether the layer is a convolution with one scale in float32 for each channel."""
    scheme = weight.scheme
    return (
        layer.kind in CONVOLUTIONS
        and scheme.granularity is Granularity.CHANNEL
        and scheme.scale_format is ScaleFormat.FP32
    )


def _bias(convolution: Any) -> str:  # noqa: ANN401  # onnx.NodeProto
    """Return the name of its bias, empty if it has none."""
    return str(convolution.input[2]) if len(convolution.input) > 2 else ""


def _following_norm(
    convolution: Any,  # noqa: ANN401  # onnx.NodeProto
    users: Mapping[str, list[Any]],
    held: Mapping[str, Any],
) -> Any:  # noqa: ANN401  # onnx.NodeProto or None
    """Return the batch norm that alone reads a convolution, if all their parameters are known."""
    followers = users.get(convolution.output[0], [])
    if len(followers) != 1 or followers[0].op_type != "BatchNormalization":
        return None
    bias = _bias(convolution)
    parameters = [*followers[0].input[1:5], *([bias] if bias else [])]
    return followers[0] if all(name in held for name in parameters) else None


def drop_unused(graph: Any) -> None:  # noqa: ANN401  # onnx.GraphProto
    """Remove initializers that no node reads."""
    read = {name for node in graph.node for name in node.input}
    read |= {v.name for v in graph.output}
    kept = [t for t in graph.initializer if t.name in read]
    if len(kept) == len(graph.initializer):
        return
    copies = []
    for tensor in kept:
        copy = type(tensor)()
        copy.CopyFrom(tensor)
        copies.append(copy)
    del graph.initializer[:]
    graph.initializer.extend(copies)


def _values(tensor: Any) -> NDArray[np.float64]:  # noqa: ANN401  # onnx.TensorProto
    import onnx

    values: NDArray[np.float64] = onnx.numpy_helper.to_array(tensor).astype(np.float64)
    return values

"""ONNX graphs rewritten so that measured passes see what corrections will repair.

Batch norms move their statistics by what happened to their inputs since full precision, whose
moments are handed in; layers take a mean that is handed in. Both are written out in standard
operators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from bitquota.errors import InvalidInput, MissingDependency

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bitquota.models.onnx.layers import FedTensor, Shift


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchNormValues:
    """One batch norm: its stored statistics, and moments of its input in the batch at hand.

    ``before_mean`` and ``before_variance`` are inputs of the graph, ``[1, C, 1]``: what the moments
    were in full precision.
    """

    inputs: str
    stored_mean: str
    stored_variance: str
    mean: str
    variance: str
    before_mean: str
    before_variance: str
    epsilon: float


def with_moved_statistics(
    source: Any,  # noqa: ANN401  # onnx.ModelProto
    fed: Mapping[str, FedTensor],
) -> tuple[Any, list[BatchNormValues]]:
    """Return a copy of the graph whose batch norms move their statistics (see ``batch_norm``).

    Each is written out: mean and variance over all axes but the channels', statistics moved from
    the handed-in moments to these, then scale and shift. A batch with a single value per channel
    has no variance; it keeps the stored statistics.

    Raises:
        InvalidInput: No batch norm with stored statistics, or operators before opset 9.
    """
    onnx = import_onnx()
    model = onnx.ModelProto()
    model.CopyFrom(source)
    version = next((o.version for o in model.opset_import if o.domain in {"", "ai.onnx"}), 0)

    # Every batch norm with stored statistics becomes the nodes that adjust them.
    found: list[BatchNormValues] = []
    nodes = []
    for node in source.graph.node:
        if node.op_type != "BatchNormalization" or not fed.keys() >= set(node.input[3:5]):
            nodes.append(node)
            continue
        values = BatchNormValues(
            inputs=node.input[0],
            stored_mean=node.input[3],
            stored_variance=node.input[4],
            mean=f"{node.output[0]}/batch mean",
            variance=f"{node.output[0]}/batch variance",
            before_mean=f"{node.output[0]}/full-precision mean",
            before_variance=f"{node.output[0]}/full-precision variance",
            epsilon=next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5),
        )
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(fed[node.input[3]].dtype))
        for name in (values.before_mean, values.before_variance):
            model.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, None))
        found.append(values)
        nodes.extend(_batch_norm_nodes(node, values, version))
    if not found or version < 9:
        msg = (
            "the correction 'batch_norm_statistics' needs BatchNormalization nodes with stored "
            f"statistics at opset 9 or above; the graph has {len(found)} of them at opset "
            f"{version} (most exporters fold them into the convolutions): leave the correction "
            "out, or export with batch norms kept"
        )
        raise InvalidInput(msg, batch_norms=len(found), opset=version)

    # The new nodes, and the shapes and axes that they share.
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    numbers = {"columns": np.array([0, 0, -1]), "channels": np.array([1, -1, 1])}
    for name, array in numbers.items():
        constant = onnx.numpy_helper.from_array(array.astype(np.int64), f"batch norm/{name}")
        model.graph.initializer.append(constant)
    if version >= 18:
        axes = onnx.numpy_helper.from_array(np.array([0, 2], np.int64), "batch norm/axes")
        model.graph.initializer.append(axes)
    return model, found


def _batch_norm_nodes(node: Any, values: BatchNormValues, version: int) -> list[Any]:  # noqa: ANN401
    onnx = import_onnx()
    make = onnx.helper.make_node
    x, scale, bias, mean, variance = node.input[:5]
    y = node.output[0]

    def named(name: str) -> str:
        return f"{y}/{name}"

    def average(of: str, to: str) -> Any:  # noqa: ANN401  # onnx.NodeProto
        if version >= 18:
            return make("ReduceMean", [of, "batch norm/axes"], [to], keepdims=1)
        return make("ReduceMean", [of], [to], axes=[0, 2], keepdims=1)

    def per_channel(of: str, to: str) -> Any:  # noqa: ANN401  # onnx.NodeProto
        return make("Reshape", [of, "batch norm/channels"], [to])

    tensor = onnx.helper.make_tensor(named("epsilon value"), 1, [1], [values.epsilon])
    return [
        # Mean m' and variance v' of this batch.
        make("Reshape", [x, "batch norm/columns"], [named("x")]),
        average(named("x"), values.mean),
        make("Sub", [named("x"), values.mean], [named("centred")]),
        make("Mul", [named("centred"), named("centred")], [named("squares")]),
        average(named("squares"), values.variance),
        # Whether it has more than one value for each channel.
        make("Size", [x], [named("n")]),
        make("Size", [mean], [named("n channels")]),
        make("Greater", [named("n"), named("n channels")], [named("enough")]),
        # The stored statistics M and V, scaled and shifted as the batch was since m and v.
        per_channel(mean, named("stored mean")),
        per_channel(variance, named("stored variance")),
        make("Constant", [], [named("epsilon")], value=tensor),
        make("CastLike", [named("epsilon"), x], [named("eps")])
        if version >= 15
        else make("Identity", [named("epsilon")], [named("eps")]),
        make("Add", [values.variance, named("eps")], [named("v'+eps")]),
        make("Add", [values.before_variance, named("eps")], [named("v+eps")]),
        make("Div", [named("v'+eps"), named("v+eps")], [named("a²")]),
        make("Sqrt", [named("a²")], [named("a")]),
        make("Sub", [named("stored mean"), values.before_mean], [named("M-m")]),
        make("Mul", [named("a"), named("M-m")], [named("a(M-m)")]),
        make("Add", [values.mean, named("a(M-m)")], [named("moved mean")]),
        make("Add", [named("stored variance"), named("eps")], [named("V+eps")]),
        make("Mul", [named("a²"), named("V+eps")], [named("a²(V+eps)")]),
        make("Max", [named("a²(V+eps)"), named("eps")], [named("moved variance")]),
        make("Where", [named("enough"), named("moved mean"), named("stored mean")], [named("m")]),
        make("Where", [named("enough"), named("moved variance"), named("V+eps")], [named("s²")]),
        # The batch norm itself, with these or the stored ones.
        make("Sub", [named("x"), named("m")], [named("shifted")]),
        make("Sqrt", [named("s²")], [named("deviation")]),
        make("Div", [named("shifted"), named("deviation")], [named("normal")]),
        per_channel(scale, named("scale")),
        make("Mul", [named("normal"), named("scale")], [named("scaled")]),
        per_channel(bias, named("bias")),
        make("Add", [named("scaled"), named("bias")], [named("y")]),
        make("Shape", [x], [named("shape")]),
        make("Reshape", [named("y"), named("shape")], [y]),
    ]


def mean_input(layer: str) -> str:
    """Return the name of the input that says which mean a layer's output should have."""
    return f"mean of {layer}"


def with_right_means(model: Any, shifts: Mapping[str, Shift]) -> Any:  # noqa: ANN401  # ModelProto
    """Return a copy of ``model`` in which each layer's output is shifted to a given mean.

    For every layer with a shift there is one more input, ``mean_input(layer)``, f32 ``[1, C, 1]``
    or, where channels come last, ``[1, C]``.

    Raises:
        InvalidInput: No layer has a place for a shift.
    """
    if not shifts:
        raise InvalidInput(no_shifts("has none"))
    onnx = import_onnx()
    make = onnx.helper.make_node
    version = next((o.version for o in model.opset_import if o.domain in {"", "ai.onnx"}), 0)
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    layer_of = {shift.node: layer for layer, shift in shifts.items()}
    nodes = []
    for node in model.graph.node:
        layer = layer_of.get(node.name)
        if layer is None:
            nodes.append(node)
            continue
        first = shifts[layer].channel_axis == 1
        y, target = node.output[0], mean_input(layer)
        raw = onnx.NodeProto()
        raw.CopyFrom(node)
        raw.output[0] = f"{y}/raw"
        if first:
            columns, axes = [0, 0, -1], [0, 2]
            nodes.append(raw)
        else:
            # The rank is not known: the number of channels comes from the wanted mean, [1, C].
            columns, axes = [-1, 1], [0]
            nodes += [
                raw,
                make("Shape", [target], [f"{y}/wanted"]),
                make("Mul", [f"{y}/wanted", f"{y}/lines"], [f"{y}/columns"]),
            ]
        constant = onnx.numpy_helper.from_array(
            np.array(columns, np.int64), f"{y}/columns" if first else f"{y}/lines"
        )
        changed.graph.initializer.append(constant)
        nodes.append(make("Reshape", [f"{y}/raw", f"{y}/columns"], [f"{y}/flat"]))
        if version >= 18:
            over = onnx.numpy_helper.from_array(np.array(axes, np.int64), f"{y}/axes")
            changed.graph.initializer.append(over)
            nodes.append(make("ReduceMean", [f"{y}/flat", f"{y}/axes"], [f"{y}/mean"], keepdims=1))
        else:
            nodes.append(make("ReduceMean", [f"{y}/flat"], [f"{y}/mean"], axes=axes, keepdims=1))
        nodes += [
            make("Sub", [target, f"{y}/mean"], [f"{y}/shift"]),
            make("Add", [f"{y}/flat", f"{y}/shift"], [f"{y}/shifted"]),
            make("Shape", [f"{y}/raw"], [f"{y}/shape"]),
            make("Reshape", [f"{y}/shifted", f"{y}/shape"], [y]),
        ]
        changed.graph.input.append(onnx.helper.make_tensor_value_info(target, 1, None))
    del changed.graph.node[:]
    changed.graph.node.extend(nodes)
    return changed


def no_shifts(got: str) -> str:
    """Return what to say where biases cannot be corrected."""
    return (
        "the correction 'bias_correction' needs layers with a bias, or an Add or batch norm "
        f"behind them, and a dynamic batch; this ONNX graph {got}: leave the correction out"
    )


def import_onnx() -> Any:  # noqa: ANN401  # a module
    """Return the onnx module.

    Raises:
        MissingDependency: It is not installed.
    """
    try:
        import onnx
    except ImportError as err:
        msg = "an ONNX model needs onnx; install it with: pip install bitquota[onnx]"
        raise MissingDependency(msg) from err
    return onnx

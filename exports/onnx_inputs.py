"""Quantized inputs in ONNX: QuantizeLinear and DequantizeLinear in front of layers' products.

Runtimes multiply integers where both factors of a product come from DequantizeLinear and the weight
has 8 bits. So codes of fewer bits are widened by a Cast, which runtimes do when they load the file,
and biases stand behind the product: ONNX Runtime would take product and Add for one Gemm, which it
computes in floating point; it leaves a Sub of the negated bias alone.

Design: docs/design/targets.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bitquota.candidates.storage import Granularity, Grid
from bitquota.errors import ExportFailed
from bitquota.models.onnx.layers import readers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from bitquota.quantizers.activations import ActivationQuantizer
    from bitquota.quantizers.weights import QuantizedWeight

CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
INTEGER_BITS = 8
"""Inputs of more bits are stored in 16, and multiplied in floating point."""


def multiplies_integers(weight: QuantizedWeight, grid: ActivationQuantizer | None) -> bool:
    """Whether runtimes can multiply a weight's codes with those of an input."""
    plain = weight.scheme.grid is Grid.SYMMETRIC and weight.bits <= INTEGER_BITS
    whole = weight.scheme.granularity is not Granularity.GROUP and not weight.scheme.row_bits
    return grid is not None and grid.bits <= INTEGER_BITS and plain and whole


def quantize_inputs(
    model: Any,  # noqa: ANN401  # onnx.ModelProto
    grids: Mapping[str, ActivationQuantizer],
    initializer_of: Mapping[str, str],
) -> None:
    """Put the inputs of layers on their grids, in place, before weights are replaced.

    Layers that read one tensor on one grid share its nodes. Values beyond a grid of fewer codes
    than its type has are clipped first.

    Args:
        model: A graph with weights in floating point.
        grids: Of layers by name; others read their inputs as they are.
        initializer_of: The weight of each layer.

    Raises:
        ExportFailed: A layer's product is not in the graph.
    """
    graph = model.graph
    _apart_from_biases(graph, [initializer_of[name] for name in grids])
    read_by = readers(graph)
    made: dict[tuple[str, ActivationQuantizer], str] = {}
    before: dict[str, list[Any]] = {}  # new nodes by the output of the node they stand in front of
    for layer, grid in grids.items():
        products = list(_products(initializer_of[layer], read_by))
        if not products:
            msg = (
                f"the input of layer '{layer}' must be visible in the ONNX graph to be quantized; "
                "no product reads its weight: leave its activations in full precision"
            )
            raise ExportFailed(msg, layer=layer)
        for node, at in products:
            key = (node.input[at], grid)
            if key not in made:
                stem = f"{node.input[at]}.q{len(made)}"
                nodes = _nodes(graph, node.input[at], stem, grid)
                before.setdefault(node.output[0], []).extend(nodes)
                made[key] = nodes[-1].output[0]
            node.input[at] = made[key]
    ordered = [n for node in graph.node for n in (*before.get(node.output[0], ()), node)]
    _replace_nodes(graph, ordered)


def _products(initializer: str, read_by: Mapping[str, list[Any]]) -> Iterator[tuple[Any, int]]:
    """Yield the products with a weight, or its transpose, and where each has its other factor."""
    for node in read_by.get(initializer, ()):
        places = list(node.input)
        if node.op_type == "Transpose":
            yield from _products(node.output[0], read_by)
        elif node.op_type in CONVOLUTIONS and places[1] == initializer:
            yield node, 0
        elif node.op_type in {"MatMul", "Gemm"} and initializer in places[:2]:
            yield node, 1 - places.index(initializer)


def _nodes(graph: Any, given: str, stem: str, grid: ActivationQuantizer) -> list[Any]:  # noqa: ANN401
    """Return the nodes that put a tensor on a grid, the last with its values."""
    import onnx

    make = onnx.helper.make_node
    wide = grid.bits > INTEGER_BITS
    kinds: dict[tuple[bool, bool], Any] = {
        (False, False): np.uint8, (True, False): np.int8,
        (False, True): np.uint16, (True, True): np.int16,
    }  # fmt: skip
    kind = kinds[grid.lowest < 0, wide]
    scale = np.float32(grid.scale) if grid.scale > 0 else np.float32(1.0)

    def constant(name: str, value: Any) -> str:  # noqa: ANN401  # a numpy scalar
        graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(value), f"{stem}.{name}"))
        return f"{stem}.{name}"

    # What a grid of one value holds is zero.
    lowest, highest = (grid.lowest, grid.highest) if grid.scale > 0 else (0, 0)
    ends = [np.float32((code - grid.zero_point) * scale) for code in (lowest, highest)]
    nodes, source = [], given
    if (lowest, highest) != (np.iinfo(kind).min, np.iinfo(kind).max):
        # Not Clip: behind a convolution ONNX Runtime would round the bias, and then fuse nothing.
        source = f"{stem}.clipped"
        nodes += [
            make("Max", [given, constant("lowest", ends[0])], [f"{stem}.floored"]),
            make("Min", [f"{stem}.floored", constant("highest", ends[1])], [source]),
        ]
    names = [constant("scale", scale), constant("zero_point", kind(grid.zero_point))]
    nodes.append(make("QuantizeLinear", [source, *names], [f"{stem}.codes"]))
    nodes.append(make("DequantizeLinear", [f"{stem}.codes", *names], [f"{stem}.values"]))
    return nodes


def _apart_from_biases(graph: Any, weights: list[str]) -> None:  # noqa: ANN401  # onnx.GraphProto
    """Subtract negated biases behind products with ``weights``, where they were added in them."""
    import onnx

    make = onnx.helper.make_node
    read_by = readers(graph)
    held = {t.name: t for t in graph.initializer}
    products = {node.output[0]: node for w in weights for node, _ in _products(w, read_by)}
    instead: dict[str, list[Any]] = {}  # by the output of the node that goes

    def negated(name: str) -> str:
        added = f"{name}.negated"
        if added not in held:
            array = -onnx.numpy_helper.to_array(held[name])
            held[added] = onnx.numpy_helper.from_array(array, added)
            graph.initializer.append(held[added])
        return added

    for out, node in products.items():
        settings = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Gemm":
            factors = {settings.get("alpha", 1.0), settings.get("beta", 1.0)}
            bias = node.input[2] if len(node.input) > 2 else ""
            if settings.get("transA", 0) or factors != {1.0} or (bias and bias not in held):
                continue
            weight, nodes = node.input[1], []
            if settings.get("transB", 0):
                weight = f"{out}.turned"
                nodes.append(make("Transpose", [node.input[1]], [weight], perm=[1, 0]))
            product = f"{out}.product" if bias else out
            nodes.append(make("MatMul", [node.input[0], weight], [product]))
            if bias:
                nodes.append(make("Sub", [product, negated(bias)], [out]))
            instead[out] = nodes
        elif node.op_type == "MatMul":
            behind = read_by.get(out, ())
            if len(behind) != 1 or behind[0].op_type != "Add":
                continue
            other = next((name for name in behind[0].input if name != out), "")
            if other in held:
                added = behind[0].output[0]
                instead[added] = [make("Sub", [out, negated(other)], [added])]
    # New nodes stand where the old ones did; biases that nothing reads any more go.
    _replace_nodes(graph, [n for node in graph.node for n in instead.get(node.output[0], [node])])
    read = readers(graph).keys() | {v.name for v in graph.output}
    kept = [t for t in graph.initializer if t.name in read]
    copies = [onnx.TensorProto.FromString(t.SerializeToString()) for t in kept]
    del graph.initializer[:]
    graph.initializer.extend(copies)


def _replace_nodes(graph: Any, nodes: list[Any]) -> None:  # noqa: ANN401  # onnx.GraphProto
    copies = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)

"""Blocks of ONNX Runtime: which weights, products and look-ups, and the nodes they become."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from bitquota.candidates.layers import LayerKind
from bitquota.exports.storage_rules import in_blocks
from bitquota.quantizers.packing import pack_bits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bitquota.candidates.layers import Layer
    from bitquota.quantizers.weights import QuantizedWeight

BLOCKS = ".blocks"
"""Suffix of the packed codes of a MatMulNBits node."""

CONTRIB = "com.microsoft"
"""Domain of MatMulNBits."""


def fits_blocks(layer: Layer, weight: QuantizedWeight) -> bool:
    """Return whether MatMulNBits can hold this weight: symmetric blocks with fp32 scales."""
    return in_blocks(layer, weight.bits, weight.scheme)


def packed_blocks(weight: QuantizedWeight) -> NDArray[np.uint8]:
    """Return ``u8[rows, blocks, block_size * bits / 8]``: low bits first, shifted to be unsigned.

    Without zero points MatMulNBits subtracts ``2^(bits-1)``.
    """
    rows, columns = weight.codes.shape
    size = weight.scheme.group_size or columns
    unsigned = weight.codes.cpu().numpy() + 2 ** (weight.bits - 1)
    flat = pack_bits(unsigned.astype(np.uint16).reshape(1, -1), weight.bits)
    return flat.reshape(rows, columns // size, -1)


def is_product(node: Any, places: dict[str, bool], layer: Layer) -> bool:  # noqa: ANN401
    """Return whether ``node`` multiplies with the weight on its right, as rows of output channels.

    Args:
        node: An ``onnx.NodeProto``.
        places: Names under which the weight can be read, and whether each is its transpose.
        layer: The layer of the weight.
    """
    attributes = {a.name: a for a in node.attribute}
    if node.op_type not in {"MatMul", "Gemm"} or node.input[1] not in places:
        return False
    if set(node.input[2:]) & set(places) or node.input[0] in places:
        return False
    turned = places[node.input[1]]
    if node.op_type == "Gemm":
        plain = all(
            name not in attributes or attributes[name].f == 1.0 for name in ("alpha", "beta")
        )
        if not plain or ("transA" in attributes and attributes["transA"].i):
            return False
        turned ^= bool("transB" in attributes and attributes["transB"].i)
    # [rows, columns] must be turned to stand on the right; [columns, rows] must not.
    return turned != (layer.kind is LayerKind.LINEAR_TRANSPOSED)


def is_look_up(node: Any, places: dict[str, bool], layer: Layer) -> bool:  # noqa: ANN401
    """Return whether ``node`` looks up rows of the weight; arguments as of ``is_product``."""
    attributes = {a.name: a.i for a in node.attribute}
    if node.op_type != "Gather" or node.input[0] not in places or node.input[1] in places:
        return False
    turned = places[node.input[0]]
    return not attributes.get("axis", 0) and turned == (layer.kind is LayerKind.LINEAR_TRANSPOSED)


def block_look_up(
    node: Any,  # noqa: ANN401  # onnx.NodeProto
    names: tuple[str, str],
    shape: str,
    weight: QuantizedWeight,
) -> list[Any]:
    """Return the nodes that look up what ``node``, a Gather of ``is_look_up``, does.

    Args:
        node: See above.
        names: Initializers of the packed codes and of the scales, as of ``block_product``.
        shape: Initializer that holds the rows and -1: codes of a row are behind one another.
        weight: Its quantized weight.
    """
    import onnx

    flat, scales = f"{node.output[0]}.codes", f"{node.output[0]}.scales"
    make = onnx.helper.make_node
    return [
        make("Reshape", [names[0], shape], [flat]),
        make("Reshape", [names[1], shape], [scales]),
        make(
            "GatherBlockQuantized",
            [flat, node.input[1], scales],
            list(node.output),
            domain=CONTRIB,
            bits=weight.bits,
            block_size=weight.scheme.group_size,
            gather_axis=0,
            quantize_axis=1,
        ),
    ]


def block_product(
    node: Any,  # noqa: ANN401  # onnx.NodeProto
    names: tuple[str, str],
    layer: Layer,
    weight: QuantizedWeight,
) -> list[Any]:
    """Return the nodes that compute what ``node`` does.

    Args:
        node: A product of which ``is_product`` holds.
        names: Initializers of the packed codes and of the scales.
        layer: The layer.
        weight: Its quantized weight.
    """
    import onnx

    bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else ""
    output = node.output[0]
    product = f"{output}.product" if bias else output
    made = [
        onnx.helper.make_node(
            "MatMulNBits",
            [node.input[0], *names],
            [product],
            domain=CONTRIB,
            K=layer.columns,
            N=layer.rows,
            bits=weight.bits,
            block_size=weight.scheme.group_size,
            accuracy_level=1,  # fp32 activations; 4 would quantize them to int8
        )
    ]
    if bias:
        made.append(onnx.helper.make_node("Add", [product, bias], [output]))
    return made

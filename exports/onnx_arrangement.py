"""How ONNX stores a quantized weight: the order of its axes, and the operators that lead back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from bitquota.candidates.layers import LayerKind
from bitquota.candidates.storage import Granularity
from bitquota.errors import InvalidPlan
from bitquota.models.layout import TRANSPOSED_CONVOLUTIONS, back_to_stored, from_matrix

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from bitquota.candidates.layers import Layer
    from bitquota.quantizers.weights import QuantizedWeight


class Arranged(NamedTuple):
    """A quantized weight as DequantizeLinear takes it.

    Attributes:
        codes: The codes, in the stored shape or as a matrix ``[rows, columns]``.
        scales: One for each block of codes.
        zero_points: Like ``scales``, if there are any.
        axis: Along which scales differ; ``None`` for one scale.
        block: Codes for each scale along ``axis``; 0 where each index has its own.
        steps: Operators that make the stored shape of ``codes``, with their arguments.
    """

    codes: NDArray[Any]
    scales: NDArray[Any]
    zero_points: NDArray[Any] | None
    axis: int | None
    block: int
    steps: list[tuple[str, list[int]]]


def arrange(layer: Layer, weight: QuantizedWeight) -> Arranged:
    """Return codes and scales so that the fewest operators give the stored shape.

    Raises:
        InvalidPlan: ONNX cannot store the weight.
    """
    block = weight.scheme.group_size or 0
    if block and layer.columns % block:
        msg = (
            f"ONNX needs the group size {block} to divide the {layer.columns} weights per output "
            f"channel of layer '{layer.name}'; plan with --target ort-cpu, or per channel"
        )
        raise InvalidPlan(msg, layers=[layer.name])
    if layer.kind is LayerKind.EXPERTS:
        msg = f"ONNX has no operator for the experts of layer '{layer.name}'; exclude them"
        raise InvalidPlan(msg, layers=[layer.name])
    scales = weight.scales.detach().float().cpu().numpy()
    zeros = None if weight.zero_points is None else weight.zero_points.cpu().numpy()
    granularity = weight.scheme.granularity

    def shaped(
        how: Callable[[NDArray[Any]], NDArray[Any]],
    ) -> tuple[NDArray[Any], NDArray[Any] | None]:
        return how(scales), None if zeros is None else how(zeros)

    # In the stored shape, where one axis of it tells the scale.
    transposed = layer.kind is LayerKind.LINEAR_TRANSPOSED
    convolved = layer.kind in TRANSPOSED_CONVOLUTIONS
    grouped = convolved and layer.rows != layer.weight_shape[1]
    whole = from_matrix(weight.codes.int(), layer).cpu().numpy()
    by_column = int(convolved or transposed)
    found = None
    if granularity is Granularity.TENSOR:
        found = Arranged(whole, *shaped(lambda a: a.reshape(())), None, 0, [])
    elif granularity is Granularity.CHANNEL and not grouped and layer.axes is None:
        found = Arranged(whole, *shaped(lambda a: a.reshape(-1)), by_column, 0, [])
    elif granularity is Granularity.GROUP and transposed:
        found = Arranged(whole, *shaped(lambda a: a.T), 0, block, [])
    if found is not None:
        return _hidden(found) if transposed and misread(weight) else found

    # As a matrix of output channels, brought to the stored shape afterwards.
    matrix = weight.codes.int().cpu().numpy()
    steps = steps_back(layer)
    if granularity is Granularity.CHANNEL:
        return Arranged(matrix, *shaped(lambda a: a.reshape(-1)), 0, 0, steps)
    return Arranged(matrix, scales, zeros, 1, block, steps)


def _hidden(plain: Arranged) -> Arranged:
    """Return the same behind a Reshape, so that ONNX Runtime sees no matrix that it can fuse."""
    scales, zeros, axis = plain.scales, plain.zero_points, plain.axis
    if plain.block:
        scales, zeros = scales[None], None if zeros is None else zeros[None]
    shape = list(plain.codes.shape)
    return plain._replace(
        codes=plain.codes[None],
        scales=scales,
        zero_points=zeros,
        axis=None if axis is None else axis + 1,
        steps=[("Reshape", shape)],
    )


def steps_back(layer: Layer) -> list[tuple[str, list[int]]]:
    """Return the operators that make the stored shape of a matrix ``[rows, columns]``."""
    if layer.kind in TRANSPOSED_CONVOLUTIONS:
        n_in, out, *kernel = layer.weight_shape
        groups = layer.rows // out
        return [
            ("Reshape", [groups, out, n_in // groups, *kernel]),
            ("Transpose", [0, 2, 1, *range(3, 3 + len(kernel))]),
            ("Reshape", list(layer.weight_shape)),
        ]
    if layer.kind is LayerKind.LINEAR_TRANSPOSED:
        return [("Transpose", [1, 0])]
    if layer.axes is not None:
        turned = [layer.weight_shape[k] for k in layer.axes]
        return [("Reshape", turned), ("Transpose", back_to_stored(layer.axes))]
    if len(layer.weight_shape) > 2:
        return [("Reshape", list(layer.weight_shape))]
    return []


def misread(weight: QuantizedWeight) -> bool:
    """Return whether ONNX Runtime would read the weight wrongly as ``[columns, rows]``.

    Its MatMulNBits fusion (1.31) takes int2 rows to start at bytes, which they do only if four
    divides their length; the result is wrong without an error. So it is through a Transpose, over
    which it pulls the codes, but not through a Reshape.
    """
    return weight.bits == 2 and weight.codes.shape[0] % 4 != 0

"""Between the shape in which a framework stores a weight and the matrix ``rows x columns``.

One row of the matrix is everything that one output channel is computed from, so that "per
channel" and "per group of columns" mean the same for every kind of layer.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from bitquota.candidates.layers import LayerKind
from bitquota.errors import InvalidModel

if TYPE_CHECKING:
    from torch import Tensor

    from bitquota.candidates.layers import Layer

CONVOLUTIONS = frozenset({LayerKind.CONV1D, LayerKind.CONV2D, LayerKind.CONV3D})
TRANSPOSED_CONVOLUTIONS = frozenset(
    {LayerKind.CONV_TRANSPOSE1D, LayerKind.CONV_TRANSPOSE2D, LayerKind.CONV_TRANSPOSE3D}
)


def matrix_shape(
    kind: LayerKind, shape: tuple[int, ...], *, groups: int = 1, transposed: bool = False
) -> tuple[int, int]:
    """Return ``(rows, columns)`` of a weight of this shape.

    Args:
        kind: What the layer does with it.
        shape: Shape as the framework stores it.
        groups: Groups of a transposed convolution (its shape alone does not tell them).
        transposed: Whether experts store ``[expert, in, out]`` instead of ``[expert, out, in]``.

    Raises:
        InvalidModel: The shape has too few dimensions for the kind.
    """
    least = 3 if kind is LayerKind.EXPERTS or kind in TRANSPOSED_CONVOLUTIONS else 2
    if len(shape) < least:
        msg = f"the weight of a layer of kind '{kind}' must have {least} dimensions; got {shape}"
        raise InvalidModel(msg, shape=list(shape))
    if kind in TRANSPOSED_CONVOLUTIONS:
        return shape[1] * groups, shape[0] // groups * math.prod(shape[2:])
    if kind is LayerKind.LINEAR_TRANSPOSED:
        return shape[1], shape[0]
    if kind is LayerKind.EXPERTS:
        return (shape[0] * shape[2], shape[1]) if transposed else (shape[0] * shape[1], shape[2])
    return shape[0], math.prod(shape[1:])


def to_matrix(weight: Tensor, layer: Layer) -> Tensor:
    """Return ``weight`` as ``[rows, columns]``, one row per output channel.

    A view where the memory layout permits it, otherwise a copy. Differentiable.

    Raises:
        InvalidModel: ``weight`` has not the shape that ``layer`` names.
    """
    if tuple(weight.shape) != layer.weight_shape:
        msg = (
            f"the weight of layer '{layer.name}' must have shape {list(layer.weight_shape)}; got "
            f"{list(weight.shape)}: discover the model again after changing it"
        )
        raise InvalidModel(msg, layer=layer.name, shape=list(weight.shape))
    if layer.kind in TRANSPOSED_CONVOLUTIONS:
        n_in, out_per_group, *kernel = weight.shape
        groups = layer.rows // out_per_group
        split = weight.reshape(groups, n_in // groups, out_per_group, *kernel)
        return split.transpose(1, 2).reshape(layer.rows, layer.columns)
    if layer.kind is LayerKind.LINEAR_TRANSPOSED:
        return weight.t()
    if layer.axes is not None:
        return weight.permute(layer.axes).reshape(layer.rows, layer.columns)
    if layer.kind is LayerKind.EXPERTS and _experts_transposed(layer):
        return weight.transpose(1, 2).reshape(layer.rows, layer.columns)
    return weight.reshape(layer.rows, layer.columns)


def from_matrix(matrix: Tensor, layer: Layer) -> Tensor:
    """Return the weight in its stored shape: the exact inverse of ``to_matrix``. Contiguous.

    Raises:
        InvalidModel: ``matrix`` is not ``[rows, columns]`` of ``layer``.
    """
    if tuple(matrix.shape) != (layer.rows, layer.columns):
        msg = (
            f"the matrix of layer '{layer.name}' must be {layer.rows} x {layer.columns}; got "
            f"{list(matrix.shape)}"
        )
        raise InvalidModel(msg, layer=layer.name, shape=list(matrix.shape))
    shape = layer.weight_shape
    if layer.kind in TRANSPOSED_CONVOLUTIONS:
        n_in, out_per_group, *kernel = shape
        groups = layer.rows // out_per_group
        split = matrix.reshape(groups, out_per_group, n_in // groups, *kernel)
        return split.transpose(1, 2).reshape(shape).contiguous()
    if layer.kind is LayerKind.LINEAR_TRANSPOSED:
        return matrix.t().contiguous()
    if layer.axes is not None:
        turned = matrix.reshape([shape[k] for k in layer.axes])
        return turned.permute(back_to_stored(layer.axes)).contiguous()
    if layer.kind is LayerKind.EXPERTS and _experts_transposed(layer):
        return matrix.reshape(shape[0], shape[2], shape[1]).transpose(1, 2).contiguous()
    return matrix.reshape(shape).contiguous()


def back_to_stored(axes: tuple[int, ...]) -> list[int]:
    """Return the permutation that undoes ``axes``."""
    return sorted(range(len(axes)), key=axes.__getitem__)


def _experts_transposed(layer: Layer) -> bool:
    # Square experts give both readings the same counts; they are taken as [expert, out, in].
    return layer.columns != layer.weight_shape[2]

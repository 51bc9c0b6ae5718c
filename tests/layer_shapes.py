"""Layers of every kind for tests."""

import math

from bitquota.candidates.layers import Layer, LayerKind
from bitquota.models.layout import matrix_shape


def layer_of(kind, shape, *, groups=1, transposed=False, name="layer"):
    """Return a layer of that kind and weight shape."""
    rows, columns = matrix_shape(kind, tuple(shape), groups=groups, transposed=transposed)
    return Layer(
        name=name,
        kind=kind,
        weight_name=f"{name}.weight",
        weight_shape=tuple(shape),
        rows=rows,
        columns=columns,
        n_weights=math.prod(shape),
    )


LAYERS = {
    LayerKind.CONV1D: layer_of(LayerKind.CONV1D, (6, 2, 5), groups=3),
    LayerKind.CONV2D: layer_of(LayerKind.CONV2D, (6, 4, 3, 3)),
    LayerKind.CONV3D: layer_of(LayerKind.CONV3D, (4, 3, 2, 2, 2)),
    LayerKind.CONV_TRANSPOSE1D: layer_of(LayerKind.CONV_TRANSPOSE1D, (6, 3, 4), groups=2),
    LayerKind.CONV_TRANSPOSE2D: layer_of(LayerKind.CONV_TRANSPOSE2D, (4, 3, 3, 2)),
    LayerKind.CONV_TRANSPOSE3D: layer_of(LayerKind.CONV_TRANSPOSE3D, (4, 2, 2, 2, 2), groups=4),
    LayerKind.LINEAR: layer_of(LayerKind.LINEAR, (5, 7)),
    LayerKind.LINEAR_TRANSPOSED: layer_of(LayerKind.LINEAR_TRANSPOSED, (7, 5)),
    LayerKind.EMBEDDING: layer_of(LayerKind.EMBEDDING, (11, 6)),
    LayerKind.EXPERTS: layer_of(LayerKind.EXPERTS, (3, 4, 5), transposed=True),
    LayerKind.RECURRENT: layer_of(LayerKind.RECURRENT, (8, 6)),
    LayerKind.CONTRACTION: layer_of(LayerKind.CONTRACTION, (12, 5)),
}
"""One layer of each kind, none of them square."""

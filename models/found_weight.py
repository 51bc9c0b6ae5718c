"""One quantizable weight while a model is searched, and what a call of it costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bitquota.candidates.layers import LayerKind
from bitquota.models.layout import matrix_shape

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class FoundWeight:
    """One quantizable weight: its layer so far, and per sample what was counted of its calls."""

    name: str
    kind: LayerKind
    weight_name: str
    weight: Tensor
    groups: int = 1
    transposed: bool = False
    aliases: list[str] = field(default_factory=list)
    n_macs: int = 0
    n_inputs: int = 0
    axes: tuple[int, ...] | None = None
    columns: int | None = None


def n_macs_of(kind: LayerKind, weight: Tensor, groups: int, n_in: int, n_out: int) -> int:
    """Return the multiply-accumulates of one call, for all its samples.

    A dense layer multiplies each output with a whole row; a transposed convolution each input
    with the whole slice of its channel (what falls outside a padded border included). Looking
    up an embedding multiplies nothing.
    """
    if kind is LayerKind.EMBEDDING:
        return 0
    if kind.name.startswith("CONV_TRANSPOSE"):
        return n_in * math.prod(weight.shape[1:])
    if kind is LayerKind.EXPERTS:
        return 0
    rows, columns = matrix_shape(kind, tuple(weight.shape), groups=groups)
    swaps = kind in (LayerKind.LINEAR, LayerKind.LINEAR_TRANSPOSED)
    if swaps and n_out * columns != n_in * rows and n_out * rows == n_in * columns:
        return n_out * rows  # the other way round: a tied weight, transposed
    return n_out // rows * rows * columns


def n_samples_of(example_inputs: tuple[Tensor, ...]) -> int:
    """Return the first dimension of the first input, or 1 where there is none."""
    return max(1, example_inputs[0].shape[0]) if example_inputs and example_inputs[0].ndim else 1

"""A model turned before its weights are rounded, so that they round better.

What layers write is multiplied by an orthogonal matrix, and what reads it too: full precision
computes what it did, no byte is added, and large weights and inputs are spread over many. The
matrices are folded into weights, as [QuaRot] and [SpinQuant] (R1 and R2) fold them; nothing is
turned while the model runs.

References:
    [QuaRot] S. Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024,
    arXiv 2404.00456.
    [SpinQuant] Z. Liu et al., "SpinQuant: LLM Quantization with Learned Rotations", 2024,
    arXiv 2405.16406.

Design: docs/design/rounding.md
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from bitquota.errors import InvalidInput, InvalidModel, InvalidPlan
from bitquota.models.onnx.program import source_of
from bitquota.models.orthogonal import Orthogonal
from bitquota.models.rotation_places import attention_heads, residual_stream
from bitquota.models.running import put_in_eval_mode, run_module, tensor_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from bitquota.candidates.layers import Inventory
    from bitquota.canonical import JsonObject
    from bitquota.models.rotation_places import RotationPlace, Side

SEED = 0
"""Matrices are drawn with this seed, and the number of the place."""

UNCHANGED = 1e-4
"""Relative change of the outputs in full precision from which on nothing is turned."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rotation:
    """A place that is turned, and how."""

    place: RotationPlace
    matrix: Orthogonal

    def __post_init__(self) -> None:
        """Check that one fits the other; raises ``ValueError``."""
        if self.place.size != len(self.matrix.signs) or not self.place.sides:
            msg = (
                f"a place of {self.place.size} channels needs tensors and a matrix of that size; "
                f"got {len(self.place.sides)} and {len(self.matrix.signs)}"
            )
            raise ValueError(msg)

    def apply(self, module: nn.Module) -> None:
        """Turn the place in ``module``, in place.

        Raises:
            InvalidPlan: The model lacks a tensor of the place, or has one of another shape.
        """
        try:
            with torch.no_grad():
                for norm in self.place.norms:
                    weight = tensor_of(module, norm.weight)
                    for side in norm.readers:
                        _multiply(module, side, weight)
                    weight.fill_(1.0)
                for name, axis in self.place.sides:
                    tensor = tensor_of(module, name)
                    tensor.copy_(self.matrix.along(tensor, axis))
        except (RuntimeError, IndexError, InvalidModel) as err:
            name = self.place.sides[0][0]
            msg = (
                f"'{name}' must be turned in the model that the plan was made for; this one does "
                f"not fit ({err}): plan again"
            )
            raise InvalidPlan(msg, tensor=name) from err


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RotatedModel:
    """A model that was turned.

    Attributes:
        module: It computes what the original does, up to rounding.
        rotations: Where it differs.
        undone: Why the residual stream is as it was, if it is.
    """

    module: nn.Module
    rotations: tuple[Rotation, ...]
    undone: str = ""

    def to_json(self) -> JsonObject:
        """Return what a plan says of it: how much was turned, and why not more."""
        stream = sum(bool(rotation.place.norms) for rotation in self.rotations)
        told: JsonObject = {
            "residual_streams": stream,
            "attention_layers": len(self.rotations) - stream,
        }
        return told | ({"undone": self.undone} if self.undone else {})


def rotate(module: nn.Module, inventory: Inventory, inputs: tuple[Tensor, ...]) -> RotatedModel:
    """Return a copy of ``module`` with its residual stream and its heads' values turned.

    Args:
        module: The full-precision model in eval mode; it is not changed.
        inventory: All its layers, also those that stay in full precision.
        inputs: Positional arguments of one pass over few samples.

    Raises:
        InvalidInput: Nothing can be turned, and why.

    Cost: a dozen passes over the samples, and ``Orthogonal.along`` of all weights.
    """
    if source_of(module) is not None:
        msg = (
            "the correction 'rotation' does not change ONNX graphs: plan the torch model that the "
            "graph came from, or leave the correction out"
        )
        raise InvalidInput(msg)
    stream, undone = [], ""
    try:
        stream = [residual_stream(module, inventory, inputs)]
    except InvalidInput as err:
        undone = str(err)
    heads = attention_heads(module, inventory, inputs)
    if stream:
        try:
            return _turned(module, [*stream, *heads], inputs)
        except InvalidInput as err:
            undone = str(err)
    if not heads:
        msg = (
            "the correction 'rotation' needs a residual stream or attention values that can be "
            f"turned: {undone}; leave the correction out"
        )
        raise InvalidInput(msg)
    return replace(_turned(module, heads, inputs), undone=undone)


def _turned(
    module: nn.Module, places: Sequence[RotationPlace], inputs: tuple[Tensor, ...]
) -> RotatedModel:
    """Return a copy with places turned; raises ``InvalidInput`` if it computes something else."""
    rotations = tuple(
        Rotation(place=place, matrix=Orthogonal.drawn(place.size, SEED + k))
        for k, place in enumerate(places)
    )
    turned = put_in_eval_mode(copy.deepcopy(module))
    for rotation in rotations:
        rotation.apply(turned)
    before, after = (run_module(m, inputs).double() for m in (module, turned))
    change = float((after - before).norm() / before.norm().clamp(min=1e-300))
    if not change <= UNCHANGED:
        msg = (
            f"turned, the model's outputs in full precision would change by {change:.1e}, "
            "relative: something on the way treats channels one by one, or subtracts their mean"
        )
        raise InvalidInput(msg)
    return RotatedModel(module=turned, rotations=rotations)


def _multiply(module: nn.Module, side: Side, factors: Tensor) -> None:
    tensor, axis = tensor_of(module, side[0]), side[1]
    shape = [1] * tensor.ndim
    shape[axis] = -1
    tensor.mul_(factors.to(tensor).reshape(shape))

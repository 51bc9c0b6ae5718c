"""Gradients of a loss for the metrics that need them, refused in words where a model has none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from bitquota.errors import InvalidModel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def gradients_at(
    total: Tensor, tensors: Sequence[Tensor], metric: str, *, create_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """Return the gradient of ``total`` at each of ``tensors``, ``None`` where there is none.

    Args:
        total: A scalar.
        tensors: Leaves that ``total`` was computed from.
        metric: Whom to name in an error.
        create_graph: Whether the gradients will be differentiated again.

    Raises:
        InvalidModel: The output has no gradient, or the model overwrites what it needs.
    """
    if not total.requires_grad:
        msg = (
            f"the metric '{metric}' needs gradients, and none reach the model's output: it runs "
            "outside torch or detaches; use 'diagonal', 'gram' or 'pairs'"
        )
        raise InvalidModel(msg, measure=metric)
    try:
        return torch.autograd.grad(total, tensors, create_graph=create_graph, allow_unused=True)
    except RuntimeError as err:
        if "modified by an inplace operation" not in str(err):
            raise
        msg = (
            f"the metric '{metric}' needs gradients, and the model overwrites a value that they "
            "need: use 'diagonal', 'gram' or 'pairs', or make its operations not work in place"
        )
        raise InvalidModel(msg, measure=metric) from err

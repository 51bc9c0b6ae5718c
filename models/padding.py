"""Which positions of a batch of sequences are tokens, and which only fill it up.

A model of transformers says so by an ``attention_mask``. Where it is zero the model's logits are
set to zero (see ``huggingface``), whatever the weights are: nothing that is measured depends on
them, no gradient passes, and the same rows of full precision tell which positions count.

Design: docs/design/models.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bitquota.models.calls import LayerCall


def padding_mask(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor | None:
    """Return ``bool[N, T]``, true where ``inputs`` hold tokens; ``None`` if nothing is padded.

    Args:
        module: A model; one that has ``takes_padding`` takes a mask as its second input, or where
            ``mask_at`` says (part of a model is also given what the part before it returned).
        inputs: Of one pass.
    """
    at: int = getattr(module, "mask_at", 1)
    if not getattr(module, "takes_padding", False) or len(inputs) <= at:
        return None
    mask: Tensor = inputs[at] != 0
    return None if mask.ndim != 2 or bool(mask.all()) else mask


def without_padding(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``logits: [N, T, V]`` with zeros at padded positions; others as they are."""
    if mask is None or logits.ndim != 3 or logits.shape[:2] != mask.shape:
        return logits
    return logits.masked_fill(~mask.to(logits.device)[..., None], 0.0)


def inputs_that_count(call: LayerCall, mask: Tensor | None) -> Tensor:
    """Return what a layer is called with: of a linear layer's ``[N, T, C]`` the rows of tokens.

    Convolutions keep the place of each value, and tokens gathered for an expert have no mask.
    """
    inputs = call.inputs
    if mask is None or inputs.shape[:2] != mask.shape or call.operator.startswith("conv"):
        return inputs
    return inputs[mask.to(inputs.device)]


def positions_that_count(logits: Tensor) -> Tensor:
    """Return ``bool[N, ...]``: positions of ``logits: [N, ..., C]`` that are not all zero."""
    counted: Tensor = (logits != 0).any(dim=-1)
    return counted

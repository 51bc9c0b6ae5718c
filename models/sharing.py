"""Copies of a module over the same memory."""

from __future__ import annotations

import copy
import warnings

from torch import nn

from bitquota.models.calls import has_values


def sharing_weights(module: nn.Module) -> nn.Module:
    """Return a copy with parameters of its own over the same memory.

    Whoever replaces parameters and never writes into them does not need a second copy of all
    weights; processes that were forked with the model loaded would each have one.
    """
    own: dict[int, object] = {}
    for p in module.parameters():
        own[id(p)] = nn.Parameter(p.data, requires_grad=p.requires_grad)
    # An outline has nothing to copy, and its tensors must stay in one mode.
    own |= {id(b): b for b in module.buffers() if not has_values(b)}
    with warnings.catch_warnings():
        # torch 2.13 warns about its own tree specifications when an exported graph is copied.
        warnings.simplefilter("ignore", FutureWarning)
        return copy.deepcopy(module, own)

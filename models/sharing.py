"""Copies of a module over the same memory."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING

from torch import nn

from bitquota.models.outlines import has_values

if TYPE_CHECKING:
    from collections.abc import Iterable


def sharing_weights(module: nn.Module, *, husks: Iterable[nn.Module] = ()) -> nn.Module:
    """Return a copy with parameters of its own over the same memory.

    Whoever replaces parameters and never writes into them does not need a second copy of all
    weights; processes that were forked with the model loaded would each have one.

    Args:
        module: The module.
        husks: Modules inside it that never run in the copy: there they have their attributes, which
            others may look at, but no parameters. A twentieth of the time.
    """
    own: dict[int, object] = {id(part): _husk(part) for part in husks}
    for p in module.parameters():
        # An outline has nothing to share, nor to copy.
        shared = nn.Parameter(p.data, requires_grad=p.requires_grad) if has_values(p) else p
        own[id(p)] = shared
    own |= {id(b): b for b in module.buffers() if not has_values(b)}
    with warnings.catch_warnings():
        # torch 2.13 warns about its own tree specifications when an exported graph is copied.
        warnings.simplefilter("ignore", FutureWarning)
        return copy.deepcopy(module, own)


def _husk(module: nn.Module) -> nn.Module:
    husk = copy.copy(module)
    # Hooks, buffers and modules may change on their own.
    vars(husk).update({k: copy.copy(v) for k, v in vars(husk).items() if isinstance(v, dict)})
    husk._parameters.clear()  # noqa: SLF001
    for name, part in module._modules.items():  # noqa: SLF001
        husk._modules[name] = None if part is None else _husk(part)  # noqa: SLF001
    return husk

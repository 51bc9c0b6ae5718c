"""The repeated blocks of a network: decoder layers, residual blocks, inverted bottlenecks.

Design: docs/design/rounding.md
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bitquota.candidates.layers import Layer

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def repeated_blocks(
    module: nn.Module, layers: Mapping[str, Layer], inputs: tuple[Tensor, ...]
) -> dict[str, tuple[str, ...]]:
    """Return the layers inside each block, by the block's name, in the order in which they run.

    Blocks are the outermost modules, other than plain containers, of which a container or a module
    holds at least two of one class with layers inside. A block runs once in a pass, its output is a
    tensor or begins with one, and no other name of its weights lies outside it. A network without
    such modules, as an exported graph, has none.

    Args:
        module: In eval mode.
        layers: Layers by name.
        inputs: Positional arguments of a pass.

    Cost: a pass.
    """
    owned: dict[str, tuple[str, ...]] = {}

    def inside(name: str) -> tuple[str, ...]:
        return tuple(
            key
            for key, layer in layers.items()
            if all(n.startswith(f"{name}.") for n in (layer.weight_name, *layer.aliases))
        )

    def visit(parent: nn.Module, prefix: str) -> None:
        children = [(f"{prefix}{name}", child) for name, child in parent.named_children()]
        kinds = Counter(
            type(child) for name, child in children if any(child.children()) and inside(name)
        )
        for name, child in children:
            if kinds[type(child)] > 1 and not isinstance(child, _CONTAINERS) and inside(name):
                owned[name] = inside(name)
            else:
                visit(child, f"{name}.")

    visit(module, "")
    ran: list[str] = []
    tensors: set[str] = set()

    def note(name: str) -> Any:  # noqa: ANN401  # a hook
        def hook(_module: nn.Module, _args: object, output: object) -> None:
            ran.append(name)
            if isinstance(leading(output), Tensor):
                tensors.add(name)

        return hook

    handles = [module.get_submodule(name).register_forward_hook(note(name)) for name in owned]
    try:
        with torch.no_grad():
            module(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: owned[name] for name in ran if ran.count(name) == 1 and name in tensors}


def leading(output: object) -> object:
    """Return the first part of a block's output."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


class _Reached(Exception):
    """Ends a pass."""


def at_block(
    module: nn.Module, name: str, batches: Sequence[tuple[Tensor, ...]]
) -> list[tuple[tuple[Any, ...], dict[str, Any], Tensor]]:
    """Return arguments and leading output of a block for each batch.

    Cost: a pass over the batches up to the end of the block.
    """
    found: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []

    def hook(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object
    ) -> None:
        tensor = leading(output)
        assert isinstance(tensor, Tensor)  # noqa: S101  # ``repeated_blocks`` saw one
        found.append((args, kwargs, tensor))
        raise _Reached

    handle = module.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            for inputs in batches:
                try:
                    module(*inputs)
                except _Reached:
                    continue
    finally:
        handle.remove()
    return found

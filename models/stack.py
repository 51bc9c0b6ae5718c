"""A model as a chain: what comes before its blocks, the blocks, and what follows them.

Decoders and encoders of language models are chains of blocks, each on the output of the one before.
Such a model need not be run from end to end for every question: block after block over all samples,
one block in memory at a time, with the activations between two blocks kept.

A *part* is one stage of the chain as a model of its own: part 0 makes the input of the first block,
parts 1 to L are the blocks, part L + 1 makes the output. A part is called with what the part before
returned and the inputs of the model; it runs the model's own forward, in which all other blocks
hand their input on, so that masks and positions are what the model makes of its inputs.

Design: docs/design/language-models.md
"""

from __future__ import annotations

import gc
import threading
from collections import Counter
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitquota.models.blocks import repeated_blocks
from bitquota.models.calls import CallCounter, tensor_key
from bitquota.models.heap import give_back
from bitquota.models.identity import HALF_TYPES
from bitquota.models.outlines import run_outline
from bitquota.models.running import primary_output, tensor_of
from bitquota.models.sharing import sharing_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from bitquota.candidates.layers import Layer
    from bitquota.models.loaded import LoadedModel
    from bitquota.models.pages import Pages

LARGE_WEIGHTS = 2**22
"""Weights of one tensor from which on copies that nobody uses are worth looking for."""

_HIDDEN = "hidden_states"
"""How transformers call the main input of a block, where it is no positional argument."""


class _Reached(Exception):  # no error
    """Ends a pass with what a part returns."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


class _Run:
    """What a pass through the skeleton is about."""

    def __init__(self, target: int, hidden: Tensor | None, block: nn.Module | None) -> None:
        self.target, self.hidden, self.block = target, hidden, block


class _Skeleton:
    """A model whose blocks do not run, but hand their input on."""

    def __init__(self, module: nn.Module, blocks: Sequence[str]) -> None:
        self.module = module
        self.n_blocks = len(blocks)
        self._now = threading.local()
        for k, name in enumerate(blocks):
            module.get_submodule(name).forward = partial(self._visit, k + 1)

    def run(self, run: _Run, inputs: Sequence[Tensor]) -> Tensor:
        """Return what the part returns."""
        self._now.run = run
        try:
            return primary_output(self.module(*inputs))
        except _Reached as reached:
            return reached.output
        finally:
            self._now.run = None

    def _visit(self, k: int, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        run: _Run = self._now.run
        given = args[0] if args else kwargs[_HIDDEN]
        if run.target == 0:
            raise _Reached(given)
        if run.target == k and run.block is not None:
            if args:
                output = run.block(run.hidden, *args[1:], **kwargs)
            else:
                output = run.block(**{**kwargs, _HIDDEN: run.hidden})
            raise _Reached(output[0] if isinstance(output, tuple) else output)
        # Behind the last block the model goes on with what it was given.
        return run.hidden if k == self.n_blocks and run.target > k else given


class Part(nn.Module):
    """One stage of a stack, with parameters of its own over the memory of the model's.

    Called with the output of the part before (nothing before part 0) and the inputs of the model.
    Its modules are found by their names in the model.

    Attributes:
        own: A block, or for the first and the last part the model without its blocks.
        takes_padding: Whether the second input of the model is a mask (see ``padding``).
        mask_at: Which of the part's it is.
    """

    def __init__(self, skeleton: _Skeleton, target: int, name: str, module: nn.Module) -> None:
        super().__init__()
        self._skeleton, self._target, self._name = skeleton, target, name
        self.own = module
        self.takes_padding = bool(getattr(skeleton.module, "takes_padding", False))
        self.mask_at = 2 if target else 1

    def forward(self, *values: Tensor) -> Tensor:
        """Run the part."""
        if self._target == 0:
            return self._skeleton.run(_Run(0, None, None), values)
        hidden, *inputs = values
        block = self.own if self._name else None
        return self._skeleton.run(_Run(self._target, hidden, block), inputs)

    def put(self, name: str, weight: Tensor) -> None:
        """Run with other values for one of the tensors, by its name in the model, from now on."""
        place = tensor_of(self, name)
        # What is looked up may lie in its file.
        place.data = weight.float() if place.dtype in HALF_TYPES else weight.to(place.dtype)

    def get_submodule(self, target: str) -> nn.Module:
        """Return a module by its name in the model; raises ``AttributeError`` for others."""
        if not self._name:
            return self.own.get_submodule(target)
        if target != self._name and not target.startswith(f"{self._name}."):
            msg = f"'{target}' is not inside '{self._name}'"
            raise AttributeError(msg)
        return self.own.get_submodule(target[len(self._name) + 1 :])


class Stack:
    """A model as a chain of parts; see ``stack_of``.

    Attributes:
        module: The model; it is never changed.
        blocks: Names of its blocks in the order in which they run.
        layers: Names of the layers of each part; a tied layer may be in the first and the last.
        reads: How often what comes before the blocks reads each tensor, by name, and how often the
            last part does, which begins with that, too.
        output_shape: Of the output of one sample.
        pages: The files that its weights stay in, if they do.
        device: Where parts run.
        caches: Names of the KV caches that are open to change, all inside blocks.
    """

    def __init__(
        self,
        module: nn.Module,
        blocks: Sequence[str],
        layers: Sequence[tuple[str, ...]] = (),
        *,
        reads: tuple[Counter[str], Counter[str]] | None = None,
        pages: Pages | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.module = module
        self.blocks = tuple(blocks)
        self.layers = tuple(layers)
        self.reads = reads or (Counter(), Counter())
        self.output_shape: tuple[int, ...] = ()
        self.pages, self.device = pages, device
        self.caches: tuple[str, ...] = ()
        self._between: _Skeleton | None = None
        self._last = 0
        self._has_large = pages is not None and any(
            p.numel() >= LARGE_WEIGHTS for p in module.parameters()
        )

    def __len__(self) -> int:
        """Return the number of parts."""
        return len(self.blocks) + 2

    def last_of(self, module: nn.Module) -> Part:
        """Return the last part of another copy of the model, whose blocks never run again."""
        skeleton = _Skeleton(module, self.blocks)
        return Part(skeleton, len(self) - 1, "", module)

    def caches_in(self, k: int) -> tuple[str, ...]:
        """Return the names of the KV caches of a part."""
        if not 0 < k <= len(self.blocks):
            return ()
        return tuple(name for name in self.caches if name.startswith(f"{self.blocks[k - 1]}."))

    def part(self, k: int) -> Part:
        """Return a part whose parameters may be replaced, but not written into.

        Of weights that stay in files it holds copies in float32; the block that a walk in this
        direction comes to next is read meanwhile. What earlier parts freed goes back to the
        operating system.
        """
        if self._has_large:
            # Modules refer to themselves: what nobody uses is freed when it is looked for.
            gc.collect()
        give_back()
        following, self._last = 2 * k - self._last, k
        if self.pages is not None and abs(following - k) == 1 and 0 < following <= len(self.blocks):
            self.pages.prefetch(self.module.get_submodule(self.blocks[following - 1]))
        if 0 < k <= len(self.blocks):
            name = self.blocks[k - 1]
            block = self._in_memory(sharing_weights(self.module.get_submodule(name)))
            if self._between is None:
                # All that blocks are called with is made of what comes before them.
                self._between = self._skeleton(last=False)
            return Part(self._between, k, name, block)
        skeleton = self._skeleton(last=k > 0)
        return Part(skeleton, k, "", skeleton.module)

    def _skeleton(self, *, last: bool) -> _Skeleton:
        """Return the model without its blocks, for the last part or for what comes before it."""
        blocks = map(self.module.get_submodule, self.blocks)
        skeleton = _Skeleton(sharing_weights(self.module, husks=blocks), self.blocks)
        if self.pages is None:
            return skeleton
        before, own = self.reads[0], self.reads[last]
        looked_up: dict[str, nn.Module] = {}
        if self.device is None or self.device.type == "cpu":
            looked_up = {
                f"{name}.weight": part
                for name, part in skeleton.module.named_modules()
                # Subclasses, such as those that scale rows, compute in the weight's precision.
                if type(part) is nn.Embedding
                # A tied head multiplies with all rows.
                and own[f"{name}.weight"] == before[f"{name}.weight"]
            }
        self._in_memory(skeleton.module, own.keys() - looked_up.keys())
        for embedding in looked_up.values():
            embedding.register_forward_hook(self._read_rows)
        return skeleton

    def _read_rows(self, embedding: nn.Module, _args: object, output: Tensor) -> Tensor:
        """Return rows that were looked up where they lie, in float32."""
        if self.pages is not None:
            self.pages.release(embedding, read_bytes=output.numel() * output.element_size())
        return output.float()

    def _in_memory(self, module: nn.Module, names: Collection[str] | None = None) -> nn.Module:
        """Replace tensors that stay in files, or only those of some names, by copies in float32."""
        if self.pages is None:
            return module
        for part in module.modules():
            part._forward_hooks.clear()  # noqa: SLF001  # they let pages go, which nothing maps now
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if names is None or name in names:
                mapped = tensor.data
                tensor.data = _float_copy(mapped, self.device)
                self.pages.release_tensor(mapped)
        return module


def _float_copy(tensor: Tensor, device: torch.device | None) -> Tensor:
    if tensor.is_floating_point():
        return tensor.to(device=device, dtype=torch.float32, copy=True)
    return tensor.to(device=device, copy=True)


class _Reads(CallCounter):
    """Counts lookups and factors of other products, too."""

    def elsewhere(
        self,
        operator: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:  # noqa: ANN401
        """Note a layer that is looked up or is a factor of another product."""
        del operator
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.numel():
                known = self.known.get(tensor_key(value))
                if known is not None:
                    self.calls[known] += 1
        return func(*args, **kwargs)


def stack_of(
    model: LoadedModel, module: nn.Module, layers: Mapping[str, Layer], inputs: tuple[Tensor, ...]
) -> Stack | None:
    """Return a model as a chain of parts, or ``None`` if it is none.

    It is one where every block is given what the one before it returned, every layer is in a block,
    before the first or behind the last, and the chain returns for ``inputs`` just what the model
    does (which is not looked at where weights stay in files).

    Args:
        model: As it was loaded.
        module: The model, or a copy of it, in eval mode.
        layers: Layers by name.
        inputs: Positional arguments of a pass over a few samples.

    Cost: three passes; none where weights stay in files.
    """
    seen = module if model.outline is None else model.outline
    with run_outline(seen):
        owned = repeated_blocks(seen, layers, inputs)
        expected = _chained_output(seen, list(owned), inputs) if len(owned) > 1 else None
        if expected is None:
            return None
        chain = Stack(seen, list(owned))
        outside = {
            name: layer
            for name, layer in layers.items()
            if not any(name in inside for inside in owned.values())
        }
        tensors = _outside(seen, list(owned), outside.values())
        named = {layer.weight_name: name for name, layer in outside.items()}
        with torch.no_grad():
            value, before = _watched(chain.part(0), tensors, inputs)
            found = [tuple(named[weight] for weight in before if weight in named)]
            for k, inside in enumerate(owned.values()):
                value, between = _watched(chain.part(k + 1), tensors, (value, *inputs))
                before |= between
                found.append(inside)
            value, called = _watched(chain.part(len(chain) - 1), tensors, (value, *inputs))
        found.append(tuple(named[weight] for weight in called - before if weight in named))
        if {name for part in found for name in part} != set(layers):
            return None
        if value.shape != expected.shape:
            return None
        if model.outline is None and not bool((value == expected).all()):
            return None
    stack = Stack(
        module,
        list(owned),
        found,
        reads=(before, called),
        pages=model.pages,
        device=inputs[0].device,
    )
    stack.output_shape = tuple(value.shape[1:])
    return stack


def _chained_output(
    module: nn.Module, blocks: Sequence[str], inputs: tuple[Tensor, ...]
) -> Tensor | None:
    """Return the output of a pass in which every block is given what the one before it returned.

    ``None`` of any other pass.
    """
    ends: list[Tensor] = []
    chained: list[bool] = []

    def enter(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs.get(_HIDDEN)
        chained.append(isinstance(given, Tensor) and (not ends or given is ends[-1]))

    def leave(_module: nn.Module, _args: object, output: object) -> None:
        only = output[0] if isinstance(output, tuple) and len(output) == 1 else output
        chained.append(isinstance(only, Tensor) and isinstance(output, Tensor))
        ends.append(only)  # type: ignore[arg-type]

    handles = []
    for name in blocks:
        block = module.get_submodule(name)
        handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(block.register_forward_hook(leave))
    try:
        with torch.no_grad():
            output = primary_output(module(*inputs))
    finally:
        for handle in handles:
            handle.remove()
    return output if all(chained) and len(chained) == 2 * len(blocks) else None


def _outside(
    module: nn.Module, blocks: Sequence[str], layers: Iterable[Layer]
) -> dict[tuple[Any, ...], str]:
    """Return the names of all tensors outside blocks, those of layers as these know them."""
    inside = tuple(f"{name}." for name in blocks)
    named = [*module.named_parameters(), *module.named_buffers()]
    found = {tensor_key(t): name for name, t in named if not name.startswith(inside)}
    weights = [layer.weight_name for layer in layers]
    return found | {tensor_key(tensor_of(module, name)): name for name in weights}


def _watched(
    part: Part, names: Mapping[tuple[Any, ...], str], values: tuple[Tensor, ...]
) -> tuple[Tensor, Counter[str]]:
    """Run a part, and count how often it reads each tensor outside all blocks."""
    with _Reads(names) as reads:
        value = part(*values)
    return value, reads.calls


__all__ = ["Part", "Stack", "stack_of"]

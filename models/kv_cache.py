"""Keys and values where transformers' attention gets them: found, counted, and open to change.

The attention layers of transformers hand their keys and values to a function that a registry
returns (``AttentionInterface``), after rotation and before they are repeated for groups of queries:
just what a cache holds. The functions of that registry are replaced, once for each process, by ones
that first hand keys and values to the modules ``k_cache`` and ``v_cache`` of the attention layer,
where it has them. Those do nothing by themselves; whoever quantizes a cache hooks into them.

Design: docs/design/kv-cache.md
"""

from __future__ import annotations

import functools
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitquota.candidates.layers import K_CACHE, V_CACHE, Cache
from bitquota.errors import InvalidModel
from bitquota.models.outlines import run_outline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from bitquota.models.loaded import LoadedModel

_EAGER = "eager"
"""The implementation that every model brings itself, as ``eager_attention_forward``."""

_OPENED = "_bitquota_opened"


@dataclass(frozen=True, slots=True)
class _Call:
    """Keys and values that an attention layer was called with."""

    module: nn.Module
    key: Tensor
    value: Tensor
    window: int | None


_now = threading.local()


def find_caches(model: LoadedModel, inputs: tuple[Tensor, ...]) -> tuple[Cache, ...]:
    """Return keys and values of each layer of causal attention, for one token of one sequence.

    Attention over all tokens at once, or over the output of an encoder, grows no cache.

    Args:
        model: As it was loaded; it is not changed.
        inputs: Positional arguments of a pass over a few samples.

    Raises:
        InvalidModel: No causal attention goes through the registry of transformers, or several
            layers share keys and values.

    Cost: one pass; none where weights stay in files.
    """
    module = model.module if model.outline is None else model.outline
    names = {id(part): name for name, part in module.named_modules()}
    calls: list[_Call] = []
    if "transformers" in sys.modules:
        with _watching(calls), torch.no_grad(), run_outline(module):
            module(*inputs)
    causal = [call for call in calls if getattr(call.module, "is_causal", False)]
    if not causal:
        msg = (
            "a KV cache is found where a causal language model of transformers hands keys and "
            f"values to its attention function; in '{model.architecture}' no layer does that: "
            "leave --kv-bits out"
        )
        raise InvalidModel(msg, architecture=model.architecture)
    found: list[Cache] = []
    for call in causal:
        name = names[id(call.module)]
        for last, held in ((K_CACHE, call.key), (V_CACHE, call.value)):
            # What is held has the shape samples, heads, tokens, numbers of a head.
            found.append(
                Cache(
                    name=f"{name}.{last}",
                    heads=held.shape[1],
                    head_size=held.shape[3],
                    window=call.window,
                )
            )
    shared = len({id(c.key) for c in causal}) < len(causal)
    if shared or len({cache.name for cache in found}) < len(found):
        msg = (
            f"each attention layer must have keys and values of its own; some layers of "
            f"'{model.architecture}' share them: leave --kv-bits out"
        )
        raise InvalidModel(msg, architecture=model.architecture)
    return tuple(found)


def latent_size(model: LoadedModel) -> int | None:
    """Return the numbers of the latent that keys and values are made of, if a config names one.

    Runtimes for such models (MLA) keep that latent in their cache, transformers keeps what was made
    of it.
    """
    config = getattr(model.module, "config", None)
    size = getattr(config, "kv_lora_rank", None)
    return size if isinstance(size, int) and size > 0 else None


def open_caches(module: nn.Module, names: Iterable[str]) -> None:
    """Give the attention layers of ``module`` the modules that caches of these names hook into."""
    opened = False
    for name in names:
        opened = True
        owner, _, last = name.rpartition(".")
        attention = module.get_submodule(owner)
        if last not in attention._modules:  # noqa: SLF001  # an attribute may be anything
            attention.add_module(last, nn.Identity())
    if opened:
        _open_registry()


@contextmanager
def _watching(calls: list[_Call]) -> Iterator[None]:
    """Within the context every call of an attention function by this thread is noted."""
    _open_registry()
    _now.calls = calls
    try:
        yield
    finally:
        _now.calls = None


def _open_registry() -> None:
    """Replace the attention functions of transformers by ones that pass through caches."""
    from transformers.modeling_utils import AttentionInterface

    known: dict[str, Callable[..., Any]] = AttentionInterface._global_mapping  # noqa: SLF001
    for name, function in {_EAGER: _own_eager, **known}.items():
        if not hasattr(function, _OPENED):
            AttentionInterface.register(name, _through_caches(function))


def _own_eager(module: nn.Module, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    """Run the attention that the file of a model's class defines."""
    for kind in type(module).__mro__:
        own = getattr(sys.modules[kind.__module__], "eager_attention_forward", None)
        if own is not None:
            return own(module, *args, **kwargs)
    msg = (
        f"the file of '{type(module).__name__}' must have an 'eager_attention_forward'; it has none"
    )
    raise InvalidModel(msg)


def _through_caches(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401  # outputs, and weights if there are any
        calls = getattr(_now, "calls", None)
        if calls is not None:
            calls.append(_Call(module, key, value, kwargs.get("sliding_window")))
        keys, values = (module._modules.get(last) for last in (K_CACHE, V_CACHE))  # noqa: SLF001
        key = key if keys is None else keys(key)
        value = value if values is None else values(value)
        return function(module, query, key, value, *args, **kwargs)

    setattr(attend, _OPENED, True)
    return attend

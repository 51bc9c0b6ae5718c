"""Watch which weights a model multiplies with while it runs, whatever its modules look like.

The watchers see the calls of operators themselves, so they work alike on ordinary modules and on
graphs that ``torch.export`` made.

Design: docs/design/corrections.md
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

LAYER_OPERATORS = {
    "conv1d": (0, 1), "conv2d": (0, 1), "conv3d": (0, 1),
    "conv_transpose1d": (0, 1), "conv_transpose2d": (0, 1), "conv_transpose3d": (0, 1),
    "linear": (0, 1), "addmm": (1, 2),
}  # fmt: skip
"""Positions of input and weight among the arguments of each operator that a layer calls."""

_METADATA = frozenset(
    {
        "size", "dim", "stride", "numel", "__len__", "is_floating_point", "is_complex",
        "data_ptr", "is_contiguous", "element_size", "storage_offset", "__get__", "type",
        "get_device", "ndimension", "_version", "__hash__", "__repr__", "__format__",
    }
)  # fmt: skip
"""Functions that look at a tensor without using its values, unless they return a tensor."""


def tensor_key(tensor: Tensor) -> tuple[Any, ...]:
    """Return what two names of the same stored tensor have in common."""
    return (
        str(tensor.device),
        tensor.data_ptr() if tensor.numel() else id(tensor),
        tuple(tensor.shape),
        tuple(tensor.stride()),
        tensor.dtype,
    )


def operator_name(function: Any) -> str:  # noqa: ANN401  # any callable
    """Return the bare name: ``conv2d`` for ``torch.conv2d`` and for ``aten.conv2d.default``."""
    if isinstance(function, torch._ops.OpOverload):  # noqa: SLF001
        return function._schema.name.removeprefix("aten::")  # noqa: SLF001
    return str(getattr(function, "__name__", function))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerCall:
    """One multiplication with a weight.

    Attributes:
        operator: Bare name of the operator.
        weight: The weight.
        bias: The bias, if there is one.
        inputs: The activation that is multiplied.
        channel_axis: Axis of the output that counts output channels, from its end.
    """

    operator: str
    weight: Tensor
    bias: Tensor | None
    inputs: Tensor
    channel_axis: int


def layer_call(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall | None:
    """Return the call if it is one of a layer, else ``None``."""
    if name not in LAYER_OPERATORS:
        return None
    if name == "addmm":
        if len(args) < 3:
            return None
        bias, inputs, weight = args[0], args[1], args[2]
    else:
        inputs = args[0] if args else kwargs.get("input")
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
    if not isinstance(weight, torch.Tensor) or not isinstance(inputs, torch.Tensor):
        return None
    # From the end, because an unbatched input has no axis of samples.
    axis = -1 - int(name.rstrip("d")[-1]) if name.startswith("conv") else -1
    return LayerCall(operator=name, weight=weight, bias=bias, inputs=inputs, channel_axis=axis)


def with_input(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], replaced: object
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a layer's call with another input."""
    at, _ = LAYER_OPERATORS[name]
    if len(args) > at:
        return (*args[:at], replaced, *args[at + 1 :]), kwargs
    return args, {**kwargs, "input": replaced}


Known = TypeVar("Known")


class LayerWatcher(TorchFunctionMode, Generic[Known]):
    """Within the context, ``around`` runs each multiplication with a weight that is known.

    Everything else is run by ``elsewhere``.

    Args:
        known: What each weight stands for, by ``tensor_key``.
    """

    def __init__(self, known: Mapping[tuple[Any, ...], Known]) -> None:
        super().__init__()
        self.known = known

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Hand a layer's call to ``around``, and everything else to ``elsewhere``."""
        del types
        named = kwargs or {}
        operator = operator_name(func)
        call = layer_call(operator, args, named)
        known = None if call is None else self.known.get(tensor_key(call.weight))
        if call is None or known is None:
            return self.elsewhere(operator, func, args, named)
        return self.around(known, call, func, args, named)

    def around(
        self,
        known: Known,
        call: LayerCall,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:  # noqa: ANN401
        """Return what the call gives: a subclass looks at it, or changes it on the way."""
        del known, call
        return func(*args, **kwargs)

    def elsewhere(
        self,
        operator: str,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:  # noqa: ANN401
        """Run what is no multiplication with a known weight."""
        del operator
        return func(*args, **kwargs)


class CallCounter(LayerWatcher[str]):
    """Counts the multiplications with each known weight.

    Attributes:
        calls: By what the weight is known as.
    """

    def __init__(self, known: Mapping[tuple[Any, ...], str]) -> None:
        super().__init__(known)
        self.calls: Counter[str] = Counter()

    def around(
        self,
        known: str,
        call: LayerCall,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:  # noqa: ANN401
        """Count the call."""
        self.calls[known] += 1
        return super().around(known, call, func, args, kwargs)


class Given:
    """Tells layers that are given the same tensor, one after the other, from others."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, int] | None = None
        self._number = 0

    def number(self, tensor: Tensor) -> int:
        """Return a number that is another one for another tensor, or for other values in it."""
        version = tensor._version  # noqa: SLF001  # counts writes
        if self._last is None or tensor is not self._last[0] or version != self._last[1]:
            self._last, self._number = (tensor, version), self._number + 1
        return self._number


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BatchNormCall:
    """The arguments of one batch normalisation."""

    inputs: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    training: bool
    eps: float


def batch_norm_call(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> BatchNormCall | None:
    """Return the call if it is a batch normalisation, else ``None``."""
    if name == "batch_norm":
        aten = len(args) == 9 or "cudnn_enabled" in kwargs
        order: tuple[str, ...] = (
            ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum",
             "eps", "cudnn_enabled")
            if aten
            else ("input", "running_mean", "running_var", "weight", "bias", "training",
                  "momentum", "eps")
        )  # fmt: skip
    elif name == "_native_batch_norm_legit_no_training":
        order = ("input", "weight", "bias", "running_mean", "running_var", "momentum", "eps")
    else:
        return None
    given = dict(zip(order, args, strict=False)) | kwargs
    return BatchNormCall(
        inputs=given["input"],
        running_mean=given.get("running_mean"),
        running_var=given.get("running_var"),
        weight=given.get("weight"),
        bias=given.get("bias"),
        training=bool(given.get("training", False)),
        eps=float(given.get("eps", 1e-5)),
    )


@dataclass(slots=True, eq=False)
class Event:
    """One executed function: what it was called with and what it returned."""

    name: str
    layer: LayerCall | None
    batch_norm: BatchNormCall | None
    output: Tensor | None


class Trace(TorchFunctionMode):
    """Records layer and batch-norm calls, and how often every tensor's values are used.

    All tensors are kept alive until the trace is dropped, so that an identity is never reused.
    """

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.uses: dict[int, int] = {}
        self._alive: list[Any] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run ``func`` and write down what it used."""
        del types
        named = kwargs or {}
        result = func(*args, **named)
        name = operator_name(func)
        if name not in _METADATA or next(tensors_in(result), None) is not None:
            for tensor in tensors_in((args, named)):
                self.uses[id(tensor)] = self.uses.get(id(tensor), 0) + 1
                self._alive.append(tensor)
        self._alive.append(result)
        output = next(tensors_in(result), None)
        if output is not None:
            self.events.append(
                Event(
                    name=name,
                    layer=layer_call(name, args, named),
                    batch_norm=batch_norm_call(name, args, named),
                    output=output,
                )
            )
        return result


def tensors_in(value: Any) -> Iterator[Tensor]:  # noqa: ANN401  # any structure
    """Yield the tensors of nested tuples, lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def parameter_owners(module: nn.Module) -> dict[tuple[Any, ...], list[tuple[nn.Module, str, str]]]:
    """Return, for each stored tensor, every ``(owner, attribute, full name)`` that holds it."""
    owners: dict[tuple[Any, ...], list[tuple[nn.Module, str, str]]] = {}
    for path, owner in module.named_modules():
        own = [*owner._parameters.items(), *owner._buffers.items()]  # noqa: SLF001
        for attribute, tensor in own:
            if tensor is not None:
                full = f"{path}.{attribute}" if path else attribute
                owners.setdefault(tensor_key(tensor), []).append((owner, attribute, full))
    return owners

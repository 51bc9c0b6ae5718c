"""Modules that have shapes and no values: what a model is, without the memory that it takes.

Every parameter and buffer of an outline lies in a read-only mapping of zeros, which takes addresses
and no memory. Products with them are not computed: they return zeros of their shape, so a forward
pass shows which weights are multiplied and how often. Masks and positions, which are made of the
inputs alone, are what they are; what a network decides by values of its weights it cannot decide
here.

Torch's own ``FakeTensor`` would do the same, but imports torch's compiler and sympy for it: 60 MB,
and three times the time.

Design: docs/design/models.md
"""

from __future__ import annotations

import mmap
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from bitquota.models.heap import give_back

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

_MARK = "_holds_nothing"
"""Attribute of tensors whose values are not those of the model."""

_FACTORS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
"""Position of the first of the two factors of each product."""

_DRAWS = frozenset({"normal_", "uniform_", "trunc_normal_"})

_DECIDES = frozenset({"_local_scalar_dense", "nonzero", "masked_select"})
"""Operators whose result, or its shape, is up to the values that they are given."""


class DecidedByValues(RuntimeError):  # it says what, not that something is wrong
    """A network asks for values that depend on its weights."""


class OperatorWatcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode that sees each operator and has nothing to do with torch's compiler.

    Torch would mark it as not to be compiled, and import the whole compiler for that: a second.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor has the values of a model; one of an outline has its shape alone."""
    return not (tensor.is_meta or hasattr(tensor, _MARK))


class _Unread(OperatorWatcher):  # type: ignore[no-untyped-call]
    """Within the context, nothing is computed of weights that hold nothing."""

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Run what does not depend on weights; mark what does."""
        del types
        given = (t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor))
        if all(map(has_values, given)):
            return func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")  # noqa: SLF001  # no public name
        masks = [t for t in args[1] if t is not None] if name == "index" else []
        if name in _DECIDES or any(t.dtype == torch.bool and not has_values(t) for t in masks):
            msg = f"an outline has no values, and '{name}' asks for them"
            raise DecidedByValues(msg)
        if name.endswith("_") and torch.Tag.inplace_view not in func.tags:
            result = args[0]
        else:
            result = _shape_of_result(name, args)
        if result is None:
            result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                setattr(tensor, _MARK, True)
        return result


def _shape_of_result(name: str, args: tuple[Any, ...]) -> Tensor | None:
    """Return a tensor in the shape of what an operator would return, if it takes long."""
    made: Tensor | None = None
    if name in _FACTORS:
        left, right = args[_FACTORS[name] :][:2]
        made = left.new_zeros(()).expand(*left.shape[:-1], right.shape[-1])
    elif name == "index" and len(args[1]) == 1 and args[1][0].dtype == torch.int64:
        # Of experts, for each token: memory that nothing is written into is not taken.
        made = args[0].new_empty(*args[1][0].shape, *args[0].shape[1:])
    return made


class NothingComputed(TorchFunctionMode):
    """Within the context, a module that is made on the meta device draws no random numbers.

    Torch does that in Python there, and ranges too, and imports sympy for it.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Return a tensor that random numbers would be written into as it is."""
        del types
        named = kwargs or {}
        if getattr(func, "__name__", "") in _DRAWS:
            into = args[0] if args else named.get("tensor")
            if isinstance(into, Tensor) and into.is_meta:
                return into
        if func is torch.arange and named.get("device") is not None:
            named["device"] = "cpu"
        return func(*args, **named)


def outline(module: nn.Module) -> nn.Module:
    """Replace every tensor of ``module`` by its outline, in place; tied ones stay tied.

    Tensors on the meta device become outlines of tensors on the CPU.
    """
    # The old tensor is kept, so that its identity stays its own.
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for part in module.modules():
        for held in (part._parameters, part._buffers):  # noqa: SLF001  # replaced in place
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    known = isinstance(tensor, nn.Parameter)
                    empty = _unread_zeros(tensor)
                    new = nn.Parameter(empty, requires_grad=False) if known else empty
                    setattr(new, _MARK, True)
                    made[id(tensor)] = new, tensor
                held[name] = made[id(tensor)][0]  # type: ignore[assignment]
    return module


def _unread_zeros(like: Tensor) -> Tensor:
    """Return zeros that take no memory, even when they are read; they cannot be written to."""
    if not like.numel():
        return torch.empty(like.shape, dtype=like.dtype)
    zeros = mmap.mmap(-1, like.nbytes, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(zeros, dtype=like.dtype).reshape(like.shape)


@contextmanager
def run_outline(module: nn.Module) -> Iterator[None]:
    """Within the context ``module`` can be run, whether it is an outline or not."""
    tensors = (*module.parameters(), *module.buffers())
    if all(map(has_values, tensors)):
        yield
        return
    with _Unread():  # type: ignore[no-untyped-call]
        yield
    give_back()

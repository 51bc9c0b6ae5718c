"""Modules that have shapes and no values: what a model is, without the memory that it takes.

Every parameter and buffer of an outline is a ``FakeTensor`` of torch, which says that it lies on
the CPU and holds nothing. Operators return outlines of their results, so a forward pass shows which
weights are multiplied and how often. What a network decides by values it cannot decide here.

Design: docs/design/models.md
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor


def outline(module: nn.Module) -> nn.Module:
    """Replace every tensor of ``module`` by its outline, in place; tied ones stay tied.

    Tensors on the meta device become outlines of tensors on the CPU.
    """
    # Constants that a forward pass holds besides become outlines when they are met.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # The old tensor is kept, so that its identity stays its own.
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for part in module.modules():
        for held in (part._parameters, part._buffers):  # noqa: SLF001  # replaced in place
            for name, tensor in held.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    with mode:
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    known = isinstance(tensor, nn.Parameter)
                    new = nn.Parameter(empty, requires_grad=False) if known else empty
                    made[id(tensor)] = new, tensor
                held[name] = made[id(tensor)][0]  # type: ignore[assignment]
    return module


@contextmanager
def run_outline(module: nn.Module, inputs: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Within the context ``module`` can be run on what is yielded, whether it is an outline or not.

    Args:
        module: Any module; one that is no outline is left alone, and so are its inputs.
        inputs: Tensors with values.
    """
    mode: FakeTensorMode | None = getattr(next(module.parameters(), None), "fake_mode", None)
    if mode is None:
        yield inputs
        return
    with mode:
        yield tuple(torch.empty(t.shape, dtype=t.dtype) for t in inputs)

"""Importing transformers' model classes without what only training and compiling need.

Design: docs/design/models.md
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_COMPILER = "torch._dynamo"

_MARKS = frozenset({"allow_in_graph", "assume_constant_result", "disable"})
"""Decorators that tell the compiler something about a function."""


class _NoCompiler(ModuleType):
    """Stands for ``torch._dynamo``: its decorators change nothing, its files can be imported."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        """Return a decorator."""
        if name not in _MARKS:
            raise AttributeError(name)

        def mark(function: Callable[..., object] | None = None, *_: object, **__: object) -> object:
            return (lambda given: given) if function is None else function

        return mark


@contextmanager
def lean_transformers() -> Iterator[None]:
    """Within the context, transformers is imported as where torch cannot compile or distribute.

    It imports torch's compiler to mark functions, its distributed tensors to ask what is one, and
    scipy for the losses of detectors: 100 MB and 2 s. For processes that only look at what a model
    is: transformers remembers what it found absent. Nothing changes where any of it was imported.
    """
    if any(name in sys.modules for name in ("transformers.modeling_utils", _COMPILER, "scipy")):
        yield
        return
    import torch

    compiler = _NoCompiler(_COMPILER)
    compiler.__path__ = [str(Path(torch.__file__).parent / "_dynamo")]
    sys.modules[_COMPILER] = compiler
    sys.modules["scipy"] = None  # type: ignore[assignment]
    try:
        with (
            patch.object(torch, "_dynamo", compiler, create=True),
            patch.object(torch.distributed, "is_available", lambda: False),
        ):
            yield
    finally:
        for name in (_COMPILER, "scipy"):
            sys.modules.pop(name, None)

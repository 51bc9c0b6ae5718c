"""Memory that was freed, given back to the operating system.

A walk over the parts of a language model makes and frees tensors of megabytes in every part. glibc
keeps what is freed for what comes next, in pieces of which the next tensors fill only some: on a
Llama of 2.5 million weights 100 of 850 MB.

Design: docs/design/language-models.md
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any

_ARENA_MAX = -8
"""``M_ARENA_MAX`` of malloc.h."""


@functools.cache
def _glibc(function: str) -> Any:  # noqa: ANN401  # a foreign function
    """Return a function of glibc, or one that does nothing where there is no such."""
    found = getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None
    return found or (lambda *_: 0)


@functools.cache
def share_one_heap() -> None:
    """Let all threads take memory from one heap.

    glibc gives each thread one of its own, which keeps what the thread frees: of a few dozen lanes
    several hundred megabytes.
    """
    _glibc("mallopt")(_ARENA_MAX, 1)


def give_back() -> None:
    """Let the operating system have all whole pages that were freed; takes milliseconds."""
    _glibc("malloc_trim")(0)


__all__ = ["give_back", "share_one_heap"]

"""Linear algebra in one thread while a problem is being solved.

A matrix product summed by two threads differs in its last bits from one summed by four, and with
it every bound. One thread also costs less in all at most of our sizes.

Design: docs/design/solver.md
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import threadpoolctl

if TYPE_CHECKING:
    from collections.abc import Iterator

_lock = threading.Lock()
_under_way = [0]
_former: list[tuple[threadpoolctl.LibController, int]] = []
"""What the libraries had before the first of the solves under way."""


@cache
def _libraries() -> threadpoolctl.ThreadpoolController:
    """Return what numpy and scipy bring; other libraries' threads are not ours to change."""
    import scipy.linalg  # noqa: F401  # brings a BLAS of its own

    return threadpoolctl.ThreadpoolController().select(internal_api="openblas")


@contextmanager
def one_thread() -> Iterator[None]:
    """Hold numpy's and scipy's BLAS at one thread; solves may overlap in several threads.

    The number is the process's in some versions of the library and the calling thread's in
    others: each solve sets it for itself, and the last one to end gives the former number back.
    """
    with _lock:
        found = _libraries()
        if not _under_way[0]:
            _former[:] = [(library, library.num_threads) for library in found.lib_controllers]
        _under_way[0] += 1
        for library in found.lib_controllers:
            library.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _under_way[0] -= 1
            if not _under_way[0]:
                for library, number in _former:
                    library.set_num_threads(number)

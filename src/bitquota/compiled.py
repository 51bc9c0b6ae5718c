"""How the kernels are compiled: numba, kept on disk, so that only the first run ever waits.

Design: docs/design/solver.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

F = TypeVar("F", bound="Callable[..., Any]")


def compiled(function: F) -> F:
    """Compile ``function`` to machine code on first use and keep the result on disk.

    The cache lies beside the source or, where that is read-only, in the user's cache folder
    (``NUMBA_CACHE_DIR`` overrides both). Where neither can be written, the function is compiled
    in every process. No fast-math: sums keep their order, so results do not depend on the machine
    beyond IEEE arithmetic.
    """
    from numba import njit

    try:
        result: F = njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # numba found no folder that it may write to
        result = njit(nogil=True, error_model="numpy")(function)
    return result


def read_only(array: NDArray[Any]) -> NDArray[Any]:
    """Return a view that cannot be written to.

    Kernels are compiled anew for arguments that can be, so those that a problem holds in some
    calls and a copy in others go through here.
    """
    view = array.view()
    view.flags.writeable = False
    return view

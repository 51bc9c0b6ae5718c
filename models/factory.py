"""Functions that a user names as ``package.module:function``: local use only, they run code."""

from __future__ import annotations

import importlib
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from bitquota.errors import BitquotaError

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def current_folder_first() -> Iterator[None]:
    """Let imports find modules of the current folder."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        sys.path.remove("")


def call_factory(spec: str, what: type[BitquotaError]) -> Any:  # noqa: ANN401  # user's code
    """Import ``package.module:function`` and call the function without arguments.

    Raises:
        BitquotaError: Of type ``what``: no such module or function, or it failed.
    """
    found = find_function(spec, what)
    with current_folder_first():
        try:
            return found()
        except BitquotaError:
            raise
        except Exception as err:  # the user's own code may raise anything
            msg = f"the factory '{spec}' must run without arguments; it failed: {err!r}"
            raise what(msg, source=spec) from err


def find_function(spec: str, what: type[BitquotaError]) -> Any:  # noqa: ANN401  # user's code
    """Import ``package.module:function`` and return the function.

    Raises:
        BitquotaError: Of type ``what``: no such module or function.
    """
    module_name, _, function_name = spec.partition(":")
    with current_folder_first():
        try:
            found: Any = importlib.import_module(module_name)
            for part in function_name.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as err:
            msg = (
                f"a factory must be importable as 'package.module:function' from the current "
                f"folder or the installed packages; '{spec}' is not: {err}"
            )
            raise what(msg, source=spec) from err
    return found

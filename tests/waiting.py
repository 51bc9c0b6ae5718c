"""How tests wait: for states, and long enough that a busy machine fails none of them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE_S = 800.0
"""Below pytest's own limit of a test, which says less about what was waited for."""


def wait_for(condition: Callable[[], object], what: object) -> None:
    """Return once ``condition`` is true; after ``PATIENCE_S`` the test fails with ``what``."""
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, f"waited in vain for {what}"
        time.sleep(0.05)

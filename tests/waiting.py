"""How tests wait: for states, and long enough that a busy machine fails none of them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

PATIENCE_S = 800.0
"""Below pytest's own limit of a test, which says less about what was waited for."""

PATIENTLY = {"timeout_s": PATIENCE_S, "poll_s": 0.2}
"""How a client waits for a job: it looks more often than a server asks for."""


def wait_for(condition: Callable[[], object], what: object) -> None:
    """Return once ``condition`` is true; after ``PATIENCE_S`` the test fails with ``what``."""
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until, f"waited in vain for {what}"
        time.sleep(0.05)

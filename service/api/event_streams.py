"""How many event streams each caller has open: one costs a connection and a look a second."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import TYPE_CHECKING

from bitquota.errors import QuotaExceeded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bitquota.service.security.keys import Caller

_RETRY_S = 5


class EventStreams:
    """Counts streams by key; used by the event loop alone.

    Args:
        most: Of one key on this server.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._open: Counter[str] = Counter()

    def check(self, caller: Caller) -> None:
        """Raise ``QuotaExceeded`` if a caller may not open another."""
        if self._open[caller.actor] >= self._most:
            msg = (
                f"at most {self._most:,} event streams of one key may be open: close some, or "
                "look at the jobs instead"
            )
            raise QuotaExceeded(msg, limit=self._most, retry_after_s=_RETRY_S)

    @contextlib.contextmanager
    def one_more(self, caller: Caller) -> Iterator[None]:
        """Count a stream for as long as the context lasts."""
        self._open[caller.actor] += 1
        try:
            yield
        finally:
            self._open[caller.actor] -= 1
            if not self._open[caller.actor]:
                del self._open[caller.actor]

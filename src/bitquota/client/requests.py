"""Requests of the client, sent again while the server cannot be reached or is busy.

Design: docs/design/client.md
"""

from __future__ import annotations

import contextlib
import json
import time
from typing import TYPE_CHECKING, Any

from bitquota.client.effects import Answer, Pause, Send, Steps, Unreachable
from bitquota.errors import ServiceError, ServiceTimeout
from bitquota.problems import error_of

if TYPE_CHECKING:
    from bitquota.errors import BitquotaError

FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 2.0
BUSY = frozenset({429, 503})
"""Statuses after which a request is sent again."""


class Requests:
    """Sends requests, and repeats them while the server cannot be reached or is busy.

    Every request of this client may be repeated: submissions carry a key, uploads their offset.

    Attributes:
        base_url: Of the server.
        retry_s: How long requests are repeated.
    """

    base_url: str
    retry_s: float

    def sent(self, send: Send, *, quiet: frozenset[int] = frozenset()) -> Steps[Answer]:
        """Return a good answer, or one with a status in ``quiet``; else raise its error."""
        until = time.monotonic() + self.retry_s
        pause = FIRST_PAUSE_S
        while True:
            failure: BitquotaError
            wait = pause
            try:
                answer: Answer = yield send
                if answer.status < 400 or answer.status in quiet:
                    return answer
                failure = error_in(answer)
                if answer.status not in BUSY:
                    raise failure
                with contextlib.suppress(ValueError):
                    wait = max(pause, float(answer.headers.get("retry-after", "")))
            except Unreachable as err:
                failure = self.unreachable(err)
                failure.__cause__ = err
            if time.monotonic() + wait > until:
                raise failure
            yield Pause(seconds=wait)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def unreachable(self, err: Unreachable) -> BitquotaError:
        """Return the error that a missing answer is for the user."""
        if err.timed_out:
            return ServiceTimeout(f"the server must answer; it did not in time: {err}")
        return ServiceError(
            f"the server must be reachable; {self.base_url} is not: {err}; check the address, or "
            "start one with 'bitquota serve'"
        )

    def got(self, path: str, **params: Any) -> Steps[Answer]:  # noqa: ANN401  # of a query
        """Return the answer to a GET."""
        return (yield from self.sent(Send(method="GET", path=path, params=params)))


def error_in(answer: Answer) -> BitquotaError:
    """Return the error that an answer stands for."""
    try:
        body = json.loads(answer.content)
    except ValueError:
        body = None
    return error_of(body, status=answer.status)

"""Connections of clients: how many, and how slow one may be.

uvicorn limits how long a connection may idle between two requests, and nothing before or within
one.  Here a head must arrive within a time, a body at a least rate, an answer must be read, and one
address has only so many connections.  Once a second all of them are looked at; a request costs no
timer.

Design: docs/design/jobs.md
"""

from __future__ import annotations

import ipaddress
import resource
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from bitquota.canonical import canonical_json
from bitquota.errors import BitquotaError, InvalidInput, QuotaExceeded, ServiceTimeout, Unavailable
from bitquota.service.api.problem_responses import MEDIA_TYPE
from bitquota.service.logs import logger
from bitquota.service.problem_json import problem_json

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence
    from ipaddress import IPv4Network, IPv6Network

    from bitquota.service.settings import Settings

_log = logger("connections")
_SWEEP_S = 1.0
_WINDOW_S = 30.0
"""A body must keep its least rate over each stretch of this length, so that a link may stall."""

_UNREAD_S = 60.0
"""Seconds for which a client may read nothing of an answer that waits for it."""

_MAX_HEAD_BYTES = 64 * 2**10
_SPARE_FILES, _ENOUGH_FILES = 512, 2**16
"""Descriptors kept for databases, uploads and drivers, and how many are asked for in all."""

_STATUS_LINES = {
    408: b"HTTP/1.1 408 Request Timeout",
    429: b"HTTP/1.1 429 Too Many Requests",
    431: b"HTTP/1.1 431 Request Header Fields Too Large",
    503: b"HTTP/1.1 503 Service Unavailable",
}


class Connections:
    """All connections of one server.

    Args:
        settings: Limits.
    """

    def __init__(self, settings: Settings) -> None:
        self._header_s = settings.header_timeout_s
        self._window_bytes = settings.min_body_rate * _WINDOW_S
        self._of_address = settings.max_connections_per_address
        self._proxies = settings.proxies
        self._most = max(1, min(settings.max_connections, _descriptors() - _SPARE_FILES))
        self._all: set[Connection] = set()
        self._addresses: Counter[str] = Counter()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.heads: dict[Connection, float] = {}
        """Connections whose next head has not arrived, and since when, oldest first."""

    def add(self, connection: Connection) -> BitquotaError | None:
        """Count a connection, or return why it cannot be taken."""
        address = connection.address
        shared = connection.client is not None and _is_among(connection.client[0], self._proxies)
        if address and not shared and 0 < self._of_address <= self._addresses[address]:
            msg = f"one address may have at most {self._of_address:,} connections: close some"
            return QuotaExceeded(msg, limit=self._of_address, retry_after_s=1)
        if len(self._all) >= self._most:
            if not self.heads:
                msg = f"this server takes {self._most:,} connections at a time: try again"
                return Unavailable(msg, retry_after_s=1)
            # Who has said nothing for longest goes first.
            next(iter(self.heads)).refuse(408, _late(self._header_s))
        self._all.add(connection)
        self._addresses[address] += 1
        if self._loop is None:
            self._loop = connection.loop
            self._loop.call_later(_SWEEP_S, self._sweep)
        return None

    def remove(self, connection: Connection) -> None:
        """Forget a connection; nothing if it was never counted, or is forgotten already."""
        self.heads.pop(connection, None)
        if connection in self._all:
            self._all.discard(connection)
            self._addresses[connection.address] -= 1
            if not self._addresses[connection.address]:
                del self._addresses[connection.address]

    def _sweep(self) -> None:
        """End connections that are too slow."""
        now = time.monotonic()
        for connection, since in list(self.heads.items()):
            if now - since <= self._header_s:
                break
            connection.refuse(408, _late(self._header_s))
        for connection in list(self._all):
            connection.check(now, self._window_bytes)
        assert self._loop is not None  # noqa: S101  # it calls this
        self._loop.call_later(_SWEEP_S, self._sweep)


class Connection(HttpToolsProtocol):
    """One connection under limits.

    Args:
        connections: All of the server.
        **given: What uvicorn hands to its protocols.
    """

    def __init__(self, connections: Connections, **given: Any) -> None:  # noqa: ANN401
        super().__init__(**given)
        self._among = connections
        self._within_message = False
        self._head_bytes = 0
        self._body_since: float | None = None
        self._body_bytes = 0
        self._unread_since: float | None = None
        self.address = ""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, or say why not."""
        super().connection_made(transport)
        self.address = _network(self.client[0]) if self.client else ""
        error = self._among.add(self)
        if error is not None:
            self.refuse(error.http_status, error)
            return
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._among.remove(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came and keep count of it."""
        if not self._within_message:
            self._expect_head()
        self._body_bytes += len(data)
        super().data_received(data)
        if self in self._among.heads and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_HEAD_BYTES:
                msg = f"the head of a request must have at most {_MAX_HEAD_BYTES:,} bytes"
                self.refuse(431, InvalidInput(msg))

    def _expect_head(self) -> None:
        if self not in self._among.heads:
            self._head_bytes = 0
            self._among.heads[self] = time.monotonic()

    def on_message_begin(self) -> None:
        """Note that a head begins."""
        self._within_message = True
        self._expect_head()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Note that the body begins."""
        self._among.heads.pop(self, None)
        self._body_since, self._body_bytes = time.monotonic(), 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Note that the body is there."""
        self._within_message = False
        self._body_since = None
        super().on_message_complete()

    def pause_writing(self) -> None:
        """Note that the client does not read."""
        self._unread_since = time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        """Note that it does."""
        self._unread_since = None
        super().resume_writing()

    def check(self, now: float, window_bytes: float) -> None:
        """End this connection if its body comes, or its answer goes, too slowly."""
        if self._unread_since is not None and now - self._unread_since > _UNREAD_S:
            _log.info("answer not read", address=self.address)
            self.transport.abort()
        if self._body_since is None:
            return
        if self.flow.read_paused:  # it is this server that is slow
            self._body_since, self._body_bytes = now, 0
        elif now - self._body_since >= _WINDOW_S:
            if self._body_bytes < window_bytes:
                msg = (
                    f"a body must arrive at {window_bytes / _WINDOW_S:,.0f} bytes a second; got "
                    f"{self._body_bytes:,} in {_WINDOW_S:.0f} s: send it again, an upload from "
                    "where it broke off"
                )
                self.refuse(408, ServiceTimeout(msg))
            self._body_since, self._body_bytes = now, 0

    def refuse(self, status: int, error: BitquotaError) -> None:
        """Hang up, and say why where no answer has begun."""
        self._among.remove(self)
        _log.info("connection refused", address=self.address, status=status)
        if self.cycle is None or not self.cycle.response_started or self.cycle.response_complete:
            body = canonical_json(problem_json(error, status=status)).encode()
            head = (
                _STATUS_LINES[status],
                b"content-type: " + MEDIA_TYPE.encode(),
                b"content-length: " + str(len(body)).encode(),
                b"connection: close",
            )
            self.transport.write(b"\r\n".join(head) + b"\r\n\r\n" + body)
        self.transport.close()


def _late(header_s: float) -> ServiceTimeout:
    return ServiceTimeout(f"the head of a request must arrive within {header_s:g} s; it did not")


def _network(host: str) -> str:
    """Return what one client has to itself: an IPv4 address, or 64 bits of an IPv6 address."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((int(address) >> 64 << 64, 64)))
    return host


def _is_among(host: str, networks: Sequence[IPv4Network | IPv6Network]) -> bool:
    """Whether an address is that of a trusted proxy, which all of its clients share."""
    try:
        return any(ipaddress.ip_address(host) in network for network in networks)
    except ValueError:
        return False


def _descriptors() -> int:
    """Return how many files this process may have open, after asking for as many as it can get."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH_FILES)
    if 0 <= soft < wanted:  # infinity is negative
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted if soft < 0 else max(soft, wanted)

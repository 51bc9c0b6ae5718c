"""What happens around every request: an id, security headers, and a limit on JSON bodies."""

from __future__ import annotations

import logging
import re
import secrets
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from bitquota.errors import BitquotaError, InvalidInput, TooLarge
from bitquota.service.api.problem_responses import problem_response
from bitquota.service.logs import logger
from bitquota.service.security.json_limits import REQUEST, check_json, check_texts

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

_log = logger("http")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
_DEFAULTS = (
    (b"cache-control", b"no-store"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
)


def _says_json(scope: Scope) -> bool:
    """Return whether FastAPI would parse the body, which it also does where nothing is said."""
    said = dict(scope["headers"]).get(b"content-type", b"application/json")
    return b"json" in said.partition(b";")[0].lower()


class Envelope:
    """Pure ASGI, so that streamed bodies pass in both directions as they come."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        max_body_bytes: int,
        streamed: frozenset[str],
        observe: Callable[[str, str, int, float], None],
    ) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.limits = replace(REQUEST, size=max_body_bytes)
        self.streamed = streamed
        self.observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = sent if _REQUEST_ID.fullmatch(sent) else secrets.token_hex(8)
        scope["request_id"] = request_id
        began = time.perf_counter()

        # Every answer has the request's id, and is counted.
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                present = {name.lower() for name, _ in headers}
                headers += [(b"x-request-id", request_id.encode()), *_HEADERS]
                headers += [(n, v) for n, v in _DEFAULTS if n not in present]
                message = {**message, "headers": headers}
                self._tell(scope, message["status"], time.perf_counter() - began)
            await send(message)

        if b"%00" in scope["raw_path"] or b"%00" in scope["query_string"]:
            wrong = InvalidInput("an address must be text without NUL characters; got one")
            await problem_response(wrong)(scope, receive, send_with_headers)
            return
        # Uploads and solves are streamed and have limits of their own.
        if scope["method"] == "PUT" or scope["path"] in self.streamed:
            await self.app(scope, receive, send_with_headers)
            return

        # Other bodies are read whole, checked, and handed on.
        body = await self._body(receive)
        try:
            if body is None:
                msg = f"a request body must be at most {self.max_body_bytes:,} bytes; got more"
                raise TooLarge(msg, limit=self.max_body_bytes)
            if body and scope["method"] == "POST" and _says_json(scope):
                check_json(body, self.limits, "a request body")
                check_texts(body, "a request body")
        except BitquotaError as error:
            await problem_response(error)(scope, receive, send_with_headers)
            return
        delivered = False

        async def receive_body() -> Message:
            nonlocal delivered
            if delivered:
                return await receive()
            delivered = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, receive_body, send_with_headers)

    def _tell(self, scope: Scope, status: int, seconds: float) -> None:
        """Count and log one answer, by route template: a path could hold anything."""
        route = getattr(scope.get("route"), "path", "(none)")
        self.observe(scope["method"], route, status, seconds)
        caller = scope.get("caller")
        quiet = status < 400 and scope["method"] == "GET"  # polls would drown the rest
        if quiet and not _log.isEnabledFor(logging.DEBUG):
            return
        say = _log.warning if status >= 500 else _log.debug if quiet else _log.info
        say(
            "request",
            method=scope["method"],
            route=route,
            path=scope["path"][:200],
            status=status,
            ms=round(1000 * seconds, 1),
            request_id=scope["request_id"],
            actor=None if caller is None else caller.actor,
        )

    async def _body(self, receive: Receive) -> bytes | None:
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return b""
            size += len(message.get("body", b""))
            if size > self.max_body_bytes:
                return None
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                return b"".join(parts)

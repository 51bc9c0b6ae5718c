"""Errors over HTTP: problem+json with stable types made of the error tree's slugs.

References:
    RFC 9457, Problem Details for HTTP APIs.

Design: docs/design/errors.md
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from bitquota.canonical import canonical_json
from bitquota.errors import (
    BitquotaError,
    Conflict,
    Forbidden,
    InvalidInput,
    NotFound,
    ServiceError,
    TooLarge,
    Unauthorized,
    Unavailable,
)
from bitquota.service.api.schemas import invalid_request
from bitquota.service.problem_json import problem_json
from bitquota.service.store.storage_errors import storage_error

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi import FastAPI
    from starlette.requests import Request
MEDIA_TYPE = "application/problem+json"
_BY_STATUS: dict[int, type[BitquotaError]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    413: TooLarge,
    422: InvalidInput,
    503: Unavailable,
}


def problem_response(
    error: BitquotaError,
    *,
    status: int | None = None,
    headers: Mapping[str, str] | None = None,
    request: Request | None = None,
) -> Response:
    """Return ``error`` as a response; a wait that it names becomes ``Retry-After``."""
    body = problem_json(error, status=status)
    if request is not None and (request_id := request.scope.get("request_id")):
        body["instance"] = f"urn:bitquota:request:{request_id}"
    sent = dict(headers or {})
    if (wait := error.details.get("retry_after_s")) is not None:
        sent.setdefault("Retry-After", str(wait))
    if body["status"] == 401:
        sent.setdefault("WWW-Authenticate", 'Bearer realm="bitquota"')
    return Response(
        canonical_json(body), status_code=body["status"], headers=sent, media_type=MEDIA_TYPE
    )


def _methods(app: FastAPI, path: str) -> list[str]:
    """Return every method that a path knows: a router names only those of its first match."""
    found: set[str] = set()
    for template, operations in app.openapi()["paths"].items():
        pattern = "[^/]+".join(map(re.escape, re.split(r"\{[^}]*\}", template)))
        if re.fullmatch(pattern, path):
            found |= {method.upper() for method in operations}
    return sorted(found)


def install(app: FastAPI) -> None:
    """Make every error of ``app`` leave as problem+json."""

    @app.exception_handler(BitquotaError)
    def _known(request: Request, error: Exception) -> Response:
        assert isinstance(error, BitquotaError)  # noqa: S101  # registered for it
        return problem_response(error, request=request)

    @app.exception_handler(RequestValidationError)
    def _invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)  # noqa: S101  # registered for it
        wrong = invalid_request(error.errors())
        return problem_response(wrong, request=request)

    @app.exception_handler(HTTPException)
    def _http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101  # registered for it
        kind = _BY_STATUS.get(error.status_code, ServiceError)
        if error.status_code < 500 and kind is ServiceError:
            kind = InvalidInput
        wrong = kind(f"{request.method} {request.url.path}: {error.detail}")
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = ", ".join(_methods(app, request.url.path)) or headers["Allow"]
        # A body that is not even UTF-8 is as invalid as one that is not JSON.
        status = 422 if error.status_code == 400 else error.status_code
        return problem_response(wrong, status=status, headers=headers, request=request)

    @app.exception_handler(OSError)
    def _disk(request: Request, error: Exception) -> Response:
        assert isinstance(error, OSError)  # noqa: S101  # registered for it
        told = storage_error(error)
        if told is None:
            raise error
        return problem_response(told, request=request)

    @app.exception_handler(Exception)
    def _unknown(request: Request, _error: Exception) -> Response:
        wrong = ServiceError("the server failed on its own account; the cause is in its log")
        return problem_response(wrong, request=request)

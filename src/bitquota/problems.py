"""problem+json back into the errors of ``bitquota.errors``, for clients and for our own processes.

Design: docs/design/errors.md
"""

from __future__ import annotations

from bitquota.errors import BitquotaError, ServiceError

TYPE_PREFIX = "urn:bitquota:problem:"


def error_of(problem: object, *, status: int = 500) -> BitquotaError:
    """Return the error that a problem+json body stands for; an unknown one is a ServiceError."""
    body = problem if isinstance(problem, dict) else {}
    slug = str(body.get("type", "")).removeprefix(TYPE_PREFIX)
    kind = _errors_by_slug().get(slug, ServiceError)
    message = body.get("detail") or f"the server answered {status} without saying why"
    details = body.get("details")
    named = {str(k): v for k, v in details.items()} if isinstance(details, dict) else {}
    named.pop("message", None)
    return kind(str(message), **named)


def _errors_by_slug() -> dict[str, type[BitquotaError]]:
    found: dict[str, type[BitquotaError]] = {}
    waiting: list[type[BitquotaError]] = [BitquotaError]
    while waiting:
        kind = waiting.pop()
        found.setdefault(kind.slug, kind)
        waiting += kind.__subclasses__()
    return found

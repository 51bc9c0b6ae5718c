"""problem+json bodies made of the error tree's slugs, short whatever an error quotes.

References:
    RFC 9457, Problem Details for HTTP APIs.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from bitquota.canonical import canonical_json
from bitquota.problems import TYPE_PREFIX

if TYPE_CHECKING:
    from bitquota.canonical import JsonObject
    from bitquota.errors import BitquotaError

LONGEST_TEXT = 2000
"""Characters of a message; what a client sent may be quoted in it."""

LONGEST_DETAILS = 20_000
"""Characters of the JSON of an error's details."""


def problem_json(error: BitquotaError, *, status: int | None = None) -> JsonObject:
    """Return the body that stands for ``error``."""
    title = (type(error).__doc__ or "").strip().splitlines()[0]
    return {
        "type": TYPE_PREFIX + error.slug,
        "title": title,
        "status": error.http_status if status is None else status,
        "detail": _storable(error.message)[:LONGEST_TEXT],
        "details": _details(error),
    }


def _details(error: BitquotaError) -> JsonObject:
    try:
        text = canonical_json(error.details)
    except (TypeError, ValueError, RecursionError):
        text = canonical_json({name: _said(value) for name, value in error.details.items()})
    if len(text) > LONGEST_DETAILS:
        return {"left_out": f"{len(text):,} characters"}
    found: JsonObject = json.loads(_storable(text))
    return found


def _storable(text: str) -> str:
    """Return ``text`` with ``?`` for what neither UTF-8 nor PostgreSQL can hold."""
    return text.encode("utf-8", "replace").decode().replace("\0", "?").replace("\\u0000", "?")


def _said(value: object) -> str:
    try:
        return str(value)
    except (ValueError, RecursionError):
        return "too long"  # a number of thousands of digits

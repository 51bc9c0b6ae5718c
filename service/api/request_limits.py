"""How much one request may ask for: every count and length in one place.

Depth, values and digits of any body are bounded before it is parsed (``json_limits.REQUEST``);
what is here are the lists and texts of submissions, which end up in the database and in the work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitquota.candidates.layers import check_pattern
from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bitquota.canonical import JsonObject

MOST_LABELS = 32
LONGEST_LABEL_NAME = 128
LONGEST_LABEL_VALUE = 256
MOST_BUDGETS = 64
MOST_LIMITS = 8
"""Limits joined by ``+`` in one budget."""
LONGEST_BUDGET = 200
MOST_WIDTHS = 16
MOST_PATTERNS = 1000
MOST_TIES = 1000
LONGEST_PATTERN = 512
LONGEST_TEXT = 512
LONGEST_LIST = 10_000
LARGEST_NUMBER = 2**53
"""Of integers: each is one exact float64, and none overflows what counts with them."""

_LISTS = {
    "budgets": MOST_BUDGETS,
    "weight_bits": MOST_WIDTHS,
    "exclude": MOST_PATTERNS,
    "fixed": MOST_PATTERNS,
    "ties": MOST_TIES,
}
"""Most entries of a list or object, by the name it has in a request."""


def check_request(request: JsonObject) -> None:
    """Raise ``InvalidInput`` if a request has more or longer parts than it may.

    Also for a layer pattern that is no regular expression of the syntax that is matched in time
    proportional to a name's length.
    """
    _check(request, "request")
    for part in (request, *(v for v in request.values() if isinstance(v, dict))):
        check_budget_texts(part.get("budgets") or ())
        for pattern in _patterns(part):
            check_pattern(pattern)


def check_budget_texts(budgets: Sequence[object]) -> None:
    """Raise ``InvalidInput`` for a budget that is too long, or joins too many limits."""
    for text in budgets:
        if not isinstance(text, str):
            continue  # its type is checked elsewhere
        _at_most(len(text), LONGEST_BUDGET, "a budget", "characters")
        _at_most(text.count("+") + 1, MOST_LIMITS, "a budget", "limits joined by '+'")


def check_labels(labels: Mapping[str, str]) -> None:
    """Raise ``InvalidInput`` for too many or too long labels."""
    _at_most(len(labels), MOST_LABELS, "a job", "labels")
    for name, value in labels.items():
        _at_most(len(name), LONGEST_LABEL_NAME, "the name of a label", "characters")
        _at_most(len(value), LONGEST_LABEL_VALUE, f"the label '{name}'", "characters")


def _check(value: object, name: str) -> None:
    if isinstance(value, str):
        _at_most(len(value), LONGEST_TEXT, f"a text of '{name}'", "characters")
    elif isinstance(value, dict):
        _at_most(len(value), _LISTS.get(name, LONGEST_LIST), f"'{name}'", "members")
        for key, member in value.items():
            _at_most(len(key), LONGEST_PATTERN, f"a name in '{name}'", "characters")
            _check(member, key)
    elif isinstance(value, int) and abs(value) > LARGEST_NUMBER:
        msg = f"integers of '{name}' must be between -2^53 and 2^53; got {value}"
        raise InvalidInput(msg, limit=LARGEST_NUMBER)
    elif isinstance(value, list | tuple):
        _at_most(len(value), _LISTS.get(name, LONGEST_LIST), f"'{name}'", "entries")
        for member in value:
            _check(member, f"each of {name}")


def _patterns(request: JsonObject) -> list[str]:
    found = [*(request.get("exclude") or ()), *(request.get("fixed") or ())]
    for tie in request.get("ties") or ():
        found += tie
    return [pattern for pattern in found if isinstance(pattern, str)]


def _at_most(got: int, limit: int, what: str, of: str) -> None:
    if got > limit:
        msg = f"{what} must have at most {limit:,} {of}; got {got:,}"
        raise InvalidInput(msg, limit=limit, got=got)

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitquota.errors import InvalidInput, TooLarge
from bitquota.service.security import json_limits
from bitquota.service.security.json_limits import (
    DOCUMENT,
    REQUEST,
    check_json,
    check_texts,
    parse_json,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(-1e9, 1e9) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


def counted(value):
    """Return the brackets, commas and colons of a value, outside its texts."""
    if isinstance(value, list):
        return 1 + max(0, len(value) - 1) + sum(map(counted, value))
    if isinstance(value, dict):
        members = sum(map(counted, value.values()))
        return 1 + max(0, len(value) - 1) + len(value) + members
    return 0


def depth(value):
    if isinstance(value, list | dict):
        inner = value.values() if isinstance(value, dict) else value
        return 1 + max(map(depth, inner), default=0)
    return 0


class TestCheckJson:
    @given(VALUES, st.booleans(), st.sampled_from([1, 2, 3, 7, 2**20]))
    def test_counts_are_those_of_the_parsed_value(self, value, ascii_only, piece):
        """Whatever stands in texts, and wherever a piece ends."""
        text = json.dumps(value, ensure_ascii=ascii_only).encode()
        limits = replace(REQUEST, values=counted(value), depth=depth(value))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_limits, "_PIECE", piece)
            check_json(text, limits, "it")
            for name in ("values", "depth"):
                if getattr(limits, name):
                    with pytest.raises(TooLarge):
                        check_json(text, replace(limits, **{name: getattr(limits, name) - 1}), "it")

    @pytest.mark.parametrize(
        "text",
        [
            b"[" * 17 + b"]" * 17,
            b"[" + b"[]," * 100_000 + b"1]",
            b"1" * 41,
            b'"' + b"x" * 2**20 + b'"',
        ],
    )
    def test_too_much(self, text):
        with pytest.raises(TooLarge, match="at most"):
            parse_json(text, REQUEST, "a body")

    @pytest.mark.parametrize(
        "text",
        [b"NaN", b"-Infinity", b"1e261", b"[1E+999]", "{}".encode("utf-16"), b"", b"[", b"\xff"],
    )
    def test_what_is_no_finite_json(self, text):
        with pytest.raises(InvalidInput):
            parse_json(text, REQUEST, "a body")

    def test_ends_early(self):
        """The 60 MB of lists that took 1.6 GB are refused before any of them is made."""
        with pytest.raises(TooLarge, match="values"):
            parse_json(b'{"a":[' + b"[]," * (20 * 2**20) + b"[]]}", DOCUMENT, "a plan")


class TestCheckTexts:
    @pytest.mark.parametrize(
        "text", [r'"\u0000"', r'["a", "\ud800x"]', r'{"\udc00": 1}', r'"\\\u0000"']
    )
    def test_what_cannot_be_stored(self, text):
        with pytest.raises(InvalidInput, match="NUL"):
            check_texts(text.encode(), "a body")

    @pytest.mark.parametrize("text", [r'"\\u0000"', r'"\ud83d\ude00"', r'"\u00e9"', r'"\u'])
    def test_what_can(self, text):
        check_texts(text.encode(), "a body")

from __future__ import annotations

import pytest

from bitquota.errors import InvalidInput
from bitquota.request import PlanRequest
from bitquota.service.api.request_limits import check_labels, check_request

PLAIN = PlanRequest(budgets=("3 bits + 2 GBitOps", "4 bits"), ties=(("q", "k"),)).to_json()


class TestCheckRequest:
    def test_plain(self):
        check_request(PLAIN)
        check_request({"plan": PLAIN})

    @pytest.mark.parametrize(
        ("changes", "limit"),
        [
            ({"budgets": ["3 bits"] * 65}, 64),
            ({"budgets": ["3 bits" + " " * 200]}, 200),
            ({"budgets": ["+".join(["3 bits"] * 9)]}, 8),
            ({"ties": [["a", "b"]] * 1001}, 1000),
            ({"exclude": ["a"] * 1001}, 1000),
            ({"exclude": ["a" * 513]}, 512),
            ({"fixed": {str(k): 4 for k in range(1001)}}, 1000),
            ({"fixed": {"a" * 513: 4}}, 512),
            ({"weight_bits": [2] * 17}, 16),
            ({"loss": "a" * 513}, 512),
        ],
    )
    def test_error_says_the_limit(self, changes, limit):
        for request in (PLAIN | changes, {"plan": PLAIN | changes}):
            with pytest.raises(InvalidInput, match=f"at most {limit:,}") as caught:
                check_request(request)
            assert caught.value.details["limit"] == limit

    @pytest.mark.parametrize("number", [2**53 + 1, -(10**39)])
    def test_integers_that_are_too_large(self, number):
        for changes in ({"samples": number}, {"fixed": {"a": number}}, {"more": [[number]]}):
            with pytest.raises(InvalidInput, match="2\\^53"):
                check_request(PLAIN | changes)

    @pytest.mark.parametrize("place", ["exclude", "ties", "fixed"])
    @pytest.mark.parametrize("pattern", ["re:(", "re:(?=a)b", r"re:(a)\1", "re:(a{1000}){1000}"])
    def test_expression_that_is_not_matched_in_linear_time(self, place, pattern):
        value = {"exclude": [pattern], "ties": [[pattern, "a"]], "fixed": {pattern: 4}}[place]
        with pytest.raises(InvalidInput, match="RE2"):
            check_request(PLAIN | {place: value})


class TestCheckLabels:
    @pytest.mark.parametrize(
        "labels", [{"a" * 129: ""}, {"a": "b" * 257}, {str(k): "" for k in range(33)}]
    )
    def test_too_much(self, labels):
        with pytest.raises(InvalidInput, match="at most"):
            check_labels(labels)

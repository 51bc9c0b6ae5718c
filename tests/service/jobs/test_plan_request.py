"""Plan requests as the REST API takes them."""

from __future__ import annotations

import pytest
from pydantic import TypeAdapter, ValidationError

from bitquota.errors import InvalidInput
from bitquota.service.jobs.kinds.plan_request import PlanRequestBody, with_budgets
from refusals import refused

BODY = TypeAdapter(PlanRequestBody)


class TestZeroBits:
    def test_are_taken_by_name_and_refused_for_targets_without(self):
        """``prune`` brings the correction that it needs; a target is read before anything runs."""
        asked = BODY.validate_python({"allow": ["prune", "2:4"], "budgets": ["3 bits"]})
        assert ["prune", "2:4"] == asked["allow"]
        assert ["bias_correction"] == asked["corrections"]
        body = {"allow": ["2:4"], "budgets": ["3 bits"], "target": "ort-cpu"}
        with refused(InvalidInput, target="ort-cpu", allow="2:4"):
            with_budgets(BODY.validate_python(body))
        with pytest.raises(ValidationError, match="allow must be one of prune, 2:4"):
            BODY.validate_python({"allow": ["heads"]})


class TestNamesOfFormats:
    def test_stand_for_bit_widths_as_in_the_command(self):
        """Formats of the target, integers by name, and weights with inputs; numbers stay."""
        floats = {"weight_bits": ["NVFP4", "fp8"], "target": "ct-vllm-nvfp4"}
        assert [4, 8] == BODY.validate_python(floats)["weight_bits"]
        both = BODY.validate_python({"weight_bits": [2, "int4", "w8a8"]})
        assert ([2, 4, 8], 8) == (both["weight_bits"], both["activation_bits"])
        assert [3, 4] == BODY.validate_python({"weight_bits": [3, 4]})["weight_bits"]

    def test_beside_several_widths_of_inputs(self):
        """``activation_bits`` may be a list; names of weights alone go with it."""
        several = BODY.validate_python({"weight_bits": ["w4", 8], "activation_bits": [8, 4]})
        assert ([4, 8], [4, 8]) == (several["weight_bits"], several["activation_bits"])
        assert BODY.validate_python({"activation_bits": [8]})["activation_bits"] == 8

    @pytest.mark.parametrize(
        ("request_body", "said"),
        [
            ({"weight_bits": ["nvfp4"]}, "formats such as nvfp4 need a"),
            ({"weight_bits": ["w4a8"], "activation_bits": 4}, "must agree on the bit-width"),
            ({"weight_bits": ["int4"], "target": 3}, "valid string"),
            ({"weight_bits": ["int4", 2.5]}, "valid integer"),
            ({"weight_bits": "int4"}, "valid tuple"),
            ({"weight_bits": ["w4a8"], "activation_bits": [4, 8]}, "got 8 in 'w4a8' and 4, 8"),
            ({"weight_bits": ["int4"], "activation_bits": [4, "8"]}, "valid integer"),
            ({"activation_bits": [4, 4]}, "each bit-width once"),
            ({"activation_bits": []}, "each bit-width once"),
        ],
    )
    def test_without_meaning_are_refused(self, request_body, said):
        """Each in a sentence, never as a fault of the server."""
        with pytest.raises(ValidationError, match=said):
            BODY.validate_python(request_body)

    def test_are_in_the_published_schema(self):
        """A client that checks against it may send them."""
        widths = BODY.json_schema()["properties"]["weight_bits"]
        assert {"type": "string"} in widths["items"]["anyOf"]

"""Formats by name where bit-widths are asked for."""

from __future__ import annotations

import pytest

from bitquota.candidates.targets import TARGETS, target_by_name
from bitquota.candidates.targets.format_names import bits_of_names, menu
from bitquota.errors import InvalidInput
from refusals import refused


class TestBitsOfNames:
    @pytest.mark.parametrize("name", TARGETS)
    def test_each_format_of_a_menu_stands_for_its_bits(self, name):
        """What ``targets`` shows can be asked for, in any spelling of letters."""
        target = TARGETS[name]
        widths = {f.weight_bits for f in target.formats} - {32}
        got, inputs = bits_of_names([n.lower() for n in menu(target)], target)
        assert set(got) == widths
        assert inputs is None

    def test_numbers_integers_and_inputs_need_no_target(self):
        """Every spelling of a bit-width."""
        assert bits_of_names(["2", "int4", "w8"], None) == ((2, 4, 8), None)
        assert bits_of_names(["w4a8", " w8a8"], None) == ((4, 8), 8)
        assert bits_of_names(["w4a16"], None) == ((4,), None)

    def test_small_floats_of_a_target(self):
        """A menu of small floats, and no integers by name beside them."""
        target = target_by_name("ct-vllm-nvfp4")
        assert bits_of_names(["nvfp4", "FP8"], target) == ((4, 8), None)
        with refused(InvalidInput, bits="int8"):
            bits_of_names(["int8"], target)

    def test_names_without_meaning_are_refused(self):
        """A format needs its target; inputs have one bit-width."""
        for name in ("nvfp4", "fp8", "2;4", ""):
            with refused(InvalidInput, bits=name):
                bits_of_names([name], None)
        with refused(InvalidInput, bits=["w4a8", "w8a4"]):
            bits_of_names(["w4a8", "w8a4"], None)

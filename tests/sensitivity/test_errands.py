"""Chunks that others measure give the same bits as a measurement alone."""

from __future__ import annotations

import numpy as np
import pytest

from bitquota.errors import InvalidInput
from bitquota.sensitivity.cache import MemoryLedger
from bitquota.sensitivity.errands import MEASURES, Errand, carry_out
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.measures.choices import measure_choices
from bitquota.sensitivity.measures.gram import measure_differences
from bitquota.sensitivity.measures.pairs import measure_pairs, measure_singles
from bitquota.sensitivity.runners.make import make_runner
from sensitivity_networks import Residual, build, inventory_of, samples, table_of

KL = loss_by_name("kl")


def a_runner():
    module = build(Residual)
    return make_runner(module, inventory_of(module), samples(Residual), chunk_size=2)


class Helped(MemoryLedger):
    """Has every second errand done by another runner, back to front, and counts both."""

    def __init__(self):
        super().__init__()
        self.other = a_runner()
        self.table = table_of(self.other.inventory)
        self.here, self.elsewhere = [], []

    def measure_ahead(self, errands, do):
        for errand in reversed(errands):
            if errand.chunk % 2:
                sent = Errand.from_json(errand.to_json())
                carry_out(sent, self.other, self.table, KL, ledger=self)
                self.elsewhere.append(errand)
            else:
                do(errand)
                self.here.append(errand)


class TestCarryOut:
    @pytest.mark.parametrize("measure", [measure_pairs, measure_singles])
    @pytest.mark.parametrize("from_point", [False, True])
    def test_same_bits_as_alone(self, measure, from_point):
        runner = a_runner()
        table = table_of(runner.inventory)
        point = tuple(0 for _ in table.groups) if from_point else None
        expected = measure(a_runner(), table, KL, base_point=point, ledger=MemoryLedger())
        ledger = Helped()
        found = measure(runner, table, KL, base_point=point, ledger=ledger)
        assert expected.to_bytes() == found.to_bytes()
        assert ledger.here
        assert ledger.elsewhere

    def test_same_differences_as_alone(self):
        runner = a_runner()
        table = table_of(runner.inventory)
        alone = MemoryLedger()
        expected, theirs = measure_differences(a_runner(), table, KL, ledger=alone)
        ledger = Helped()
        found, ours = measure_differences(runner, table, KL, ledger=ledger)
        assert expected.to_bytes() == found.to_bytes()
        assert theirs.differences.equal(ours.differences)
        assert len(alone) == len(ledger)

    @pytest.mark.parametrize("with_centre", [False, True])
    def test_same_losses_of_choices_as_alone(self, with_centre):
        runner = a_runner()
        table = table_of(runner.inventory)
        choices = [tuple(0 for _ in table.groups), tuple(1 for _ in table.groups)]
        centre = choices[1] if with_centre else None
        expected = measure_choices(a_runner(), table, KL, choices, centre=centre)
        ledger = Helped()
        found = measure_choices(runner, table, KL, choices, centre=centre, ledger=ledger)
        assert np.array_equal(expected, found)
        assert ledger.elsewhere

    def test_nobody_is_asked_for_what_is_there(self):
        runner = a_runner()
        table = table_of(runner.inventory)
        ledger = Helped()
        measure_pairs(runner, table, KL, ledger=ledger)
        before = len(ledger.here)
        measure_pairs(a_runner(), table, KL, ledger=ledger)
        assert before == len(ledger.here)

    @pytest.mark.parametrize(
        "changes", [{"chunk": 10_000}, {"point": (0,)}, {"choices": ((99, 99, 99, 99),)}]
    )
    def test_errand_of_another_model(self, changes):
        runner = a_runner()
        errand = Errand(**{"measure": "gram", "chunk": 0} | changes)
        with pytest.raises(InvalidInput, match="must speak of"):
            carry_out(errand, runner, table_of(runner.inventory), KL, ledger=MemoryLedger())


class TestErrand:
    def test_survives_json(self):
        errand = Errand(measure="choices", chunk=3, point=(1, 0), choices=((0, 1), (1, 1)))
        assert errand == Errand.from_json(errand.to_json())

    @pytest.mark.parametrize("data", [{}, {"measure": "gram"}, {"measure": 1, "chunk": "x"}])
    def test_refuses_anything_else(self, data):
        with pytest.raises(InvalidInput, match="an errand must have"):
            Errand.from_json(data)

    def test_refuses_unknown_measures(self):
        with pytest.raises(InvalidInput, match=", ".join(MEASURES)):
            Errand(measure="tangent", chunk=0)

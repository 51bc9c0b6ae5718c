"""Losses of choices: what is known is not run again, and has the bits of a measurement alone."""

from __future__ import annotations

import numpy as np
import pytest

from bitquota.context import Context, MemoryLedger
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.measures.choices import measure_choices, passes_of
from bitquota.sensitivity.runners.make import make_runner
from sensitivity_networks import Residual, build, inventory_of, samples, table_of

KL = loss_by_name("kl")
CHOICES = ((0, 0, 0, 0), (1, 0, 1, 0), (1, 1, 0, 1))


def a_runner():
    module = build(Residual)
    return make_runner(module, inventory_of(module), samples(Residual), chunk_size=2)


class TestMeasureChoices:
    @pytest.mark.parametrize("centre", [None, (1, 1, 1, 1)])
    @pytest.mark.parametrize("new", range(3))
    def test_only_the_new_choice_is_run(self, centre, new):
        """Wherever it stands among choices that the cache holds."""
        runner, context = a_runner(), Context(ledger=MemoryLedger())
        table = table_of(runner.inventory)
        known = [choice for k, choice in enumerate(CHOICES) if k != new]
        measure_choices(runner, table, KL, known, centre=centre, context=context)
        before = runner.passes.passes
        found = measure_choices(runner, table, KL, CHOICES, centre=centre, context=context)
        expected = passes_of(runner, table, [CHOICES[new]], centre)
        assert runner.passes.passes - before == pytest.approx(expected)
        assert np.array_equal(found, measure_choices(a_runner(), table, KL, CHOICES, centre=centre))

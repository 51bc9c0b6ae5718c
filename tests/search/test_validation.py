"""Choices are measured where they must be, and compared sample by sample."""

import numpy as np
import pytest

from bitquota.search.validation import HoldOut
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.measures.choices import measure_choices
from bitquota.sensitivity.recorder import standard_error
from bitquota.sensitivity.runners.make import make_runner
from sensitivity_networks import Residual, build, inventory_of, samples, table_of

KL = loss_by_name("kl")
LOW, MIDDLE, HIGH = (0, 0, 0, 0), (0, 1, 0, 1), (1, 1, 1, 1)


@pytest.fixture
def holdout():
    module = build(Residual)
    inventory = inventory_of(module)
    blocks = tuple(
        make_runner(module, inventory, samples(Residual, n, seed=s), engine="eager")
        for n, s in ((12, 1), (6, 2), (6, 3))
    )
    return HoldOut(blocks=blocks, table=table_of(inventory), loss=KL)


class TestMeasure:
    def test_measures_each_choice_once_on_each_block(self, holdout):
        """What is known is not run again."""
        holdout.measure([LOW, HIGH], None, "first")
        calls = [block.passes.calls for block in holdout.blocks]
        holdout.measure([LOW, HIGH], None, "again")
        assert [block.passes.calls for block in holdout.blocks] == calls
        assert calls[1:] == [0, 0]

        holdout.measure([LOW], None, "more", blocks=3)
        assert [len(holdout.losses[c]) for c in (LOW, HIGH)] == [3, 1]
        truth = [measure_choices(b, holdout.table, KL, [LOW])[0] for b in holdout.blocks]
        np.testing.assert_array_equal(holdout.per_sample(LOW), np.concatenate(truth))


class TestGain:
    def test_is_paired_over_common_blocks(self, holdout):
        """Blocks that only one of the two was measured on do not count."""
        holdout.measure([LOW, MIDDLE], None, "both", blocks=2)
        holdout.measure([MIDDLE], None, "one", blocks=3)
        gain, error = holdout.gain(MIDDLE, LOW)
        difference = holdout.per_sample(LOW) - holdout.per_sample(MIDDLE)[:18]
        assert gain == pytest.approx(difference.mean())
        assert error == pytest.approx(standard_error(difference))
        back, same = holdout.gain(LOW, MIDDLE)
        assert (back, same) == pytest.approx((-gain, error))


class TestBest:
    def test_compares_on_what_all_were_measured_on(self, holdout):
        """A choice with an easy extra block gains nothing by it."""
        holdout.measure([LOW, MIDDLE, HIGH], None, "all")
        holdout.losses[LOW].append(np.full(6, -1e9))
        assert holdout.best([LOW, MIDDLE, HIGH]) == min(
            (LOW, MIDDLE, HIGH), key=lambda c: holdout.losses[c][0].mean()
        )

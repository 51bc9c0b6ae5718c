"""The judge measures where it must, and compares sample by sample."""

import numpy as np
import pytest

from bitquota.search.validation import Judge
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.measures.choices import measure_choices
from bitquota.sensitivity.recorder import standard_error
from bitquota.sensitivity.runners.make import make_runner
from sensitivity_networks import Residual, build, inventory_of, samples, table_of

KL = loss_by_name("kl")
LOW, MIDDLE, HIGH = (0, 0, 0, 0), (0, 1, 0, 1), (1, 1, 1, 1)


@pytest.fixture
def judge():
    module = build(Residual)
    inventory = inventory_of(module)
    blocks = tuple(
        make_runner(module, inventory, samples(Residual, n, seed=s), engine="eager")
        for n, s in ((12, 1), (6, 2), (6, 3))
    )
    return Judge(blocks=blocks, table=table_of(inventory), loss=KL)


class TestMeasure:
    def test_measures_each_choice_once_on_each_block(self, judge):
        """What is known is not run again."""
        judge.measure([LOW, HIGH], None, "first")
        calls = [block.passes.calls for block in judge.blocks]
        judge.measure([LOW, HIGH], None, "again")
        assert [block.passes.calls for block in judge.blocks] == calls
        assert calls[1:] == [0, 0]

        judge.measure([LOW], None, "more", blocks=3)
        assert [len(judge.losses[c]) for c in (LOW, HIGH)] == [3, 1]
        truth = [measure_choices(b, judge.table, KL, [LOW])[0] for b in judge.blocks]
        np.testing.assert_array_equal(judge.per_sample(LOW), np.concatenate(truth))


class TestGain:
    def test_is_paired_over_common_blocks(self, judge):
        """Blocks that only one of the two was measured on do not count."""
        judge.measure([LOW, MIDDLE], None, "both", blocks=2)
        judge.measure([MIDDLE], None, "one", blocks=3)
        gain, error = judge.gain(MIDDLE, LOW)
        difference = judge.per_sample(LOW) - judge.per_sample(MIDDLE)[:18]
        assert gain == pytest.approx(difference.mean())
        assert error == pytest.approx(standard_error(difference))
        back, same = judge.gain(LOW, MIDDLE)
        assert (back, same) == pytest.approx((-gain, error))


class TestBest:
    def test_compares_on_what_all_were_measured_on(self, judge):
        """A choice with an easy extra block gains nothing by it."""
        judge.measure([LOW, MIDDLE, HIGH], None, "all")
        judge.losses[LOW].append(np.full(6, -1e9))
        assert judge.best([LOW, MIDDLE, HIGH]) == min(
            (LOW, MIDDLE, HIGH), key=lambda c: judge.losses[c][0].mean()
        )

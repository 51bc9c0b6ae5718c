"""Learned step sizes as sensitivities (LIMPQ)."""

import numpy as np
import pytest
import torch

from bitquota.candidates.table import enumerate_candidates
from bitquota.context import Context, MemoryLedger
from bitquota.errors import Cancelled, InvalidCalibration
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.metrics.learned_steps import LearnedIndicators
from bitquota.sensitivity.runners.make import make_runner
from digits_network import digits, trained_digits_net

KL = loss_by_name("kl")
WIDTHS = (2, 3, 4, 6, 32)


def prepare(model=None, *, labelled=True, n=256):
    """Return a runner and a table."""
    model = trained_digits_net() if model is None else model
    x, y = digits()
    data = CalibrationSet(inputs=(x[:n],), labels=y[:n] if labelled else None)
    inventory = discover(model, (x[:2],))
    return make_runner(model, inventory, data), enumerate_candidates(inventory, WIDTHS)


@pytest.fixture(scope="module")
def matrix():
    """Measured once, with every default."""
    return LearnedIndicators().measure(*prepare(), KL)


class TestLearnedIndicators:
    def test_fall_with_the_bit_width(self, matrix):
        """In at least 90 % of neighbouring widths; zero in full precision."""
        scores = matrix.diagonal.reshape(4, 5)
        assert (np.diff(scores[:, :4], axis=1) < 0).mean() >= 0.9
        assert (scores[:, :4] > 0).all()
        assert (scores[:, 4] == 0).all()

    def test_do_not_depend_on_the_scale_of_the_weights(self, matrix):
        """Batch norm makes a layer's scale arbitrary: without a step, nothing else is left."""
        model = trained_digits_net()
        with torch.no_grad():
            model.conv2.weight *= 7
        still = LearnedIndicators(rate=0.0)
        ours, theirs = (still.measure(*prepare(m), KL).diagonal for m in (None, model))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        assert not np.allclose(ours, matrix.diagonal)

    def test_leave_the_model_alone(self):
        """Weights, statistics and mode are as before."""
        model = trained_digits_net()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        LearnedIndicators(epochs=1).measure(*prepare(model), KL)
        assert not model.training
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())

    def test_are_kept_in_the_ledger(self):
        """A second measurement trains nothing."""
        ledger, counts = MemoryLedger(), []
        for _ in range(2):
            runner, table = prepare()
            LearnedIndicators(epochs=1).measure(runner, table, KL, context=Context(ledger=ledger))
            counts.append(runner.passes.passes)
        assert counts[0] > 0
        assert 0 == counts[1]

    def test_cost_is_declared(self):
        """An upper estimate of the passes that it takes."""
        runner, table = prepare()
        measure = LearnedIndicators(epochs=2)
        measure.measure(runner, table, KL)
        assert 0.5 * measure.cost(runner, table) < runner.passes.passes
        assert runner.passes.passes <= measure.cost(runner, table)

    def test_needs_labels(self):
        """It trains on them."""
        with pytest.raises(InvalidCalibration, match="needs labels"):
            LearnedIndicators().measure(*prepare(labelled=False), KL)

    def test_can_be_cancelled(self):
        """Between steps."""
        with pytest.raises(Cancelled):
            LearnedIndicators().measure(*prepare(), KL, context=Context(cancelled=lambda: True))

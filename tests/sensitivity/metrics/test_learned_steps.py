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

    def test_start_where_lsq_does(self, matrix):
        """Without training ``2 E|w| / sqrt(highest level)``; training moves them."""
        runner, table = prepare()
        found = LearnedIndicators(rate=0.0).measure(runner, table, KL).diagonal.reshape(4, 5)
        for layer, scores in zip(runner.inventory.layers, found, strict=True):
            mean = float(runner.weights.original(layer.name).detach().abs().mean())
            expected = [2 * mean / q**0.5 for q in (1, 3, 7, 31)]
            np.testing.assert_allclose(scores[:4], expected, rtol=1e-5)
        assert not np.allclose(found.ravel(), matrix.diagonal)

    def test_add_the_steps_of_inputs(self):
        """``s_a + α s_w``; an input without negative values has all levels above zero."""
        runner, plain = prepare(n=64)
        table = enumerate_candidates(runner.inventory, WIDTHS, activation_bits=4)
        still = LearnedIndicators(rate=0.0, alpha=3.0)
        weights = still.measure(runner, plain, KL).diagonal.reshape(4, 5)
        both = still.measure(runner, table, KL).diagonal.reshape(4, 5)
        steps = both - weights
        np.testing.assert_allclose(steps, steps[:, :1].repeat(5, axis=1), rtol=1e-5)
        seen = {}
        for name in ("conv1", "conv2"):
            module = runner.module.get_submodule(name)
            module.register_forward_pre_hook(lambda _, args, n=name: seen.update({n: args[0]}))
        with torch.no_grad():
            runner.module(*runner.calibration.inputs)
        assert float(seen["conv1"].min()) < 0 <= float(seen["conv2"].min())
        expected = [
            2 * float(seen[n].abs().mean()) / q**0.5 for n, q in (("conv1", 7), ("conv2", 15))
        ]
        assert steps[:2, 0] == pytest.approx(expected, rel=1e-4)
        trained = LearnedIndicators(epochs=1, alpha=3.0).measure(runner, table, KL).diagonal
        assert not np.allclose(trained, both.ravel())

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

import numpy as np
import pytest
import torch
from torch import nn

from bitquota.errors import InvalidCalibration
from bitquota.models.calibration import CalibrationSet
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.metrics import ClassSeparability
from bitquota.sensitivity.metrics.class_separability import separability
from bitquota.sensitivity.runners.make import make_runner
from sensitivity_networks import Attention, build, inventory_of, samples, table_of

KL = loss_by_name("kl")


class Twins(nn.Module):
    """Layer ``knows`` passes the classes on, layer ``blurs`` sums them away."""

    def __init__(self):
        super().__init__()
        self.knows = nn.Linear(3, 3, bias=False)
        self.blurs = nn.Linear(3, 3, bias=False)
        self.out = nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.knows.weight.copy_(torch.eye(3))
            self.blurs.weight.fill_(1.0)

    def forward(self, x):
        known, blurred = torch.relu(self.knows(x)), torch.relu(self.blurs(x))
        return self.out(blurred) + known


def prepare(chunk_size=99):
    module = build(Twins)
    inventory = inventory_of(module)
    labels = torch.arange(12) % 3
    noise = torch.rand(12, 3, generator=torch.Generator().manual_seed(0))
    data = CalibrationSet(inputs=(torch.eye(3)[labels] + 0.1 * noise,), labels=labels)
    runner = make_runner(module, inventory, data, chunk_size=chunk_size, engine="eager")
    return runner, table_of(inventory)


class TestSeparability:
    def test_one_channel_per_class(self):
        """Tf = 1 on its class, seen by one class of three: log 3."""
        assert separability(np.eye(3)) == pytest.approx(np.log(3))

    def test_channels_alike_on_all_classes(self):
        """They tell nothing apart."""
        assert 0.0 == separability(np.ones((4, 5)))

    def test_by_hand(self):
        """Two classes, two channels: frequencies (¾, ¼) and (⅓, ⅔)."""
        means = np.array([[3.0, 1.0], [1.0, 2.0]])
        expected = (0.75 * np.log(2) + 2 / 3 * np.log(2)) / 2

        assert separability(means) == pytest.approx(expected)

    def test_a_dead_class_has_no_frequencies(self):
        """No activation at all divides by nothing."""
        assert np.isfinite(separability(np.array([[0.0, 0.0], [1.0, 2.0]])))


class TestClassSeparability:
    def test_layers_that_tell_classes_apart_get_more(self):
        """``knows`` above ``blurs``; importances have mean one."""
        matrix = ClassSeparability().measure(*prepare(), KL)
        gamma = matrix.provenance["metric"]["gamma"]

        assert gamma["knows"] > 3 * gamma["blurs"]
        assert np.mean(list(gamma.values())) == pytest.approx(1.0)
        np.testing.assert_allclose(
            matrix.diagonal[:2], [30 * gamma["knows"], 28 * gamma["knows"]], rtol=1e-12
        )

    def test_error_is_the_jackknife_over_chunks(self):
        """Leaving out each of three chunks in turn."""
        runner, table = prepare(chunk_size=4)
        matrix = ClassSeparability().measure(runner, table, KL)
        left_out = []
        for chunk in runner.chunks:
            rows = [i for i in range(12) if i not in chunk]
            data = runner.calibration.take(rows)
            alone = make_runner(runner.module, runner.inventory, data, engine="eager")
            left_out.append(ClassSeparability().measure(alone, table, KL).diagonal)
        deviations = np.array(left_out) - np.mean(left_out, axis=0)
        expected = np.sqrt((deviations**2).sum(axis=0) * 2 / 3)

        np.testing.assert_allclose(matrix.diagonal_error, expected, rtol=1e-6)

    def test_needs_one_class_per_sample(self):
        """Labels of tokens are no classes of samples."""
        module = build(Attention)
        inventory = inventory_of(module)
        runner = make_runner(module, inventory, samples(Attention), engine="eager")
        with pytest.raises(InvalidCalibration, match=r"got shape \[12, 6\]"):
            ClassSeparability().measure(runner, table_of(inventory), KL)

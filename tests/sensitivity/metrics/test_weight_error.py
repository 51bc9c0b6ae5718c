import pytest
import torch

from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.metrics import RelativeWeightMse, WeightMse
from bitquota.sensitivity.runners.make import make_runner
from sensitivity_networks import Branches, Residual, build, inventory_of, samples, table_of

KL = loss_by_name("kl")


def prepare(kind=Branches, ties=(), change=None):
    module = build(kind)
    if change is not None:
        change(module)
    inventory = inventory_of(module, ties)
    runner = make_runner(module, inventory, samples(kind), engine="eager")
    return runner, table_of(inventory)


def errors(runner, table):
    found = []
    for row in table.rows:
        squared, energy = 0.0, 0.0
        for c in row.candidates:
            original = runner.weights.original(c.layer).detach().double()
            squared += float((runner.weights(c).detach().double() - original).pow(2).sum())
            energy += float(original.pow(2).sum())
        found.append((squared, energy))
    return found


class TestWeightMse:
    def test_is_the_squared_distance(self):
        """Entry by entry."""
        runner, table = prepare()
        matrix = WeightMse().measure(runner, table, KL)

        for value, (squared, _) in zip(matrix.diagonal, errors(runner, table), strict=True):
            assert value == pytest.approx(squared, rel=1e-6)
        assert runner.passes.passes == 0

    def test_scales_with_the_weights(self):
        """Twice the weights, four times the error: why it favours large layers."""
        plain = WeightMse().measure(*prepare(), KL).diagonal
        double = (
            WeightMse()
            .measure(*prepare(change=lambda m: m.left.weight.data.mul_(2.0)), KL)
            .diagonal
        )

        assert double[:2] == pytest.approx(4 * plain[:2], rel=1e-5)
        assert double[2:] == pytest.approx(plain[2:])


class TestRelativeWeightMse:
    def test_is_the_squared_distance_over_the_energy(self):
        """Entry by entry."""
        runner, table = prepare()
        matrix = RelativeWeightMse().measure(runner, table, KL)

        for value, (squared, energy) in zip(matrix.diagonal, errors(runner, table), strict=True):
            assert value == pytest.approx(squared / energy, rel=1e-6)

    def test_does_not_depend_on_the_weights_scale(self):
        """What a batch norm behind the layer undoes anyway."""
        plain = RelativeWeightMse().measure(*prepare(), KL).diagonal
        double = (
            RelativeWeightMse()
            .measure(*prepare(change=lambda m: m.left.weight.data.mul_(2.0)), KL)
            .diagonal
        )

        assert double == pytest.approx(plain, rel=1e-5)

    def test_a_group_sums_its_layers(self):
        """Ratios add, layer by layer."""
        alone = RelativeWeightMse().measure(*prepare(Residual), KL)
        runner, table = prepare(Residual, ties=[["inner", "side"]])
        tied = RelativeWeightMse().measure(runner, table, KL)
        single = dict(
            zip([(r.group, r.label) for r in alone.table.rows], alone.diagonal, strict=True)
        )

        assert tied.diagonal[2] == pytest.approx(single["inner", "W2"] + single["side", "W2"])

    def test_a_layer_of_zeros_has_no_error(self):
        """Nothing over nothing is taken as zero."""
        matrix = RelativeWeightMse().measure(
            *prepare(change=lambda m: torch.nn.init.zeros_(m.left.weight)), KL
        )

        assert (matrix.diagonal[:2] == 0).all()
        assert (matrix.diagonal[2:] > 0).all()

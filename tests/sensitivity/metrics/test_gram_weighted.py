import pytest
import torch
from torch import nn

from bitquota.errors import InvalidInput
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.metrics import GramWeightedError
from bitquota.sensitivity.runners.make import make_runner
from sensitivity_networks import Residual, build, inventory_of, samples, table_of

KL = loss_by_name("kl")


class Plain(nn.Module):
    """One linear layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x)


class Normalised(nn.Module):
    """A linear layer and a batch norm, whose output counts."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3, bias=False)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.layer(x))


def delta(runner, candidate):
    original = runner.weights.original(candidate.layer).detach()
    return (runner.weights(candidate).detach() - original).double()


class TestGramWeightedError:
    def test_closed_form_of_a_linear_layer(self):
        """For the squared error every output counts 2/3 / 2, and e G eᵀ is the mean response."""
        module = build(Plain)
        inventory = inventory_of(module)
        runner = make_runner(module, inventory, samples(Plain, 20), engine="eager")
        x = runner.calibration.inputs[0].double()
        gram = x.T @ x / len(x)

        matrix = GramWeightedError().measure(runner, table_of(inventory), loss_by_name("mse"))

        for r, row in enumerate(matrix.table.rows):
            e = delta(runner, row.candidates[0])
            assert matrix.diagonal[r] == pytest.approx(float((e @ gram * e).sum() / 3), rel=1e-5)

    def test_curvature_of_kl_on_average(self):
        """E[g²] of each logit is p (1 - p), over random signs: with many samples nearly so."""
        module = build(Plain)
        inventory = inventory_of(module)
        runner = make_runner(module, inventory, samples(Plain, 4096), chunk_size=4096)
        x = runner.calibration.inputs[0].double()
        p = torch.softmax(module(x.float()).double(), dim=-1).detach()
        b = (p * (1 - p)).mean(dim=0)
        gram = x.T @ x / len(x)

        matrix = GramWeightedError().measure(runner, table_of(inventory), KL)

        for r, row in enumerate(matrix.table.rows):
            e = delta(runner, row.candidates[0])
            expected = 0.5 * float(b @ (e @ gram * e).sum(dim=1))
            assert matrix.diagonal[r] == pytest.approx(expected, rel=0.05)

    def test_adjusted_statistics_repair_mean_and_scale(self):
        """What is left of a change is that of the normalised output, put back to its variance."""
        module = build(Normalised)
        inventory = inventory_of(module)
        runner = make_runner(
            module, inventory, samples(Plain, 64), batch_norm="moved", engine="eager"
        )
        x = runner.calibration.inputs[0].double()
        w = module.layer.weight.detach().double()
        slope = module.norm.weight.detach().double() / torch.sqrt(
            module.norm.running_var.double() + module.norm.eps
        )

        def standard(y):
            y = y - y.mean(dim=0)
            return y / y.square().mean(dim=0).sqrt()

        matrix = GramWeightedError().measure(runner, table_of(inventory), loss_by_name("mse"))

        y = x @ w.T
        size = (y - y.mean(dim=0)).square().mean(dim=0).sqrt()
        for r, row in enumerate(matrix.table.rows):
            moved = x @ (w + delta(runner, row.candidates[0])).T
            left = size * (standard(moved) - standard(y)) * slope
            expected = float(left.square().mean(dim=0).sum() / 3)
            assert matrix.diagonal[r] == pytest.approx(expected, rel=1e-3)

    def test_a_loss_without_a_known_hessian(self):
        """It is refused in one sentence."""
        module = build(Residual)
        inventory = inventory_of(module)
        runner = make_runner(module, inventory, samples(Residual), engine="eager")
        with pytest.raises(InvalidInput, match="no known factor"):
            GramWeightedError().measure(runner, table_of(inventory), loss_by_name("cosine"))

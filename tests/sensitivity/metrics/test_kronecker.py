import pytest
import torch
from torch import nn
from torch.nn import functional

from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.metrics import KroneckerFisher
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


def prepare(kind, chunk_size):
    module = build(kind)
    inventory = inventory_of(module)
    runner = make_runner(module, inventory, samples(kind), chunk_size=chunk_size, engine="eager")
    return runner, table_of(inventory)


def delta(runner, candidate):
    original = runner.weights.original(candidate.layer).detach()
    return (runner.weights(candidate).detach() - original).double()


class TestKroneckerFisher:
    def test_closed_form_of_a_linear_layer(self):
        """½ Σ_ij E[(p_i - [i = y])²] E[x_j²] ΔW_ij², one position."""
        runner, table = prepare(Plain, chunk_size=99)
        x, labels = runner.calibration.inputs[0].double(), runner.calibration.labels
        p = torch.softmax(runner.module(x.float()).double(), dim=-1).detach()
        b = (p - functional.one_hot(labels, 3)).square().mean(dim=0)
        a = x.square().mean(dim=0)

        matrix = KroneckerFisher().measure(runner, table, KL)

        for r, row in enumerate(table.rows):
            d = delta(runner, row.candidates[0])
            expected = 0.5 * (b[:, None] * a * d.square()).sum()
            assert matrix.diagonal[r] == pytest.approx(float(expected), rel=1e-5)

    def test_closed_form_of_a_convolution(self):
        """Moments of unfolded patches, times the 64 positions."""
        runner, table = prepare(Residual, chunk_size=99)
        module, x = runner.module, runner.calibration.inputs[0]
        stem = functional.conv2d(x, module.stem.weight, padding=1).detach().requires_grad_()
        y = module.act(module.norm(stem))
        z = module.act(module.inner_norm(module.inner(y))) + module.side(y)
        logits = module.head(z.mean(dim=(2, 3)))
        loss = functional.cross_entropy(logits.double(), runner.calibration.labels, reduction="sum")
        (g,) = torch.autograd.grad(loss, stem)
        b = g.double().square().mean(dim=(0, 2, 3))
        a = functional.unfold(x, 3, padding=1).double().square().mean(dim=(0, 2))

        matrix = KroneckerFisher().measure(runner, table, KL)

        for r in range(2):
            d = delta(runner, table.rows[r].candidates[0]).flatten(1)
            expected = 0.5 * 64 * (b[:, None] * a * d.square()).sum()
            assert matrix.diagonal[r] == pytest.approx(float(expected), rel=1e-4)

    def test_chunks_are_averaged_by_size(self):
        """Moments are those of each chunk; 12 samples in chunks of 8 and 4."""
        runner, table = prepare(Plain, chunk_size=8)
        matrix = KroneckerFisher().measure(runner, table, KL)
        parts = []
        for rows in (range(8), range(8, 12)):
            data = runner.calibration.take(rows)
            alone = make_runner(runner.module, runner.inventory, data, engine="eager")
            parts.append(KroneckerFisher().measure(alone, table, KL).diagonal)

        assert matrix.diagonal == pytest.approx((8 * parts[0] + 4 * parts[1]) / 12)
        assert matrix.diagonal_error == pytest.approx(abs(parts[0] - parts[1]) / 2)

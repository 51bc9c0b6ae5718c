import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from bitquota.candidates.table import enumerate_candidates
from bitquota.models.calibration import CalibrationSet
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.metrics import EmpiricalFisher, OutputFisher
from bitquota.sensitivity.runners.make import make_runner
from sensitivity_networks import Attention, Residual, build, inventory_of, samples, table_of

KL = loss_by_name("kl")


class Small(nn.Module):
    """Two linear layers, 51 parameters."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 3)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def prepare(kind, ties=(), widths=(2, 4), **kwargs):
    module = build(kind)
    inventory = inventory_of(module, ties)
    data = samples(kind)
    runner = make_runner(module, inventory, data, chunk_size=5, engine="eager", **kwargs)
    return runner, table_of(inventory, widths)


def sample_gradients(runner, names):
    """Gradient of each sample's cross entropy with respect to each layer's weight."""
    module, data = runner.module, runner.calibration
    weights = [runner.weights.original(name) for name in names]
    rows = []
    for n in range(len(data)):
        value = module(data.inputs[0][n : n + 1])
        logits = value["logits"] if isinstance(value, dict) else value
        loss = functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), data.labels[n].flatten()
        )
        rows.append(torch.autograd.grad(loss, weights))
    return {name: [row[k].double() for row in rows] for k, name in enumerate(names)}


def delta(runner, candidate):
    original = runner.weights.original(candidate.layer).detach()
    return (runner.weights(candidate).detach() - original).double()


class TestEmpiricalFisher:
    def test_equals_the_dense_matrix_on_51_parameters(self):
        """½ Δwᵀ F Δw with F = mean of g gᵀ over all weights of both layers."""
        runner, table = prepare(Small)
        names = [la.name for la in runner.inventory.layers]
        gradients = sample_gradients(runner, names)
        stacked = torch.stack(
            [torch.cat([gradients[n][k].flatten() for n in names]) for k in range(12)]
        )
        fisher = stacked.T @ stacked / 12  # [42, 42]

        matrix = EmpiricalFisher().measure(runner, table, KL)

        for row, value in zip(table.rows, matrix.diagonal, strict=True):
            (candidate,) = row.candidates
            parts = [torch.zeros_like(runner.weights.original(n)).double() for n in names]
            parts[names.index(candidate.layer)] = delta(runner, candidate)
            dw = torch.cat([p.flatten() for p in parts])
            assert value == pytest.approx(float(0.5 * dw @ fisher @ dw), rel=1e-4)

    @pytest.mark.parametrize(
        ("kind", "ties"), [(Residual, ()), (Residual, [["inner", "side"]]), (Attention, ())]
    )
    def test_equals_gradients_sample_by_sample(self, kind, ties):
        """Convolutions with skips, groups perturbed as a whole, a weight that is used twice."""
        runner, table = prepare(kind, ties)
        names = sorted({c.layer for row in table.rows for c in row.candidates})
        gradients = sample_gradients(runner, names)

        matrix = EmpiricalFisher().measure(runner, table, KL)

        for r, row in enumerate(table.rows):
            slopes = np.zeros(12)
            for c in row.candidates:
                d = delta(runner, c)
                slopes += [float((g * d).sum()) for g in gradients[c.layer]]
            values = slopes**2 / 2
            assert matrix.diagonal[r] == pytest.approx(values.mean(), rel=1e-3, abs=1e-12)
            error = values.std(ddof=1) / np.sqrt(12)
            assert matrix.diagonal_error[r] == pytest.approx(error, rel=1e-3, abs=1e-12)

    def test_estimates_the_loss_increase_in_its_unit(self):
        """It is a second-order loss increase, so the matrix carries loss and unit."""
        matrix = EmpiricalFisher().measure(*prepare(Small), KL)

        assert ("cross_entropy", "nats/sample") == (matrix.loss, matrix.unit)
        assert EmpiricalFisher().estimates_loss


class TestOutputFisher:
    def test_closed_form_of_the_last_layer(self):
        """½ mean Σ_i (p_i - [i = label])² ((Q(W) - W) h)_i²."""
        runner, table = prepare(Small)
        module, data = runner.module, runner.calibration
        h = torch.tanh(module.first(data.inputs[0])).detach().double()
        p = torch.softmax(module.second(h.float()).double(), dim=-1).detach()
        g = p - functional.one_hot(data.labels, 3)

        matrix = OutputFisher().measure(runner, table, KL)

        for r, row in enumerate(table.rows):
            (candidate,) = row.candidates
            if candidate.layer == "second":
                moved = h @ delta(runner, candidate).T
                values = 0.5 * (g.square() * moved.square()).sum(dim=1)
                assert matrix.diagonal[r] == pytest.approx(float(values.mean()), rel=1e-4)

    @pytest.mark.parametrize("metric", [EmpiricalFisher(), OutputFisher()])
    def test_sees_quantized_inputs(self, metric):
        """The response is layer(q(x); Q(W)) - layer(x; W)."""

        def quantizers(layer, bits):
            del layer
            return lambda x: torch.round(x * bits) / bits

        module = build(Small)
        inventory, data = inventory_of(module), samples(Small)
        runner = make_runner(module, inventory, data, engine="eager", activations=quantizers)
        table = enumerate_candidates(inventory, (4, 32), activation_bits=2)
        h = torch.tanh(module.first(data.inputs[0])).detach()
        p = torch.softmax(module.second(h).double(), dim=-1).detach()
        g = p - functional.one_hot(data.labels, 3)

        matrix = metric.measure(runner, table, KL)

        for r, row in enumerate(table.rows):
            (candidate,) = row.candidates
            if candidate.layer == "second":
                weight, rounded = runner.weights(candidate).detach(), torch.round(h * 2) / 2
                moved = (rounded @ weight.T - h @ module.second.weight.detach().T).double()
                by_element = (g * moved).square().sum(dim=1)
                together = (g * moved).sum(dim=1).square()
                expected = by_element if isinstance(metric, OutputFisher) else together
                assert matrix.diagonal[r] == pytest.approx(float(expected.mean()) / 2, rel=1e-3)
                assert matrix.diagonal[r] > 0

    def test_depends_on_labels_not_on_the_loss(self):
        """Around full precision a divergence has no gradient; cross entropy is taken instead."""
        runner, table = prepare(Small)
        kl = OutputFisher().measure(runner, table, KL).diagonal
        mse = OutputFisher().measure(runner, table, loss_by_name("mse")).diagonal
        data = runner.calibration
        other = CalibrationSet(inputs=data.inputs, labels=(data.labels + 1) % 3)
        shifted = make_runner(runner.module, runner.inventory, other, engine="eager")

        np.testing.assert_array_equal(kl, mse)
        assert not np.allclose(kl, OutputFisher().measure(shifted, table, KL).diagonal)

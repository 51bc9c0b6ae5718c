import numpy as np
import pytest
import torch
from torch import nn

from bitquota.errors import InvalidInput, InvalidModel
from bitquota.models.calibration import CalibrationSet
from bitquota.sensitivity.losses import CustomLoss, loss_by_name
from bitquota.sensitivity.metrics import HessianTrace
from bitquota.sensitivity.runners.make import make_runner
from sensitivity_networks import Attention, build, inventory_of, samples, table_of

KL, MSE = loss_by_name("kl"), loss_by_name("mse")


class Plain(nn.Module):
    """One linear layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x)


class Detached(nn.Module):
    """No gradient leaves it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x).detach()


def prepare(x, kind=Plain, chunk_size=5):
    module = build(kind)
    inventory = inventory_of(module)
    data = CalibrationSet(inputs=(x,))
    runner = make_runner(module, inventory, data, chunk_size=chunk_size, engine="eager")
    return runner, table_of(inventory)


def trace_of(matrix, layer="layer"):
    details = matrix.provenance["metric"]
    return details["traces"][layer], details["trace_errors"][layer]


class TestHessianTrace:
    @pytest.mark.parametrize("probes", [1, 3])
    def test_is_exact_where_the_hessian_is_diagonal(self, probes):
        """Squared error, one-hot inputs: H = diag, tr H = 2 E‖x‖² = 2 whatever the signs."""
        runner, table = prepare(torch.eye(4).repeat(3, 1))
        matrix = HessianTrace(probes=probes).measure(runner, table, MSE)

        assert (pytest.approx(2.0, rel=1e-6), pytest.approx(0.0, abs=1e-6)) == trace_of(matrix)
        for r, row in enumerate(table.rows):
            original = runner.weights.original("layer").detach()
            error = (runner.weights(row.candidates[0]).detach() - original).double()
            expected = 0.5 * 2.0 / 12 * float(error.square().sum())
            assert matrix.diagonal[r] == pytest.approx(expected, rel=1e-5)

    def test_estimates_the_trace_of_a_divergence(self):
        """KL of a linear layer: tr H = E[‖x‖² Σ p (1 - p)], within four standard errors."""
        x = samples(Plain, n=40).inputs[0]
        runner, table = prepare(x)
        matrix = HessianTrace(probes=32).measure(runner, table, KL)
        p = torch.softmax(runner.module(x).detach().double(), dim=-1)
        expected = float((x.double().square().sum(dim=1) * (p * (1 - p)).sum(dim=1)).mean())

        trace, error = trace_of(matrix)
        assert 0 < error < 0.3 * expected
        assert trace == pytest.approx(expected, abs=4 * error)

    def test_negative_curvature_is_clamped_and_told(self):
        """The score is zero; the trace and the layer's name are in the provenance."""
        loss = CustomLoss(name="upside_down", function=lambda o, _r, _l: -o.square().sum(dim=1))
        runner, table = prepare(torch.eye(4))
        matrix = HessianTrace(probes=2).measure(runner, table, loss)

        assert (matrix.diagonal == 0).all()
        assert trace_of(matrix)[0] == pytest.approx(-6.0)
        assert ["layer"] == matrix.provenance["metric"]["clamped"]

    def test_one_chunk_has_the_error_of_its_probes(self):
        """Zero with a single probe, which says nothing; positive with several."""
        x = samples(Plain).inputs[0]
        one = HessianTrace(probes=1).measure(*prepare(x, chunk_size=99), KL)
        many = HessianTrace(probes=4).measure(*prepare(x, chunk_size=99), KL)

        assert (one.diagonal_error == 0).all()
        assert (many.diagonal_error > 0).all()

    def test_seed_changes_the_signs(self):
        """Another seed, other probes; the estimate moves."""
        x = samples(Plain).inputs[0]
        one = HessianTrace(seed=0).measure(*prepare(x), KL)
        two = HessianTrace(seed=1).measure(*prepare(x), KL)

        assert not np.allclose(one.diagonal, two.diagonal)

    def test_goes_through_fused_attention(self):
        """Which has no second derivative of its own."""
        module = build(Attention)
        inventory = inventory_of(module)
        runner = make_runner(module, inventory, samples(Attention), engine="eager")
        matrix = HessianTrace(probes=2).measure(runner, table_of(inventory), KL)

        assert np.isfinite(matrix.diagonal).all()
        assert (matrix.diagonal[:2] > 0).all()

    def test_needs_gradients(self):
        """A model that detaches is refused, with a way out."""
        with pytest.raises(InvalidModel, match="needs gradients.*use 'diagonal'"):
            HessianTrace().measure(*prepare(torch.eye(4), Detached), KL)

    def test_needs_a_probe(self):
        """None is refused."""
        with pytest.raises(InvalidInput, match="at least one probe; got 0"):
            HessianTrace(probes=0)

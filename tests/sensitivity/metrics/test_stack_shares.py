"""Shares of the loss of a quantized chain: gradients of the whole model, found part by part."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from bitquota.candidates.storage import Granularity, ScaleFormat, Scheme
from bitquota.context import Context
from bitquota.measurement_setup import build_setup
from bitquota.models.calibration import CalibrationSet
from bitquota.models.load import load_model
from bitquota.models.running import primary_output
from bitquota.request import PlanRequest
from bitquota.search import shares
from bitquota.search.allocate import allocate
from bitquota.search.portfolio import gather_portfolio
from bitquota.search.shares import WITHIN, scaled_by_shares, shared_plan
from bitquota.sensitivity.metrics.stack_shares import layer_shares
from transformer_families import write_family

REQUEST = PlanRequest(
    budgets=("4 bits",),
    weight_bits=(3, 4, 6),
    scheme=Scheme(granularity=Granularity.GROUP, group_size=16, scale_format=ScaleFormat.FP16),
    samples=16,
    holdout_samples=16,
    rounding="qep",
    effort="quick",
)


def made(family, place):
    """Return a model with its samples."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, 96, (32, 12), generator=generator)
    model = load_model(str(write_family(family, place)))
    return model, CalibrationSet(inputs=(tokens,))


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def loaded(request, tmp_path_factory):
    return made(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def setup(loaded):
    return build_setup(*loaded, REQUEST)


class TestLayerShares:
    def test_are_gradients_of_the_whole_model(self, setup):
        """Half of the gradient at the quantized weights times their change, layer by layer."""
        choice = (1,) * len(setup.table.groups)
        shipped = setup.rounded(choice)
        runner = setup.runner(setup.holdout)
        weights = runner.known.shipped(shipped.weights)
        found = layer_shares(runner, weights, setup.loss, "here", Context())

        quantized = shipped.put_into(copy.deepcopy(setup.module), setup.inventory)
        (tokens,) = setup.holdout.inputs
        with torch.no_grad():
            reference = primary_output(setup.module(tokens))
        for parameter in quantized.parameters():
            parameter.requires_grad_()
        setup.loss.per_sample(primary_output(quantized(tokens)), reference, None).sum().backward()
        layers = {layer.name: layer for layer in setup.inventory.layers}
        assert weights.keys() == found.keys()
        for name, share in found.items():
            place = quantized.get_parameter(layers[name].weight_name)
            change = place.detach() - setup.module.get_parameter(layers[name].weight_name).detach()
            expected = 0.5 * float((place.grad * change).sum(dtype=torch.float64)) / len(tokens)
            assert share == pytest.approx(expected, rel=1e-3, abs=1e-9), name

    def test_add_up_to_the_loss(self, setup):
        """Where the loss is quadratic in the changes; at 6 bits it nearly is."""
        choice = (2,) * len(setup.table.groups)
        runner = setup.runner(setup.holdout)
        weights = runner.known.shipped(setup.rounded(choice).weights)
        found = layer_shares(runner, weights, setup.loss, "there", Context())
        measured = setup.measure_choice(choice, stage="a").mean
        assert sum(found.values()) == pytest.approx(measured, rel=0.1)


class TestScaledByShares:
    def test_the_uniform_plan_is_predicted_by_its_shares(self, setup):
        budgets = [setup.budgets("4.5 bits")]
        name, choice = shared_plan(setup, budgets)
        assert name == "uniform W4"
        holdout = setup.runner(setup.holdout)
        plain = gather_portfolio(setup, setup.runner()).matrix
        scaled = scaled_by_shares(setup, plain, holdout, name, choice)

        factors = scaled.diagonal[::3] / plain.diagonal[::3]
        assert factors == pytest.approx(scaled.diagonal[2::3] / plain.diagonal[2::3])
        if plain.loss == setup.loss.name:
            median = np.median(factors)
            assert (factors <= WITHIN * median * (1 + 1e-9)).all()
            assert (factors >= median / WITHIN * (1 - 1e-9)).all()
        measured = setup.measure_choice(choice, stage="a").mean
        assert scaled.predict(choice) == pytest.approx(measured, rel=0.5)
        assert scaled.loss == setup.loss.name
        assert scaled.provenance["transformed"] == ["shares of uniform W4"]

    @pytest.mark.parametrize("share", [0.0, float("nan")])
    def test_shares_of_nothing_scale_nothing(self, setup, monkeypatch, share):
        """The proposals race as before, and the plan says why."""
        names = [layer.name for layer in setup.inventory.layers]
        monkeypatch.setattr(shares, "layer_shares", lambda *_: dict.fromkeys(names, share))
        budgets = [setup.budgets("4.5 bits")]
        found = gather_portfolio(setup, setup.runner(), setup.runner(setup.holdout), budgets)
        assert not found.scaled
        assert "must lose something" in found.skipped["shares"]
        assert found.matrix.digest() == gather_portfolio(setup, setup.runner()).matrix.digest()

    def test_a_quick_plan_is_the_optimum_of_the_scaled_matrix(self, loaded):
        found = allocate(*loaded, REQUEST)
        (plan,) = found.plans
        assert plan.proof.matrix_digest == found.matrix.digest()
        assert found.matrix.provenance["transformed"]
        assert plan.predicted == pytest.approx(plan.measured.mean, rel=0.5)
        assert plan.measured.mean <= min(b.measured.mean for b in plan.baselines)
        assert found.passes > 4

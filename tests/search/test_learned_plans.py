"""Plans whose rounding is learned: what is measured ships, and plans say what learning gained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from bitquota.candidates.storage import ScaleRule, Scheme
from bitquota.context import Context
from bitquota.corrections import Correction
from bitquota.errors import InvalidInput
from bitquota.models.calibration import CalibrationSet
from bitquota.models.loaded import finish
from bitquota.quantizers.planned import quantized_module
from bitquota.report.text import rounding_sentences
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate
from refusals import refused

REQUEST = PlanRequest(
    budgets=("2 bits",),
    weight_bits=(2,),
    rounding="learned",
    iterations=100,
    measure="weight_mse",
    effort="quick",
    refine=False,
    samples=400,
    holdout_samples=200,
)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(12, 24)
        self.down = nn.Linear(24, 12)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


@pytest.fixture(scope="module")
def samples():
    torch.manual_seed(1)
    return CalibrationSet(inputs=(torch.randn(600, 8) @ torch.randn(8, 12),))


def planned(module, samples, request=REQUEST):
    torch.manual_seed(0)
    model = finish(module.eval(), source="blocks", architecture="Blocks")
    found = allocate(model, samples, request, context=Context(device="cpu"))
    return model, found.plans[0], found.weights[0]


def stack():
    torch.manual_seed(0)
    return nn.Sequential(*(Residual() for _ in range(3)), nn.Linear(12, 6))


class TestLearnedPlan:
    def test_measures_better_than_qep_by_what_it_says_and_ships_that(self, samples, tmp_path):
        # Scales from the largest weight leave much to learn.
        request = replace(REQUEST, scheme=Scheme(scale_rule=ScaleRule.ABSMAX))
        model, plan, weights = planned(stack(), samples, request)
        _, by_qep, _ = planned(stack(), samples, replace(request, rounding="qep", iterations=200))
        about = plan.provenance["rounding"]
        assert about["to"] == plan.weights.rounding == "learned"
        assert about["blocks"] == 3
        gain = by_qep.measured.mean - plan.measured.mean
        assert gain == pytest.approx(about["unlearned_worse_by"], rel=1e-6)
        assert gain > 0

        path = tmp_path / "plan.weights.safetensors"
        path.write_bytes(weights)
        shipped = quantized_module(replace(model, weights=(path,)), plan)
        holdout = plan.provenance["holdout"]["indices"]
        x = samples.inputs[0][holdout]
        with torch.no_grad():
            p, q = (net(x).double().log_softmax(-1) for net in (model.module, shipped))
        kl = float((p.exp() * (p - q)).sum(-1).mean())
        assert kl == pytest.approx(plan.measured.mean, rel=1e-4)
        (sentence,) = rounding_sentences(plan)
        assert "learned in 3 blocks" in sentence

    def test_learns_beside_quantized_inputs_and_corrections(self, samples):
        request = replace(
            REQUEST, activation_bits=8, iterations=20, corrections=(Correction.BIAS_CORRECTION,)
        )
        _, plan, weights = planned(stack(), samples, request)
        assert weights is not None
        assert plan.provenance["rounding"]["blocks"] == 3

    def test_without_blocks_the_plan_says_so(self, samples):
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6))
        _, plan, _ = planned(plain, samples)
        assert plan.provenance["rounding"] == {"to": "qep", "blocks": 0}
        assert plan.weights.rounding == "qep"
        (sentence,) = rounding_sentences(plan)
        assert "no repeated blocks" in sentence


class TestRequest:
    def test_leaves_iterations_out_unless_they_were_given(self):
        assert "iterations" not in replace(REQUEST, iterations=200).to_json()
        assert PlanRequest.from_json(REQUEST.to_json()) == REQUEST

    def test_refuses_iterations_without_learning_or_below_one(self):
        with refused(InvalidInput, rounding="qep"):
            replace(REQUEST, rounding="qep")
        with pytest.raises(InvalidInput, match="iterations must be at least 1"):
            replace(REQUEST, iterations=0)

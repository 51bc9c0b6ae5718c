"""``auto`` rounds as the hold-out samples prefer, and says so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from bitquota.context import Context
from bitquota.evaluate.scoring import evaluate_plans
from bitquota.models.calibration import CalibrationSet
from bitquota.models.loaded import finish
from bitquota.report.text import rounding_sentences
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate

REQUEST = PlanRequest(
    budgets=("3 bits",), weight_bits=(3,), samples=2, holdout_samples=64, refine=False
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)).eval()
    return finish(net, source="net", architecture="Sequential")


def samples(*, related):
    """Random inputs, 400 times each: independent, or of a few directions, which two almost show."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, 64, generator=generator)
    if related:
        x = torch.randn(256, 2, generator=generator) @ x[:2] + 0.01 * x
    # Repeated, they seem to be many: the moments are trusted.
    return CalibrationSet(inputs=(x[:, None].expand(-1, 400, -1).contiguous(),))


def planned(model, data, memory=2**30, **options):
    made = allocate(
        model, data, replace(REQUEST, **options), context=Context(device="cpu", memory_bytes=memory)
    )
    return made, made.plans[0]


@pytest.mark.parametrize(
    ("related", "rounding", "sentence"),
    [(True, "qep", "rounded by qep: to nearest"), (False, "nearest", "to nearest: by qep")],
)
def test_what_measures_better_is_what_ships(model, related, rounding, sentence):
    """Two samples tell nothing of inputs that are independent, and much of those that are not."""
    data = samples(related=related)
    made, plan = planned(model, data)
    told = plan.provenance["rounding"]

    assert plan.rounding == told["to"] == rounding
    assert (told["nearest_worse_by"] > 0) == related
    assert sentence in rounding_sentences(plan)[0]
    assert (made.weights[0] is None) == (rounding == "nearest")
    # The same widths rounded so from the beginning, and what anybody measures of this plan later.
    _, asked = planned(model, data, rounding=rounding)
    assert asked.measured.mean == pytest.approx(plan.measured.mean, rel=1e-6)
    again = evaluate_plans(made.with_weights(model), data, [plan])[1]
    assert again.measured.mean == pytest.approx(plan.measured.mean, rel=0.5)


def test_quick_compares_with_nearest_only_where_the_race_leaves_doubt(model):
    """Layers that are rounded apart were raced: what clearly gains over that is not questioned."""
    _, plan = planned(model, samples(related=True), effort="quick")
    told = plan.provenance["rounding"]
    assert plan.rounding == told["to"] == "qep"
    assert told["apart_worse_by"] > told["standard_error"]
    assert "layer by layer" in rounding_sentences(plan)[0]

    _, plan = planned(model, samples(related=False), effort="quick")
    assert plan.rounding == "nearest"
    assert plan.provenance["rounding"]["nearest_worse_by"] < 0


def test_moments_that_do_not_fit_into_memory_are_not_taken(model):
    """The first layer's alone take 64 times 64 numbers of eight bytes."""
    _, plan = planned(model, samples(related=True), memory=8 * 64 * 64)

    assert plan.rounding == "nearest"
    assert plan.provenance["rounding"] == {"to": "nearest"}
    assert rounding_sentences(plan) == ["Weights are rounded to nearest."]


def test_a_rounding_that_was_asked_for_is_not_questioned(model):
    _, plan = planned(model, samples(related=False), rounding="gptq")

    assert plan.rounding == "gptq"
    assert "rounding" not in plan.provenance

"""What is proposed follows the effort; what a model cannot give is skipped and said."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from bitquota.context import Context
from bitquota.errors import InvalidInput
from bitquota.measurement_setup import build_setup
from bitquota.models.calibration import CalibrationSet
from bitquota.models.loaded import finish
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate
from bitquota.search.portfolio import (
    QUICK_SAMPLES,
    gather_portfolio,
    leading_measure,
    measuring_runner,
)
from sensitivity_networks import Residual, build, samples

REQUEST = PlanRequest(
    budgets=("3 bits",), weight_bits=(2, 4, 8), samples=16, holdout_samples=16
)  # fmt: skip


def prepared(request=REQUEST, data=None):
    model = finish(build(Residual), source="residual", architecture="Residual")
    return build_setup(model, samples(Residual, n=48) if data is None else data, request)


def gathered(setup):
    return gather_portfolio(setup, measuring_runner(setup))


class Overwriting(nn.Module):
    """Adds in place to what a ReLU returned, whose gradient needs it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        hidden = torch.relu(self.first(x))
        hidden += 1
        return self.last(hidden)


class TestGatherPortfolio:
    def test_a_model_that_overwrites_what_gradients_need_is_planned_without_them(self):
        torch.manual_seed(0)
        model = finish(Overwriting(), source="m", architecture="m")
        data = CalibrationSet(inputs=(torch.randn(48, 6),), labels=torch.arange(48) % 4)
        found = gathered(build_setup(model, data, REQUEST))
        assert {} == {k: v for k, v in found.proposals.items() if k != "projected"}
        assert {"gram_weighted", "output_fisher"} == set(found.skipped)
        assert allocate(model, data, REQUEST).plans[0].measured is not None

    def test_normal_effort_has_cross_terms_and_metrics(self):
        found = gathered(prepared())

        assert "gram" == found.matrix.provenance["measure"]
        assert found.matrix.cross is not None
        assert ["gram_weighted", "output_fisher", "projected"] == list(found.proposals)
        assert ["size only", "weight MSE", "one-layer kl"] == list(found.scores)
        assert {} == found.skipped

    def test_robust_adds_standard_errors(self):
        """To the matrix that is solved; what is projected and scored stays as measured."""
        means = gathered(prepared())
        found = gathered(prepared(replace(REQUEST, robust=2.0)))
        assert found.matrix.digest() == means.matrix.robust(2.0).digest()
        assert (found.matrix.diagonal >= means.matrix.diagonal).all()
        assert found.proposals["projected"].digest() == means.proposals["projected"].digest()

    def test_quick_effort_measures_no_candidate(self):
        """One metric of a few passes takes the place of everything that runs the whole model."""
        setup = prepared(replace(REQUEST, effort="quick"))
        runner = measuring_runner(setup)
        found = gather_portfolio(setup, runner)

        assert "gram_weighted" == found.matrix.provenance["measure"]
        assert found.matrix.cross is None
        assert {} == found.proposals
        assert runner.passes.passes <= 3 + 3  # forwards, backwards, three candidates of each layer

    def test_says_what_it_skips(self):
        """Without labels there is no Fisher score of labels; the rest goes on."""
        data = replace(samples(Residual, n=48), labels=None)
        found = gathered(prepared(data=data))

        assert ["output_fisher"] == list(found.skipped)
        assert "labels" in found.skipped["output_fisher"]
        assert "gram_weighted" in found.proposals

    def test_a_loss_without_a_known_hessian(self):
        """Quick falls back to the weights alone, which every model has."""
        setup = prepared(replace(REQUEST, effort="quick", loss="cosine"))
        found = gathered(setup)

        assert "weight_mse" == found.matrix.provenance["measure"]
        with pytest.raises(InvalidInput, match="no known factor"):
            gathered(prepared(replace(REQUEST, measure="gram_weighted", loss="cosine")))

    def test_a_named_measure_leads(self):
        request = replace(REQUEST, effort="quick", measure="diagonal")
        setup = prepared(request)
        assert "diagonal" == leading_measure(setup, measuring_runner(setup)).name


class TestMeasuringRunner:
    def test_quick_takes_few_samples(self):
        n = QUICK_SAMPLES + 44
        request = replace(REQUEST, samples=n, holdout_samples=4, effort="quick")
        data = samples(Residual, n=n + 8)
        assert QUICK_SAMPLES == len(measuring_runner(prepared(request, data)).calibration)
        assert n == len(
            measuring_runner(prepared(replace(request, effort="normal"), data)).calibration
        )

    def test_quick_exports_no_graph(self):
        """It never goes on in the middle of a model."""
        data = samples(Residual, n=8)
        request = replace(REQUEST, samples=4, holdout_samples=4)
        for effort, engine in (("quick", "eager"), ("normal", "graph")):
            assert engine == prepared(replace(request, effort=effort), data).runner().engine

    def test_normal_takes_whole_chunks_within_its_passes(self, monkeypatch):
        """A measurement that would take too long is made on its first chunks."""
        request = replace(REQUEST, samples=200, holdout_samples=4)
        data = samples(Residual, n=204)
        whole = measuring_runner(prepared(request, data))
        assert [64, 64, 64, 8] == [len(chunk) for chunk in whole.chunks]

        monkeypatch.setattr("bitquota.search.portfolio.NORMAL_PASSES", 2.0)
        part = measuring_runner(prepared(request, data))
        assert 64 == len(part.calibration)
        assert part.calibration.indices == whole.calibration.indices[:64]
        thorough = measuring_runner(prepared(replace(request, effort="thorough"), data))
        assert 200 == len(thorough.calibration)


@pytest.fixture(scope="module")
def plans():
    """One plan for each effort, and its passes."""
    model = finish(build(Residual), source="residual", architecture="Residual")
    data = samples(Residual, n=48)
    told: dict[str, list[str]] = {}
    found = {}
    for effort in ("quick", "normal", "thorough"):
        stages = told.setdefault(effort, [])
        context = Context(on_progress=lambda p, stages=stages: stages.append(p.stage))
        request = replace(REQUEST, effort=effort)
        found[effort] = allocate(model, data, request, context=context)
    return found, told


class TestEffort:
    def test_more_effort_takes_more_passes(self, plans):
        found, _ = plans
        assert found["quick"].passes < found["normal"].passes / 2
        assert found["normal"].passes <= found["thorough"].passes

    def test_quick_plans_keep_budgets_and_beat_uniform(self, plans):
        found, _ = plans
        (plan,) = found["quick"].plans
        assert plan.average_bits <= 3
        assert plan.evidence is None
        assert plan.proof.certified
        assert ["uniform W2"] == [b.name for b in plan.baselines]
        assert plan.measured.mean <= plan.baselines[0].measured.mean
        assert plan.predicted is not None

    def test_stages_tell_the_best_loss_so_far(self, plans):
        _, told = plans
        around = [stage for stage in told["normal"] if stage.startswith("linearisation")]
        assert around
        assert all("best so far" in stage for stage in around)

    def test_default_is_left_out_of_the_json(self):
        assert "effort" not in REQUEST.to_json()
        quick = replace(REQUEST, effort="quick")
        assert "quick" == quick.to_json()["effort"]
        assert quick == PlanRequest.from_json(quick.to_json())
        with pytest.raises(InvalidInput, match="effort must be one of"):
            replace(REQUEST, effort="hasty")


def test_torch_is_seeded_by_nothing():
    """Random directions come from a generator of their own."""
    torch.manual_seed(1)
    one = gathered(prepared(replace(REQUEST, effort="quick"))).matrix
    torch.manual_seed(2)
    two = gathered(prepared(replace(REQUEST, effort="quick"))).matrix
    assert one.digest() == two.digest()

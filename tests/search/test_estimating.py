"""Estimates: what a dry run says is what the job does."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from bitquota.context import Context
from bitquota.errors import BudgetTooSmall, InvalidCalibration
from bitquota.estimate import JobEstimate
from bitquota.models.calibration import CalibrationSet
from bitquota.models.loaded import finish
from bitquota.progress import ALMOST
from bitquota.report.estimate import (
    estimate_rows,
    estimate_sentences,
    render_estimate,
    stage_rows,
)
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate
from bitquota.search.compare import compare
from bitquota.search.estimating import estimate_compare, estimate_measure, estimate_plan
from sensitivity_networks import Residual, build, samples

pytestmark = pytest.mark.slow

REQUEST = PlanRequest(
    budgets=("3 bits", "4 bits"), weight_bits=(2, 4, 8), samples=16, holdout_samples=16
)


@pytest.fixture(scope="module")
def model():
    """A network with a skip connection."""
    return finish(build(Residual), source="residual", architecture="Residual")


@pytest.fixture(scope="module")
def data():
    """Labelled samples, more than the request asks for."""
    return samples(Residual, n=48)


class Ticks:
    """A clock that goes on by one second whenever it is read."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        """Return the time."""
        self.now += 1.0
        return self.now


class TestEstimatePlan:
    def test_bounds_what_is_run(self, model, data):
        """The counters of the runners stay below what is said at most, and above the measure."""
        found = estimate_plan(model, data, REQUEST)
        run = allocate(model, data, REQUEST)

        counted = [s for s in found.stages if not s.stage.startswith("hold-out")]
        assert run.passes <= sum(s.most_passes for s in counted)
        assert run.passes >= found.stages[0].passes
        assert found.stages[0].passes == found.stages[0].most_passes

    def test_says_what_it_is_about(self, model, data):
        found = estimate_plan(model, data, REQUEST)

        assert (4, 4, 12) == (found.n_layers, found.n_groups, found.n_candidates)
        assert math.comb(4, 2) * 3 * 3 == found.n_pairs
        assert (16, 16) == (found.samples, found.holdout_samples)
        assert ["3 bits", "4 bits"] == [b.text for b in found.budgets]
        assert 0 < found.budgets[0].model_bits < found.budgets[1].model_bits < found.model_bits
        assert found.peak_bytes > found.model_bits / 8
        assert {"bias"} <= {refusal.reason for refusal in found.refused}
        assert found == JobEstimate.from_json(found.to_json())

    def test_time_is_passes_times_the_timed_pass(self, model, data):
        """A clock that ticks once a reading makes a pass take one second a chunk."""
        found = estimate_plan(model, data, REQUEST, clock=Ticks())

        assert 1.0 == found.seconds_per_pass
        for stage in found.stages[1:]:
            assert stage.seconds == pytest.approx(stage.passes)

    def test_words_are_careful(self, model, data):
        """Nobody is promised a second."""
        found = replace(estimate_plan(model, data, REQUEST), peak_bytes=3 * 2**30)
        rows = {row["what"]: row["estimate"] for row in estimate_rows(found)}

        assert "about" in rows["passes"]
        assert "at most" in rows["passes"]
        assert "about 3.0 GiB at its peak" == rows["memory"]
        assert any("bias" in line for line in estimate_sentences(found))
        assert len(stage_rows(found)) == len(found.stages)
        assert "| memory | about 3.0 GiB" in render_estimate(found)

    def test_measures_nothing(self, model, data):
        """The cache stays empty."""
        context = Context()
        estimate_plan(model, data, REQUEST, context=context)
        assert 0 == len(context.ledger)

    def test_fits_no_quantizers(self, model, data):
        """Ranges of inputs take passes over all samples, which an estimate does not need."""
        found = estimate_plan(model, data, replace(REQUEST, activation_bits=8))
        assert found.n_candidates == 12

    def test_refuses_what_the_job_would(self, model, data):
        with pytest.raises(BudgetTooSmall):
            estimate_plan(model, data, replace(REQUEST, budgets=("1 bits",)))
        bare = CalibrationSet(inputs=data.inputs)
        with pytest.raises(InvalidCalibration):
            estimate_plan(model, bare, replace(REQUEST, measure="kronecker"))


class TestEstimateMeasure:
    @pytest.mark.parametrize("name", ["gram", "pairs", "diagonal", "tangent", "kronecker"])
    def test_is_exact(self, model, data, name):
        """One stage, whose passes are those that ``compare`` counts for the measure."""
        request = replace(REQUEST, measure=name, budgets=("3 bits",))
        (stage,) = estimate_measure(model, data, request).stages
        (entry,) = [e for e in compare(model, data, request, [name]).entries if e.name == name]

        # The tangents' declaration looks at one reference itself.
        assert stage.passes == pytest.approx(entry.passes, abs=1.0 if name == "tangent" else 1e-9)


class TestEstimateCompare:
    def test_has_a_stage_for_each_metric_and_says_what_is_left_out(self, model, data):
        bare = CalibrationSet(inputs=data.inputs)
        found = estimate_compare(model, bare, REQUEST, affordable_passes=40)

        stages = [s.stage for s in found.stages]
        assert {"gram", "diagonal", "weight_mse"} <= set(stages)
        left_out = {r.what: r.reason for r in found.refused if not r.size_bits}
        assert "labels" in left_out["kronecker"]
        assert "more than 40" in left_out["hessian_trace"]


class TestProgressOfAWholeJob:
    @pytest.mark.parametrize("job", [allocate, compare])
    def test_grows_to_almost_the_end(self, model, data, job):
        """Whoever is told sees one fraction, which never falls, and is never 1 before the end."""
        told = []
        job(model, data, REQUEST, context=Context(on_progress=told.append))

        fractions = [p.fraction for p in told]
        assert sorted(fractions) == fractions
        assert 0 < fractions[0] < 0.5
        assert 0.8 < fractions[-1] <= ALMOST
        assert all(p.fraction <= p.until <= ALMOST for p in told)


class TestEffort:
    @pytest.mark.parametrize("effort", ["quick", "thorough"])
    def test_bounds_what_is_run(self, model, data, effort):
        """Every effort is estimated by the schedule that it follows."""
        request = replace(REQUEST, effort=effort)
        found = estimate_plan(model, data, request)
        run = allocate(model, data, request)

        counted = [s for s in found.stages if not s.stage.startswith("hold-out")]
        assert run.passes <= sum(s.most_passes for s in counted)
        assert run.passes >= found.stages[0].passes
        stage = "gram_weighted" if effort == "quick" else "gram"
        assert stage == found.stages[0].stage

"""The whole chain on a real network: never clearly worse than a baseline, exact budgets."""

from __future__ import annotations

import functools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from bitquota.candidates.storage import Rounding, Scheme
from bitquota.canonical import canonical_json
from bitquota.context import Context, MemoryLedger
from bitquota.corrections import Correction
from bitquota.errors import (
    BudgetTooSmall,
    Cancelled,
    InvalidBudget,
    InvalidInput,
    StalePlan,
    UnknownLayer,
)
from bitquota.evaluate.scoring import evaluate_plans
from bitquota.measurement_setup import build_setup
from bitquota.models.loaded import check_model
from bitquota.plan import SOLVER, Plan
from bitquota.report.text import evidence_sentences, render_markdown, verdict
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate, measure_matrix
from bitquota.search.baselines import baseline_choices
from bitquota.search.measured_plan import _best
from bitquota.sensitivity.cache import SqliteLedger
from bitquota.sensitivity.losses import CustomLoss
from trained_digits import trained

SMALL = PlanRequest(
    budgets=("2.5 bits",), weight_bits=(2, 3, 4, 8), samples=96, holdout_samples=96,
    correction_samples=96,
)  # fmt: skip


KEPT = MemoryLedger()
"""What one test has measured no other measures again, but those that are about ledgers."""


def run(request=SMALL, loss=None, **context):
    """Return the result of a request; where it alone decides it, the same object each time."""
    if loss is None and not context:
        return allocated(canonical_json(request.to_json()))
    known = trained()
    made = Context(**{"ledger": KEPT} | context)
    return allocate(known.model, known.fit, request, context=made, loss=loss)


@functools.cache
def allocated(request):
    return run(PlanRequest.from_json(json.loads(request)), ledger=KEPT)


def loses_to(plan):
    """Baselines that the plan should have been: uniform ones that are better, others clearly."""
    return [
        b.name
        for b in plan.baselines
        if b.paired_difference < (0 if b.name.startswith("uniform") else -2 * b.paired_error)
    ]


@pytest.fixture(scope="module")
def two_uniform():
    """A setup, its uniform choices at 2 and 3 bits, and what these cost."""
    known = trained()
    request = replace(SMALL, holdout_samples=48)
    setup = build_setup(known.model, known.fit, request, context=Context(ledger=KEPT))
    uniform = baseline_choices(setup.table)
    wanted = uniform["uniform W2"], uniform["uniform W3"]
    return setup, wanted, list(setup.measure_choices(wanted, stage="hold-out").values())


class TestUniformBesideThePlan:
    """What the hold-out samples cannot tell from a uniform plan is measured on further ones."""

    def chosen(self, two_uniform, mixed, *, doubtful):
        """Let 2 or 3 bits everywhere stand for the mixed plan, the other one for the uniform."""
        setup, choices, losses = two_uniform
        choices = {SOLVER: choices[mixed], "uniform": choices[1 - mixed]}
        measured = {SOLVER: losses[mixed], "uniform": losses[1 - mixed]}
        # In doubt the worse one leads, by a hair; else the better one does, by far more than noise.
        lead = 1e-6 if doubtful else -0.1
        noise = 1e-3 * np.tile([1.0, -1.0], len(setup.holdout) // 2)
        level = measured["uniform"].per_sample + noise + (lead if mixed else -lead)
        measured[SOLVER] = replace(measured[SOLVER], per_sample=level)
        return _best(setup, choices, measured, "budget 1 of 1")

    @pytest.mark.parametrize(("mixed", "expected"), [(1, SOLVER), (0, "uniform")])
    def test_further_samples_decide(self, two_uniform, mixed, expected):
        best, about = self.chosen(two_uniform, mixed, doubtful=True)
        assert best == expected
        assert about["beside"] == "uniform"
        assert about["samples"][0] == 48 < about["samples"][1]
        first, together = about["worse_by"]
        assert (first > 0) is (together < 0) is (mixed == 1)
        assert abs(together) > 2 * about["standard_error"][1]

    @pytest.mark.parametrize(("mixed", "expected"), [(1, SOLVER), (0, "uniform")])
    def test_what_is_clear_is_not_asked_again(self, two_uniform, mixed, expected):
        assert self.chosen(two_uniform, mixed, doubtful=False) == (expected, {})

    def test_the_report_says_so(self):
        """Of five bits here: the difference is small beside that of so few samples."""
        (plan,) = run(replace(SMALL, budgets=("5 bits",), holdout_samples=16, effort="quick")).plans
        about = plan.provenance["uniform"]
        assert about["samples"][0] == plan.measured.n_samples == 16
        assert f"{about['samples'][1]} samples in all" in verdict(plan)
        assert verdict(plan).endswith(": the mixed plan is what you get.")


class TestAllocate:
    def test_never_clearly_loses_to_a_baseline(self):
        """No baseline is clearly better on the hold-out than the returned choice."""
        (plan,) = run().plans

        names = {b.name for b in plan.baselines}
        assert {"size only", "weight MSE", "one-layer kl", "uniform W2"} <= names
        assert not loses_to(plan)
        assert plan.size.codes <= plan.budgets[0].limit == int(2.5 * plan.n_weights)

    @pytest.mark.parametrize("name", ["empirical_fisher", "relative_mse", "tangent", "limpq"])
    @pytest.mark.parametrize("refine", [False, True])
    def test_any_metric_may_be_the_measure(self, name, refine):
        """Its own plan is measured beside the others, under its name and in its own unit."""
        result = run(replace(SMALL, measure=name, refine=refine))
        (plan,) = result.plans

        assert result.matrix.provenance["measure"] == name
        assert name in {b.name for b in plan.baselines}
        assert "one-layer kl" not in {b.name for b in plan.baselines}
        assert not loses_to(plan)
        assert (plan.predicted is None) == (result.matrix.loss != "kl")

    def test_a_menu_of_one_bit_width(self):
        """There is one plan; nothing is left to measure around it."""
        request = replace(SMALL, budgets=("4 bits",), weight_bits=(4,))
        (plan,) = run(request).plans
        assert set(plan.weight_bits) == {4}

    def test_labels_that_a_metric_needs(self):
        """Without them one sentence, before anything is measured."""
        known = trained()
        unlabelled = replace(known.fit, labels=None)
        with pytest.raises(InvalidInput, match="labels"):
            allocate(
                known.model, unlabelled, replace(SMALL, measure="empirical_fisher"),
            )  # fmt: skip

    def test_bf16_measures_near_and_judges_in_float32(self):
        """Sensitivities differ a little, hold-out figures of one choice not at all."""
        exact, rough = (
            run(replace(SMALL, refine=False, precision=precision)) for precision in ("fp32", "bf16")
        )
        a, b = exact.matrix.diagonal, rough.matrix.diagonal
        assert not np.array_equal(a, b)
        assert np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1] > 0.9
        losses = [
            {x.name: x.measured for x in result.plans[0].baselines} for result in (exact, rough)
        ]
        assert losses[0]["uniform W2"] == losses[1]["uniform W2"]

    def test_proof_is_of_the_returned_choice(self):
        """The bound is certified and below the objective."""
        result = run()
        (plan,) = result.plans

        assert plan.proof.certified
        assert plan.proof.bound <= plan.proof.objective
        assert plan.proof.matrix_digest == result.matrix.digest()
        table = result.matrix.table
        rows = [
            next(
                k
                for k, row in enumerate(table.rows[table.offsets[g] : table.offsets[g + 1]])
                if row.candidates[0] == assignment.candidate
            )
            for g, assignment in enumerate(plan.assignments)
        ]
        assert result.matrix.predict(rows) == pytest.approx(plan.proof.objective)
        assert plan.predicted == pytest.approx(plan.proof.objective)

    def test_evidence_is_in_the_plan_and_in_the_report(self):
        """The plan, neighbours and random plans, predicted and measured; it survives the file."""
        (plan,) = run().plans
        kinds = [point["kind"] for point in plan.evidence["points"]]

        assert kinds[0] == "plan"
        assert kinds.count("random") == 8
        assert 0 < kinds.count("near") <= 8
        assert Plan.from_json(json.loads(plan.dumps())) == plan
        first, second = evidence_sentences(plan)
        assert f"Predicted {plan.predicted:.4g}" in first
        assert f"of {kinds.count('random')} measured worse than the plan" in second
        report = render_markdown([plan])
        assert first in report
        assert second in report
        assert evidence_sentences(replace(plan, evidence=None)) == []
        unpriced = replace(plan, predicted=None)
        assert evidence_sentences(unpriced)[0].startswith("Measured")

    def test_kill_and_resume_gives_the_same_bytes(self, tmp_path):
        """A run cancelled half-way and repeated ends with the plan of an undisturbed run."""
        undisturbed = run(ledger=MemoryLedger()).plans[0].dumps()
        steps = 0

        def cancelled() -> bool:
            nonlocal steps
            steps += 1
            return steps > 3

        with SqliteLedger(tmp_path / "ledger.sqlite") as ledger:
            with pytest.raises(Cancelled):
                run(ledger=ledger, cancelled=cancelled)
            kept = len(ledger)
            resumed = run(ledger=ledger)

        assert kept > 0
        assert undisturbed == resumed.plans[0].dumps()

    def test_finished_measurements_are_free(self):
        """A second run on the same ledger runs each linearisation's base point and no more."""
        ledger = MemoryLedger()
        first = run(ledger=ledger)
        again = run(ledger=ledger)

        assert first.passes > 20
        assert again.passes <= 4
        assert again.plans == first.plans

    def test_several_budgets_share_the_measurement(self):
        """Each budget gets its own plan; a larger one is not worse."""
        result = run(replace(SMALL, budgets=("2.25 bits", "4 bits")))
        low, high = result.plans

        assert high.measured.mean <= low.measured.mean
        assert low.average_bits <= 2.25
        assert high.average_bits <= 4

    def test_budgets_hold_together(self):
        """Two budgets joined by + are both kept."""
        (plan,) = run(replace(SMALL, budgets=("3 bits + 5.0 KiB of weights",))).plans

        assert plan.average_bits <= 3
        assert plan.size_bits <= 5 * 1024 * 8

    @pytest.mark.parametrize("measure", ["pairs", "diagonal", "gram"])
    def test_measures(self, measure):
        """Every measure leads to a plan, refined or not."""
        (plan,) = run(replace(SMALL, measure=measure, refine=False)).plans

        assert plan.provenance["matrix"]["measure"] == measure

    # Rotation needs a transformer: test_rotation.py.
    @pytest.mark.parametrize("correction", [c for c in Correction if c is not Correction.ROTATION])
    def test_corrections(self, correction):
        """Corrections are recorded and change the loss of two bits everywhere, for all alike."""
        # Rounding that repays errors leaves little to the scaling of channels.
        to_nearest = replace(SMALL, rounding="nearest", refine=False)
        corrected = run(replace(to_nearest, corrections=(correction,))).plans[0]
        plain = run(to_nearest).plans[0]

        def uniform(plan: Plan) -> float:
            return next(b.measured.mean for b in plan.baselines if b.name == "uniform W2")

        assert corrected.corrections == (correction,)
        if correction is Correction.FOLD_BATCH_NORM:
            assert uniform(corrected) == pytest.approx(uniform(plain), rel=0.2)
        elif correction is Correction.SMOOTHING:
            # What it gains shows in tests of its own; at two bits a small network's loss rises or
            # falls by chance, and differs from processor to processor.
            assert uniform(corrected) != uniform(plain)
        else:
            assert uniform(corrected) < uniform(plain)

    def test_activations_are_quantized(self):
        """Two-bit activations hurt, eight-bit ones hardly do."""
        eight, two = (
            run(replace(SMALL, activation_bits=bits, budgets=("8 bits",), refine=False)).plans[0]
            for bits in (8, 2)
        )

        assert eight.assignments[0].candidate.label == "W8A8"
        assert eight.measured.mean < 0.1 * two.measured.mean

    def test_error_feedback(self):
        """Error-feedback rounding reaches the measurement and is better at two bits."""
        scheme = Scheme(rounding=Rounding.ERROR_FEEDBACK)
        request = replace(SMALL, budgets=("2 bits",), refine=False, rounding="nearest")
        feedback = run(replace(request, scheme=scheme)).plans[0]
        nearest = run(request).plans[0]

        assert feedback.measured.mean < nearest.measured.mean

    def test_fixed_tied_and_excluded_layers(self):
        """Wishes about layers are kept to the letter."""
        request = replace(
            SMALL,
            budgets=("3 bits",),
            fixed={"head": 8},
            ties=(("wide.0", "deep.0"),),
            exclude=("stem.*",),
            refine=False,
        )
        (plan,) = run(request).plans
        bits = {a.layer.name: a.candidate.weight_bits for a in plan.assignments}

        assert bits["head"] == 8
        assert bits["wide.0"] == bits["deep.0"]
        assert "stem.0" not in bits
        assert "stem.0.weight" in {t.name for t in plan.unquantized}

    @pytest.mark.parametrize(
        ("change", "error", "text"),
        [
            ({"budgets": ()}, InvalidInput, "at least one budget"),
            ({"budgets": ("1 bits",)}, BudgetTooSmall, "below the smallest plan"),
            ({"budgets": ("3 furlongs",)}, InvalidBudget, "3 furlongs"),
            ({"fixed": {"haed": 8}}, UnknownLayer, "did you mean 'head'"),
        ],
    )
    def test_bad_requests_measure_nothing(self, change, error, text):
        """What cannot work is said before the first measurement."""
        ledger = MemoryLedger()

        with pytest.raises(error, match=text):
            run(replace(SMALL, **change), ledger=ledger)
        assert len(ledger) == 0

    def test_loss_of_the_users_own(self):
        """Any per-sample function of output and reference can be what is minimised."""
        own = CustomLoss(name="largest", function=lambda o, r, _: (o - r).abs().amax(dim=1))
        (plan,) = run(replace(SMALL, refine=False), loss=own).plans

        assert plan.loss == "largest"
        assert plan.measured.mean > 0

    def test_unknown_device(self):
        """A device that is not there is an input error."""
        with pytest.raises(InvalidInput, match="a device must be"):
            run(device="abacus")


class TestMeasureMatrix:
    def test_round_trip(self):
        """The matrix alone can be had, without a budget."""
        known = trained()
        request = replace(SMALL, budgets=(), measure="pairs", weight_bits=(2, 8))
        matrix = measure_matrix(known.model, known.fit, request)

        assert matrix.cross is not None
        assert np.isfinite(matrix.diagonal).all()
        assert type(matrix).from_bytes(matrix.to_bytes()).digest() == matrix.digest()


class TestEvaluatePlans:
    def test_order_and_accuracy(self):
        """Full precision, then plan and baselines, each with loss and accuracy."""
        known = trained()
        made = run(replace(SMALL, budgets=("4 bits",), refine=False))
        (plan,) = made.plans
        found = evaluate_plans(
            made.with_weights(known.model), known.test, [plan],
            with_baselines=True, correction_data=known.fit.first(96),
        )  # fmt: skip

        assert [e.name for e in found[:2]] == ["full precision", "plan"]
        assert {e.name for e in found[2:]} == {b.name for b in plan.baselines}
        assert found[0].measured.mean == 0
        assert found[0].measured.accuracy > 0.8
        assert abs(found[1].measured.accuracy - found[0].measured.accuracy) < 0.1

    def test_stale_plan(self):
        """A plan for other weights is refused."""
        known = trained()
        (plan,) = run(replace(SMALL, refine=False)).plans
        other = replace(known.model, digest="sha256:other")

        assert plan.selected in {SOLVER, *(b.name for b in plan.baselines)}
        with pytest.raises(StalePlan, match="make a new plan"):
            check_model(plan, other)

    def test_corrections_need_data(self):
        """Corrections are never fitted on the set that judges them."""
        known = trained()
        request = replace(
            SMALL, corrections=(Correction.BIAS_CORRECTION,), refine=False, rounding="nearest"
        )
        (plan,) = run(request).plans

        with pytest.raises(InvalidInput, match="need samples"):
            evaluate_plans(known.model, known.test, [plan])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_gpu_plan_is_close_to_the_cpu_plan():
    """The same request on a GPU measures the same losses up to float32 rounding."""
    on_cpu, on_gpu = (
        run(device=device, ledger=MemoryLedger()).plans[0] for device in ("cpu", "cuda")
    )

    assert on_gpu.measured.mean == pytest.approx(on_cpu.measured.mean, rel=0.05)

"""From a plan to trained weights and back: digests, budgets, the plan that is solved again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bitquota.candidates.budget import Budget
from bitquota.candidates.storage import Scheme
from bitquota.candidates.table import Candidate
from bitquota.corrections import REWRITTEN, Correction
from bitquota.errors import BudgetTooSmall, InvalidInput, InvalidPlan, StalePlan
from bitquota.exports.export import export_plan
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.models.identity import model_fingerprint
from bitquota.models.load import load_model
from bitquota.models.loaded import LoadedModel
from bitquota.plan import Assignment, Plan
from bitquota.request import PlanRequest
from bitquota.training.finetune import measure_trained
from bitquota.training.learn import RECIPES, default_settings
from bitquota.training.qat import BEFORE, finetune_plan, learn_plan, solve_around, write_pt2
from bitquota.training.saved import load_trained
from bitquota.training.settings import TrainingSettings
from digits_network import N_TRAIN, digits, trained_digits_net

SETTINGS = TrainingSettings(epochs=1, batch_size=64, learning_rate=3e-3)


@pytest.fixture(scope="module")
def model():
    """The trained network as ``load_model`` returns it."""
    module = trained_digits_net()
    return LoadedModel(
        module=module, digest=model_fingerprint(module), source="digits", architecture="DigitsNet"
    )


def plan_of(model, bits=2, *, activation_bits=None, budget=None, **members):
    inventory = discover(model.module, (torch.zeros(2, 1, 8, 8),), model_digest=model.digest)
    return Plan(
        model_digest=model.digest,
        assignments=tuple(
            Assignment(layer=la, candidate=Candidate.of(la, bits, Scheme(), activation_bits))
            for la in inventory.layers
        ),
        unquantized=inventory.unquantized,
        budgets=() if budget is None else (Budget.parse(budget, inventory),),
        **members,
    )


class TestFinetunePlan:
    def test_the_plan_is_of_the_trained_weights(self, model, data, tmp_path):
        """Its digest fits what was written; the old plan stands beside it, worse."""
        request = PlanRequest(budgets=("2 bits",)).to_json()
        plan = plan_of(model, budget="2 bits", provenance={"request": request})
        found = finetune_plan(model, plan, data, SETTINGS)
        assert found.plan.model_digest == model_fingerprint(found.model.module)
        assert found.plan.model_digest != model.digest
        (before,) = found.plan.baselines
        assert BEFORE == before.name
        assert found.plan.measured.mean < before.measured.mean
        assert found.plan.budgets == plan.budgets
        assert found.plan.provenance["plan"] == plan.digest()
        found.save(tmp_path)
        assert Plan.load(tmp_path / "plan.json") == found.plan
        saved = load_trained(tmp_path / "trained.safetensors")
        other = trained_digits_net(seed=0)
        other.load_state_dict(saved.state)
        assert model_fingerprint(other) == found.plan.model_digest

    @pytest.mark.parametrize("correction", [c for c in Correction if c not in REWRITTEN])
    def test_corrections_are_trained(self, model, data, correction):
        """Folded batch norms stay folded; statistics ship with the weights."""
        plan = plan_of(model, 3, corrections=(correction,))
        found = finetune_plan(model, plan, data, SETTINGS)
        assert () == found.plan.corrections
        norms = [m for m in found.model.module.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert bool(norms) == (correction is not Correction.FOLD_BATCH_NORM)
        assert found.plan.measured.accuracy > 0.9

    def test_quantized_inputs_are_trained_and_saved(self, model, data, tmp_path):
        """Both files hold their grids; what the .pt2 computes is what was trained."""
        found = finetune_plan(model, plan_of(model, 4, activation_bits=3), data, SETTINGS)
        found.save(tmp_path)
        saved = load_trained(tmp_path / "trained.safetensors")
        assert saved.inputs == found.model.inputs
        assert {3} == {q.bits for q in saved.inputs.values()}
        found = write_pt2(found, data, tmp_path / "trained.pt2")
        loaded = load_model(str(tmp_path / "trained.pt2"))
        assert loaded.digest == found.plan.model_digest
        x = digits()[0][N_TRAIN:]
        with torch.no_grad():
            plain, ours = found.model.module(x), loaded.module(x)
            with found.model.running():
                trained = found.model.module(x)
        assert torch.allclose(ours, trained, atol=1e-6)
        assert (plain - trained).abs().amax(dim=1).median() > 0.1
        again = finetune_plan(loaded, replace(found.plan, baselines=()), data, SETTINGS)
        assert again.plan.measured.accuracy > found.plan.measured.accuracy - 0.05
        again = write_pt2(again, data, tmp_path / "again.pt2")
        assert load_model(str(tmp_path / "again.pt2")).digest == again.plan.model_digest

    def test_exported_files_compute_what_was_trained(self, model, data, tmp_path):
        """ONNX Runtime runs the quantizers of inputs, too."""
        pytest.importorskip("onnxruntime")
        found = finetune_plan(model, plan_of(model, 4, activation_bits=3), data, SETTINGS)
        found = write_pt2(found, data, tmp_path / "trained.pt2")
        report = export_plan(
            load_model(str(tmp_path / "trained.pt2")), found.plan, tmp_path / "out",
            format_name="onnx-qdq", samples=CalibrationSet(inputs=(digits()[0][N_TRAIN:],)),
        )  # fmt: skip
        # A value in the middle between two codes may take the other one.
        assert report.difference.relative < 0.05

    def test_a_pt2_can_be_trained(self, model, data, tmp_path):
        """What comes back from training is such a file, too."""
        found = finetune_plan(model, plan_of(model, 3), data, SETTINGS)
        found = write_pt2(found, data, tmp_path / "once.pt2")
        loaded = load_model(str(tmp_path / "once.pt2"))
        assert loaded.digest == found.plan.model_digest
        again = finetune_plan(loaded, found.plan, data, SETTINGS)
        assert again.plan.measured.accuracy > 0.9

    def test_direct_must_keep_the_budget(self, model, data):
        """A codebook of sixteen levels takes more than ten scales."""
        plan = plan_of(model, 4, budget="4.7 bpw")
        small = replace(plan, budgets=(replace(plan.budgets[0], limit=plan.size_bits),))
        head = small.assignments[-1]
        only = replace(small, assignments=(head,), budgets=(
            replace(plan.budgets[0], limit=head.candidate.size_bits),
        ))  # fmt: skip
        with pytest.raises(BudgetTooSmall, match="--grid codebook"):
            finetune_plan(model, only, data, SETTINGS, method="direct")

    def test_refuses_plans_of_other_models(self, model, data):
        """Exit 4 on the command line."""
        with pytest.raises(StalePlan):
            finetune_plan(model, replace(plan_of(model), model_digest="sha256:0"), data, SETTINGS)

    def test_refuses_models_that_only_run(self, data):
        """Such as a graph of ONNX."""
        frozen = trained_digits_net().requires_grad_(False)
        digest = model_fingerprint(frozen)
        model = LoadedModel(module=frozen, digest=digest, source="m.onnx", architecture="ONNX")
        with pytest.raises(InvalidInput, match="can only be run"):
            finetune_plan(model, plan_of(model), data, SETTINGS)


class TestLearnPlan:
    def test_budgets_hold_together(self, model, data):
        """Joined by a plus or given one by one."""
        found = learn_plan(
            model, data, ["3 bits + act 300 B", "act total 600 B"], (2, 3, 4, 6),
            settings=replace(default_settings("stabilised"), epochs=1),
        )  # fmt: skip
        sizes = [a.candidate.activation_size_bits for a in found.plan.assignments]
        assert sum(sizes) <= 600 * 8
        assert max(sizes) <= 300 * 8
        assert found.plan.average_bits <= 3
        assert 3 == len(found.plan.budgets)

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_the_exported_model_keeps_the_budget(self, model, data, tmp_path, recipe):
        """Bytes of the file, scales included, by the export report; outputs those of training."""
        found = learn_plan(
            model, data, ["2.9 bpw"], (2, 3, 4, 6, 8), recipe=recipe,
            settings=replace(default_settings(recipe), epochs=1),
        )  # fmt: skip
        module = found.model.module
        trained = LoadedModel(
            module=module, digest=model_fingerprint(module), source="trained", architecture="Net"
        )
        report = export_plan(
            trained, found.plan, tmp_path / "out", format_name="ref-int",
            samples=CalibrationSet(inputs=(digits()[0][N_TRAIN:],)),
        )  # fmt: skip
        (budget,) = found.plan.budgets
        assert report.payload_bits == found.plan.size_bits <= budget.limit
        assert report.difference.relative < 1e-5

    def test_excluded_layers_stay(self, model, data):
        """And count as unquantized."""
        found = learn_plan(
            model, data, ["3 bits"], (2, 3, 4), exclude=["head"],
            settings=replace(default_settings("stabilised"), epochs=1),
        )  # fmt: skip
        assert "head" not in [a.layer.name for a in found.plan.assignments]
        assert "head.weight" in [t.name for t in found.plan.unquantized]

    def test_refuses_to_start_from_another_models_plan(self, model, data):
        """Its bit-widths would mean nothing."""
        start = replace(plan_of(model), model_digest="sha256:0")
        with pytest.raises(StalePlan):
            learn_plan(model, data, ["3 bits"], (2, 3, 4), start=start)


class TestSolveAround:
    def test_never_worse_on_the_holdout(self, model, data):
        """Measure, solve, train, measure; the better one is kept, within the same budget."""
        request = PlanRequest(
            budgets=("2.5 bits",), weight_bits=(2, 3, 4), samples=128, holdout_samples=128,
            corrections=(Correction.BATCH_NORM_STATISTICS,), refine=False,
        )  # fmt: skip
        plan = plan_of(model, 2, budget="2.5 bits", provenance={"request": request.to_json()})
        first = finetune_plan(model, plan, data, SETTINGS)
        again = solve_around(model, first, data, SETTINGS)
        assert again.plan.average_bits <= 2.5
        _, holdout = data.split(SETTINGS.holdout_fraction, SETTINGS.seed)
        losses = [measure_trained(t.model, model.module, holdout).mean for t in (first, again)]
        assert losses[1] <= losses[0]

    def test_needs_a_request(self, model, data):
        """A plan without one says where to get it."""
        first = finetune_plan(model, plan_of(model), data, SETTINGS)
        with pytest.raises(InvalidPlan, match="needs the request"):
            solve_around(model, first, data, SETTINGS)

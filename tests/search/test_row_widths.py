"""Rows of one layer with different bit-widths: chosen, planned, evaluated, exported, refused."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from bitquota.candidates.rows import mix_rows
from bitquota.candidates.targets import target_by_name
from bitquota.context import Context, MemoryLedger
from bitquota.errors import InvalidInput, InvalidPlan
from bitquota.evaluate.scoring import evaluate_plans
from bitquota.exports.export import export_plan, open_export
from bitquota.measurement_setup import build_setup
from bitquota.models.calibration import CalibrationSet
from bitquota.models.loaded import finish
from bitquota.plan import Plan
from bitquota.quantizers.planned import quantized_module
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate
from bitquota.sensitivity.losses import divergence
from refusals import refused

REQUEST = PlanRequest(
    budgets=("3 bits",),
    target="ort-cpu",
    rounding="gptq",
    effort="quick",
    refine=False,
    row_widths=3,
    samples=64,
    holdout_samples=64,
)


class Uneven(nn.Module):
    """Convolutions, one of them in groups, and a head; channels matter very differently."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.second = nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.head = nn.Linear(12, 6)
        for weight in (self.first.weight, self.second.weight):
            weight.data *= torch.logspace(0, -1.5, 12)[torch.randperm(12)][:, None, None, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return 4 * self.head(torch.relu(self.second(x) + x).mean((2, 3)))


@pytest.fixture(scope="module")
def samples():
    torch.manual_seed(1)
    return CalibrationSet(inputs=(torch.randn(128, 3, 8, 8) * torch.rand(128, 1, 1, 1) * 4,))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return finish(Uneven().eval(), source="uneven", architecture="Uneven")


@pytest.fixture(scope="module")
def planned(model, samples):
    """Return the plans for both targets, and the model with their weights, by target."""
    found = {}
    for target in ("ort-cpu", "ref-int"):
        request = replace(REQUEST, target=target)
        context = Context(device="cpu", ledger=MemoryLedger())
        made = allocate(model, samples, request, context=context)
        found[target] = made.plans[0], made.with_weights(model)
    return found


def mixed(plan):
    return [a for a in plan.assignments if a.candidate.row_bits]


class TestMixRows:
    def test_it_is_as_good_as_trying_everything_where_errors_are_convex(self):
        """Six rows, three widths: the mix has the least error of all with as few bits as it has."""
        rng = np.random.default_rng(0)
        widths = [2, 3, 4]
        scale = rng.exponential(size=6)
        errors = np.array([scale * 4.0**-bits for bits in widths])
        for found in mix_rows(errors, widths, [2.5, 3.0, 3.5], 3):
            spent = sum(found)
            best = min(
                sum(errors[k, r] for r, k in enumerate(choice))
                for choice in product(range(3), repeat=6)
                if sum(widths[k] for k in choice) <= spent
            )
            got = sum(errors[widths.index(bits), r] for r, bits in enumerate(found))
            assert got == pytest.approx(best, rel=1e-12)

    @pytest.mark.parametrize("seed", range(8))
    def test_errors_that_fall_along_a_straight_line(self, seed):
        """Steps of a row have one slope but for a rounding, which may put the second one first.

        The least error for as many bits: the rows with the steepest lines get all they can have.
        """
        scale = np.sort(np.random.default_rng(seed).exponential(size=20))[::-1]
        widths = [2, 3, 4, 5, 6, 8]
        errors = np.array([scale * (8.1 - bits) for bits in widths])
        for found in mix_rows(errors, widths, np.arange(2.25, 8, 0.25).tolist(), 6):
            got = sum(errors[widths.index(bits), r] for r, bits in enumerate(found))
            beyond = np.clip(sum(found) - 2 * 20 - 6 * np.arange(20), 0, 6)
            assert got == pytest.approx((scale * (6.1 - beyond)).sum(), rel=1e-9)

    def test_no_more_widths_than_asked_for_and_no_more_bits_than_the_average(self):
        """Two widths at most, of five on offer."""
        errors = np.random.default_rng(1).exponential(size=40) * np.array(
            [[4.0**-bits] for bits in (2, 3, 4, 6, 8)]
        )
        for average in (2.5, 3.25, 5.0):
            (found,) = mix_rows(errors, [2, 3, 4, 6, 8], [average], 2)
            assert len(set(found)) == 2
            assert average - 0.2 < sum(found) / 40 <= average


class TestPlans:
    def test_rows_lose_less_than_layers_at_the_same_bits(self, planned, model, samples):
        """Channels of very different size: a mix is chosen, and measures better."""
        plan, _ = planned["ort-cpu"]
        assert mixed(plan)
        size = f"{plan.size_bits // 8} B of weights"
        request = replace(REQUEST, row_widths=1, budgets=(size,))
        context = Context(device="cpu", ledger=MemoryLedger())
        (layers,) = allocate(model, samples, request, context=context).plans
        assert not mixed(layers)
        assert plan.measured.mean < 0.9 * layers.measured.mean

    def test_an_estimate_counts_as_many_candidates_as_are_measured(self, model, samples):
        """Nothing is run for it, so which rows get which is made up."""
        counted, measured = (
            build_setup(model, samples, REQUEST, context=Context(device="cpu"), fit=fit).table
            for fit in (False, True)
        )
        assert counted.groups == measured.groups
        # Where rows are alike two averages may be one mix.
        assert len(measured.rows) > 8 * len(measured.groups)
        assert abs(len(counted.rows) - len(measured.rows)) <= len(measured.groups)

    def test_a_plan_reads_back_and_counts_its_order(self, planned):
        """Equal bytes; a byte for each of twelve rows beside codes and scales."""
        plan, _ = planned["ort-cpu"]
        again = Plan.from_json(plan.to_json())
        assert again == plan
        layer = next(a for a in mixed(plan) if a.layer.name == "first")
        widths = layer.candidate.row_bits
        assert layer.candidate.size.order == 8 * 12
        assert layer.candidate.size.codes == 27 * sum(widths)
        assert layer.candidate.size.scales == 32 * 12
        assert layer.candidate.label == f"W{sum(widths) / 12:.4g}"

    def test_evaluation_runs_the_codes_that_were_measured(self, planned, samples):
        """Every row has no more levels than its width allows, and scores are the plan's."""
        plan, model = planned["ort-cpu"]
        module = quantized_module(model, plan)
        for a in mixed(plan):
            weight = module.get_parameter(a.layer.weight_name).flatten(1)
            for row, bits in zip(weight, a.candidate.row_bits, strict=True):
                assert len(row.unique()) <= 2**bits
        found = evaluate_plans(model, samples, [plan], correction_data=samples, with_baselines=True)
        scored = {evaluation.name: evaluation.measured.mean for evaluation in found}
        with torch.no_grad():
            kl = divergence(module(*samples.inputs), model.module(*samples.inputs)).mean()
        assert scored["plan"] == pytest.approx(float(kl), rel=1e-4)
        assert scored.keys() >= {baseline.name for baseline in plan.baselines}


class TestExports:
    @pytest.mark.parametrize("target", ["ort-cpu", "ref-int"])
    def test_files_hold_the_plan(self, planned, samples, tmp_path, target):
        """The runtime computes the plan's outputs from files of the counted size."""
        plan, model = planned[target]
        assert mixed(plan)
        report = export_plan(model, plan, tmp_path / "out", target=target, samples=samples)
        assert report.difference.relative < 1e-5
        assert sum(t.actual_bits for t in report.tensors) == plan.size_bits
        module, again, _ = open_export(model, tmp_path / "out")
        assert again == plan
        with torch.no_grad():
            expected = quantized_module(model, plan)(*samples.inputs)
            assert torch.allclose(module(*samples.inputs), expected, atol=1e-5)

    def test_other_formats_refuse_it(self, planned, samples, tmp_path):
        """OpenVINO's files have one type for a tensor."""
        plan, model = planned["ort-cpu"]
        layers = sorted(a.layer.name for a in mixed(plan))
        with refused(InvalidPlan, format="openvino", layers=layers):
            export_plan(model, plan, tmp_path / "o", format_name="openvino", samples=samples)


class TestRefusals:
    def test_a_target_whose_files_hold_no_parts(self, model, samples):
        """The reason, before anything is measured."""
        with refused(InvalidInput, target="gguf-py"):
            target_by_name("gguf-py").require_rows()
        with pytest.raises(InvalidInput, match="one packed weight for each layer"):
            target_by_name("ct-vllm-humming").require_rows()
        with refused(InvalidInput, target="openvino-cpu"):
            allocate(model, samples, replace(REQUEST, target="openvino-cpu"))

    def test_a_request_that_names_widths_of_rows(self):
        """Which row gets which is the plan's to say."""
        scheme = replace(REQUEST.scheme, row_bits=(2, 4))
        with refused(InvalidInput, row_bits=[2, 4]):
            PlanRequest(scheme=scheme)
        with refused(InvalidInput, row_widths=9):
            PlanRequest(row_widths=9)

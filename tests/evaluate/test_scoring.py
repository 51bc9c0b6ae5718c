"""Plans and exported files scored on one set."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from bitquota.candidates.storage import Granularity, Grid, Rounding, Scheme
from bitquota.candidates.targets import TARGETS
from bitquota.corrections import Correction
from bitquota.errors import ExportFailed, InvalidInput, StalePlan
from bitquota.evaluate.scoring import score_plans, uniform_candidates
from bitquota.exports.export import export_plan, open_export
from bitquota.models.calibration import CalibrationSet
from bitquota.models.load import load_model
from bitquota.plan import Baseline, MeasuredLoss, PlanTarget
from bitquota.quantizers.apply import apply_plan
from bitquota.quantizers.planned import quantized_module
from format_networks import plan_with
from refusals import refused

IMAGES = CalibrationSet(
    inputs=(torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(1)),),
    labels=torch.arange(40) % 10,
)


@pytest.fixture(scope="module")
def net():
    """The tiny convolutional network."""
    return load_model("format_networks:tiny_net")


@pytest.fixture(scope="module")
def plan(net):
    """A mix of widths that uniform 4 bits fit into."""
    return plan_with(net, IMAGES.inputs, target="ref-int", bits=(4, 6, 8), seed=4)


class TestScorePlans:
    def test_everything_beside_everything(self, net, plan, tmp_path):
        """Plan, export and uniform at the same bytes, each with paired differences."""
        plan = replace(plan, target=PlanTarget.of(TARGETS["ref-int"]))
        export_plan(net, plan, tmp_path / "o", target="ref-int", samples=IMAGES)
        found = score_plans(net, IMAGES, plans={"p": plan}, exported=[tmp_path / "o"])
        assert ["full precision", "plan", "exported", "uniform"] == [s.kind for s in found]
        full, mixed, files, uniform = found
        assert full.metrics["kl"].mean == pytest.approx(0, abs=1e-12)
        assert mixed.metrics["kl"].mean > 0
        assert files.differences["p"]["kl"].mean == pytest.approx(0, abs=1e-9)
        assert uniform.size_bits <= plan.size_bits
        assert (full.name, uniform.name) == mixed.beside
        paired = mixed.differences[uniform.name]["kl"]
        assert paired.mean == pytest.approx(mixed.metrics["kl"].mean - uniform.metrics["kl"].mean)
        assert set(mixed.to_json()["differences"]) == {full.name, uniform.name}

    def test_agrees_with_applying_the_plan(self, net, plan):
        """Top-1 and KL are those of the fake-quantized module."""
        module = apply_plan(net.module, plan.inventory, [a.candidate for a in plan.assignments])
        with torch.no_grad():
            output, reference = module(*IMAGES.inputs), net.module(*IMAGES.inputs)
        (_, found) = score_plans(net, IMAGES, plans={"p": plan}, with_uniform=False)
        p, q = (torch.log_softmax(o.double(), 1) for o in (reference, output))
        kl = (p.exp() * (p - q)).sum(1)
        assert found.metrics["kl"].mean == pytest.approx(float(kl.mean()), rel=1e-9)
        error = float(kl.std()) / np.sqrt(40)
        assert found.metrics["kl"].standard_error == pytest.approx(error, rel=1e-9)
        right = (output.argmax(1) == IMAGES.labels).double().mean()
        assert found.metrics["top1"].mean == pytest.approx(float(right))

    def test_baselines(self, net, plan):
        """Baselines of the plan stand beside it when asked for."""
        measured = MeasuredLoss(mean=0.0, standard_error=0.0, n_samples=1)
        size = 0
        baseline = Baseline(
            name="uniform W8", weight_bits=(8, 8, 8), size_bits=size, measured=measured
        )
        plan = replace(plan, baselines=(baseline,))
        found = score_plans(net, IMAGES, plans={"p": plan}, with_uniform=False, with_baselines=True)
        assert ["full precision", "p", "uniform W8 of p"] == [s.name for s in found]
        assert ("full precision", "p") == found[-1].beside

    def test_original(self, net, plan):
        """Full precision and uniform are the original's, the plan is the trained model's."""
        trained = replace(net, module=copy.deepcopy(net.module))
        with torch.no_grad():
            for parameter in trained.module.parameters():
                parameter.mul_(1.05)
        apart = score_plans(trained, IMAGES, plans={"p": plan})
        full, mixed, uniform = score_plans(trained, IMAGES, plans={"p": plan}, original=net)
        (alone,) = score_plans(net, IMAGES)
        own = score_plans(net, IMAGES, plans={"p": plan})
        assert full.metrics == alone.metrics
        assert uniform.metrics == own[2].metrics
        assert mixed.metrics["top1"] == apart[1].metrics["top1"]
        assert mixed.metrics["cross_entropy"] == apart[1].metrics["cross_entropy"]
        assert mixed.metrics["kl"] != apart[1].metrics["kl"]

    def test_original_with_other_layers(self, net, plan):
        """Says which weight is missing."""
        other = replace(net, module=torch.nn.Sequential(torch.nn.Linear(3, 2)))
        with pytest.raises(InvalidInput, match="the original must have the plan's layers"):
            score_plans(net, IMAGES, plans={"p": plan}, original=other)

    def test_stale_plan(self, net, plan):
        """A plan of another model is refused."""
        other = replace(plan, model_digest="sha256:0")
        with pytest.raises(StalePlan, match="make a new plan"):
            score_plans(net, IMAGES, plans={"p": other})

    def test_own_metric(self, net, plan):
        """A callable of the user's gets outputs and labels."""
        found = score_plans(
            net,
            IMAGES,
            plans={"p": plan},
            with_uniform=False,
            custom={"label": lambda _, labels: labels.double()},
        )
        assert found[1].metrics["label"].mean == pytest.approx(4.5)


class TestUniformCandidates:
    def test_widest_that_fits(self, plan):
        """One bit-width everywhere, in no more bytes; the next would be larger."""
        width, chosen = uniform_candidates(plan)
        assert {width} == {c.weight_bits for c in chosen}
        assert sum(c.size_bits for c in chosen) <= plan.size_bits
        above = plan.candidates_at([width + 1] * 3)
        assert sum(c.size_bits for c in above) > plan.size_bits

    def test_widths_that_a_target_lacks(self, net):
        """Layers that the target cannot store so narrow take the nearest above."""
        target = TARGETS["tensorrt"]
        plan = plan_with(net, IMAGES.inputs, target="tensorrt", bits=(8,))
        plan = replace(plan, target=PlanTarget.of(target))
        width, chosen = uniform_candidates(plan)
        assert 8 == width
        assert {8} == {c.weight_bits for c in chosen}

    def test_grid_without_wide_widths(self, net):
        """Powers of two end at five bits: wider ones are no choice."""
        scheme = Scheme(grid=Grid.POWER_OF_TWO)
        plan = plan_with(net, IMAGES.inputs, bits=(5,), scheme=scheme)
        assert 5 == uniform_candidates(plan)[0]

    def test_nothing_fits(self, net):
        """A plan at the narrowest width is its own uniform plan; below there is none."""
        plan = plan_with(net, IMAGES.inputs, bits=(1,))
        assert uniform_candidates(plan) is None


class TestQuantizedModule:
    @pytest.mark.parametrize(
        ("scheme", "correction"),
        [
            (Scheme(rounding=Rounding.ERROR_FEEDBACK), None),
            (Scheme(), Correction.BIAS_CORRECTION),
        ],
    )
    def test_needs_samples(self, net, scheme, correction):
        """What is fitted on samples is refused without them, and differs with them."""
        plan = plan_with(net, IMAGES.inputs, bits=(3,), scheme=scheme)
        plan = replace(plan, corrections=(correction,) if correction else ())
        chosen = [a.candidate for a in plan.assignments]
        with pytest.raises(InvalidInput):
            quantized_module(net, plan, chosen)
        module = quantized_module(net, plan, chosen, correction_data=IMAGES)
        plain = plan_with(net, IMAGES.inputs, bits=(3,))
        other = quantized_module(net, plain, [a.candidate for a in plain.assignments])
        with torch.no_grad():
            assert not torch.equal(module(*IMAGES.inputs), other(*IMAGES.inputs))

    def test_activations(self, net):
        """Ranges of activations come from the correction data."""
        plan = plan_with(net, IMAGES.inputs, target="mcu", bits=(8,))
        chosen = [a.candidate for a in plan.assignments]
        with pytest.raises(InvalidInput, match="ranges of activations"):
            quantized_module(net, plan, chosen)
        module = quantized_module(net, plan, chosen, correction_data=IMAGES)
        with torch.no_grad():
            gap = (module(*IMAGES.inputs) - net.module(*IMAGES.inputs)).abs().max()
        assert 0 < gap < 0.1


class TestOpenExport:
    def test_missing_file(self, net, plan, tmp_path):
        """Files are held to the export report before anything is loaded."""
        export_plan(net, plan, tmp_path / "o", format_name="ref-int", samples=IMAGES)
        module, same, report = open_export(net, tmp_path / "o")
        assert plan == same
        assert "ref-int" == report.exporter
        with torch.no_grad():
            assert module(*IMAGES.inputs).shape == (40, 10)
        (tmp_path / "o" / "model.safetensors").unlink()
        with refused(ExportFailed, file="model.safetensors"):
            open_export(net, tmp_path / "o")

    def test_group_scales(self, net, tmp_path):
        """Schemes of any grouping come back as they were."""
        scheme = Scheme(granularity=Granularity.GROUP, group_size=4)
        plan = plan_with(net, IMAGES.inputs, bits=(5,), scheme=scheme)
        export_plan(net, plan, tmp_path / "o", format_name="ref-int", samples=IMAGES)
        module, _, _ = open_export(net, tmp_path / "o")
        chosen = [a.candidate for a in plan.assignments]
        with torch.no_grad():
            expected = quantized_module(net, plan, chosen)(*IMAGES.inputs)
            assert torch.equal(expected, module(*IMAGES.inputs))

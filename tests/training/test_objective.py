"""What training minimises: classes, numbers, images, own functions; with labels and without."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from bitquota.candidates.storage import Scheme
from bitquota.candidates.table import Candidate
from bitquota.errors import InvalidCalibration, InvalidInput
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.models.identity import model_fingerprint
from bitquota.models.load import load_model
from bitquota.models.loaded import LoadedModel
from bitquota.plan import Assignment, Plan
from bitquota.sensitivity.losses import (
    BinaryKullbackLeibler,
    CustomLoss,
    MeanSquaredError,
    SumOfLosses,
)
from bitquota.training.learn import default_settings
from bitquota.training.objective import Objective, Scores
from bitquota.training.qat import finetune_plan, learn_plan, solve_around
from bitquota.training.settings import TrainingSettings
from digits_network import digits
from language_folders import folder

SETTINGS = TrainingSettings(epochs=2, batch_size=50, learning_rate=1e-3)


class TwiceAsLarge(nn.Module):
    """Doubles the sides of images."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(12, 4, 3, padding=1)

    def forward(self, x):
        detail = functional.pixel_shuffle(self.last(functional.relu(self.first(x))), 2)
        return detail + functional.interpolate(x, scale_factor=2.0)


def loaded(module, name="net"):
    module.eval()
    return LoadedModel(
        module=module, digest=model_fingerprint(module), source=name, architecture=name
    )


def plan_of(model, example, bits):
    inventory = discover(model.module, example, model_digest=model.digest)
    return Plan(
        model_digest=model.digest,
        assignments=tuple(
            Assignment(layer=la, candidate=Candidate.of(la, bits, Scheme()))
            for la in inventory.layers
        ),
        unquantized=inventory.unquantized,
    )


@pytest.fixture(scope="module")
def images():
    """Large digits, and their halves."""
    large = digits()[0][:600]
    return CalibrationSet(inputs=(functional.avg_pool2d(large, 2),), labels=large)


@pytest.fixture(scope="module")
def enlarger(images):
    """A network that was trained to enlarge."""
    torch.manual_seed(0)
    module = TwiceAsLarge()
    optimizer = torch.optim.Adam(module.parameters(), 3e-3)
    for _ in range(8):
        for x, y in zip(images.inputs[0].split(50), images.labels.split(50), strict=True):
            optimizer.zero_grad()
            functional.mse_loss(module(x), y).backward()
            optimizer.step()
    return loaded(module)


class TestObjective:
    def test_labels_that_are_numbers(self):
        """Shares of the squared distances to the reference and to the labels."""
        output, other, labels = torch.zeros(2, 3), torch.ones(2, 3), torch.full((2, 3), 2.0)
        found = Objective(loss=MeanSquaredError(), distillation=0.25)(output, other, labels)
        assert 0.25 * 1 + 0.75 * 4 == pytest.approx(float(found))
        assert 1 == float(Objective(loss=MeanSquaredError())(output, other, None))

    def test_yes_or_no(self):
        """Binary cross-entropy to the labels; the divergence to the reference is zero."""
        z = torch.tensor([[0.3], [-2.0]])
        found = Objective(loss=BinaryKullbackLeibler(), distillation=0.5)(
            z, z, torch.tensor([1, 0])
        )
        expected = functional.softplus(torch.tensor([-0.3, -2.0])).mean() / 2
        assert float(expected) == pytest.approx(float(found), rel=1e-6)

    def test_masked_positions_do_not_count(self):
        """Labels below 0 are left out of the cross-entropy."""
        logits = torch.randn(2, 3, 5)
        labels = torch.tensor([[1, -100, 2], [-1, 0, 4]])
        found = Objective(distillation=0.0)(logits, None, labels)
        rows = [-logits[i, j].log_softmax(0)[labels[i, j]] for i, j in
                ((0, 0), (0, 2), (1, 1), (1, 2))]  # fmt: skip
        assert float(torch.stack(rows).mean()) == pytest.approx(float(found), rel=1e-6)

    def test_several_outputs(self):
        """Each by its own loss and weight; labels go to the output that they fit."""
        loss = SumOfLosses(
            name="a=mse,b=kl", key="k",
            parts=((2.0, MeanSquaredError(), (2,)), (1.0, Objective().loss, (3,))),
        )  # fmt: skip
        output, other = torch.zeros(4, 5), torch.zeros(4, 5)
        other[:, :2] = 1.0
        assert 2 == pytest.approx(float(Objective(loss=loss)(output, other, None)))
        labelled = Objective(loss=loss, distillation=0.0)(output, None, torch.tensor([0, 1, 2, 0]))
        assert float(torch.log(torch.tensor(3.0))) == pytest.approx(float(labelled))

    def test_labels_must_fit(self):
        """The message names both shapes."""
        with pytest.raises(InvalidCalibration, match=r"shape \[3\] a sample, labels \[7\]"):
            Objective(loss=MeanSquaredError())(torch.zeros(2, 3), None, torch.zeros(2, 7))

    def test_own_function(self):
        """It sees everything, and is all that counts."""
        own = CustomLoss(name="own", function=lambda o, r, y: (o - r).sum(1) + y)
        found = Objective(loss=own)(torch.ones(2, 3), torch.zeros(2, 3), torch.tensor([1.0, 2.0]))
        assert 4.5 == float(found)
        with pytest.raises(InvalidCalibration, match="needs a labelled set"):
            Objective(loss=replace(own, needs_labels=True)).check_labels(None)


class TestScores:
    def test_psnr(self):
        """An error of a tenth of the range is 20 dB."""
        labels = torch.rand(3, 1, 4, 4)
        labels.view(-1)[:2] = torch.tensor([0.0, 1.0])
        scores = Scores(MeanSquaredError())
        for part in (slice(0, 2), slice(2, 3)):
            scores.add(labels[part] + 0.1, labels[part])
        assert 20 == pytest.approx(scores.psnr(), abs=1e-3)
        assert scores.accuracy() is None


class TestImages:
    def test_finetuning_gives_noise_back(self, enlarger, images):
        """At 3 bits training regains half of the decibels that quantization took, or more."""
        found = finetune_plan(enlarger, plan_of(enlarger, images.first(2).inputs, 3), images,
                              SETTINGS)  # fmt: skip
        assert "relative_mse" == found.plan.loss
        assert ("numbers",) == tuple(o.kind for o in found.plan.outputs)
        full = found.model.record.full_precision["holdout_psnr"]
        assert found.model.record.epochs[-1]["holdout_psnr"] > full - 0.15
        (before,) = found.plan.baselines
        assert found.plan.measured.mean < 0.6 * before.measured.mean
        assert "of the variance/sample" == before.measured.unit

    def test_without_labels(self, enlarger, images):
        """The full-precision model is followed; nothing needs to be said."""
        bare = CalibrationSet(inputs=images.inputs)
        found = finetune_plan(enlarger, plan_of(enlarger, images.first(2).inputs, 3), bare,
                              SETTINGS)  # fmt: skip
        (before,) = found.plan.baselines
        assert found.plan.measured.mean < 0.6 * before.measured.mean
        assert found.model.record.epochs[-1]["holdout_psnr"] is None

    def test_learning_and_solving_again(self, enlarger, images):
        """Bit-widths of a regression; the second solution is measured by the same loss."""
        settings = replace(default_settings("stabilised"), epochs=2, batch_size=50)
        found = learn_plan(enlarger, images, ["3 bits"], (2, 3, 4), settings=settings)
        assert "relative_mse" == found.plan.loss
        assert found.plan.average_bits <= 3
        again = solve_around(enlarger, found, images, replace(SETTINGS, epochs=1))
        assert again.plan.measured.mean <= found.plan.measured.mean

    def test_augmentation_would_part_images_from_labels(self, enlarger, images):
        """Inputs move, labels do not."""
        plan = plan_of(enlarger, images.first(2).inputs, 3)
        with pytest.raises(InvalidInput, match="moves inputs but not labels"):
            finetune_plan(enlarger, plan, images, replace(SETTINGS, augmentation="shift_flip"))


class EndsInSoftmax(nn.Module):
    """Returns probabilities."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, 16), nn.Linear(16, 10)

    def forward(self, x):
        return self.last(functional.relu(self.first(x.flatten(1)))).softmax(dim=1)


class TestOutputs:
    def test_probabilities_are_trained_before_the_softmax(self):
        """And what is written still returns probabilities."""
        torch.manual_seed(0)
        module = EndsInSoftmax()
        with torch.no_grad():
            module.last.weight.mul_(5)
        model, x = loaded(module), digits()[0]
        data = CalibrationSet(inputs=(x[:600],))
        found = finetune_plan(model, plan_of(model, data.first(2).inputs, 2), data,
                              replace(SETTINGS, learning_rate=5e-3))  # fmt: skip
        assert "softmax" == found.plan.outputs[0].undone
        assert torch.allclose(found.model.module(x[:5]).sum(dim=1), torch.ones(5))
        assert found.plan.model_digest == model_fingerprint(found.model.module)
        assert found.plan.measured.mean < 0.5 * found.plan.baselines[0].measured.mean


class TestLanguageModel:
    def test_text_without_labels_in_parts_of_a_batch(self, tmp_path):
        """Gradients add up: one sample at a time ends like the whole batch; the KL falls."""
        model = load_model(str(folder(tmp_path / "llama", initializer_range=0.2)))
        tokens = torch.randint(0, 64, (80, 12), generator=torch.Generator().manual_seed(0))
        data = CalibrationSet(inputs=(tokens,))
        plan = plan_of(model, data.first(2).inputs, 2)
        settings = TrainingSettings(epochs=2, batch_size=8, learning_rate=2e-3)
        whole = finetune_plan(model, plan, data, settings)
        parts = finetune_plan(model, plan, data, replace(settings, micro_batch=1))
        assert whole.plan.measured.mean < 0.9 * whole.plan.baselines[0].measured.mean
        assert whole.plan.measured.mean == pytest.approx(parts.plan.measured.mean, rel=0.05)

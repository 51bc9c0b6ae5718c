"""Training before a plan: what uniform bit-widths lose afterwards, on images never seen."""

from __future__ import annotations

from dataclasses import replace
from statistics import mean

import pytest
import torch

from bitquota.candidates.storage import Scheme
from bitquota.candidates.table import Candidate
from bitquota.context import Context
from bitquota.errors import Cancelled, InvalidCalibration, InvalidInput
from bitquota.evaluate.metrics import measure_module
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.models.loaded import finish
from bitquota.quantizers.apply import apply_plan
from bitquota.quantizers.corrections import reestimate_batch_norm
from bitquota.training.robust import RobustModel, make_robust
from bitquota.training.settings import TrainingSettings
from digits_network import N_TRAIN, digits, trained_digits_net

SETTINGS = TrainingSettings(epochs=4, batch_size=64)
SMALL = {"first": 6, "rest": 10}


def loaded(seed=0):
    return finish(trained_digits_net(seed, **SMALL), source="digits", architecture="DigitsNet")


def loss_at(bits, module, teacher, data):
    """Return the divergence of uniform ``bits`` from the model before, on other images."""
    x, y = digits()
    test = CalibrationSet(inputs=(x[N_TRAIN:],), labels=y[N_TRAIN:])
    inventory = discover(module, (x[:2],))
    candidates = [Candidate.of(layer, bits, Scheme()) for layer in inventory.layers]
    found = apply_plan(module, inventory, candidates)
    reestimate_batch_norm(found, data)
    return measure_module(found, teacher, test).mean


class TestMakeRobust:
    @pytest.mark.slow
    def test_loses_less_than_the_same_steps_without(self, data):
        """Means of three networks: dropbits at 2 bits, gradient at 4, where errors are small."""
        lost = {(way, bits): [] for way in ("without", "gradient", "dropbits") for bits in (2, 4)}
        for seed in range(3):
            model, settings = loaded(seed), replace(SETTINGS, seed=seed)
            for way, kind, weight in (
                ("without", "gradient", 1e-12),
                ("gradient", "gradient", 0.05),
                ("dropbits", "dropbits", 0.05),
            ):
                found = make_robust(model, data, settings, way=kind, gradient_weight=weight)
                for bits in (2, 4):
                    lost[way, bits].append(loss_at(bits, found.module, model.module, data))
        assert mean(lost["dropbits", 2]) < 0.8 * mean(lost["without", 2])
        assert mean(lost["gradient", 4]) < 0.9 * mean(lost["without", 4])

    def test_continues_to_the_same_bits(self, data, tmp_path):
        """Drawn bit-widths follow from seed and step."""
        model, few = loaded(), data.first(200)
        settings = replace(SETTINGS, epochs=3)
        whole = make_robust(model, few, settings)
        seen = []

        def stopped():
            seen.append(1)
            return len(seen) > 4

        checkpoint = tmp_path / "robust.safetensors"
        with pytest.raises(Cancelled):
            make_robust(
                model, few, settings, checkpoint=checkpoint, context=Context(cancelled=stopped)
            )
        again = make_robust(model, few, settings, checkpoint=checkpoint)
        ours, theirs = again.module.state_dict(), whole.module.state_dict()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
        assert {2, 3, 4} == set(whole.uniform)

    def test_what_is_refused(self, data):
        """One sentence each."""
        model = loaded()
        with pytest.raises(InvalidInput, match="must be one of gradient, dropbits; got 'magic'"):
            make_robust(model, data, way="magic")
        with pytest.raises(InvalidInput, match=r"of 1 to 16; got \[0, 4\]"):
            make_robust(model, data, weight_bits=(4, 0))
        with pytest.raises(InvalidInput, match="must be above 0; got 0"):
            make_robust(model, data, way="gradient", gradient_weight=0)
        with pytest.raises(InvalidCalibration, match="small gradients need a labelled set"):
            make_robust(model, CalibrationSet(inputs=data.inputs), way="gradient")


class TestRobustModel:
    def test_rounds_only_while_training(self):
        """Every layer at each width, or not at all; the hold-out sees full precision."""
        module = trained_digits_net(0, **SMALL)
        layers = discover(module, (torch.zeros(2, 1, 8, 8),)).layers
        trainee = RobustModel(module, layers, (2, 3))
        assert trainee.weights() == {}
        trainee.model.train()
        torch.manual_seed(0)
        name = layers[1].weight_name
        seen = set()
        for _ in range(40):
            weight = trainee.weights().get(name)
            seen.add(0 if weight is None else max(len(row.unique()) for row in weight.flatten(1)))
        assert 0 in seen
        assert {True, False} == {n > 4 for n in seen - {0}}
        assert max(seen) <= 8

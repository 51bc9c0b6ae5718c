"""Fine-tuning: better than before, the exact plan, and the same bits after an interruption."""

import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from bitquota.candidates.storage import Grid, Scheme
from bitquota.candidates.table import Candidate
from bitquota.context import Context
from bitquota.errors import Cancelled, InvalidCalibration, InvalidInput
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.quantizers.apply import apply_plan
from bitquota.quantizers.channel_fit import collect_channels, relative_errors
from bitquota.quantizers.packing import pack
from bitquota.training.finetune import finetune
from bitquota.training.objective import shift_flip
from bitquota.training.settings import TrainingSettings
from digits_network import N_TRAIN, accuracy, digits, trained_digits_net
from waiting import wait_for

SETTINGS = TrainingSettings(epochs=3, batch_size=64, learning_rate=3e-3)


@pytest.fixture(scope="module")
def test_images():
    """Samples that nothing was chosen on."""
    x, y = digits()
    return x[N_TRAIN:], y[N_TRAIN:]


@pytest.fixture
def model():
    """The trained network."""
    return trained_digits_net()


def uniform(model, bits):
    inventory = discover(model, (torch.zeros(1, 1, 8, 8),))
    return inventory, [Candidate.of(la, bits, Scheme()) for la in inventory.layers]


def same_state(first, second):
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


class TestFinetune:
    @pytest.mark.parametrize(("method", "least"), [("lsq", 0.93), ("direct", 0.93)])
    def test_recovers_two_bits(self, model, data, test_images, method, least):
        """Far above post-training quantization, on images it never saw."""
        inventory, plan = uniform(model, 2)
        before = accuracy(apply_plan(model, inventory, plan), *test_images)
        trained = finetune(model, inventory, plan, data, SETTINGS, method=method)
        after = accuracy(trained.module, *test_images)
        assert after > max(before + 0.05, least)

    def test_ships_exactly_the_plan(self, model, data):
        """Sizes to the bit, and weights that are what is stored."""
        inventory, plan = uniform(model, 3)
        trained = finetune(model, inventory, plan, data, replace(SETTINGS, epochs=1))
        assert sum(c.size_bits for c in plan) == trained.size_bits
        for candidate in plan:
            packed = pack(trained.stored[candidate.layer])
            assert candidate.size_bits == 8 * packed.n_bytes
            values = trained.module.get_parameter(f"{candidate.layer}.weight")
            for row in values.flatten(1):
                assert len(row.unique()) <= 8

    def test_direct_counts_its_levels(self, model, data):
        """Another format than the plan's, counted as such; above four bits integers stay."""
        inventory, plan = uniform(model, 2)
        plan[0] = Candidate.of(inventory.layers[0], 6, Scheme())
        trained = finetune(
            model, inventory, plan, data, replace(SETTINGS, epochs=1), method="direct"
        )
        grids = [c.scheme.grid for c in trained.candidates]
        assert [Grid.SYMMETRIC, *[Grid.CODEBOOK] * 3] == grids
        packed = [pack(weight) for weight in trained.stored.values()]
        assert sum(8 * p.n_bytes for p in packed) == trained.size_bits
        assert len(trained.module.conv2.weight.unique()) <= 4

    @pytest.mark.parametrize("method", ["tqt", "direct"])
    def test_what_is_stored_is_what_was_trained(self, model, data, method):
        """Quantizing the shipped weights as the plan says changes nothing."""
        inventory, plan = uniform(model, 3)
        trained = finetune(model, inventory, plan, data, replace(SETTINGS, epochs=1), method=method)
        again = apply_plan(
            trained.module, discover(trained.module, (torch.zeros(1, 1, 8, 8),)), trained.candidates
        )
        x = digits()[0][N_TRAIN:]
        assert torch.allclose(trained.module(x), again(x), atol=1e-4)

    def test_thresholds_end_on_powers_of_two(self, model, data):
        """So that scaling is a shift."""
        inventory, plan = uniform(model, 4)
        trained = finetune(model, inventory, plan, data, replace(SETTINGS, epochs=1), method="tqt")
        for weight in trained.stored.values():
            exponents = torch.log2(weight.scales)
            assert torch.equal(exponents, exponents.round())

    def test_trains_quantized_inputs(self, model, data, test_images):
        """At 2-bit inputs, far above calibration alone."""
        inventory, _ = uniform(model, 2)
        plan = [Candidate.of(la, 4, Scheme(), activation_bits=2) for la in inventory.layers]
        first = finetune(
            model, inventory, plan, data,
            replace(SETTINGS, epochs=1, learning_rate=0.0, quantizer_learning_rate=0.0),
        )  # fmt: skip
        trained = finetune(model, inventory, plan, data, SETTINGS)
        assert {2} == {q.bits for q in trained.inputs.values()}
        scores = []
        for found in (first, trained):
            with found.running():
                scores.append(accuracy(found.module, *test_images))
        assert scores[1] > scores[0] + 0.01
        assert scores[1] > 0.9

    def test_channels_count_while_training(self, model, data):
        """With rates for steps alone, their mean relative error falls further than without."""
        inventory, _ = uniform(model, 2)
        plan = [Candidate.of(la, 8, Scheme(), activation_bits=2) for la in inventory.layers]
        settings = replace(SETTINGS, epochs=1, learning_rate=0.0, quantizer_learning_rate=2e-2)
        watched = collect_channels(model, inventory, [data.first(64).inputs]).values
        means = []
        for weight in (0.0, 30.0):
            found = finetune(
                model, inventory, plan, data, replace(settings, channel_weight=weight)
            ).inputs
            errors = [relative_errors(watched[name], q).mean() for name, q in found.items()]
            means.append(float(torch.stack(errors).mean()))
        assert means[1] < means[0]

    def test_does_not_touch_the_given_model(self, model, data):
        """It trains a copy."""
        inventory, plan = uniform(model, 2)
        finetune(model, inventory, plan, data, replace(SETTINGS, epochs=1))
        assert same_state(trained_digits_net(), model)
        assert not model.training

    def test_learns_from_the_teacher_without_labels(self, model, data, test_images):
        """Distillation alone repairs most of the damage."""
        inventory, plan = uniform(model, 2)
        unlabelled = CalibrationSet(inputs=data.inputs)
        settings = replace(SETTINGS, distillation=1.0)
        trained = finetune(model, inventory, plan, unlabelled, settings)
        assert accuracy(trained.module, *test_images) > 0.93

    def test_keeps_the_best_epoch(self, model, data):
        """The hold-out selects; later epochs may be worse."""
        inventory, plan = uniform(model, 2)
        record = finetune(model, inventory, plan, data, SETTINGS).record
        losses = [epoch["holdout_loss"] for epoch in record.epochs]
        assert losses.index(min(losses)) == record.best_epoch

    def test_stops_early(self, model, data):
        """Nothing moves, so no epoch is better than the state before."""
        inventory, plan = uniform(model, 3)
        still = replace(
            SETTINGS, epochs=12, patience=2, learning_rate=0.0, quantizer_learning_rate=0.0
        )
        record = finetune(model, inventory, plan, data, still).record
        assert (-1, 2) == (record.best_epoch, len(record.epochs))
        assert record.start_loss == pytest.approx(record.epochs[0]["holdout_loss"])

    def test_keeps_what_it_began_with(self, model, data, test_images):
        """Where every epoch is worse than the state before."""
        inventory, plan = uniform(model, 8)
        wild = replace(SETTINGS, epochs=1, learning_rate=10.0)
        trained = finetune(model, inventory, plan, data, wild)
        assert trained.record.best_epoch == -1
        assert trained.record.start_loss < trained.record.epochs[0]["holdout_loss"]
        assert accuracy(trained.module, *test_images) > 0.95

    def test_equal_seeds_give_equal_weights(self, model, data):
        """And another seed gives others."""
        inventory, plan = uniform(model, 2)
        settings = replace(SETTINGS, epochs=1)
        runs = [
            finetune(model, inventory, plan, data, replace(settings, seed=s)).module
            for s in (0, 0, 1)
        ]
        assert same_state(runs[0], runs[1])
        assert not same_state(runs[0], runs[2])

    @pytest.mark.parametrize("stop_at", [1, 20, 31])
    def test_a_cancelled_run_continues_to_the_same_bits(self, model, data, tmp_path, stop_at):
        """In the middle of an epoch, and between two."""
        inventory, plan = uniform(model, 2)
        whole = finetune(model, inventory, plan, data, SETTINGS)
        calls = iter(range(10**6))
        path = tmp_path / "run.safetensors"
        with pytest.raises(Cancelled):
            finetune(
                model, inventory, plan, data, SETTINGS,
                checkpoint=path, context=Context(cancelled=lambda: next(calls) >= stop_at),
            )  # fmt: skip
        resumed = finetune(model, inventory, plan, data, SETTINGS, checkpoint=path)
        assert same_state(whole.module, resumed.module)
        assert whole.record == resumed.record

    def test_a_killed_run_continues_to_the_same_bits(self, model, data, tmp_path, repository):
        """Kill -9 in the middle; what was not in the checkpoint is done again."""
        inventory, plan = uniform(model, 2)
        settings = replace(SETTINGS, checkpoint_steps=4)
        path = tmp_path / "run.safetensors"
        program = f"""
import sys, torch
sys.path.insert(0, {str(repository / "tests")!r})
torch.set_num_threads(1)
from pathlib import Path
from digits_network import N_TRAIN, digits, trained_digits_net
from bitquota.candidates.table import Candidate
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.candidates.storage import Scheme
from bitquota.training.finetune import finetune
from bitquota.training.settings import TrainingSettings
x, y = digits()
data = CalibrationSet(inputs=(x[:N_TRAIN],), labels=y[:N_TRAIN])
model = trained_digits_net()
inventory = discover(model, (torch.zeros(1, 1, 8, 8),))
plan = [Candidate.of(la, 2, Scheme()) for la in inventory.layers]
settings = TrainingSettings(epochs=300, batch_size=64, learning_rate=3e-3, checkpoint_steps=4)
finetune(model, inventory, plan, data, settings, checkpoint=Path({str(path)!r}))
"""
        long = replace(settings, epochs=300)
        process = subprocess.Popen([sys.executable, "-c", program])
        try:
            wait_for(path.exists, "the first checkpoint")
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        assert path.exists()
        # Continue the killed run for a while, and run the same distance undisturbed.
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            import json

            reached = json.loads(file.metadata()["progress"])["step"]
        goal = reached + 5

        def up_to(checkpoint, start):
            calls = iter(range(start, 10**6))
            with pytest.raises(Cancelled):
                finetune(
                    model, inventory, plan, data, long,
                    checkpoint=checkpoint, context=Context(cancelled=lambda: next(calls) >= goal),
                )  # fmt: skip

        up_to(path, reached)
        undisturbed = tmp_path / "undisturbed.safetensors"
        up_to(undisturbed, 0)
        with (
            safe_open(path, framework="pt") as ours,
            safe_open(undisturbed, framework="pt") as theirs,
        ):
            assert set(ours.keys()) == set(theirs.keys())
            for name in ours.keys():  # noqa: SIM118  # not a dictionary
                assert torch.equal(ours.get_tensor(name), theirs.get_tensor(name)), name

    def test_refuses_the_checkpoint_of_another_run(self, model, data, tmp_path):
        """Another seed is another run."""
        inventory, plan = uniform(model, 2)
        path = tmp_path / "run.safetensors"
        settings = replace(SETTINGS, epochs=1)
        finetune(model, inventory, plan, data, settings, checkpoint=path)
        with pytest.raises(InvalidInput, match="must be of the same model, data and settings"):
            finetune(model, inventory, plan, data, replace(settings, seed=1), checkpoint=path)

    def test_needs_labels_if_there_is_nothing_else(self, model, data):
        """The message says both ways out."""
        inventory, plan = uniform(model, 2)
        settings = replace(SETTINGS, distillation=0.0)
        with pytest.raises(InvalidCalibration, match="add labels, or follow the full-precision"):
            finetune(model, inventory, plan, CalibrationSet(inputs=data.inputs), settings)

    def test_refuses_a_plan_without_quantized_layers(self, model, data):
        """Plain training is not our business."""
        inventory, plan = uniform(model, 32)
        with pytest.raises(InvalidInput, match="at least one quantized layer"):
            finetune(model, inventory, plan, data, SETTINGS)


class TestShiftFlip:
    def test_every_image_is_a_shifted_mirror_of_itself(self):
        """Against a search over all shifts."""
        images = torch.randn(6, 2, 16, 16, generator=torch.Generator().manual_seed(0))
        moved = shift_flip(images, torch.Generator().manual_seed(1))
        padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
        for before, after in zip(padded, moved, strict=True):
            shifts = [before[:, t : t + 16, s : s + 16] for t in range(5) for s in range(5)]
            assert any(torch.equal(after, v) or torch.equal(after, v.flip(2)) for v in shifts)
        assert not torch.equal(images, moved)

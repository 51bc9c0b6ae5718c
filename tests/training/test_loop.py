"""The loop's switches: bfloat16, layout, compiled steps, schedules, several processes."""

import runpy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from bitquota.candidates.storage import Scheme
from bitquota.candidates.table import Candidate
from bitquota.errors import InvalidInput
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.training.finetune import finetune
from bitquota.training.loop import optimizer_of, rate_factor
from bitquota.training.settings import TrainingSettings
from digits_network import N_TRAIN, accuracy, digits, trained_digits_net
from waiting import PATIENCE_S

SETTINGS = TrainingSettings(epochs=1, batch_size=100, learning_rate=3e-3)


def run(settings, bits=2):
    x, y = digits()
    model = trained_digits_net()
    inventory = discover(model, (x[:2],))
    plan = [Candidate.of(la, bits, Scheme()) for la in inventory.layers]
    data = CalibrationSet(inputs=(x[:N_TRAIN],), labels=y[:N_TRAIN])
    return finetune(model, inventory, plan, data, settings)


class TestTrain:
    @pytest.mark.parametrize("switch", ["mixed_precision", "channels_last"])
    def test_fast_steps_train_as_well(self, switch):
        """Parameters stay in float32; accuracy on other images is the same within two points."""
        x, y = digits()
        plain, fast = run(SETTINGS), run(replace(SETTINGS, **{switch: True}))
        assert {torch.float32} == {p.dtype for p in fast.module.parameters()}
        ours, theirs = (accuracy(t.module, x[N_TRAIN:], y[N_TRAIN:]) for t in (plain, fast))
        assert theirs > ours - 0.02

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's own
    def test_a_compiled_step_computes_the_same(self, monkeypatch):
        """Up to the order of sums."""
        from torch._inductor import config as inductor

        # Of a few small kernels none takes as long as the headers.
        monkeypatch.setattr(inductor, "cpp_cache_precompile_headers", False)
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(200, 6, generator=generator), torch.arange(200) % 3
        losses = []
        for settings in (SETTINGS, replace(SETTINGS, compiled=True)):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
            inventory = discover(model, (x[:2],))
            plan = [Candidate.of(la, 2, Scheme()) for la in inventory.layers]
            data = CalibrationSet(inputs=(x,), labels=y)
            trained = finetune(model, inventory, plan, data, settings)
            losses.append(trained.record.epochs[0]["training_loss"])
        assert losses[0] == pytest.approx(losses[1], rel=0.02)

    def test_inputs_and_compiling_do_not_go_together(self):
        """They are refused before anything is trained."""
        x, y = digits()
        model = trained_digits_net()
        inventory = discover(model, (x[:2],))
        plan = [Candidate.of(la, 4, Scheme(), activation_bits=4) for la in inventory.layers]
        with pytest.raises(InvalidInput, match="cannot be compiled"):
            finetune(
                model, inventory, plan, CalibrationSet(inputs=(x,), labels=y),
                replace(SETTINGS, compiled=True),
            )  # fmt: skip

    @pytest.mark.slow
    def test_two_processes_take_the_same_steps_as_one(self, tmp_path, monkeypatch):
        """Each takes half of every batch; without batch norm only the order of sums differs."""
        program = tmp_path / "program.py"
        program.write_text("""
import sys
from pathlib import Path
import torch
from bitquota.candidates.table import Candidate
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.candidates.storage import Scheme
from bitquota.training.distributed import joined_group
from bitquota.training.finetune import finetune
from bitquota.training.settings import TrainingSettings

torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()
x, y = torch.randn(200, 6), torch.randint(0, 3, (200,))
inventory = discover(model, (x[:2],))
plan = [Candidate.of(la, 4, Scheme()) for la in inventory.layers]
settings = TrainingSettings(epochs=2, batch_size=20, optimizer="sgd", learning_rate=0.05)
with joined_group() as group:
    trained = finetune(
        model, inventory, plan, CalibrationSet(inputs=(x,), labels=y), settings,
        checkpoint=Path(sys.argv[1] + ".checkpoint"),
    )
    if group.is_first:
        torch.save(trained.latents.state_dict(), sys.argv[1])
        Path(sys.argv[1] + ".size").write_text(str(group.size))
""")
        monkeypatch.setattr(sys, "argv", [str(program), str(tmp_path / "one")])
        runpy.run_path(str(program))
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
        done = subprocess.run(
            [*start, str(program), str(tmp_path / "two")],
            capture_output=True, text=True, check=False, timeout=PATIENCE_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert "2" == (tmp_path / "two.size").read_text()
        one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two"))
        for key, value in one.items():
            assert torch.allclose(value, two[key], atol=1e-5), key
        assert (tmp_path / "two.checkpoint").exists()


class TestOptimizerOf:
    def test_published_training_is_momentum_sgd(self):
        """With a rate and decay of its own for every group."""
        parameter = torch.nn.Parameter(torch.zeros(2))
        group = {"params": [parameter], "lr": 0.3, "weight_decay": 0.1}
        found = optimizer_of([group], TrainingSettings(optimizer="sgd"))
        assert isinstance(found, torch.optim.SGD)
        assert (0.9, 0.3, 0.1) == tuple(
            found.param_groups[0][k] for k in ("momentum", "lr", "weight_decay")
        )


class TestRateFactor:
    def test_steps(self):
        """A tenth at half, another at three quarters."""
        found = [rate_factor("steps", p) for p in (0.0, 0.49, 0.5, 0.74, 0.75, 1.0)]
        assert [1, 1, 0.1, 0.1, 0.01, 0.01] == pytest.approx(found)

    def test_cosine(self):
        """From one to zero."""
        assert [1.0, 0.5, 0.0] == pytest.approx([rate_factor("cosine", p) for p in (0, 0.5, 1)])


class TestTrainingSettings:
    @pytest.mark.parametrize(
        ("wrong", "text"),
        [
            ({"epochs": 0}, "at least one epoch"),
            ({"optimizer": "magic"}, "'adamw' or 'sgd'; got 'magic'"),
            ({"schedule": "magic"}, "'cosine' or 'steps'; got 'magic'"),
            ({"holdout_fraction": 1.0}, "share between 0 and 1; got 1.0"),
            ({"learning_rate": -1.0}, "must not be negative"),
            ({"patience": 0}, "must be at least 1"),
        ],
    )
    def test_refuses(self, wrong, text):
        """What must hold, and what was got."""
        with pytest.raises(InvalidInput, match=text):
            TrainingSettings(**wrong)

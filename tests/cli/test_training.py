"""The commands that train: files, errors, and the same weights after kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from bitquota.models.layout import from_matrix
from bitquota.models.load import load_model
from bitquota.plan import Plan
from bitquota.training.saved import load_trained
from waiting import wait_for

MODEL, DATA = "examples.digits:model", "examples.digits:calibration"


@pytest.fixture(autouse=True)
def examples_importable(monkeypatch, repository):
    monkeypatch.syspath_prepend(str(repository))


@pytest.fixture(scope="module")
def plan_text(repository):
    """A plan at 3 bits everywhere, made without measuring."""
    sys.path.insert(0, str(repository))
    try:
        from bitquota.candidates.budget import Budget
        from bitquota.candidates.storage import Scheme
        from bitquota.candidates.table import Candidate
        from bitquota.models.discovery import discover
        from bitquota.plan import Assignment

        model = load_model(MODEL)
    finally:
        sys.path.remove(str(repository))
    inventory = discover(model.module, (torch.zeros(2, 1, 8, 8),), model_digest=model.digest)
    return Plan(
        model_digest=model.digest,
        assignments=tuple(
            Assignment(layer=la, candidate=Candidate.of(la, 3, Scheme())) for la in inventory.layers
        ),
        unquantized=inventory.unquantized,
        budgets=(Budget.parse("3 bits", inventory),),
    ).dumps()


class TestFinetune:
    def test_writes_plan_and_weights_that_agree(self, bitquota, tmp_path, plan_text):
        """The plan is of the model that the .pt2 holds; codes give its weights."""
        (tmp_path / "plan.json").write_text(plan_text)
        code, out, err = bitquota(
            "finetune", MODEL, "plan.json", DATA, "--epochs", 1, "--method", "direct"
        )
        assert code == 0, err
        assert "before training" in out
        lines = err.splitlines()
        assert "wrote trained/plan.json" in lines
        assert "wrote trained/trained.safetensors, trained/trained.pt2" in lines
        made = Plan.load(tmp_path / "trained" / "plan.json")
        loaded = load_model(str(tmp_path / "trained" / "trained.pt2"))
        assert loaded.digest == made.model_digest
        saved = load_trained(tmp_path / "trained" / "trained.safetensors")
        for a in made.assignments:
            weight = from_matrix(saved.weights[a.layer.name].dequantize(), a.layer)
            assert torch.equal(saved.state[a.layer.weight_name], weight)
        code, out, err = bitquota(
            "evaluate", "trained/trained.pt2", "examples.digits:test", "--plan",
            "trained/plan.json", "--original", MODEL, "--json",
        )  # fmt: skip
        assert code == 0, err
        full, trained, uniform = json.loads(out)
        names = ("full precision", "trained/plan.json")
        assert (full["name"], trained["name"]) == names
        assert trained["metrics"]["kl"]["mean"] > 0
        assert trained["metrics"]["kl"]["mean"] < uniform["metrics"]["kl"]["mean"]
        code, out, err = bitquota("evaluate", MODEL, "examples.digits:test", "--json")
        assert code == 0, err
        assert json.loads(out)[0]["metrics"] == full["metrics"]

    @pytest.mark.parametrize(
        ("arguments", "code", "text"),
        [
            (["--method", "magic"], 2, "must be one of lsq, tqt, direct; got 'magic'"),
            (["--epochs", 0], 2, "at least one epoch"),
            (["--augment", "mixup"], 2, "must be 'none' or 'shift_flip'; got 'mixup'"),
            (["--device", "magic"], 2, "a device must be 'auto', 'cpu'"),
            (["--input-fit", "magic"], 2, "must be one of joint, chan, irls; got 'magic'"),
            (["--robust", "magic"], 2, "must be one of gradient, dropbits; got 'magic'"),
            (["--robust", "dropbits"], 2, "trains before there is a plan: give MODEL and TRAIN"),
            (["--gradient-weight", 1], 2, "only --robust, which has no PLAN, takes"),
        ],
    )
    def test_errors(self, bitquota, tmp_path, plan_text, arguments, code, text):
        """One sentence that says what is possible."""
        (tmp_path / "plan.json").write_text(plan_text)
        got, _, err = bitquota("finetune", MODEL, "plan.json", DATA, *arguments)
        assert code == got
        assert text in " ".join(err.split())

    def test_plan_of_another_model(self, bitquota, tmp_path, plan_text, repository):
        """Exit 4, as everywhere."""
        (tmp_path / "other.py").write_text(
            "import torch\n"
            "from bitquota.cli.demo import DigitsNet\n"
            "def model():\n"
            "    torch.manual_seed(5)\n"
            "    return DigitsNet()\n"
        )
        (tmp_path / "plan.json").write_text(plan_text)
        code, _, err = bitquota("finetune", "other:model", "plan.json", DATA)
        assert code == 4, err

    def test_killed_and_started_again(self, bitquota, tmp_path, plan_text, repository):
        """Kill -9 after the first epoch: the same command ends with the same weights."""
        (tmp_path / "plan.json").write_text(plan_text)

        def arguments(out):
            few = ["--epochs", "3", "--batch-size", "32"]
            return ["finetune", MODEL, "plan.json", DATA, *few, "--out", out]

        checkpoint = tmp_path / "killed" / "checkpoints" / "finetune.safetensors"
        process = subprocess.Popen(
            [sys.executable, "-m", "bitquota", *arguments("killed")],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
        )
        wait_for(lambda: checkpoint.exists() or process.poll() is not None, "the checkpoint")
        assert process.poll() is None, "it was over before it could be killed"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "killed" / "trained.safetensors").exists()
        for out in ("killed", "whole"):
            code, _, err = bitquota(*arguments(out))
            assert code == 0, err
        ours, theirs = (
            load_file(tmp_path / out / "trained.safetensors") for out in ("killed", "whole")
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)


class TestLearn:
    def test_keeps_its_budget(self, bitquota, tmp_path):
        """The plan says how it came about."""
        code, _, err = bitquota(
            "learn", MODEL, DATA, "--budget", "3 bpw", "--epochs", 1, "--recipe", "ellipsoid"
        )
        assert code == 0, err
        made = Plan.load(tmp_path / "learned" / "plan.json")
        assert made.effective_bits <= 3
        assert made.selected == "learned:ellipsoid"
        assert len(set(made.weight_bits)) > 1

    @pytest.mark.parametrize(
        ("arguments", "code", "text"),
        [
            ([], 2, "learning needs a budget"),
            (["-b", "2.5 bits", "--recipe", "magic"], 2, "must be one of stabilised, ellipsoid"),
            (["-b", "1 bits"], 5, "below the smallest plan"),
            (["-b", "act 10 KiB"], 2, "at least one limit on weights"),
            (["-b", "2.5 bits", "-b", "act 10 B"], 5, "budget 'act 10 B'"),
        ],
    )
    def test_errors(self, bitquota, arguments, code, text):
        """Before anything is trained."""
        got, _, err = bitquota("learn", MODEL, DATA, *arguments)
        assert code == got
        assert text in " ".join(err.split())

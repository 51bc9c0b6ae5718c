"""``quickstart`` proposes what fits the model, says why, and runs the commands that it prints."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

import numpy as np
import pytest

from bitquota.cli import quickstart
from bitquota.errors import InvalidInput
from bitquota.estimate import JobEstimate, StageEstimate
from bitquota.exports.export_report import ExportReport
from bitquota.plan import Plan
from onnx_graphs import image_graph


def layer(bits, n_weights, kept=None):
    """One layer as ``inspect --json`` shows it."""
    formats = [{"weight_bits": b} for b in bits]
    return {"n_weights": n_weights, "kept_in_full_precision": kept, "formats": formats}


def estimate(seconds, samples=512, holdout=512):
    """What a dry run says of a job that takes so long."""
    stage = StageEstimate(stage="gram", passes=1, most_passes=1, seconds=seconds)
    return JobEstimate(
        job="plan", model_digest="sha256:0", engine="eager", device="cpu", n_layers=1, n_groups=1,
        n_candidates=1, n_pairs=0, samples=samples, holdout_samples=holdout, model_bits=8,
        quantizable_bits=8, budgets=(), stages=(stage,), seconds_per_pass=1.0, peak_bytes=1,
    )  # fmt: skip


class TestBudget:
    def test_usual(self):
        assert "4 bits" == quickstart._budget({"layers": [layer((2, 4), 9)]}, None).value

    def test_target_that_has_nothing_so_narrow(self):
        """Half a bit above the narrowest; layers that stay as they are do not count."""
        layers = [layer((8,), 10), layer((4,), 10), layer((), 99, kept="excluded")]
        assert "6.5 bits" == quickstart._budget({"layers": layers}, None).value

    def test_given(self):
        assert ("--budget", "0.2x") == quickstart._budget({"layers": []}, "0.2x").arguments


class TestWork:
    @pytest.mark.parametrize(
        ("seconds", "arguments"),
        [
            (500, []),
            (5_000, ["--effort", "quick"]),
            (40_000, ["--samples", "64", "--holdout", "64", "--effort", "quick"]),
            (4_000_000, ["--samples", "64", "--holdout", "64", "--effort", "quick"]),
        ],
    )
    def test_ten_minutes(self, seconds, arguments):
        """The most work that is expected to fit, or the least."""
        found = quickstart._work(estimate(seconds))
        assert arguments == [a for p in found for a in p.arguments]

    def test_samples_are_those_that_there_are(self):
        assert "100 + 90" == quickstart._work(estimate(1, 100, 90))[0].value


class TestTarget:
    @pytest.mark.parametrize(
        ("config", "target"),
        [({"model_type": "llama"}, "gguf-k"), ({"model_type": "vit"}, "ct-vllm-humming")],
    )
    def test_folder(self, tmp_path, config, target):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert target == quickstart._target(str(tmp_path), None).value

    def test_unknown(self):
        with pytest.raises(InvalidInput, match="must be one of"):
            quickstart._target("m:model", "cpu")


class TestQuickstart:
    @pytest.fixture(autouse=True)
    def files(self, bitquota, tmp_path):
        """An ONNX file and a few samples."""
        image_graph(tmp_path / "m.onnx")
        images = np.random.default_rng(0).normal(size=(16, 3, 8, 8)).astype(np.float32)
        np.savez(tmp_path / "c.npz", x=images)

    def test_proposes_runs_and_prints_what_it_ran(self, bitquota, tmp_path):
        """The printed commands make the same plan again."""
        code, printed, told = bitquota("quickstart", "m.onnx", "c.npz", "--yes", "--out", "small")
        assert 0 == code, told
        for word in ("ort-cpu", "4 bits", "8 + 8", "normal", "because"):
            assert word in printed
        plan = Plan.load(tmp_path / "small-plan.json")
        assert ExportReport.load(tmp_path / "small").plan_digest == plan.digest()
        assert "run it: onnxruntime.InferenceSession('small/model.onnx')" in told
        (again,) = [line for line in told.splitlines() if line.startswith("bitquota plan")]
        _, told = bitquota(*shlex.split(again)[1:])[1:]
        assert "wrote small-plan.json (as it was)" in told
        assert not {"\r", "\x1b"} & set(printed + told)

    def test_without_samples_or_consent_nothing_is_run(self, bitquota, tmp_path):
        """Both end well: to look is a use of it."""
        code, printed, told = bitquota("quickstart", "m.onnx")
        assert (0, True) == (code, "ort-cpu" in printed)
        assert "a plan needs CALIBRATION" in told
        code, printed, told = bitquota("quickstart", "m.onnx", "c.npz", "--loss", "mse")
        assert (0, True) == (code, "mse" in printed)
        assert "nothing was run" in told
        assert "bitquota plan m.onnx c.npz --target ort-cpu --budget '4 bits' --loss mse" in told
        assert {"m.onnx", "c.npz"} == {p.name for p in tmp_path.iterdir() if p.is_file()}

    def test_yes_needs_samples(self, bitquota):
        code, _, told = bitquota("quickstart", "m.onnx", "--yes")
        assert 2 == code
        assert "give CALIBRATION" in told


@pytest.mark.slow
def test_factory_that_needs_scipy_is_inspected_in_a_process_of_its_own(repository):
    """What transformers is imported without is there for the user's code."""
    done = subprocess.run(
        [sys.executable, "-m", "bitquota", "inspect", "examples.digits:model", "--json"],
        capture_output=True, text=True, check=False, cwd=repository,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["layers"]) == 6

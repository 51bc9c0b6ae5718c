"""Plans and checks in an experiment tracker, read back by its own client."""

from __future__ import annotations

import sys

import pytest

from bitquota.ci.lock import Limits, make_lock
from bitquota.plan import Plan
from bitquota.report.tracking import log_plans

FAST = ["--bits", "2,4,8", "--samples", "64", "--holdout", "64", "--no-refine"]
FACTORIES = ["trained_digits:model", "trained_digits:calibration"]


@pytest.fixture
def tracker(monkeypatch, tmp_path):
    """Return a client of an empty MLflow store."""
    mlflow = pytest.importorskip("mlflow", reason="'mlflow-skinny' is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    return mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")


@pytest.mark.filterwarnings("ignore")  # the tracker's own
class TestMlflow:
    def test_plan_and_check(self, bitquota, tmp_path, tracker):
        """A run per plan and per check, with what was measured and the files."""
        code, _, err = bitquota("plan", *FACTORIES, "-b", "3 bits", *FAST, "--log-to", "mlflow")
        plan = Plan.load(tmp_path / "plan.json")
        make_lock(plan, limits=Limits(max_bytes=1)).save(tmp_path / "bitquota.lock.json")
        checked, _, _ = bitquota("check", "--log-to", "mlflow")

        assert (code, checked) == (0, 1), err
        runs = {run.info.run_name: run for run in tracker.search_runs(["0"])}
        made = runs[f"{FACTORIES[0]} at 3 bits"]
        assert made.data.params["plan_digest"] == plan.digest()
        assert made.data.metrics["loss_increase"] == plan.measured.mean
        assert made.data.metrics["size_bytes"] == plan.model_bits / 8
        assert any(name.startswith("baselines/uniform") for name in made.data.metrics)
        assert [f.path for f in tracker.list_artifacts(made.info.run_id)] == [
            "plan.json",
            "report.md",
        ]
        checks = runs["check of bitquota.lock.json"].data
        assert checks.params["bytes of the model"] == "failed"
        assert checks.metrics["exit_code"] == 1

    def test_unknown_tracker(self, bitquota, tmp_path):
        """Refused before anything is measured."""
        code, _, err = bitquota("plan", *FACTORIES, "-b", "3 bits", *FAST, "--log-to", "aim")
        assert code == 2
        assert "must be one of mlflow, wandb; got 'aim'" in err
        assert not (tmp_path / "plan.json").exists()

    @pytest.mark.parametrize("tracker", ["mlflow", "wandb"])
    def test_missing_package(self, bitquota, monkeypatch, tracker):
        """The extra is named."""
        monkeypatch.setitem(sys.modules, tracker, None)
        code, _, err = bitquota("plan", *FACTORIES, "-b", "3 bits", *FAST, "--log-to", tracker)
        assert code == 2
        assert f"pip install 'bitquota[{tracker}]'" in err


@pytest.mark.filterwarnings("ignore")  # the tracker's own
class TestWandb:
    def test_plan(self, monkeypatch, tmp_path, repository):
        """A run offline, read back from the file that would be synchronised."""
        wandb = pytest.importorskip("wandb", reason="'wandb' is not installed")
        monkeypatch.setenv("WANDB_MODE", "offline")
        for name in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
            monkeypatch.setenv(name, str(tmp_path))
        plan = Plan.load(repository / "tests/golden/plan-measured-0.json")
        (run,) = log_plans([plan], tracker="wandb", source="net")
        wandb.teardown()  # all is written, and another try begins with its own folder

        (written,) = tmp_path.glob(f"wandb/offline-run-*-{run}/run-{run}.wandb")
        held = written.read_bytes()
        for text in (plan.digest(), "loss_increase", "baselines/", "plan.json", "report.md"):
            assert text.encode() in held, text

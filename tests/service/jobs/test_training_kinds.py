"""Jobs of the kinds finetune and learn, over a live server."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from bitquota.candidates.storage import Grid
from bitquota.errors import InvalidInput
from bitquota.plan import Plan
from bitquota.request import RECIPES, TRAINING_METHODS, PlanRequest
from bitquota.service.jobs.kinds import training_request
from bitquota.training import learn, weight_quantizers
from bitquota.training.nested_plans import load_nested
from bitquota.training.saved import load_trained
from live_server import LiveServer
from waiting import PATIENTLY, wait_for

REQUEST = PlanRequest(
    budgets=("3 bits",), weight_bits=(2, 3, 4, 8), samples=32, holdout_samples=32, effort="quick"
)


@pytest.fixture(scope="module")
def client(server):
    with server.client() as made:
        yield made


@pytest.fixture(scope="module")
def planned(client, digits_files):
    job = client.submit(model=digits_files[0], calibration=digits_files[1], request=REQUEST)
    return job.wait(**PATIENTLY)


class TestFinetune:
    def test_weights_and_plan_come_back(self, client, planned, digits_files, tmp_path):
        """The plan of one job is the input of another; what comes back agrees with itself."""
        job = client.order(
            "finetune",
            {"epochs": 1, "method": "direct", "batch_size": 64, "symmetric": True},
            model=planned.body["model"],
            dataset=digits_files[1],
            plan=planned.results["plans"][0],
        ).wait(**PATIENTLY)
        plan = job.plan()
        assert plan.selected == "trained:direct"
        assert plan.baselines[0].name == "before training"
        assert plan.measured.accuracy > 0.5
        saved = load_trained(job.save("weights", tmp_path / "trained.safetensors"))
        for a in plan.assignments:
            assert len(saved.state[a.layer.weight_name].unique()) > 1
            stored = saved.weights[a.layer.name]
            assert stored.bits == a.candidate.weight_bits
            if a.candidate.scheme.grid is Grid.CODEBOOK:
                levels = stored.scales.flatten().float()
                assert torch.allclose(levels, -levels.flip(0), atol=1e-4)
        assert len(job.result("training")["finetuning"]["epochs"]) == 1
        assert "before training" in job.report()
        beside = client.order(
            "evaluate", {"uniform": False}, model=job.results["trained_model"],
            original=planned.body["model"], dataset=digits_files[1],
            plans=[job.results["plans"][0]],
        ).wait(**PATIENTLY)  # fmt: skip
        original, trained = beside.result("evaluation")["scores"]
        assert original["metrics"]["kl"]["mean"] == pytest.approx(0, abs=1e-9)
        assert trained["metrics"]["kl"]["mean"] > 1e-4
        assert trained["metrics"]["top1"]["mean"] > 0.5

    def test_one_payload_serves_several_plans(self, client, planned, digits_files, tmp_path):
        """All plans come back, those of the weights first, and one file that holds their codes."""
        job = client.order(
            "finetune",
            {"epochs": 1, "batch_size": 256, "widths": [2, 3, 4, 8]},
            model=planned.body["model"],
            dataset=digits_files[1],
            plan=planned.results["plans"][0],
        ).wait(**PATIENTLY)
        nested = load_nested(job.save("nested", tmp_path / "nested.safetensors"))
        assert {"W2", "W3", "W4", "W8", "plan"} == set(nested.plans)
        assert len(job.results["plans"]) == 5
        assert job.plan().weight_bits == nested.plans["plan"].weight_bits
        saved = load_trained(job.save("weights", tmp_path / "trained.safetensors"))
        for name, weight in nested.weights("plan").items():
            assert torch.equal(weight.codes, saved.weights[name].codes)

    @pytest.mark.parametrize(
        ("request_", "text"),
        [
            ({"method": "magic"}, "method must be one of lsq, tqt, direct"),
            ({"activation_fit": "magic"}, "activation_fit must be one of mse, joint, chan, irls"),
            ({"widths": [2, 9]}, r"widths must be from 2 to 8; got \[2, 9\]"),
            ({"widths": [2, 4], "method": "tqt"}, "widths train nested codes with learned steps"),
        ],
    )
    def test_refuses_names_that_are_not_known(self, client, planned, digits_files, request_, text):
        """At once, not in the sandbox."""
        with pytest.raises(InvalidInput, match=text):
            client.order(
                "finetune",
                request_,
                model=planned.body["model"],
                dataset=digits_files[1],
                plan=planned.results["plans"][0],
            )


class TestLearn:
    def test_keeps_its_budget(self, client, planned, digits_files):
        """From a solved plan, with a limit on inputs besides."""
        job = client.order(
            "learn",
            {"epochs": 1, "budgets": ["3 bits", "act total 4 KiB"], "batch_size": 64},
            model=planned.body["model"],
            dataset=digits_files[1],
            plan=planned.results["plans"][0],
        ).wait(**PATIENTLY)
        plan = job.plan()
        assert isinstance(plan, Plan)
        assert plan.average_bits <= 3
        assert sum(a.candidate.activation_size_bits for a in plan.assignments) <= 4 * 1024 * 8
        assert job.result("training")["learning"]["steps"] > 0


@pytest.mark.slow
class TestKill:
    def test_goes_on_from_the_last_checkpoint(self, tmp_path, digits_files):
        """The driver is killed while bits are learned, the evaluator while weights are trained.

        Nothing but the steps since a checkpoint is done again, and the bytes are those of a job
        that nobody disturbed.
        """
        order = {"budgets": ["3 bits"], "epochs": 3, "batch_size": 16, "patience": 3}
        per_epoch = int(0.9 * 1500) // 16
        with (
            LiveServer(tmp_path / "data", heartbeat_s=0.05, lease_s=60) as server,
            server.client() as client,
        ):
            job = client.order("learn", order, model=digits_files[0], dataset=digits_files[1])
            folder = server.data_dir / "checkpoints" / job.id
            for victim, name in (("driver", "learn"), ("evaluator", "finetune")):
                wait_for((folder / f"{name}.safetensors").exists, name)
                os.kill(server.working(victim), signal.SIGKILL)
                attempt = 2 if victim == "driver" else 3
                wait_for(lambda n=attempt: has_attempt(job, n), "the next attempt")
            job.wait(**PATIENTLY)
            assert job.body["attempts"] == 3
            assert not folder.exists()
            story = [e.data for e in job.events()]
            twin = client.order(
                "learn", order, model=digits_files[0], dataset=digits_files[1]
            ).wait(**PATIENTLY)
        assert job.results["weights"] == twin.results["weights"]
        assert job.results["plans"] == twin.results["plans"]
        starts = [k for k, event in enumerate(story) if event.get("status") == "running"]
        assert len(starts) == 3
        for begin, stage in ((starts[1], "learn"), (starts[2], "finetune")):
            later = [e["done"] for e in story[begin:] if e.get("stage") == stage]
            assert min(later) > per_epoch


def has_attempt(job, number):
    reached = job.refresh().body["attempts"] >= number
    assert reached or not job.ended, job.body
    return reached


class TestNames:
    def test_are_those_of_the_training_package(self):
        """They are written twice, because who only checks an order must not load torch."""
        assert tuple(learn.RECIPES) == RECIPES
        assert weight_quantizers.METHODS == TRAINING_METHODS


class TestCheckWeights:
    def test_refuses_other_files(self, tmp_path):
        """A safetensors file without our description, and no safetensors file at all."""
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
        with pytest.raises(KeyError):
            training_request.check_weights(tmp_path / "other.safetensors")
        (tmp_path / "text.safetensors").write_text("nothing")
        with pytest.raises(InvalidInput, match="must be a safetensors file"):
            training_request.check_weights(tmp_path / "text.safetensors")

"""A job on a real Ray cluster of two nodes, one of which dies in the middle."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import pytest

from bitquota.errors import Cancelled, InvalidInput
from bitquota.request import PlanRequest
from bitquota.service.settings import Settings
from bitquota.service.worker.engines.ray_cluster import connect
from live_cluster import LiveCluster, evaluators
from live_server import LiveServer, npz
from onnx_graphs import endless_graph
from waiting import PATIENTLY, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]
REQUEST = PlanRequest(
    budgets=("3 bits",), weight_bits=(2, 3, 4, 6), samples=768, holdout_samples=128,
    measure="pairs", refine=False,
)  # fmt: skip
TRIES = 5


@pytest.fixture(scope="module")
def cluster():
    with LiveCluster() as found:
        found.start_head()
        yield found


def events(log, name):
    """What a server and its drivers logged under a name."""
    whole = log.read_text().rpartition("\n")[0]
    lines = [json.loads(line) for line in whole.splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == name]


def submit(client, digits_files, seed):
    model, calibration = digits_files
    return client.submit(model=model, calibration=calibration, request=replace(REQUEST, seed=seed))


def ended(job):
    return job.refresh().status not in {"queued", "running"}


class TestRayEngine:
    def test_node_dies_in_the_middle(self, tmp_path, cluster, digits_files):
        """Both nodes have measured; the plan is that of the local engine, byte for byte."""
        settings = {
            "engine": "ray", "workers": 2, "ray_address": cluster.address,
            "ray_token_file": cluster.token, "ray_scratch": cluster.folder / "nodes",
            "heartbeat_s": 0.1, "lease_s": 5, "log_level": "DEBUG",
        }  # fmt: skip
        with LiveServer(tmp_path / "ray", **settings) as server, server.client() as client:

            def places(job):
                lines = events(server.log, "task done")
                return {line["place"] for line in lines if line["job"] == job.id}

            # Whether the node has work in hand when it dies is up to the machine: on a busy one
            # the other node may be through before, or the job about to end. Then the next try.
            for seed in range(TRIES):
                node = cluster.add_node()
                job = submit(client, digits_files, seed)
                wait_for(lambda job=job: len(places(job)) > 1 or ended(job), "both nodes")
                both = not ended(job)
                assert not both or evaluators(node.pid), "the node has evaluators"
                cluster.kill(node)
                found = job.wait(**PATIENTLY).plan_text()
                if both and events(server.log, "helper lost") + events(server.log, "driver ended"):
                    break
            else:
                pytest.fail(f"no node died with work in hand in {TRIES} tries")
        with LiveServer(tmp_path / "local") as server, server.client() as client:
            job = submit(client, digits_files, seed)
            assert job.wait(**PATIENTLY).plan_text() == found


class TestCancel:
    def test_evaluator_inside_a_model_that_never_ends(self, tmp_path, cluster):
        (tmp_path / "data.npz").write_bytes(npz(16))
        files = endless_graph(tmp_path / "endless.onnx"), tmp_path / "data.npz"
        settings = {
            "engine": "ray", "ray_address": cluster.address, "ray_token_file": cluster.token,
            "ray_scratch": cluster.folder / "nodes",
        }  # fmt: skip
        request = PlanRequest(budgets=("4 bits",), samples=8, holdout_samples=8)
        with LiveServer(tmp_path / "ray", **settings) as server, server.client() as client:
            job = client.submit(model=files[0], calibration=files[1], request=request)
            wait_for(lambda: job.refresh().progress and job.progress.stage == "load", "the model")
            job.cancel()
            with pytest.raises(Cancelled):
                job.wait(**PATIENTLY)
            nodes = [node.pid for node in cluster.nodes]
            wait_for(lambda: not any(evaluators(pid) for pid in nodes), "the end of the evaluator")


class TestConnect:
    def test_needs_a_token(self, monkeypatch):
        monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
        monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
        with pytest.raises(InvalidInput, match="BITQUOTA_RAY_TOKEN_FILE"):
            connect(Settings())

    def test_needs_the_token_file(self, tmp_path):
        with pytest.raises(InvalidInput, match="must exist"):
            connect(Settings(ray_token_file=str(tmp_path / "none")))

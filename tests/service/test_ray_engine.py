"""A job on a real Ray cluster of two nodes, one of which dies in the middle."""

from __future__ import annotations

import importlib.util
import json
import time

import pytest

from bitquota.errors import InvalidInput
from bitquota.request import PlanRequest
from bitquota.service.engines.ray_cluster import connect
from bitquota.service.settings import Settings
from live_cluster import LiveCluster, evaluators
from live_server import LiveServer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]
REQUEST = PlanRequest(
    budgets=("3 bits",), weight_bits=(2, 3, 4, 6), samples=768, holdout_samples=128,
    measure="pairs", refine=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def cluster():
    with LiveCluster() as found:
        found.start_head()
        yield found


def events(log, name):
    """What a server and its drivers logged under a name."""
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return [line for line in lines if line["event"] == name]


def plan_of(server, digits_files, during=lambda _job: None):
    model, calibration = digits_files
    with server.client() as client:
        job = client.submit(model=model, calibration=calibration, request=REQUEST)
        during(job)
        job.wait(timeout_s=200)
        return job, job.plan_text()


def wait_for(condition, what, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited in vain for {what}"
        time.sleep(0.05)


class TestRayEngine:
    def test_node_dies_in_the_middle(self, tmp_path, cluster, digits_files):
        """The plan equals the local engine's, byte for byte; both nodes had measured."""
        with LiveServer(tmp_path / "local", nice=0) as server:
            _, expected = plan_of(server, digits_files)
        node = cluster.add_node()
        settings = {
            "engine": "ray", "workers": 2, "ray_address": cluster.address, "nice": 0,
            "ray_token_file": cluster.token, "ray_scratch": cluster.folder / "nodes",
            "heartbeat_s": 0.1, "lease_s": 5,
        }  # fmt: skip
        data = tmp_path / "ray"

        def kill_when_both_work(job):
            def both_measured():
                return len(evaluators(node.pid)) > 1 and job.refresh().body["measured"] > 3

            wait_for(both_measured, "measurements on both nodes")
            cluster.kill(node)

        with LiveServer(data, **settings) as server:
            job, found = plan_of(server, digits_files, kill_when_both_work)
            log = server.log
        assert expected == found
        assert job.status == "succeeded"
        lost = events(log, "helper lost") + events(log, "job started")[1:]
        assert lost, "nobody noticed the death of a node"
        places = {place for line in events(log, "measured") for place in line["shares"]}
        assert places


class TestConnect:
    def test_needs_a_token(self, monkeypatch):
        monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
        monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
        with pytest.raises(InvalidInput, match="BITQUOTA_RAY_TOKEN_FILE"):
            connect(Settings())

    def test_needs_the_token_file(self, tmp_path):
        with pytest.raises(InvalidInput, match="must exist"):
            connect(Settings(ray_token_file=str(tmp_path / "none")))

"""Whatever a client sends, the answer is its own error, never the server's."""

from __future__ import annotations

import time

import httpx
import pytest

from bitquota.service.security.keys import KeyStore
from bitquota.service.settings import Settings
from bitquota.service.store.database import Database
from live_server import LiveServer, folder_zip, npz
from route_fuzzer import DIGEST, HostileRequest, RouteFuzzer, send
from seeded_jobs import inventory_of, matrix_of, seed_model
from waiting import PATIENCE_S

CASES = 60
SEEDS = range(8)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    """A server with a job that has ended and uploads, and a key."""
    data_dir = tmp_path_factory.mktemp("fuzzed") / "data"
    data_dir.mkdir()
    database = Database(Settings(data_dir=data_dir).url)
    database.create()
    _, key = KeyStore(database, time.time).create("ann")
    database.close()
    job = seed_model(data_dir, 6, tenant="ann")
    with LiveServer(data_dir, slots=0) as server:
        http = httpx.Client(
            base_url=server.url, headers={"Authorization": f"Bearer {key}"}, timeout=PATIENCE_S
        )
        with http:
            dataset = http.put("/v1/datasets", content=npz()).json()["id"]
            model = http.put("/v1/models", content=folder_zip()).json()["id"]
            matrix = http.put("/v1/matrices", content=matrix_of(inventory_of(6)).to_bytes())
            document = http.get("/v1/openapi.json").json()
        known = {"job_id": [job], "dataset": [dataset], "model": [model]}
        known |= {"matrix": [matrix.json()["id"]], "digest": [dataset, model, DIGEST]}
        yield server, key, document, known


@pytest.mark.parametrize("seed", SEEDS)
def test_no_request_is_the_servers_failure(fuzzed, seed):
    server, key, document, known = fuzzed
    port = int(server.url.rpartition(":")[2])
    for request in RouteFuzzer(document, seed, known).requests(CASES):
        reply = send(port, request, key)
        assert reply.status < 500, (request, reply)
        if reply.status >= 400 and reply.media_type == "application/json":
            assert b'"detail"' in reply.body, (request, reply)
    assert httpx.get(server.url + "/readyz").status_code == 200
    assert '"level": "error"' not in server.log.read_text(), server.log.read_text()[-3000:]


@pytest.mark.parametrize(
    ("target", "headers"),
    [
        (b"/v1/jobs/%(job)s/events", (("Last-Event-ID", b"9223372036854775808"),)),
        (b"/v1/jobs/%(job)s/live?after=9223372036854775808", ()),
        (b"/v1/jobs?cursor=a%%00b", ()),
        (b"/v1/models?cursor=%%ff%%fe", ()),
        (b"/v1/jobs?label=a%%00=b", ()),
        (b"/v1/jobs/%(job)s/plan?budget=" + b"9" * 5000, ()),
    ],
)
def test_known_failures(fuzzed, target, headers):
    server, key, _, known = fuzzed
    filled = target % {b"job": known["job_id"][0].encode()}
    port = int(server.url.rpartition(":")[2])
    reply = send(port, HostileRequest(method="GET", target=filled, headers=headers), key)
    assert 400 <= reply.status < 500, reply

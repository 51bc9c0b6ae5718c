from __future__ import annotations

import asyncio
import hashlib
import threading
import zipfile

import pytest

from bitquota import errors
from bitquota.client import AsyncClient, Client, Job, error_of
from bitquota.client.sources import source_of
from bitquota.request import PlanRequest
from live_server import LiveServer, folder_zip, npz, safetensors
from waiting import PATIENTLY

REQUEST = PlanRequest(budgets=("3 bits",))


def tree(kind):
    yield kind
    for below in kind.__subclasses__():
        yield from tree(below)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """A server that starts no jobs."""
    with LiveServer(tmp_path_factory.mktemp("client") / "data", slots=0) as running:
        yield running


@pytest.fixture
def files(tmp_path):
    (tmp_path / "model.zip").write_bytes(folder_zip())
    (tmp_path / "calibration.npz").write_bytes(npz())
    return {"model": tmp_path / "model.zip", "calibration": tmp_path / "calibration.npz"}


@pytest.fixture
def client(quiet):
    with quiet.client() as made:
        yield made


class TestErrorOf:
    @pytest.mark.parametrize(
        "kind", [k for k in tree(errors.BitquotaError) if k.__module__ == "bitquota.errors"],
        ids=lambda kind: kind.slug,
    )  # fmt: skip
    def test_every_error_of_the_tree_comes_back_as_itself(self, kind):
        body = {
            "type": f"urn:bitquota:problem:{kind.slug}",
            "detail": "what, got, do",
            "details": {"limit": 3, "message": "not this"},
        }
        error = error_of(body)
        assert type(error) is kind
        assert (error.message, error.details) == ("what, got, do", {"limit": 3})

    @pytest.mark.parametrize("body", [None, [], "x", {}, {"type": "urn:other"}, {"details": 3}])
    def test_anything_else_is_a_service_error(self, body):
        assert type(error_of(body, status=502)) is errors.ServiceError


class TestPage:
    def test_is_below_the_address_of_the_server(self):
        """No server is asked."""
        with Client("http://127.0.0.1:9/") as client:
            job = Job(client, {"id": "job_1", "status": "queued"})
        assert job.page == "http://127.0.0.1:9/jobs/job_1"


class TestSubmit:
    def test_uploads_once(self, quiet, client, files):
        job = client.submit(**files, request=REQUEST)
        digest = "sha256:" + hashlib.sha256(files["model"].read_bytes()).hexdigest()
        assert job.body["model"] == digest
        again = client.submit(model=digest, calibration=job.body["dataset"], request=REQUEST)
        assert again.id != job.id

    def test_same_key_is_the_same_job(self, client, files):
        first = client.submit(**files, request=REQUEST, idempotency_key="one")
        assert client.submit(**files, request=REQUEST, idempotency_key="one").id == first.id

    def test_error_of_the_server_is_raised_as_itself(self, client, files):
        with pytest.raises(errors.InvalidBudget, match="3 apples"):
            client.submit(**files, request=PlanRequest(budgets=("3 apples",)))

    def test_pickle_is_an_unsafe_model(self, client, files, tmp_path):
        (tmp_path / "model.pkl").write_bytes(b"\x80\x04N.")
        with pytest.raises(errors.UnsafeModel, match="pickle"):
            client.submit(**files | {"model": tmp_path / "model.pkl"}, request=REQUEST)

    def test_other_folder(self, client, files, tmp_path):
        with pytest.raises(errors.InvalidInput, match="must be a file or a Hugging Face folder"):
            client.submit(**files | {"model": tmp_path}, request=REQUEST)

    def test_hugging_face_folder(self, client, files, tmp_path):
        """As an archive without files that hold code; the same folder is the same upload."""
        folder = tmp_path / "net"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes(
            safetensors({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8))
        )
        (folder / "modeling_net.py").write_text("raise SystemExit")
        jobs = [client.submit(**files | {"model": folder}, request=REQUEST) for _ in range(2)]
        assert jobs[0].body["model"] == jobs[1].body["model"]
        with zipfile.ZipFile(source_of(folder, tmp_path).path) as archive:
            assert archive.namelist() == ["config.json", "model.safetensors"]


class TestWait:
    def test_too_short(self, client, files):
        job = client.submit(**files, request=REQUEST)
        with pytest.raises(errors.ServiceTimeout, match="queued"):
            job.wait(timeout_s=0.1, poll_s=0.05)

    def test_cancelled(self, client, files):
        job = client.submit(**files, request=REQUEST).cancel()
        with pytest.raises(errors.Cancelled):
            job.wait(**PATIENTLY)

    def test_plan_before_the_end(self, client, files):
        with pytest.raises(errors.Conflict):
            client.submit(**files, request=REQUEST).plan()

    def test_outlives_a_restart_of_the_server(self, tmp_path, files):
        """The port is kept, as it is for a real server."""
        server = LiveServer(tmp_path / "data", slots=0).start()
        port = int(server.url.rpartition(":")[2])
        with server.client(retry_s=120) as client:
            job = client.submit(**files, request=REQUEST)
            server.kill()
            server.port = port

            def revive():
                server.start()
                with server.client() as other:
                    other.job(job.id).cancel()

            back = threading.Timer(0.5, revive)
            back.start()
            with pytest.raises(errors.Cancelled):
                job.wait(**PATIENTLY)
            back.join()
        server.stop()


class TestEvents:
    def test_of_a_job_that_is_cancelled_meanwhile(self, client, files):
        job = client.submit(**files, request=REQUEST)
        threading.Timer(0.5, lambda: client.job(job.id).cancel()).start()
        told = [event.data["status"] for event in job.events() if event.kind == "status"]
        assert told == ["queued", "cancelled"]

    def test_after_a_number(self, client, files):
        job = client.submit(**files, request=REQUEST).cancel()
        assert [event.number for event in job.events(after=1)] == [2]


class TestClient:
    def test_server_that_is_not_there(self):
        with (
            Client("http://127.0.0.1:9", retry_s=0.2) as client,
            pytest.raises(errors.ServiceError, match="reachable"),
        ):
            client.job("job_" + "0" * 32)

    @pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x"])
    def test_what_is_no_url(self, url):
        with pytest.raises(errors.InvalidInput, match="http://"), Client(url) as client:
            client.job("job_" + "0" * 32)

    def test_unknown_job(self, client):
        with pytest.raises(errors.NotFound):
            client.job("job_" + "0" * 32)

    def test_jobs_newest_first(self, client, files):
        made = [client.submit(**files, request=REQUEST).id for _ in range(3)]
        found = [job.id for job in client.jobs()]
        assert found[:3] == made[::-1]


class TestAsyncClient:
    def test_many_at_once(self, quiet, files):
        async def go():
            async with AsyncClient(quiet.url) as client:
                jobs = await asyncio.gather(
                    *(client.submit(**files, request=REQUEST) for _ in range(5))
                )
                await asyncio.gather(*(job.cancel() for job in jobs))
                ends = await asyncio.gather(
                    *(job.wait(**PATIENTLY) for job in jobs), return_exceptions=True
                )
            return {type(end) for end in ends}

        assert asyncio.run(go()) == {errors.Cancelled}

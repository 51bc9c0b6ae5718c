"""Both clients over servers that are busy, that break off, and that are honest."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import inspect
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bitquota import errors
from bitquota.client import AsyncClient, Client
from bitquota.client.effects import Call
from bitquota.client.job_calls import JobCalls
from bitquota.client.server_calls import ServerCalls
from bitquota.request import PlanRequest
from live_server import LiveServer, folder_zip, npz

REQUEST = PlanRequest(budgets=("3 bits",))


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """A server that starts no jobs."""
    with LiveServer(tmp_path_factory.mktemp("transports") / "data", slots=0) as running:
        yield running


def blocking(url, call, **options):
    with Client(url, **options) as client:
        return call(client)


def awaited(url, call, **options):
    async def go():
        async with AsyncClient(url, **options) as client:
            found = call(client)
            return await found if inspect.isawaitable(found) else found

    return asyncio.run(go())


@pytest.fixture(params=[blocking, awaited], ids=["Client", "AsyncClient"])
def run(request):
    """Run one call on a client of either kind."""
    return request.param


class Busy:
    """A server that says a number of times that it is busy, and how long, before it answers."""

    def __init__(self, status, refusals, retry_after):
        self.asked = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.asked += 1
                refused = outer.asked <= refusals
                slug = "quota-exceeded" if status == 429 else "service-error"
                problem = {"type": f"urn:bitquota:problem:{slug}", "detail": "busy"}
                body = json.dumps(problem if refused else {"id": "job_1", "status": "queued"})
                self.send_response(status if refused else 200)
                if refused:
                    self.send_header("Retry-After", retry_after)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.thread = threading.Thread(target=self.http.serve_forever)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


class TestRetries:
    @pytest.mark.parametrize("status", [429, 503])
    def test_busy_server_is_asked_again(self, run, status):
        with Busy(status, refusals=2, retry_after="0") as server:
            job = run(server.url, lambda client: client.job("job_1"))
            assert (job.id, server.asked) == ("job_1", 3)

    def test_wait_beyond_the_patience_is_the_error_at_once(self, run):
        with Busy(429, refusals=9, retry_after="3600") as server:
            with pytest.raises(errors.QuotaExceeded, match="busy"):
                run(server.url, lambda client: client.job("job_1"), retry_s=30)
            assert server.asked == 1

    def test_server_that_is_not_there(self, run):
        with pytest.raises(errors.ServiceError, match="reachable"):
            run("http://127.0.0.1:9", lambda client: client.job("job_1"), retry_s=0.2)

    @pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://x"])
    def test_what_is_no_url(self, run, url):
        with pytest.raises(errors.InvalidInput, match="http://"):
            run(url, lambda client: client.job("job_1"))


class Cutting:
    """A proxy that hangs up on the first upload after some of its bytes."""

    def __init__(self, port, after):
        self.target, self.after, self.cut = port, after, False
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                ours, _ = self.listening.accept()
            except OSError:
                return
            threading.Thread(target=self.join, args=(ours,), daemon=True).start()

    def join(self, ours):
        with ours, socket.create_connection(("127.0.0.1", self.target)) as theirs:
            up = threading.Thread(target=self.copy, args=(ours, theirs, True))
            up.start()
            self.copy(theirs, ours, upwards=False)
            up.join()

    def copy(self, source, target, upwards):
        seen = 0
        uploading = False
        try:
            while data := source.recv(65536):
                uploading |= upwards and data.startswith(b"PUT ")
                seen += len(data) if uploading else 0
                target.sendall(data)
                if not self.cut and seen > self.after:
                    self.cut = True
                    break
        except OSError:
            pass
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self):
        self.listening.close()


class TestUpload:
    def test_broken_one_goes_on_where_the_server_has_it(self, run, quiet, tmp_path):
        data = npz(500_000 + (run is awaited))
        (tmp_path / "large.npz").write_bytes(data)
        proxy = Cutting(int(quiet.url.rpartition(":")[2]), after=5_000_000)
        digest = run(proxy.url, lambda c: c.upload("dataset", tmp_path / "large.npz"))
        proxy.close()
        assert proxy.cut
        assert digest == "sha256:" + hashlib.sha256(data).hexdigest()
        assert run(quiet.url, lambda c: c.download("dataset", digest)) == data

    def test_bytes_from_memory(self, run, quiet):
        data = npz(5)
        digest = run(quiet.url, lambda c: c.upload("dataset", data))
        assert digest == "sha256:" + hashlib.sha256(data).hexdigest()

    def test_kind_that_is_none(self, run, quiet):
        with pytest.raises(errors.InvalidInput, match="must be a model, dataset"):
            run(quiet.url, lambda c: c.upload("dance", b""))


class TestOrder:
    def test_input_that_is_none(self, run, quiet):
        with pytest.raises(errors.InvalidInput, match="inputs of a job"):
            run(quiet.url, lambda c: c.order("plan", REQUEST, melody=b""))

    def test_error_of_the_server_is_raised_as_itself(self, run, quiet):
        with pytest.raises(errors.NotFound):
            run(quiet.url, lambda c: c.job("job_" + "0" * 32))


class TestWaitByEvents:
    def test_ends_with_the_job(self, quiet):
        with quiet.client() as client:
            job = client.submit(model=folder_zip(), calibration=npz(), request=REQUEST)
            cancel = threading.Timer(0.3, lambda: client.job(job.id).cancel())
            cancel.start()
            with pytest.raises(errors.Cancelled):
                job.wait(by_events=True)
            cancel.join()

    def test_ends_with_the_job_when_awaited(self, quiet):
        async def go():
            async with AsyncClient(quiet.url) as client:
                job = await client.submit(model=folder_zip(), calibration=npz(), request=REQUEST)
                waiting = asyncio.create_task(job.wait(by_events=True))
                await asyncio.sleep(0.3)
                await (await client.job(job.id)).cancel()
                with pytest.raises(errors.Cancelled):
                    await waiting
                told = [e.data["status"] async for e in job.events() if e.kind == "status"]
                listed = [j.id async for j in client.jobs(status="cancelled")]
            return told, job.id in listed

        assert asyncio.run(go()) == (["queued", "cancelled"], True)

    def test_takes_no_time_limit(self, quiet):
        with quiet.client() as client:
            job = client.submit(model=folder_zip(), calibration=npz(), request=REQUEST)
            with pytest.raises(errors.InvalidInput, match="no time limit"):
                job.wait(by_events=True, timeout_s=1)


class TestSave:
    def test_problem_leaves_no_file(self, run, quiet, tmp_path):
        with quiet.client() as client:
            job = client.submit(model=folder_zip(), calibration=npz(), request=REQUEST)

        def save(client):
            if run is blocking:
                return client.job(job.id).save("sensitivity", tmp_path / "m.npz")

            async def go():
                return await (await client.job(job.id)).save("sensitivity", tmp_path / "m.npz")

            return go()

        with pytest.raises(errors.Conflict):
            run(quiet.url, save)
        assert not (tmp_path / "m.npz").exists()


class TestCalls:
    @pytest.mark.parametrize("kind", [ServerCalls, JobCalls])
    def test_each_says_what_it_does(self, kind):
        calls = [value for value in vars(kind).values() if isinstance(value, Call)]
        assert len(calls) > 5
        assert all(call.__doc__ for call in calls)

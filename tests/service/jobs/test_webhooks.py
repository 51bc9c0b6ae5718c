from __future__ import annotations

import asyncio
import contextlib
import http.server
import json
import shutil
import socket
import threading

import pytest
from standardwebhooks import Webhook

from bitquota.errors import InvalidInput
from bitquota.service.jobs.job import NewJob
from bitquota.service.jobs.job_store import JobStore
from bitquota.service.jobs.webhooks import Webhooks
from bitquota.service.settings import Settings
from bitquota.service.store.database import Database, deliveries
from waiting import wait_for

NOW = 1_800_000_000.0


@pytest.fixture
def receiver():
    """A server that notes what it gets and answers what it is told to."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):  # the library's name
            body = self.rfile.read(int(self.headers["content-length"]))
            self.server.got.append((dict(self.headers.items()), body.decode()))
            status = self.server.answers.pop(0) if self.server.answers else 200
            self.send_response(status)
            if status == 302:
                self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/other")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.got, server.answers = [], []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def database(tmp_path, migrated):
    shutil.copy(migrated, tmp_path / "hooks.db")
    opened = Database(f"sqlite:///{tmp_path}/hooks.db")
    yield opened
    opened.close()


class Stalling:
    """A receiver that says something again and again, and never enough; it counts who came."""

    def __init__(self, said: bytes, pause_s: float) -> None:
        self._said, self._pause_s = said, pause_s
        self._over = threading.Event()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.server_port = self._listening.getsockname()[1]
        self.came = 0
        self._thread = threading.Thread(target=self._accept)
        self._threads = []

    def _accept(self):
        while not self._over.is_set():
            connection, _ = self._listening.accept()
            self.came += 1
            self._threads.append(threading.Thread(target=self._answer, args=(connection,)))
            self._threads[-1].start()

    def _answer(self, connection):
        with connection, contextlib.suppress(OSError):
            connection.recv(4096)
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            while not self._over.wait(self._pause_s):
                connection.sendall(self._said)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        socket.create_connection(("127.0.0.1", self.server_port)).close()
        for thread in (self._thread, *self._threads):
            thread.join()
        self._listening.close()


class World:
    """A tenant with a secret and a job that has ended."""

    def __init__(self, database, receiver, **settings):
        self.now = NOW
        self.database = database
        values = {"webhook_allow_private": True, "webhook_attempts": 3, "webhook_retry_s": 5}
        self.hooks = Webhooks(Settings(**values | settings), database, lambda: self.now)
        self.secret = self.hooks.new_secret("ann")
        self.hooks.new_secret("bob")
        self.jobs = JobStore(database, lambda: self.now)
        self.url = f"http://127.0.0.1:{receiver.server_port}/hook"

    def end_a_job(self, tenant="ann", url=None):
        new = NewJob(tenant=tenant, kind="plan", request={}, labels={}, webhook=url or self.url)
        job, _ = self.jobs.create(new)
        self.jobs.cancel(tenant, job.id)
        return job

    def deliver_due(self):
        count = 0
        while (row := self.hooks.claim()) is not None:
            asyncio.run(self.hooks.deliver(row))
            count += 1
        return count

    def row(self):
        with self.database.engine.connect() as connection:
            return connection.execute(deliveries.select()).one()

    def rows(self, tenant):
        with self.database.engine.connect() as connection:
            query = deliveries.select().where(deliveries.c.tenant == tenant)
            return connection.execute(query).all()


@pytest.fixture
def world(database, receiver):
    return World(database, receiver)


class TestDeliver:
    def test_says_how_the_job_ended_under_the_tenants_signature(self, world, receiver, monkeypatch):
        job = world.end_a_job()
        assert world.deliver_due() == 1
        headers, body = receiver.got[0]
        assert json.loads(body)["data"]["id"] == job.id
        assert json.loads(body)["type"] == "job.cancelled"
        lower = {name.lower(): value for name, value in headers.items()}
        # The library refuses old time stamps; the test's clock stands in 2027.
        monkeypatch.setattr(Webhook, "_Webhook__verify_timestamp", lambda _self, _t: from_clock())
        assert Webhook(world.secret).verify(body, lower)["type"] == "job.cancelled"
        with pytest.raises(Exception, match="signature"):
            Webhook(world.secret).verify(body + " ", lower)

    def test_failure_is_tried_again_later_and_not_before(self, world, receiver):
        world.end_a_job()
        receiver.answers = [500]
        world.deliver_due()
        assert world.deliver_due() == 0
        world.now += 5
        assert world.deliver_due() == 1
        assert world.row().delivered_at == world.now
        first, second = (headers["webhook-id"] for headers, _ in receiver.got)
        assert first == second

    def test_gives_up_after_the_last_attempt(self, world, receiver):
        world.end_a_job()
        receiver.answers = [500] * 9
        for _ in range(9):
            world.deliver_due()
            world.now += 3600
        assert len(receiver.got) == 3
        assert world.row().error == "answered 500"

    def test_redirects_are_not_followed(self, world, receiver):
        world.end_a_job()
        receiver.answers = [302]
        world.deliver_due()
        assert len(receiver.got) == 1
        assert world.row().error == "answered 302"

    def test_one_that_dies_while_sending_leaves_it_to_another(self, world):
        world.end_a_job()
        assert world.hooks.claim() is not None
        assert world.hooks.claim() is None
        world.now += 75
        assert world.hooks.claim() is not None

    def test_private_address_is_refused_at_delivery_too(self, database, receiver):
        """A name may have pointed elsewhere when the job was ordered."""
        world = World(database, receiver)
        world.end_a_job()
        strict = Webhooks(Settings(), database, lambda: NOW)
        asyncio.run(strict.deliver(strict.claim()))
        assert receiver.got == []
        assert "public address" in world.row().error


class TestDeadline:
    @pytest.mark.parametrize("said", [b"", b"x-more: y\r\n"], ids=["silent", "dripping"])
    def test_is_for_all_of_a_delivery(self, database, said):
        """However often the receiver says a little."""
        with Stalling(said, 0.05) as receiver:
            world = World(database, receiver, webhook_deadline_s=0.5)
            world.end_a_job()
            assert world.deliver_due() == 1
        assert world.row().error == "did not answer within 0.5 s"

    def test_headers_without_end_are_cut_off(self, database):
        with Stalling(b"x: " + b"y" * 2**16 + b"\r\n", 0.001) as receiver:
            world = World(database, receiver, webhook_deadline_s=60)
            world.end_a_job()
            assert world.deliver_due() == 1
        assert "ProtocolError" in world.row().error

    def test_covers_the_search_for_the_name(self, database, receiver, monkeypatch):
        """A name server that does not answer cannot be had here; the search waits instead."""
        answered = threading.Event()
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answered.wait() and [])
        world = World(database, receiver, webhook_deadline_s=0.1)
        world.end_a_job(url="https://example.org/")
        thread = threading.Thread(target=world.deliver_due)
        thread.start()
        wait_for(lambda: world.row().error == "did not answer within 0.1 s", "the end")
        assert thread.is_alive()  # it counts as under way until the search has ended
        answered.set()
        thread.join()


class TestTurns:
    def test_of_tenants_with_the_fewest_under_way(self, world):
        for tenant in ("ann", "ann", "ann", "bob", "bob"):
            world.end_a_job(tenant)
            world.now += 1
        assert [row["tenant"] for row in claim_all(world.hooks)] == [
            "ann", "bob", "ann", "bob", "ann",
        ]  # fmt: skip

    def test_one_tenant_has_only_so_many(self, database, receiver):
        world = World(database, receiver, webhook_in_flight=2)
        for _ in range(5):
            world.end_a_job("ann")
        world.end_a_job("bob")
        under_way = claim_all(world.hooks)
        assert sorted(row["tenant"] for row in under_way) == ["ann", "ann", "bob"]

    def test_one_host_has_only_so_many(self, database, receiver):
        world = World(database, receiver, webhook_in_flight=1)
        for tenant in ("ann", "bob", "eve"):
            world.end_a_job(tenant, "https://slow.example/")
        world.end_a_job("eve", "https://other.example/")
        hosts = sorted(row["host"] for row in claim_all(world.hooks))
        assert hosts == ["other.example", "slow.example", "slow.example"]

    def test_who_never_answers_delays_nobody_else(self, database, receiver):
        """The other tenant's arrives although none of the first one's has ended."""
        with Stalling(b"x: y\r\n", 0.05) as stalling:
            world = World(database, receiver, webhook_deadline_s=600)
            for _ in range(50):
                world.end_a_job("ann", f"http://127.0.0.1:{stalling.server_port}/")
            # At the same address only the port differs: the limit of a host is not reached.
            world.hooks.start()
            wait_for(lambda: stalling.came == 4, "four deliveries")
            world.end_a_job("bob")
            wait_for(lambda: len(receiver.got) == 1, "the delivery")
            assert stalling.came == 4
            assert all(row.error is None for row in world.rows("ann"))
        world.hooks.stop()


def claim_all(hooks):
    """Return all that may be under way at once."""
    under_way = []
    while (row := hooks.claim(under_way)) is not None:
        under_way.append(row)
    return under_way


class TestCheck:
    def test_tenant_without_a_secret(self, database):
        with pytest.raises(InvalidInput, match="needs a secret"):
            Webhooks(Settings(), database, lambda: NOW).check("bob", "https://example.org/")


def from_clock():
    from datetime import UTC, datetime

    return datetime.fromtimestamp(NOW, UTC)

from __future__ import annotations

import http.server
import json
import shutil
import threading

import pytest
from standardwebhooks import Webhook

from bitquota.errors import InvalidInput
from bitquota.service.database import Database, deliveries
from bitquota.service.job import NewJob
from bitquota.service.jobs import JobStore
from bitquota.service.settings import Settings
from bitquota.service.webhooks import Webhooks, check_url, public_address

NOW = 1_800_000_000.0


class TestCheckUrl:
    @pytest.mark.parametrize(
        "url",
        ["http://example.org/", "ftp://example.org/", "https://", "example.org", "https://u:p@e.org/",
         "https://127.0.0.1/", "https://10.0.0.1/", "https://169.254.169.254/latest", "https://[::1]/",
         "https://[::ffff:127.0.0.1]/", "https://[fe80::1]/", "https://0.0.0.0/", "https://224.0.0.1/",
         "https://[64:ff9b::7f00:1]/", "https://[2002:7f00:1::]/", "https://100.64.0.1/"],
    )  # fmt: skip
    def test_refused(self, url):
        with pytest.raises(InvalidInput, match="webhook"):
            check_url(url, allow_private=False)

    @pytest.mark.parametrize("url", ["https://example.org/x?y=1", "https://93.184.215.14:8443/"])
    def test_taken(self, url):
        check_url(url, allow_private=False)


class TestPublicAddress:
    @pytest.mark.parametrize("host", ["localhost", "127.1", "2130706433", "0x7f000001"])
    def test_every_way_to_write_this_machine(self, host):
        with pytest.raises(InvalidInput, match="public address|must be found"):
            public_address(host, 443, allow_private=False)

    def test_unknown_name(self):
        with pytest.raises(InvalidInput, match="must be found"):
            public_address("no-such-host.invalid", 443, allow_private=False)


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


class World:
    """A tenant with a secret and a job that has ended."""

    def __init__(self, database, receiver):
        self.now = NOW
        self.database = database
        settings = Settings(webhook_allow_private=True, webhook_attempts=3, webhook_retry_s=5)
        self.hooks = Webhooks(settings, database, lambda: self.now)
        self.secret = self.hooks.new_secret("ann")
        self.jobs = JobStore(database, lambda: self.now)
        self.url = f"http://127.0.0.1:{receiver.server_port}/hook"

    def end_a_job(self):
        new = NewJob(tenant="ann", kind="plan", request={}, labels={}, webhook=self.url)
        job, _ = self.jobs.create(new)
        self.jobs.cancel("ann", job.id)
        return job

    def deliver_due(self):
        count = 0
        while (row := self.hooks.claim()) is not None:
            self.hooks.deliver(row)
            count += 1
        return count

    def row(self):
        with self.database.engine.connect() as connection:
            return connection.execute(deliveries.select()).one()


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
        world.now += 60
        assert world.hooks.claim() is not None

    def test_private_address_is_refused_at_delivery_too(self, database, receiver):
        """A name may have pointed elsewhere when the job was ordered."""
        world = World(database, receiver)
        world.end_a_job()
        strict = Webhooks(Settings(), database, lambda: NOW)
        strict.deliver(strict.claim())
        assert receiver.got == []
        assert "public address" in world.row().error


class TestCheck:
    def test_tenant_without_a_secret(self, database):
        with pytest.raises(InvalidInput, match="needs a secret"):
            Webhooks(Settings(), database, lambda: NOW).check("bob", "https://example.org/")


def from_clock():
    from datetime import UTC, datetime

    return datetime.fromtimestamp(NOW, UTC)

"""Real servers, drivers and evaluators are killed; the plans must not notice."""

from __future__ import annotations

import os
import signal
import sqlite3

import pytest

from bitquota.errors import BudgetTooSmall, Cancelled
from bitquota.request import PlanRequest
from bitquota.service.settings import Settings
from bitquota.service.store.database import Database
from bitquota.service.store.migrate import downgrade
from bitquota.service.worker.maintenance import backup, verify
from live_server import LiveServer
from refusals import refused
from waiting import PATIENTLY, wait_for

pytestmark = pytest.mark.slow
BITS = (2, 4, 8)


def request(**changes):
    budgets = ("3 bits", "5 bits")
    values = {"budgets": budgets, "weight_bits": BITS, "samples": 256, "holdout_samples": 256}
    return PlanRequest(**values | {"measure": "pairs"} | changes)


@pytest.fixture(scope="module")
def finished(server, digits_files):
    """The job of ``request()`` on a server that nobody disturbs, and its progress while it ran."""
    with server.client() as client:
        seen = []
        yield submit(client, digits_files).wait(on_progress=seen.append, **PATIENTLY), seen


@pytest.fixture(scope="module")
def undisturbed(finished):
    """The plans that every disturbed job must make, too."""
    return plan_texts(finished[0])


def plan_texts(job):
    return [job.plan_text(k) for k in range(2)]


def ledger_size(server):
    path = server.data_dir / "ledgers" / "local" / "ledger.sqlite"
    if not path.exists():
        return 0
    connection = sqlite3.connect(path)
    try:
        return connection.execute("SELECT count(*) FROM entries").fetchone()[0]
    except sqlite3.OperationalError:
        return 0
    finally:
        connection.close()


def submit(client, digits_files, **changes):
    model, calibration = digits_files
    return client.submit(model=model, calibration=calibration, request=request(**changes))


class TestPlanJob:
    def test_two_budgets_give_two_plans_within_them(self, finished):
        job, seen = finished
        small, large = job.plans()
        assert small.average_bits <= 3
        assert large.average_bits <= 5
        assert seen
        assert "# " in job.report()
        assert job.plan(1) == large
        assert small.measured is not None
        assert job.sensitivity()[:2] == b"PK"

    def test_the_same_order_again_measures_nothing(self, server, digits_files, undisturbed):
        """And its events tell the story in order."""
        before = ledger_size(server)
        with server.client() as client:
            job = submit(client, digits_files)
            events = list(job.events())
            assert plan_texts(job.refresh()) == undisturbed
        assert ledger_size(server) == before
        assert job.body["measured"] == 0
        assert [e.number for e in events] == list(range(1, len(events) + 1))
        told = [e.data["status"] for e in events if e.kind == "status"]
        assert told == ["queued", "running", "succeeded"]

    def test_budget_below_the_minimum_is_one_sentence(self, server, digits_files):
        with server.client() as client:
            job = submit(client, digits_files, budgets=("1 bits",))
            with refused(BudgetTooSmall, budget="1 bits", limit=4168, smallest=8336):
                job.wait(**PATIENTLY)


class TestReserve:
    def test_driver_that_waits_takes_the_next_job(self, tmp_path, finished):
        """And another one waits afterwards."""
        matrix = finished[0].sensitivity()
        with LiveServer(tmp_path / "data", reserve=True) as server, server.client() as client:
            wait_for(lambda: server.working("driver"), "a driver in reserve")
            waiting = server.working("driver")
            digest = client.upload("matrix", matrix)
            job = client.order("solve", {"budget": "3 bits"}, matrix=digest).wait(**PATIENTLY)
            assert job.result("solution")["objective"] > 0
            assert f'"driver": {waiting}' in server.log.read_text()
            wait_for(lambda: server.working("driver") not in {None, waiting}, "the next one")


class TestKill:
    """The plans are the undisturbed ones, byte for byte."""

    def test_evaluator_and_driver(self, tmp_path, digits_files, undisturbed):
        """Each attempt goes on where the one before was killed, and the job ends once."""
        settings = {"heartbeat_s": 0.1, "lease_s": 60}
        with LiveServer(tmp_path / "data", **settings) as server, server.client() as client:
            job = submit(client, digits_files)
            for attempt, victim in enumerate(("evaluator", "driver"), 1):
                wait_for_measurements(server, job, attempt)
                kill_working(server, victim)
            job.wait(**PATIENTLY)
            assert plan_texts(job) == undisturbed
            assert job.body["attempts"] >= 3
            story = [e.data["status"] for e in job.events() if e.kind == "status"]
        assert story[-1] == "succeeded"
        assert story.count("succeeded") == 1

    def test_server(self, tmp_path, digits_files, undisturbed):
        """It takes its children along; the next one is stopped, and the third finishes the job."""
        server = LiveServer(tmp_path / "data", heartbeat_s=0.1, lease_s=60).start()
        with server.client() as client:
            job = submit(client, digits_files)
            wait_for_measurements(server, job, 1)
        pids = [pid for pid, _ in server.children()]
        assert pids
        server.kill()
        wait_for(lambda: not any(alive(pid) for pid in pids), "the children's end")
        with server, server.client() as client:
            wait_for_measurements(server, client.job(job.id), 2)
            assert server.stop() == 0
        with server, server.client() as client:
            job = client.job(job.id).wait(**PATIENTLY)
            assert plan_texts(job) == undisturbed
            assert job.body["attempts"] >= 2
            story = [e.data for e in job.events() if e.kind == "status"]
        assert {"status": "queued", "reason": "the server was stopped"} in story
        assert [event["status"] for event in story].count("succeeded") == 1


class TestRestore:
    def test_backup_and_downgrade_with_a_job_in_flight(self, tmp_path, digits_files, undisturbed):
        """A server that starts from it ends the job with the same plans, and measures less.

        The backup's database goes back by one form before, and forward as that server starts.
        """
        with LiveServer(tmp_path / "data", heartbeat_s=0.1) as server, server.client() as client:
            job = submit(client, digits_files)
            wait_for_measurements(server, job, 1)
            settings = Settings(data_dir=tmp_path / "data")
            backup(settings, tmp_path / "copy")
            server.kill()
        copy = Settings(data_dir=tmp_path / "copy")
        database = Database(copy.url)
        assert verify(copy, database) == []
        newer, older = database.write(downgrade)
        assert older < newer
        database.close()
        with LiveServer(tmp_path / "copy") as restored, restored.client() as client:
            assert ledger_size(restored) >= 3
            job = client.job(job.id).wait(**PATIENTLY)
            assert plan_texts(job) == undisturbed
            story = [e.data["status"] for e in job.events() if e.kind == "status"]
        assert story.count("succeeded") == 1


class TestCancel:
    def test_running_job_ends_and_keeps_its_measurements(self, server, digits_files):
        with server.client() as client:
            enough = ledger_size(server) + 3
            job = submit(client, digits_files, seed=11)
            wait_for(lambda: ledger_size(server) >= enough, "the first measurements")
            job.cancel()
            with pytest.raises(Cancelled):
                job.wait(**PATIENTLY)
            assert job.status == "cancelled"
        assert ledger_size(server) >= enough


def wait_for_measurements(server, job, attempt):
    """Return once this attempt of a job has measured something; it must not be over by then."""

    def attempts():
        body = job.refresh().body
        assert not job.ended, body
        return body["attempts"]

    wait_for(lambda: attempts() >= attempt, f"attempt {attempt}")
    enough = ledger_size(server) + 3
    wait_for(lambda: attempts() and ledger_size(server) >= enough, "measurements")


def kill_working(server, module):
    """Kill the process that works on a job, and not the one in reserve."""
    working = server.working(module)
    assert working, f"no working {module}: {server.children()}"
    os.kill(working, signal.SIGKILL)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True

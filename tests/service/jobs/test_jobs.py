from __future__ import annotations

import re
import shutil
import threading

import pytest
import sqlalchemy as sa

from bitquota.errors import Conflict, InvalidInput, MeasurementFailed, NotFound
from bitquota.service.jobs.job import JobStatus, KeptResult, LeaseLost, NewJob
from bitquota.service.jobs.job_store import JobStore
from bitquota.service.jobs.quotas import Quotas
from bitquota.service.settings import Settings
from bitquota.service.store.artifacts import ArtifactStore
from bitquota.service.store.database import Database, metadata
from bitquota.service.store.formats import ArtifactKind

MODEL, DATASET = "sha256:" + "a" * 64, "sha256:" + "b" * 64


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request, tmp_path):
    if request.param == "sqlite":
        shutil.copy(request.getfixturevalue("migrated"), tmp_path / "jobs.db")
        opened = Database(f"sqlite:///{tmp_path}/jobs.db")
    else:
        opened = Database(request.getfixturevalue("postgres_url"))
        opened.write(empty)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def postgres_url(postgres):
    url = postgres.new_database()
    made = Database(url)
    made.create()
    made.close()
    return url


def empty(connection):
    for table in metadata.sorted_tables:
        connection.execute(table.delete())


@pytest.fixture
def store(database, clock):
    artifacts = ArtifactStore(database, clock)
    for tenant in ("ann", "bob"):
        for kind, digest in ((ArtifactKind.MODEL, MODEL), (ArtifactKind.DATASET, DATASET)):
            artifacts.record(tenant, kind, digest, format_name="pt2", name="m", size=1)
    return JobStore(database, clock)


def order(tenant="ann", **changes):
    values = {"kind": "plan", "request": {"budgets": ["3 bits"]}, "labels": {}}
    values |= {"model": MODEL, "dataset": DATASET}
    return NewJob(tenant=tenant, **values | changes)


def beat(store, job, **changes):
    values = {"lease_s": 15, "progress": None, "measured": 0, "worker_s": 0.5}
    return store.heartbeat(job.id, job.epoch, **values | changes)


def claim_and_end(store, clock):
    """Return the job that was next and has ended."""
    clock.now += 1
    job = store.claim("me", 15)
    store.fail(job.id, job.epoch, MeasurementFailed("it ends"))
    return job


class TestCreate:
    def test_is_queued(self, store):
        job, replayed = store.create(order())
        assert (JobStatus.QUEUED, False) == (job.status, replayed)

    def test_same_key_gives_the_same_job(self, store):
        first, _ = store.create(order(), "key")
        second, replayed = store.create(order(), "key")
        assert (first.id, True) == (second.id, replayed)

    def test_same_key_for_another_order_is_refused(self, store):
        store.create(order(), "key")
        with pytest.raises(InvalidInput, match="a single job"):
            store.create(order(priority=1), "key")

    def test_keys_belong_to_a_tenant(self, store):
        first, _ = store.create(order(), "key")
        second, replayed = store.create(order("bob"), "key")
        assert not replayed
        assert first.id != second.id

    def test_needs_the_upload(self, store):
        with pytest.raises(NotFound, match="uploaded"):
            store.create(order(model="sha256:" + "c" * 64))

    def test_fifty_threads_with_one_key_make_one_job(self, store):
        made = []
        threads = [
            threading.Thread(target=lambda: made.append(store.create(order(), "key")[0].id))
            for _ in range(50)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 50 == len(made)
        assert 1 == len(set(made))


class TestGet:
    def test_of_another_tenant_is_not_found(self, store):
        job, _ = store.create(order())
        with pytest.raises(NotFound):
            store.get("bob", job.id)


class TestClaim:
    def test_nothing_to_do(self, store):
        assert store.claim("me", 15) is None

    def test_oldest_first_within_a_priority(self, store, clock):
        first, _ = store.create(order())
        clock.now += 1
        store.create(order())
        clock.now += 1
        urgent, _ = store.create(order(priority=5))
        assert urgent.id == store.claim("me", 15).id
        assert first.id == store.claim("me", 15).id

    def test_each_job_goes_to_one_of_many_threads(self, store):
        ids = {store.create(order())[0].id for _ in range(20)}
        claimed = []

        def work():
            while (job := store.claim("me", 15)) is not None:
                claimed.append(job.id)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(ids) == sorted(claimed)

    def test_tenants_take_turns(self, store, clock):
        """However many jobs the first one has ordered."""
        for _ in range(20):
            store.create(order("ann"))
        for _ in range(2):
            store.create(order("bob"))
        turns = [claim_and_end(store, clock).tenant for _ in range(5)]
        assert turns == ["ann", "bob", "ann", "bob", "ann"]

    def test_the_one_with_fewer_running_jobs_comes_first(self, store):
        for tenant in ("ann", "ann", "ann", "bob", "bob"):
            store.create(order(tenant))
        first = [store.claim("me", 15) for _ in range(3)]
        assert [job.tenant for job in first] == ["ann", "bob", "ann"]
        store.fail(first[1].id, first[1].epoch, MeasurementFailed("it ends"))
        assert [store.claim("me", 15).tenant for _ in range(2)] == ["bob", "ann"]

    def test_priority_goes_before_turns(self, store, clock):
        claimed = {store.create(order("ann", priority=5))[0].id for _ in range(3)}
        store.create(order("bob"))
        assert {claim_and_end(store, clock).id for _ in range(3)} == claimed

    def test_tenant_at_its_limit_holds_nobody_up(self, store):
        for _ in range(3):
            store.create(order("ann", priority=5))
        store.create(order("bob"))
        turns = [store.claim("me", 15, max_running=1) for _ in range(3)]
        assert [job and job.tenant for job in turns] == ["ann", "bob", None]

    def test_servers_that_claim_at_once_keep_to_the_limit(self, store, database, clock):
        for _ in range(12):
            store.create(order())
        url = database.engine.url.render_as_string(hide_password=False)
        servers = [JobStore(Database(url), clock) for _ in range(6)]
        claimed = []

        def work(server):
            while (job := server.claim("me", 15, max_running=3)) is not None:
                claimed.append(job.id)
            server._db.close()

        threads = [threading.Thread(target=work, args=(server,)) for server in servers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(claimed) == 3

    def test_looks_at_no_job_twice(self, store, database):
        """The plan of the query has searches in an index only: a scan would read every job."""
        store.create(order())
        if database.postgres:
            pytest.skip("its planner scans a table of one row, rightly")
        seen = []

        def note(_connection, _cursor, statement, parameters, _context, _many):
            seen.append((statement, parameters))

        sa.event.listen(database.engine, "before_cursor_execute", note)
        store.claim("me", 15)
        sa.event.remove(database.engine, "before_cursor_execute", note)
        selects = [one for one in seen if re.match("SELECT|WITH", one[0])]
        assert len(selects) >= 4
        with database.engine.connect() as connection:
            for statement, parameters in selects:
                rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
                steps = [row[-1] for row in rows]
                assert not any(step.startswith("SCAN jobs") for step in steps), steps

    def test_deadline_that_passed_expires_the_job(self, store, clock):
        job, _ = store.create(order(deadline=clock.now + 10))
        clock.now += 11
        assert store.claim("me", 15) is None
        assert JobStatus.EXPIRED is store.get("ann", job.id).status


WHY = {"stage": "compile", "done": 0, "total": 1, "reused": 0}


class TestTellQueued:
    def test_says_once_why_a_job_waits_and_takes_it_back(self, store):
        """As progress and as an event, so that pages, clients and streams all show it."""
        job, _ = store.create(order())
        for _ in range(2):
            store.tell_queued(WHY)
        told = store.get("ann", job.id)
        assert told.progress == WHY
        assert [kind for _, kind, _ in store.events(job.id, 0)] == ["status", "progress"]
        store.tell_queued(None)
        assert store.get("ann", job.id).progress is None

    def test_leaves_jobs_alone_that_have_begun(self, store):
        begun, _ = store.create(order())
        claimed = store.claim("x", 10)
        store.tell_queued(WHY)
        assert store.get("ann", begun.id).progress is None
        store.release(claimed.id, claimed.epoch, "the server was stopped")
        store.tell_queued(WHY)
        assert store.get("ann", begun.id).progress is None


class TestFencing:
    def test_lost_lease_gives_the_job_to_the_next(self, store, clock):
        store.create(order())
        old = store.claim("one", 15)
        clock.now += 16
        assert 1 == store.requeue_lost(5)
        new = store.claim("two", 15)
        assert (old.id, old.epoch + 1) == (new.id, new.epoch)

    @pytest.mark.parametrize(
        "write",
        [
            beat,
            lambda store, job: store.succeed(job.id, job.epoch, {"plans": ["stale"]}),
            lambda store, job: store.fail(job.id, job.epoch, MeasurementFailed("stale")),
        ],
        ids=["heartbeat", "succeed", "fail"],
    )
    @pytest.mark.parametrize("claimed", [False, True], ids=["queued", "claimed again"])
    def test_old_driver_can_change_nothing(self, store, clock, write, claimed):
        store.create(order())
        old = store.claim("one", 15)
        clock.now += 16
        store.requeue_lost(5)
        if claimed:
            store.claim("two", 15)
        before = store.get("ann", old.id)
        with pytest.raises(LeaseLost):
            write(store, old)
        assert before == store.get("ann", old.id)

    def test_old_driver_cannot_hand_back_what_it_lost(self, store, clock):
        store.create(order())
        old = store.claim("one", 15)
        clock.now += 16
        store.requeue_lost(5)
        new = store.claim("two", 15)
        store.release(old.id, old.epoch, "stale")
        store.requeue(old.id, old.epoch, 5, "stale")
        assert new == store.get("ann", new.id)

    def test_heartbeats_keep_the_lease(self, store, clock):
        store.create(order())
        job = store.claim("one", 15)
        for _ in range(5):
            clock.now += 10
            beat(store, job)
        assert 0 == store.requeue_lost(5)

    def test_waits_for_a_driver_that_has_not_begun(self, store, clock):
        """Its supervisor renews the lease until the first heartbeat, and never takes it back."""
        store.create(order())
        job = store.claim("one", 15)
        until = job.lease_until
        for _ in range(5):
            clock.now += 14
            until = store.await_driver(job.id, job.epoch, until, 15)
        assert (clock.now + 15, 0) == (until, store.requeue_lost(5))
        clock.now += 1
        beat(store, job)
        assert store.await_driver(job.id, job.epoch, until, 100) is None
        clock.now += 16
        assert 1 == store.requeue_lost(5)
        assert store.await_driver(job.id, job.epoch, until, 100) is None

    def test_success_twice_by_one_driver_is_one_success(self, store):
        """The answer to a commit can be lost with the connection; the driver tries again."""
        store.create(order())
        job = store.claim("one", 15)
        store.succeed(job.id, job.epoch, {"plans": ["p"]})
        version = store.get("ann", job.id).version
        store.succeed(job.id, job.epoch, {"plans": ["p"]})
        assert version == store.get("ann", job.id).version


class TestAttempts:
    def test_cap_on_attempts_that_measure_nothing(self, store):
        made, _ = store.create(order())
        for _ in range(3):
            job = store.claim("me", 15)
            store.requeue(job.id, job.epoch, 3, "it died")
        failed = store.get("ann", made.id)
        assert JobStatus.FAILED is failed.status
        assert "within 3 attempts" in failed.error["detail"]

    def test_attempts_that_measure_go_on(self, store):
        store.create(order())
        for _ in range(10):
            job = store.claim("me", 15)
            beat(store, job, measured=1)
            store.requeue(job.id, job.epoch, 3, "it died")
        assert store.claim("me", 15) is not None

    def test_hand_backs_do_not_count(self, store):
        store.create(order())
        for _ in range(10):
            job = store.claim("me", 15)
            store.release(job.id, job.epoch, "stopped")
        assert store.claim("me", 15) is not None


class TestCancel:
    def test_queued_job_ends_at_once(self, store):
        job, _ = store.create(order())
        assert JobStatus.CANCELLED is store.cancel("ann", job.id).status
        assert store.claim("me", 15) is None

    def test_running_job_is_told_by_its_heartbeat(self, store):
        store.create(order())
        job = store.claim("me", 15)
        assert not beat(store, job).cancel_requested
        store.cancel("ann", job.id)
        assert beat(store, job).cancel_requested

    def test_running_job_whose_driver_died_is_cancelled_not_repeated(self, store):
        store.create(order())
        job = store.claim("me", 15)
        store.cancel("ann", job.id)
        store.requeue(job.id, job.epoch, 5, "it died")
        assert JobStatus.CANCELLED is store.get("ann", job.id).status

    def test_twice_is_once(self, store):
        job, _ = store.create(order())
        assert store.cancel("ann", job.id) == store.cancel("ann", job.id)

    def test_ended_job(self, store):
        store.create(order())
        job = store.claim("me", 15)
        store.succeed(job.id, job.epoch, {"plans": []})
        with pytest.raises(Conflict, match="succeeded"):
            store.cancel("ann", job.id)

    def test_of_another_tenant(self, store):
        job, _ = store.create(order())
        with pytest.raises(NotFound):
            store.cancel("bob", job.id)


class TestEvents:
    def test_are_numbered_from_one_without_gaps(self, store):
        store.create(order())
        job = store.claim("me", 15)
        for done in range(3):
            beat(store, job, progress={"stage": "pairs", "done": done, "total": 3})
        store.succeed(job.id, job.epoch, {"plans": []})
        numbers = [number for number, _, _ in store.events(job.id, 0)]
        assert [1, 2, 3, 4, 5, 6] == numbers

    def test_after_a_number(self, store):
        job, _ = store.create(order())
        store.claim("me", 15)
        assert [2] == [number for number, _, _ in store.events(job.id, 1)]


class TestResults:
    def finish(self, store, artifact):
        store.create(order())
        job = store.claim("me", 15)
        kept = KeptResult(digest="sha256:" + "c" * 64, size=7, name="plans", artifact=artifact)
        store.succeed(job.id, job.epoch, {"plans": [kept.digest]}, [kept])
        return kept.digest

    def test_plan_becomes_an_upload_once(self, store, database, clock):
        """In the transaction that ends the job, so that neither is ever without the other."""
        for _ in range(2):
            digest = self.finish(store, ArtifactKind.PLAN)
        found = ArtifactStore(database, clock).page("ann", ArtifactKind.PLAN, limit=9, after=None)
        assert [(one.digest, one.size, one.format) for one in found] == [(digest, 7, "json")]

    def test_what_becomes_none_counts_as_stored(self, store, database, clock):
        quotas = Quotas(database, Settings(), clock)
        before = quotas.usage("ann").stored_bytes
        self.finish(store, None)
        assert quotas.usage("ann").stored_bytes == before + 7


class TestPage:
    def test_walks_all_jobs_newest_first(self, store, clock):
        ids = []
        for _ in range(5):
            ids.append(store.create(order())[0].id)
            clock.now += 1
        first = store.page("ann", limit=3)
        second = store.page("ann", limit=3, before=first[-1].id)
        assert ids[::-1] == [job.id for job in [*first, *second]]

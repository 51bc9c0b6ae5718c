"""The driver between a real database and evaluators that say what no honest one says."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import escape_attempts
from bitquota.canonical import digest_json
from bitquota.context import MemoryLedger
from bitquota.errors import LimitExceeded, MeasurementFailed
from bitquota.sensitivity.cache import SqliteLedger, ledger_key
from bitquota.service.jobs.job import JobStatus, NewJob
from bitquota.service.jobs.job_store import JobStore
from bitquota.service.jobs.messages import Ended, Failed, LedgerPut, Piece, Whole, encode
from bitquota.service.security.limits import Resource, exceeded
from bitquota.service.security.sandbox import bubblewrap
from bitquota.service.settings import Settings
from bitquota.service.store.artifacts import ArtifactStore
from bitquota.service.store.blobs import BlobStore
from bitquota.service.store.database import Database
from bitquota.service.store.formats import ArtifactKind
from bitquota.service.worker.driver import EXIT_EVALUATOR_DIED, Driver
from bitquota.service.worker.engines import local
from bitquota.service.worker.engines.local import LocalEngine
from bitquota.service.worker.presentable_errors import MAX_MESSAGE, presentable
from bitquota.service.worker.scoped_ledger import ScopedLedger
from waiting import wait_for

KEY = ledger_key("a")


class Scripted:
    """An engine whose evaluator says a list of things, then dies of what is last."""

    name = "scripted"
    starts_slowly = False
    place = "here"

    def __init__(self, *said, death=None):
        self._said = [encode(m) if hasattr(m, "__slots__") else m for m in said]
        self._death = death

    def open(self):
        pass

    def start(self, order, inbox):
        for message in [*self._said, self._death]:
            inbox.put((self, message))
        return self

    def send(self, head, parts=()):
        pass

    def end(self):
        pass

    def close(self):
        pass


@pytest.fixture
def settings(tmp_path):
    made = Settings(data_dir=tmp_path / "data", max_scratch_bytes=2**20)
    made.data_dir.mkdir()
    database = Database(made.url)
    database.create()
    database.close()
    return made


@pytest.fixture
def carry_out(settings):
    """Run one job with a script; returns exit status and the job afterwards."""

    def carry_out(*said, death=None, engine=None, settings=settings):
        database = Database(settings.url)
        store = JobStore(database, time.time)
        blobs, artifacts = (
            BlobStore(settings.data_dir / "blobs"),
            ArtifactStore(database, time.time),
        )
        digests = {}
        for kind in (ArtifactKind.MODEL, ArtifactKind.DATASET):
            digests[kind.value] = blobs.put(kind.value.encode())
            artifacts.record("ann", kind, digests[kind.value], format_name="onnx", name="m", size=1)
        ordered = NewJob(
            tenant="ann", kind="plan", request={"budgets": ["3 bits"]}, labels={},
            model=digests["model"], dataset=digests["dataset"],
        )  # fmt: skip
        store.create(ordered)
        job = store.claim("here", 15.0)
        try:
            status = Driver(settings, job, engine or Scripted(*said, death=death)).run()
            return status, store.get("ann", job.id)
        finally:
            if engine is not None:
                engine.close()
            database.close()

    return carry_out


class TestHostileEvaluator:
    @pytest.mark.parametrize(
        ("said", "verdict"),
        [
            (({"type": "shutdown"}, []), "one of ledger_get"),
            (({"type": "end", "status": "succeeded"}, []), "the members peak_bytes"),
            (Whole(name="database"), "a plan job leaves"),
            (Whole(name="plans"), "is invalid"),
            (Ended(), "must return the matrix"),
            (LedgerPut(entries={KEY: np.array([np.inf])}), "finite"),
            (LedgerPut(entries={KEY: np.zeros(2**18)}), "BITQUOTA_MAX_SCRATCH_BYTES"),
            (Whole(name="x", checkpoint=True), "ended without|must return"),
        ],
    )
    def test_each_lie_fails_its_job_with_a_verdict(self, carry_out, said, verdict):
        status, job = carry_out(said, Ended())
        assert (status, job.status) == (0, JobStatus.FAILED)
        assert _matches(verdict, job.error["detail"]), job.error

    def test_more_results_than_were_asked_for(self, carry_out, settings):
        plan = (Path(__file__).parents[2] / "golden").rglob("plan*.json")
        data = next(iter(sorted(plan))).read_bytes()
        twice = [Piece(data=data), Whole(name="plans")] * 2
        _, job = carry_out(*twice, Ended())
        assert "at most 1 of the result plans" in job.error["detail"]

    def test_limit_is_the_verdict(self, carry_out):
        status, job = carry_out(death=exceeded(Resource.PROCESSES, 1024, 1500))
        assert (status, job.status) == (0, JobStatus.FAILED)
        assert job.error["type"].endswith("limit-exceeded")
        assert job.error["details"] == {
            "resource": "processes", "limit": 1024, "used": 1500,
            "setting": "BITQUOTA_MAX_PROCESSES",
        }  # fmt: skip

    def test_death_is_tried_again(self, carry_out):
        status, job = carry_out()
        assert (status, job.status) == (EXIT_EVALUATOR_DIED, JobStatus.QUEUED)

    def test_error_names_no_folder_of_the_server(self, carry_out, settings):
        inside = settings.data_dir / "scratch" / "job-x1" / "in" / "model-0.onnx"
        wrong = MeasurementFailed(f"'{inside}' cannot be read: {np.__file__}:3", path=str(inside))
        _, job = carry_out(Failed(error=wrong))
        assert job.error["detail"] == "'model-0.onnx' cannot be read: __init__.py:3"
        assert job.error["details"] == {"path": "model-0.onnx"}

    def test_measurements_are_kept_for_the_model_of_the_job(self, carry_out, settings):
        """What one model's evaluator writes under a key, no other model's evaluator finds."""
        carry_out(LedgerPut(entries={KEY: np.ones(3)}), Failed(error=MeasurementFailed("no")))
        with SqliteLedger(settings.data_dir / "ledgers" / "ann" / "ledger.sqlite") as ledger:
            assert len(ledger) == 1
            assert ledger.get(KEY) is None
            other = ScopedLedger(ledger, ["sha256:" + "0" * 64], 100)
            assert other.get_many([KEY]) == {}


TAKE_ORDER = """
import os, socket, sys, time
control = socket.socket(fileno=int(sys.argv[-1]))
_, handles, _, _ = socket.recv_fds(control, 1, 1)
kept = socket.socket(fileno=handles[0])
"""
FORK = (
    TAKE_ORDER
    + """
for _ in range(120):
    if os.fork() == 0:
        time.sleep(600)
        os._exit(0)
time.sleep(600)
"""
)
FILL_TMP = (
    TAKE_ORDER
    + """
if os.fork() == 0:
    with open('/dev/shm/x', 'wb') as file:
        for _ in range(64):
            file.write(bytes(2**20))
            file.flush()
kept.close()
time.sleep(600)
"""
)
"""The fork that worked dies of a full file system; the server that it came from is still there."""
EAT = (
    TAKE_ORDER
    + """
for _ in range(8):
    if os.fork() == 0:
        kept_bytes = bytearray(os.urandom(2**20)) * 60
        time.sleep(600)
time.sleep(600)
"""
)
LOOP = (
    TAKE_ORDER
    + """
until = time.monotonic() + 300
while time.monotonic() < until:
    pass
"""
)
ESCAPE = """
import json
results = {}
given = json.loads(sys.argv[1])
if confined(given):
    for name, attempt in attempts(given).items():
        try:
            results[name] = {"got": repr(attempt())}
        except (OSError, KeyError) as error:
            results[name] = {"refused": repr(error)}
with open("results.part", "w") as file:
    json.dump(results, file)
os.rename("results.part", "results.json")
"""


@pytest.mark.skipif(bubblewrap() is None, reason="needs bubblewrap")
class TestEvaluatorOfAStranger:
    """A program in place of our evaluator: the sandbox and its limits are all that holds it."""

    @pytest.fixture
    def small(self, settings):
        return replace(
            settings, max_processes=40, max_tmp_bytes=2**24, max_memory_bytes=2**28, max_job_s=3,
            max_scratch_bytes=2**26, sandbox="require",
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("program", "kind", "setting"),
        [
            (FORK, "limit-exceeded", "BITQUOTA_MAX_PROCESSES"),
            (FILL_TMP, "limit-exceeded", "BITQUOTA_MAX_TMP_BYTES"),
            (EAT, "limit-exceeded", "BITQUOTA_MAX_MEMORY_BYTES"),
            (LOOP, "service-timeout", "BITQUOTA_MAX_JOB_S"),
        ],
        ids=["forks", "fills tmp", "eats memory", "loops"],
    )
    def test_each_excess_is_ended_by_its_own_limit(
        self, carry_out, small, monkeypatch, program, kind, setting
    ):
        time_limited = small if program is LOOP else replace(small, max_job_s=600)
        monkeypatch.setattr(local, "EVALUATOR", ("-c", program))
        status, job = carry_out(engine=LocalEngine(time_limited), settings=time_limited)
        late = kind == "service-timeout"
        assert (status, job.status) == (0, JobStatus.EXPIRED if late else JobStatus.FAILED)
        assert job.error["type"].endswith(kind)
        assert setting in job.error["detail"]
        assert list((small.data_dir / "scratch").iterdir()) == []

    def test_nothing_is_reached_from_where_models_run(self, small, monkeypatch):
        """As after an escape from the vetter: any code, with the descriptors an evaluator has."""
        data = small.data_dir
        given = {
            "namespaces": {
                n: str(Path(f"/proc/self/ns/{n}").readlink()) for n in escape_attempts.NAMESPACES
            },
            "database": str(data / "bitquota.db"), "other_job": str(data / "scratch" / "other"),
            "outside": str(data / "outside"), "input": str(data / "bitquota.db"), "port": 9,
            "abstract": "bitquota-none", "unix": str(data / "none"), "pid": os.getpid(),
        }  # fmt: skip
        source = Path(escape_attempts.__file__).read_text().partition("def main()")[0]
        monkeypatch.setattr(local, "EVALUATOR", ("-c", source + ESCAPE, json.dumps(given)))
        engine = LocalEngine(small)
        engine.open()
        try:
            (scratch,) = (data / "scratch").iterdir()

            def has_told():
                ended = engine._server.process.poll() is not None
                told = (scratch / "work" / "results.json").exists()
                assert told or not ended
                return told

            wait_for(has_told, "the results")
            results = json.loads((scratch / "work" / "results.json").read_text())
        finally:
            engine.close()
        got = {name for name, result in results.items() if "refused" not in result}
        # The socket to the driver; and a folder in memory where the data folder would be.
        assert len(results) > 40
        assert got <= {"inherited sockets", "write outside", "change an input"}
        assert not (data / "outside").exists()
        assert b"forged" not in (data / "bitquota.db").read_bytes()


class TestScopedLedger:
    def test_gives_back_what_the_same_models_measured(self):
        whole = MemoryLedger()
        ScopedLedger(whole, ["a", "b"], 100).put_many({KEY: np.ones(2)})
        again = ScopedLedger(whole, ["b", "a"], 100).get_many([KEY, digest_json("c")])
        assert again.keys() == {KEY}
        assert again[KEY].tolist() == [1, 1]

    def test_one_job_cannot_fill_the_disk(self):
        ledger = ScopedLedger(MemoryLedger(), ["a"], 100)
        ledger.put_many({KEY: np.ones(10)})
        with pytest.raises(LimitExceeded):
            ledger.put_many({digest_json("b"): np.ones(10)})


class TestPresentable:
    def test_layers_with_names_like_paths_stay(self, tmp_path):
        error = MeasurementFailed("'/features/conv/Conv_output_0' of 3 B/s", layer="/model.2/Add")
        shown = presentable(error, tmp_path)
        assert (shown.message, shown.details) == (error.message, error.details)

    def test_long_text_is_cut(self, tmp_path):
        assert len(presentable(MeasurementFailed("x" * 10**6), tmp_path).message) == MAX_MESSAGE

    def test_folder_on_another_node(self, tmp_path):
        error = MeasurementFailed("cannot read /srv/bq/scratch/job-ab_1/in/model-0/config.json")
        assert presentable(error, tmp_path).message == "cannot read config.json"


def _matches(pattern, text):
    return any(part in text for part in pattern.split("|"))

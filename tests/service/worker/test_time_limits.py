"""Models that never end, jobs that take too long or kill their workers, on real servers."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from dataclasses import replace

import pytest

from bitquota.errors import Cancelled, MeasurementFailed, ServiceTimeout
from bitquota.request import PlanRequest
from bitquota.service.jobs.job import NewJob
from bitquota.service.jobs.job_store import JobStore
from bitquota.service.settings import Settings
from bitquota.service.store.database import Database
from bitquota.service.worker.time_limits import TimeLimits
from live_server import LiveServer, npz
from onnx_graphs import endless_graph
from refusals import refused
from waiting import PATIENTLY, wait_for

pytestmark = pytest.mark.slow
STAGE_S = 60.0
"""Longer than an evaluator takes to start on a busy machine: that is a stage, too."""


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A model that never ends, and data for it."""
    folder = tmp_path_factory.mktemp("endless")
    (folder / "data.npz").write_bytes(npz(16))
    return endless_graph(folder / "endless.onnx"), folder / "data.npz"


def submit(client, files, **options):
    request = PlanRequest(budgets=("4 bits",), samples=8, holdout_samples=8)
    return client.submit(model=files[0], calibration=files[1], request=request, **options)


def wait_until_it_has_begun(job):
    """Return once the evaluator loads the model: nothing more will be heard of it."""

    def begun():
        stage = (job.refresh().body["progress"] or {}).get("stage")
        assert not job.ended, job.body
        return stage == "load"

    wait_for(begun, "the stage 'load'")


@pytest.fixture
def job(tmp_path, migrated):
    """A job that was claimed, with a deadline in an hour."""
    shutil.copy(migrated, tmp_path / "limits.db")
    database = Database(f"sqlite:///{tmp_path}/limits.db")
    store = JobStore(database, time.time)
    store.create(
        NewJob(tenant="ann", kind="solve", request={}, labels={}, deadline=time.time() + 3600)
    )
    yield store.claim("me", 15)
    database.close()


class TestTimeLimits:
    def test_none_has_passed_at_the_beginning(self, job):
        assert TimeLimits(Settings(), job).passed() is None

    def test_deadline(self, job):
        late = replace(job, deadline=time.time() - 1)
        assert "deadline" in TimeLimits(Settings(), late).passed().message

    def test_worker_seconds_of_all_attempts(self, job):
        limits = TimeLimits(Settings(max_job_s=100), replace(job, worker_s=60))
        assert limits.passed() is None
        limits.progressed("solve")
        limits.worked(101)
        passed = limits.passed()
        assert (passed.details["stage"], passed.details["limit_s"]) == ("solve", 100)

    def test_stage_without_progress(self, job):
        limits = TimeLimits(Settings(max_stage_s=1e-9), job)
        assert limits.passed() is None  # none has begun
        limits.progressed("load")
        assert limits.passed().details["stage"] == "load"

    def test_zero_is_no_limit(self, job):
        limits = TimeLimits(Settings(max_job_s=0, max_stage_s=0), job)
        limits.worked(1e9)
        assert limits.passed() is None


@pytest.fixture(scope="module")
def patient(tmp_path_factory):
    """A server that does not miss a silent driver soon."""
    with LiveServer(tmp_path_factory.mktemp("patient") / "data", lease_s=60) as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def silent(tmp_path_factory, endless):
    """A job whose evaluator says nothing, on a server that ends a stage after a minute.

    The minute passes while other tests run. The evaluator is stopped, because an endless loop would
    take a processor from them.
    """
    folder = tmp_path_factory.mktemp("silent")
    with (
        LiveServer(folder / "data", max_stage_s=STAGE_S, lease_s=60) as server,
        server.client() as client,
    ):
        job = submit(client, endless)
        wait_until_it_has_begun(job)
        os.kill(server.working("evaluator"), signal.SIGSTOP)
        yield job


class TestCancel:
    """The slot was free again each time, or the next test could not begin."""

    def test_evaluator_inside_a_model_that_never_ends(self, patient, endless):
        with patient.client() as client:
            job = submit(client, endless)
            wait_until_it_has_begun(job)
            working = patient.working("evaluator")
            job.cancel()
            with pytest.raises(Cancelled):
                job.wait(**PATIENTLY)
            wait_for(lambda: not alive(working), "its end")

    @pytest.mark.parametrize("module", ["driver", "evaluator"])
    def test_process_that_does_not_listen(self, patient, endless, module):
        with patient.client() as client:
            job = submit(client, endless)
            wait_until_it_has_begun(job)
            working = patient.working(module)
            os.kill(working, signal.SIGSTOP)
            job.cancel()
            with pytest.raises(Cancelled):
                job.wait(**PATIENTLY)
            wait_for(lambda: not alive(working), "its end")


class TestDeadline:
    def test_job_that_takes_too_long_expires(self, server, digits_files):
        """Some 400 passes over 1,400 samples do not end within two seconds."""
        long = PlanRequest(
            budgets=("3 bits",), weight_bits=(2, 3, 4, 5, 6, 8), samples=1400,
            holdout_samples=256, measure="pairs", seed=7,
        )  # fmt: skip
        with server.client() as client:
            job = client.submit(
                model=digits_files[0], calibration=digits_files[1], request=long, deadline_s=2.0
            )
            with pytest.raises(ServiceTimeout, match="deadline"):
                job.wait(**PATIENTLY)
        assert job.status == "expired"


class TestAttempts:
    def test_job_that_kills_its_workers_fails_and_the_next_one_runs(
        self, tmp_path, endless, digits_files
    ):
        """Two attempts measure nothing: their model never ends, and somebody kills each worker."""
        settings = {"max_attempts": 2, "heartbeat_s": 0.1, "lease_s": 60}
        few = PlanRequest(budgets=("3 bits",), weight_bits=(2, 4, 8), samples=32,
                          holdout_samples=32, measure="diagonal")  # fmt: skip
        with LiveServer(tmp_path / "data", **settings) as server, server.client() as client:
            job = submit(client, endless)
            while not job.refresh().ended:
                if job.status == "running" and (pid := server.working("evaluator")):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                time.sleep(0.05)
            with pytest.raises(MeasurementFailed, match="measure something new within 2"):
                job.raise_unless_succeeded()
            assert job.body["attempts"] == 2
            job = client.submit(model=digits_files[0], calibration=digits_files[1], request=few)
            assert job.wait(**PATIENTLY).plans()


class TestStage:
    def test_silent_evaluator_is_ended_with_the_stage_and_the_limit(self, silent):
        with refused(ServiceTimeout, stage="load", limit_s=STAGE_S):
            silent.wait(**PATIENTLY)
        assert (silent.status, silent.body["attempts"]) == ("expired", 1)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True

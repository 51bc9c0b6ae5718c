"""The supervisor before its first job."""

from __future__ import annotations

import sys
import time

from bitquota.service.jobs.job import JobStatus, NewJob
from bitquota.service.jobs.job_store import JobStore
from bitquota.service.settings import Settings
from bitquota.service.store.database import Database
from bitquota.service.worker import supervisor
from bitquota.service.worker.supervisor import Supervisor
from waiting import wait_for


class TestFirstStart:
    def test_jobs_say_that_kernels_are_compiled_and_a_stop_waits_for_none(
        self, tmp_path, monkeypatch
    ):
        """A compiler that would never end stands for one that takes minutes."""
        monkeypatch.setattr(supervisor, "kernel_folders", list)
        monkeypatch.setattr(supervisor, "sandbox_of", lambda _settings: object())
        endless = (sys.executable, "-c", "import time\nwhile True: time.sleep(60)")
        monkeypatch.setattr(supervisor, "_WARM_UP", endless)
        settings = Settings(data_dir=tmp_path)
        database = Database(settings.url)
        database.create()
        store = JobStore(database, time.time)
        job, _ = store.create(NewJob(tenant="ann", kind="solve", request={}, labels={}))
        begun = Supervisor(settings, database, store)
        begun.start()
        try:
            wait_for(lambda: store.get("ann", job.id).progress, "the reason to wait")
        finally:
            begun.stop()
        told = store.get("ann", job.id)
        assert told.progress["stage"] == "compile"
        assert told.status is JobStatus.QUEUED
        database.close()

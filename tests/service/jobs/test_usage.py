"""What keys used, and when a tenant's files go."""

from __future__ import annotations

import shutil

import pytest

from bitquota.service.jobs.job import NewJob
from bitquota.service.jobs.job_store import JobStore
from bitquota.service.jobs.quotas import AuditLog
from bitquota.service.jobs.usage import retention_of, usage_by_key
from bitquota.service.security.keys import KeyStore
from bitquota.service.settings import Settings
from bitquota.service.store.artifacts import ArtifactStore
from bitquota.service.store.database import Database, jobs
from bitquota.service.store.formats import ArtifactKind

NOW = 1_800_000_000.0


FILES = (("m", ArtifactKind.MODEL), ("d", ArtifactKind.DATASET))


@pytest.fixture
def database(tmp_path, migrated):
    shutil.copy(migrated, tmp_path / "bitquota.db")
    opened = Database(Settings(data_dir=tmp_path).url)
    store = ArtifactStore(opened, lambda: NOW)
    for tenant in ("ann", "bob"):
        for digest, kind in FILES:
            store.record(tenant, kind, digest, format_name="npz", name="", size=7)
    yield opened
    opened.close()


class TestUsageByKey:
    def test_jobs_and_uploads_of_each_key(self, database):
        """Removed jobs count, without seconds; other times, tenants and actions do not."""

        def clock():
            return NOW

        keys, audit = KeyStore(database, clock), AuditLog(database, clock)
        store = JobStore(database, clock)
        callers = {}
        for tenant, name in (("ann", "ci"), ("ann", "laptop"), ("bob", "")):
            _, text = keys.create(tenant, name=name)
            callers[tenant, name] = keys.verify(text)

        def order(caller):
            values = {"kind": "plan", "request": {}, "labels": {}}
            new = NewJob(tenant=caller.tenant, model="m", dataset="d", **values)
            job = store.create(new)[0]
            audit.add(caller, "job.create", job.id)
            return job

        done, failed = (order(callers["ann", "ci"]) for _ in range(2))
        order(callers["bob", ""])
        audit.add(callers["ann", "laptop"], "job.create", "job_that_was_removed")
        for job, state in ((done, "succeeded"), (failed, "failed")):
            values = {"status": state, "worker_s": 60.0}
            database.write(
                lambda c, j=job, v=values: c.execute(
                    jobs.update().where(jobs.c.id == j.id).values(**v)
                )
            )
        audit.add(callers["ann", "ci"], "upload.model", "m")

        ci, laptop = sorted(
            usage_by_key(database, since=NOW - 1, tenant="ann"), key=lambda u: u.name
        )
        assert callers["ann", "ci"].actor == ci.actor
        assert (2, 1, 1, 120.0) == (ci.jobs, ci.succeeded, ci.failed, ci.worker_s)
        assert (1, 7) == (ci.uploads, ci.uploaded_bytes)
        assert (1, 0, 0.0) == (laptop.jobs, laptop.succeeded, laptop.worker_s)
        assert ["ann", "ann", "bob"] == [u.tenant for u in usage_by_key(database, since=NOW - 1)]
        assert [] == usage_by_key(database, since=NOW + 1)


class TestRetention:
    def test_what_goes_next(self, database, tmp_path):
        """The job that ended first, the upload that was used last; nothing where nothing is."""
        settings = Settings(data_dir=tmp_path, job_retention_s=100.0, upload_retention_s=10.0)
        nothing = retention_of(settings, database, "eve")
        assert (None, None) == (nothing.next_job_at, nothing.next_upload_at)
        values = {"kind": "plan", "request": {}, "labels": {}}
        new = NewJob(tenant="ann", model="m", dataset="d", **values)
        job = JobStore(database, lambda: NOW).create(new)[0]
        ended = {"status": "failed", "finished_at": NOW + 5}
        database.write(
            lambda c: c.execute(jobs.update().where(jobs.c.id == job.id).values(**ended))
        )
        found = retention_of(settings, database, "ann")
        assert (NOW + 105, NOW + 10) == (found.next_job_at, found.next_upload_at)

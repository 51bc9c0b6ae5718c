from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from bitquota.errors import Conflict, InvalidInput
from bitquota.service import admin_commands
from bitquota.service.jobs.job import KeptResult, NewJob
from bitquota.service.jobs.job_store import JobStore
from bitquota.service.jobs.kinds.training_request import TRAINED_MODEL
from bitquota.service.settings import Settings
from bitquota.service.store.artifacts import ArtifactStore
from bitquota.service.store.blobs import BlobStore
from bitquota.service.store.database import Database
from bitquota.service.store.formats import ArtifactKind, ModelFormat
from bitquota.service.worker.maintenance import (
    backup,
    collect,
    remove_upload,
    verify,
)
from bitquota.service.worker.processes import OWNER_FILE, owner_name

NOW = 1_800_000_000.0
DAY = 86400.0


class World:
    """A data folder with a model, a dataset, and helpers to grow old in."""

    def __init__(self, folder, migrated) -> None:
        folder.mkdir()
        shutil.copy(migrated, folder / "bitquota.db")
        self.settings = Settings(data_dir=folder)
        self.database = Database(self.settings.url)
        self.now = NOW
        self.blobs = BlobStore(folder / "blobs")
        self.artifacts = ArtifactStore(self.database, lambda: self.now)
        self.jobs = JobStore(self.database, lambda: self.now)
        self.model = self.upload(ArtifactKind.MODEL, b"model")
        self.dataset = self.upload(ArtifactKind.DATASET, b"dataset")

    def upload(self, kind, data):
        digest = self.blobs.put(data)
        self.age(digest)
        self.artifacts.record("ann", kind, digest, format_name="npz", name="", size=len(data))
        return digest

    def age(self, digest):
        """Make a file look as old as the clock says."""
        os.utime(self.blobs.path(digest), (self.now, self.now))

    def order(self):
        values = {"kind": "plan", "request": {}, "labels": {}}
        new = NewJob(tenant="ann", model=self.model, dataset=self.dataset, **values)
        return self.jobs.create(new)[0]

    def finish(self):
        job = self.jobs.claim("me", 15)
        plan = self.blobs.put(b"plan")
        self.age(plan)
        self.jobs.succeed(job.id, job.epoch, {"plans": [plan], "matrix": plan})
        return plan

    def collect(self):
        return collect(self.settings, self.database, self.now)


@pytest.fixture
def world(tmp_path, migrated):
    made = World(tmp_path / "data", migrated)
    yield made
    made.database.close()


class TestCollect:
    def test_young_things_stay(self, world):
        world.order()
        world.finish()
        removed = world.collect()
        assert (removed.jobs, removed.uploads, removed.files) == (0, 0, 0)

    def test_old_jobs_go_with_events_and_results(self, world):
        job = world.order()
        plan = world.finish()
        world.now += 91 * DAY
        world.upload(ArtifactKind.MODEL, b"model")
        assert world.collect().jobs == 1
        assert world.jobs.events(job.id, 0) == []
        assert not world.blobs.place(plan).exists()

    def test_checkpoints_of_ended_jobs_go(self, world):
        """Those of a job that waits for its next attempt stay."""
        ended = world.order()
        world.finish()
        waiting = world.order()
        for job in (ended, waiting):
            folder = world.settings.data_dir / "checkpoints" / job.id
            folder.mkdir(parents=True)
            (folder / "learn.safetensors").write_bytes(b"state")
        world.collect()
        left = (world.settings.data_dir / "checkpoints").iterdir()
        assert [waiting.id] == [folder.name for folder in left]

    def test_uploads_not_used_for_long_go(self, world):
        world.now += 31 * DAY
        assert world.collect().uploads == 2
        assert not world.blobs.place(world.model).exists()

    def test_an_order_is_a_use(self, world):
        world.now += 29 * DAY
        world.order()
        world.finish()
        world.now += 29 * DAY
        assert world.collect().uploads == 0

    def test_uploads_of_a_job_that_waits_stay(self, world):
        world.order()
        world.now += 400 * DAY
        assert world.collect().uploads == 0
        assert world.blobs.read(world.model) == b"model"

    def test_plans_and_matrices_of_a_job_that_waits_stay(self, world):
        digest = world.upload(ArtifactKind.MATRIX, b"matrix")
        new = NewJob(tenant="ann", kind="solve", request={}, labels={}, inputs={"matrix": [digest]})
        world.jobs.create(new)
        world.now += 365 * DAY
        world.collect()
        assert world.blobs.read(digest) == b"matrix"
        assert world.artifacts.get("ann", ArtifactKind.MATRIX, digest).digest == digest

    def test_results_that_became_uploads_outlive_their_job(self, world):
        world.order()
        job = world.jobs.claim("me", 15)
        plan = world.blobs.put(b"plan")
        world.age(plan)
        kept = KeptResult(digest=plan, size=4, name="plans", artifact=ArtifactKind.PLAN)
        world.jobs.succeed(job.id, job.epoch, {"plans": [plan]}, [kept])
        world.now += 91 * DAY
        new = NewJob(tenant="ann", kind="export", request={}, labels={}, inputs={"plan": [plan]})
        world.upload(ArtifactKind.MODEL, b"model")
        world.jobs.create(replace(new, model=world.model))
        world.collect()
        assert world.blobs.read(plan) == b"plan"

    def test_a_trained_model_is_an_upload(self, world):
        """What training leaves can be named by the next order, as what it is."""
        world.order()
        job = world.jobs.claim("me", 15)
        made = world.blobs.put(b"trained")
        name = TRAINED_MODEL.name + TRAINED_MODEL.suffix
        kept = KeptResult(digest=made, size=7, name=name, artifact=TRAINED_MODEL.keep_as)
        world.jobs.succeed(job.id, job.epoch, {TRAINED_MODEL.name: made}, [kept])
        found = world.artifacts.get("ann", ArtifactKind.MODEL, made)
        assert ModelFormat.PT2 == found.format

    def test_file_without_a_row_gets_an_hour(self, world):
        """An upload is on the disk before the database names it."""
        digest = world.blobs.put(b"on its way")
        world.age(digest)
        assert world.collect().files == 0
        world.now += 3601
        assert world.collect().files == 1

    def test_the_same_upload_again_makes_a_file_young(self, world):
        digest = world.blobs.put(b"again")
        os.utime(world.blobs.path(digest), (0, 0))
        world.blobs.put(b"again")
        assert world.blobs.path(digest).stat().st_mtime > 0

    def test_scratch_of_processes_that_ended_goes(self, world):
        for name, owner in (("job-a", owner_name(os.getpid())), ("job-b", owner_name(2**22 + 1))):
            folder = world.settings.data_dir / "scratch" / name
            folder.mkdir(parents=True)
            (folder / OWNER_FILE).write_text(
                owner.replace("|0", "|1") if name == "job-b" else owner
            )
        # A process was killed between making its folder and naming itself.
        unnamed = world.settings.data_dir / "scratch" / "job-c"
        unnamed.mkdir()
        (unnamed / OWNER_FILE).touch()
        assert world.collect().scratch == 1
        assert (world.settings.data_dir / "scratch" / "job-a").exists()
        assert unnamed.exists()


class TestRemoveUpload:
    def test_of_a_job_that_waits_is_refused(self, world):
        world.order()
        with pytest.raises(Conflict, match="not ended"):
            remove_upload(world.database, "ann", "model", world.model)

    def test_afterwards_it_is_gone(self, world):
        assert remove_upload(world.database, "ann", "model", world.model)
        assert not remove_upload(world.database, "ann", "model", world.model)


class TestBackup:
    def test_is_a_data_folder(self, world, tmp_path):
        job = world.order()
        plan = world.finish()
        backup(world.settings, tmp_path / "copy")
        copy = Settings(data_dir=tmp_path / "copy")
        database = Database(copy.url)
        assert verify(copy, database) == []
        restored = JobStore(database, lambda: NOW).get("ann", job.id)
        database.close()
        assert restored == world.jobs.get("ann", job.id)
        assert BlobStore(copy.data_dir / "blobs").read(plan) == b"plan"

    def test_never_overwrites(self, world, tmp_path):
        with pytest.raises(InvalidInput, match="does not exist yet"):
            backup(world.settings, tmp_path)


class TestVerify:
    def test_names_what_is_missing_and_what_is_damaged(self, world):
        path = world.blobs.path(world.model)
        path.chmod(0o600)
        path.write_bytes(b"other")
        world.blobs.path(world.dataset).unlink()
        missing, damaged = verify(world.settings, world.database)
        assert world.dataset in missing
        assert world.model in damaged


class TestAdminCommands:
    @pytest.fixture
    def admin(self, tmp_path, migrated):
        folder = tmp_path / "admin"
        folder.mkdir()
        shutil.copy(migrated, folder / "bitquota.db")

        def call(*arguments):
            line = [*arguments, "--data-dir", str(folder)]
            return CliRunner().invoke(admin_commands.app, line, catch_exceptions=False)

        return call

    def test_key_from_creation_over_rotation_to_its_end(self, admin):
        made = json.loads(admin("keys", "create", "ann", "--scope", "read", "--days", "30").output)
        assert made["key"].startswith("bq_")
        turned = json.loads(admin("keys", "rotate", made["id"]).output)
        assert turned["scopes"] == ["read"]
        assert admin("keys", "revoke", turned["id"]).exit_code == 0
        listed = [json.loads(line) for line in admin("keys", "list").output.splitlines()]
        assert [entry["id"] for entry in listed] == [made["id"], turned["id"]]
        assert "secret" not in admin("keys", "list").output

    def test_quota_of_a_tenant(self, admin):
        admin("quotas", "set", "ann", "--max-running", "7")
        shown = json.loads(admin("quotas", "show", "ann").output)
        assert shown["quota"]["max_running"] == 7
        assert shown["usage"]["running"] == 0

    def test_unknown_scope(self, admin):
        with pytest.raises(InvalidInput, match="read, write"):
            admin("keys", "create", "ann", "--scope", "fly")

    @pytest.mark.parametrize("command", ["gc", "verify", "doctor", "audit"])
    def test_on_an_empty_server(self, admin, command):
        assert admin(command).exit_code == 0

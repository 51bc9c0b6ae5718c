"""The driver: one process for one job, between the database and the evaluator.

It holds the lease, keeps the ledger, checks every result, and alone writes to the database. It
starts its evaluator first and then waits for an order, so that one can be kept warm. It imports no
torch and no model.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitquota.canonical import canonical_json
from bitquota.errors import (
    BitquotaError,
    Cancelled,
    MeasurementFailed,
    ServiceError,
    ServiceTimeout,
)
from bitquota.sensitivity.ledger import SqliteLedger
from bitquota.service import wire
from bitquota.service.artifacts import ArtifactStore
from bitquota.service.blobs import BlobStore
from bitquota.service.database import Database
from bitquota.service.evaluator import die_with_parent
from bitquota.service.inspection import ModelFormat
from bitquota.service.jobs import JobStore, LeaseLost, digests_by_role
from bitquota.service.kinds import kind_by_name
from bitquota.service.maintenance import OWNER_FILE
from bitquota.service.problems import TYPE_PREFIX
from bitquota.service.processes import owner_name
from bitquota.service.received import Received
from bitquota.service.sandbox import Cell, command, memory_limit, sandbox_of
from bitquota.service.settings import Settings

if TYPE_CHECKING:
    from types import FrameType

    from bitquota.canonical import JsonObject
    from bitquota.service.artifacts import Artifact
    from bitquota.service.jobs import Job

EXIT_EVALUATOR_DIED = 10
EXIT_LEASE_LOST = 11
EXIT_RELEASED = 12
_TICK_S = 0.1


class Evaluator:
    """The child process that runs the model, and the thread that reads what it says."""

    def __init__(self, settings: Settings, cell: Cell) -> None:
        self.cell = cell
        program = sandbox_of(settings)
        limits = [str(memory_limit(settings)), str(settings.max_upload_bytes)]
        line, environment = command(
            program, cell, settings.data_dir, ["-m", "bitquota.service.evaluator", *limits]
        )
        self._process = subprocess.Popen(  # noqa: S603  # our own module
            line,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=cell.work,
        )
        assert self._process.stdin is not None  # noqa: S101  # PIPE above
        assert self._process.stdout is not None  # noqa: S101  # PIPE above
        self._sink, self._source = self._process.stdin, self._process.stdout
        self.inbox: queue.SimpleQueue[tuple[JsonObject, list[bytes]] | BaseException | None] = (
            queue.SimpleQueue()
        )
        threading.Thread(target=self._read, name="evaluator", daemon=True).start()

    def _read(self) -> None:
        try:
            while (message := wire.receive(self._source)) is not None:
                self.inbox.put(message)
        except BaseException as err:  # noqa: BLE001  # handed to the thread that waits
            self.inbox.put(err)
        self.inbox.put(None)

    def send(self, head: JsonObject, parts: list[bytes] | None = None) -> None:
        """Send one message; a dead evaluator is noticed by its silence."""
        try:
            wire.send(self._sink, head, parts or [])
        except (BrokenPipeError, ValueError):
            return

    def end(self) -> int | None:
        """Kill the process and return how it ended."""
        self._process.kill()
        return self._process.wait()


class Driver:
    """Runs one job under its lease.

    Args:
        settings: Of the server.
        job: As it was claimed.
        evaluator: A process that waits for an order.
    """

    def __init__(self, settings: Settings, job: Job, evaluator: Evaluator) -> None:
        self._settings = settings
        self._job = job
        self._evaluator = evaluator
        self._database = Database(settings.url)
        self._store = JobStore(self._database, time.time)
        self._blobs = BlobStore(settings.data_dir / "blobs")
        ledgers = settings.data_dir / "ledgers" / job.tenant
        ledgers.mkdir(parents=True, exist_ok=True)
        self._ledger = SqliteLedger(ledgers / "ledger.sqlite")
        self._measured = 0
        self._progress: JsonObject | None = None
        self._received = Received(kind_by_name(job.kind), self._blobs)
        self._stopping = threading.Event()

    def stop(self, _number: int, _frame: FrameType | None) -> None:
        """Hand the job back at the next unit of work (a signal handler)."""
        self._stopping.set()

    def run(self) -> int:
        """Run to the end of the job and return the exit status."""
        job = self._job
        try:
            self._start()
            status = self._loop()
        except LeaseLost:
            return EXIT_LEASE_LOST
        except BitquotaError as error:
            self._evaluator.end()
            failure = error
            return self._end(lambda: self._store.fail(job.id, job.epoch, failure))
        finally:
            self._received.close()
            self._ledger.close()
        return status

    def _start(self) -> None:
        job = self._job
        known = ArtifactStore(self._database, time.time)
        named = digests_by_role(job)
        inputs: dict[str, list[str]] = {}
        for entry in kind_by_name(job.kind).inputs:
            inputs[entry.role] = [
                str(self._place(known.get(job.tenant, entry.artifact, digest), f"{entry.role}-{k}"))
                for k, digest in enumerate(named.get(entry.role, ()))
            ]
        self._evaluator.send(
            {
                "kind": job.kind,
                "request": job.request,
                "inputs": inputs,
                "threads": self._settings.threads or _share(self._settings.slots),
                "device": "auto",
            }
        )

    def _place(self, artifact: Artifact, name: str) -> Path:
        """Put an input into the inbox and return its path."""
        inbox = self._evaluator.cell.inbox
        if artifact.format == ModelFormat.HUGGING_FACE:
            folder = inbox / name
            with zipfile.ZipFile(self._blobs.path(artifact.digest)) as archive:
                archive.extractall(folder)  # names were checked on arrival
            return folder
        place = inbox / f"{name}.{artifact.format}"
        _show(self._blobs.path(artifact.digest), place)
        return place

    def _loop(self) -> int:
        job, settings = self._job, self._settings
        beat = told = time.monotonic()
        deadline_s = None if job.deadline is None else job.deadline - time.time()
        cancel: BitquotaError | None = None
        give_up = float("inf")
        while True:
            try:
                message = self._evaluator.inbox.get(timeout=_TICK_S)
            except queue.Empty:
                message = ({"type": "nothing"}, [])
            now = time.monotonic()
            if message is None or isinstance(message, BaseException):
                return self._died(cancel)
            ended = self._handle(*message)
            if ended is not None:
                return ended
            if now - beat >= settings.heartbeat_s:
                state = self._heartbeat(now - beat)
                beat = now
                if cancel is None and state.cancel_requested:
                    msg = "the job was cancelled on request; what was measured is kept"
                    cancel = Cancelled(msg)
            if cancel is None and deadline_s is not None and now - told > deadline_s:
                cancel = ServiceTimeout("a job must end before its deadline; this one did not")
            if cancel is None and self._stopping.is_set():
                cancel = ServiceError("released")
            if cancel is not None and give_up == float("inf"):
                self._evaluator.send({"type": "cancel"})
                self._cancel_with = cancel
                give_up = now + settings.grace_s
            if now > give_up:
                self._evaluator.end()
                return self._died(cancel)

    _cancel_with: BitquotaError | None = None

    def _heartbeat(self, worked_s: float) -> Job:
        progress, self._progress = self._progress, None
        measured, self._measured = self._measured, 0
        return self._store.heartbeat(
            self._job.id,
            self._job.epoch,
            lease_s=self._settings.lease_s,
            progress=progress,
            measured=measured,
            worker_s=worked_s,
        )

    def _handle(self, head: JsonObject, parts: list[bytes]) -> int | None:
        evaluator = self._evaluator
        match head.get("type"):
            case "ledger_get":
                keys = [str(key) for key in head["keys"]]
                found = self._ledger.get_many(keys)
                answer, arrays = wire.pack(found)
                evaluator.send(answer, arrays)
            case "ledger_put":
                entries = wire.unpack(head, parts)
                self._ledger.put_many(entries)
                self._measured += len(entries)
                evaluator.send({"type": "kept"})
            case "ledger_size":
                evaluator.send({"size": len(self._ledger)})
            case "progress":
                self._progress = _checked_progress(head["progress"])
            case "piece":
                self._received.piece(parts)
            case "result":
                self._received.result(str(head["name"]))
            case "error":
                return self._failed(head["problem"])
            case "end":
                return self._succeed()
            case _:
                pass
        return None

    def _failed(self, problem: Any) -> int:  # noqa: ANN401  # not trusted
        job = self._job
        self._evaluator.end()
        error = _error_of(problem)
        if isinstance(error, Cancelled) and self._cancel_with is not None:
            if self._stopping.is_set() and not isinstance(
                self._cancel_with, Cancelled | ServiceTimeout
            ):
                return self._release()
            error = self._cancel_with
        return self._end(lambda: self._store.fail(job.id, job.epoch, error))

    def _died(self, cancel: BitquotaError | None) -> int:
        job = self._job
        self._evaluator.end()
        if isinstance(cancel, Cancelled | ServiceTimeout):
            return self._end(lambda: self._store.fail(job.id, job.epoch, cancel))
        if self._stopping.is_set():
            return self._release()
        self._heartbeat(0.0)
        self._store.requeue(job.id, job.epoch, self._settings.max_attempts, "its worker died")
        return EXIT_EVALUATOR_DIED

    def _release(self) -> int:
        self._heartbeat(0.0)
        self._store.release(self._job.id, self._job.epoch, "the server was stopped")
        return EXIT_RELEASED

    def _succeed(self) -> int:
        job = self._job
        results, kept = self._received.complete()
        self._progress = {"stage": "done", "done": 1, "total": 1}

        def finish() -> None:
            self._heartbeat(0.0)
            self._store.succeed(job.id, job.epoch, results, kept)

        return self._end(finish)

    @staticmethod
    def _end(write: Any) -> int:  # noqa: ANN401  # a closure without arguments
        try:
            write()
        except LeaseLost:
            return EXIT_LEASE_LOST
        return 0


def _error_of(problem: Any) -> BitquotaError:  # noqa: ANN401  # not trusted
    known = {kind.slug: kind for kind in _tree(BitquotaError)}
    try:
        slug = str(problem["type"]).removeprefix(TYPE_PREFIX)
        details = json.loads(canonical_json(problem["details"]))
        message = str(problem["detail"])[:4000]
        return known.get(slug, MeasurementFailed)(message, **details)
    except (KeyError, TypeError, ValueError):
        return MeasurementFailed("the model must run on the calibration set; it failed")


def _tree(kind: type[BitquotaError]) -> list[type[BitquotaError]]:
    return [kind, *(k for sub in kind.__subclasses__() for k in _tree(sub))]


def _checked_progress(progress: JsonObject) -> JsonObject:
    counts = {name: max(0, int(progress.get(name, 0))) for name in ("done", "total", "reused")}
    return {"stage": str(progress["stage"])[:100], **counts}


def _show(blob: Path, place: Path) -> None:
    """Make a stored file visible in an inbox, which is read-only inside a sandbox."""
    try:
        place.hardlink_to(blob)
    except OSError:  # another file system
        shutil.copyfile(blob, place)


def _share(slots: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // max(1, slots))


def main() -> None:
    """Start an evaluator, wait for one order on standard input, run it."""
    die_with_parent(int(os.environ.get("BITQUOTA_PARENT_PID", "0")))
    # Ctrl-C reaches the whole process group; the server tells its drivers by SIGTERM itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings = Settings.from_environment()
    scratches = settings.data_dir / "scratch"
    scratches.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="job-", dir=scratches.absolute()))
    os.nice(settings.nice)
    cell = Cell(scratch=scratch)
    cell.create()
    (scratch / OWNER_FILE).write_text(owner_name(os.getpid()))
    evaluator = Evaluator(settings, cell)
    status = 0
    try:
        line = sys.stdin.readline()
        if line:
            order = json.loads(line)
            store = JobStore(Database(settings.url), time.time)
            job = store.get(order["tenant"], order["job"])
            driver = Driver(settings, job, evaluator)
            signal.signal(signal.SIGTERM, driver.stop)
            status = driver.run()
    finally:
        evaluator.end()
        shutil.rmtree(scratch, ignore_errors=True)
    sys.exit(status)


if __name__ == "__main__":
    main()

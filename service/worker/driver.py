"""The driver: one process for one job, between the database and the evaluator.

It holds the lease, keeps the ledger, checks every result, and alone writes to the database. It
gets its engine ready first and then waits for an assignment, so that one can be kept warm. It
imports no torch and no model.

Design: docs/design/sandbox.md
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import sys
import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bitquota.errors import (
    BitquotaError,
    Cancelled,
    LimitExceeded,
    MeasurementFailed,
    NotFound,
    ServiceError,
    ServiceTimeout,
    Unavailable,
)
from bitquota.sensitivity.cache import SqliteLedger
from bitquota.service import wire
from bitquota.service.jobs.job import LeaseLost, digests_by_role
from bitquota.service.jobs.job_store import JobStore
from bitquota.service.jobs.kinds import kind_by_name
from bitquota.service.jobs.kinds.kind import MODEL, QUANTIZED
from bitquota.service.jobs.kinds.plan_request import PlanRequestBody
from bitquota.service.jobs.messages import (
    Ahead,
    Ended,
    Failed,
    Idle,
    LedgerGet,
    LedgerPut,
    LedgerSize,
    Piece,
    Progressed,
    Whole,
    decode,
)
from bitquota.service.jobs.training_checkpoints import FOLDER
from bitquota.service.logs import configure, logger
from bitquota.service.security.json_limits import DOCUMENT, parse_json
from bitquota.service.security.keys import KeyStore
from bitquota.service.settings import Settings
from bitquota.service.store.artifacts import ArtifactStore
from bitquota.service.store.blobs import blob_store
from bitquota.service.store.database import Database
from bitquota.service.store.formats import ArtifactKind, ModelFormat
from bitquota.service.telemetry import Tracing
from bitquota.service.worker.checkpoints import KeptCheckpoints
from bitquota.service.worker.engines import Assignment, Engine, Inbox, InputFile, Worker, engine_of
from bitquota.service.worker.engines.local import LocalEngine
from bitquota.service.worker.evaluator import die_with_parent
from bitquota.service.worker.heartbeats import Heartbeats
from bitquota.service.worker.presentable_errors import presentable
from bitquota.service.worker.result_receiver import ResultReceiver
from bitquota.service.worker.scoped_ledger import ScopedLedger
from bitquota.service.worker.time_limits import TimeLimits
from bitquota.service.worker.whole_job import WholeJob
from bitquota.service.worker.worker_pool import WorkerPool

if TYPE_CHECKING:
    from types import FrameType

    from bitquota.canonical import JsonObject
    from bitquota.progress import Progress
    from bitquota.service.jobs.job import Job
    from bitquota.service.jobs.messages import Message
    from bitquota.service.store.artifacts import Artifact

EXIT_EVALUATOR_DIED = 10
EXIT_LEASE_LOST = 11
EXIT_RELEASED = 12
EXIT_UNAVAILABLE = 13
_TICK_S = 0.1
_PATIENCE_S = 5.0
_CANCEL_GRACE_S = 0.5
"""Seconds an evaluator gets to stop by itself where nothing that it still measures is wanted."""
_log = logger("driver")


class Driver:
    """Runs one job under its lease.

    Args:
        settings: Of the server.
        job: As it was claimed.
        engine: Where its evaluators run.
    """

    def __init__(self, settings: Settings, job: Job, engine: Engine) -> None:
        self._settings = settings
        self._job = job
        self._engine = engine
        self._inbox: Inbox = queue.SimpleQueue()
        self._ranks = 0
        self._pool = WorkerPool(settings.workers, self._help, job=job.id)
        self._database = Database(settings.url)
        self._store = JobStore(self._database, time.time)
        self._blobs = blob_store(settings)
        ledgers = settings.data_dir / "ledgers" / job.tenant
        ledgers.mkdir(parents=True, exist_ok=True)
        self._ledger = SqliteLedger(ledgers / "ledger.sqlite")
        models = digests_by_role(job).get(MODEL.role, ())
        self._scoped = ScopedLedger(self._ledger, models, settings.max_scratch_bytes)
        self._measured = 0
        self._progress: JsonObject | None = None
        self._told: Progress | None = None
        self._whole = WholeJob(job.progress)
        kind = kind_by_name(job.kind)
        self._receiver = ResultReceiver(
            kind,
            self._blobs,
            most=len(job.request.get("budgets", "1")) + len(job.request.get("widths", "")),
        )
        self._checkpoints = KeptCheckpoints(
            settings.data_dir / FOLDER / job.id,
            kind.checkpoints,
            self._blobs,
            limit=settings.max_upload_bytes,
            total=settings.max_scratch_bytes,
        )
        self._stopping = threading.Event()
        self._limits = TimeLimits(settings, job)

    def stop(self, _number: int, _frame: FrameType | None) -> None:
        """Hand the job back at the next unit of work (a signal handler)."""
        self._stopping.set()

    def run(self) -> int:
        """Run to the end of the job and return the exit status."""
        job = self._job
        try:
            try:
                with self._beating("prepare"):
                    self._start()
            except ServiceError as error:
                if type(error) is not ServiceError:
                    raise
                return self._unreachable(error)
            status = self._loop()
        except LeaseLost:
            return EXIT_LEASE_LOST
        except Unavailable as error:
            # The job is not at fault; the supervisor queues it again once the database is back.
            _log.warning("database lost", job=job.id, error=error.message)
            return EXIT_UNAVAILABLE
        except BitquotaError as error:
            return self._fail(error)
        finally:
            if self._pool.shares:
                _log.info("measured", job=job.id, shares=dict(self._pool.shares))
            self._receiver.close()
            self._checkpoints.close()
            self._ledger.close()
        return status

    def _start(self) -> None:
        job = self._job
        known = ArtifactStore(self._database, time.time)
        named = digests_by_role(job)
        if QUANTIZED.role not in named:
            named[QUANTIZED.role] = self._quantized_beside(known)
        input_files: list[InputFile] = []
        programs = False
        for entry in kind_by_name(job.kind).inputs:
            for k, digest in enumerate(named.get(entry.role, ())):
                artifact = known.get(job.tenant, entry.artifact, digest)
                input_files.append(self._input_file(artifact, entry.role, f"{entry.role}-{k}"))
                programs |= artifact.format == ModelFormat.PT2
        input_files += self._checkpoints.input_files()
        settings = self._settings
        helped = settings.workers > 1 and kind_by_name(job.kind).request is PlanRequestBody
        self._order = Assignment(
            head={
                "kind": job.kind,
                "request": job.request,
                "threads": settings.threads or _share(settings),
                "device": "auto",
                "memory_bytes": settings.measuring_memory_bytes,
                "helped": helped,
            },
            input_files=tuple(input_files),
            needs_sandbox=programs and self._strangers(),
        )
        self._evaluator = self._engine.start(self._order, self._inbox)
        if helped and self._engine.starts_slowly:
            self._pool.recruit(settings.workers - 1)

    def _quantized_beside(self, known: ArtifactStore) -> list[str]:
        """Return the quantized weights that the job's plans name, as far as the tenant has them."""
        found = []
        for entry in kind_by_name(self._job.kind).inputs:
            if entry.artifact is not ArtifactKind.PLAN:
                continue
            for digest in digests_by_role(self._job).get(entry.role, ()):
                body = parse_json(self._blobs.read(digest), DOCUMENT, "a plan")
                weights = body.get("weights") or {}
                with contextlib.suppress(NotFound):
                    found.append(
                        known.get(
                            self._job.tenant, ArtifactKind.QUANTIZED, str(weights.get("digest"))
                        ).digest
                    )
        return found

    def _beating(self, stage: str) -> Heartbeats:
        return Heartbeats(self._store, self._job, self._settings, self._whole.aside(stage))

    def _unreachable(self, error: BitquotaError) -> int:
        """Queue the job again after a while: the engine may come back."""
        _log.warning("engine unreachable", job=self._job.id, error=error.message)
        self._stopping.wait(min(_PATIENCE_S, self._settings.lease_s / 2))
        job = self._job
        self._store.requeue(job.id, job.epoch, self._settings.max_attempts, error.message)
        return EXIT_EVALUATOR_DIED

    def _help(self) -> Worker:
        """Start a helper."""
        self._ranks += 1
        order = replace(self._order, head=self._order.head | {"helper": True, "rank": self._ranks})
        return self._engine.start(order, self._inbox)

    def _strangers(self) -> bool:
        """Return whether models may be of others than the only user of this machine."""
        alone = self._settings.loopback and not KeyStore(self._database, time.time).any()
        return not (alone or self._settings.dangerously_run_code_of_strangers)

    def _input_file(self, artifact: Artifact, role: str, name: str) -> InputFile:
        unpack = artifact.format == ModelFormat.HUGGING_FACE
        return InputFile(
            role=role,
            name=name if unpack else f"{name}.{artifact.format}",
            digest=artifact.digest,
            path=self._blobs.path(artifact.digest),
            unpack=unpack,
        )

    def _loop(self) -> int:
        settings = self._settings
        beat = time.monotonic()
        limits = self._limits
        cancel: BitquotaError | None = None
        give_up = float("inf")
        while True:
            ended = None
            with contextlib.suppress(queue.Empty):
                worker, message = self._inbox.get(timeout=_TICK_S)
                if worker is not self._evaluator:
                    self._handle_helper(worker, message)
                elif message is None or isinstance(message, BaseException):
                    return self._died(cancel, message)
                else:
                    ended = self._handle(decode(*message))
            now = time.monotonic()
            if ended is not None:
                return ended
            if now - beat >= settings.heartbeat_s:
                state = self._heartbeat(now - beat)
                beat = now
                limits.worked(state.worker_s)
                if cancel is None and state.cancel_requested:
                    msg = "the job was cancelled on request; what was measured is kept"
                    cancel = Cancelled(msg)
            cancel = cancel or limits.passed()
            if cancel is None and self._stopping.is_set():
                cancel = ServiceError("released")
            if cancel is not None and give_up == float("inf"):
                self._evaluator.send({"type": "cancel"})
                self._pool.stop()
                self._cancel_with = cancel
                unwanted = isinstance(cancel, Cancelled | ServiceTimeout)
                give_up = now + min(settings.grace_s, _CANCEL_GRACE_S if unwanted else math.inf)
            if now > give_up:
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
            worker_s=worked_s * (1 + self._pool.helpers),
        )

    def _handle(self, message: Message) -> int | None:
        """Do what the evaluator of the job says; returns how the job ended, if it did."""
        if self._handle_shared(self._evaluator, message):
            return None
        match message:
            case Ahead(tasks=tasks):
                self._pool.begin(self._evaluator, [task.to_json() for task in tasks])
            case Progressed(progress=told):
                if told != self._told:
                    self._limits.progressed(told.stage)
                self._told = told
                self._progress = self._whole.told(told)
            case Piece(data=data, checkpoint=checkpoint):
                self._limits.progressed()
                (self._checkpoints if checkpoint else self._receiver).piece([data])
            case Whole(name=name, checkpoint=True):
                with self._beating("keep"):
                    self._checkpoints.keep(name)
                self._measured += 1
            case Whole(name=name):
                with self._beating("keep"):  # it may have to travel to a bucket
                    self._receiver.result(name)
            case Failed(error=error):
                return self._failed(error)
            case Ended(peak_bytes=peak_bytes):
                return self._succeed(peak_bytes)
        return None

    def _handle_helper(
        self, worker: Worker, message: tuple[JsonObject, list[bytes]] | BaseException | None
    ) -> None:
        """Serve a helper; whatever it says wrong costs only the helper."""
        if message is None or isinstance(message, BaseException):
            self._pool.lost(worker, "it died" if message is None else str(message)[:500])
            return
        try:
            said = decode(*message)
            if not self._handle_shared(worker, said) and isinstance(said, Failed):
                self._pool.lost(worker, said.error.message[:500])
        except LimitExceeded:
            raise
        except BitquotaError as error:
            self._pool.lost(worker, error.message)

    def _handle_shared(self, worker: Worker, message: Message) -> bool:
        """Do what every evaluator may ask for; returns whether this was such a message."""
        match message:
            case LedgerGet(keys=keys):
                answer, arrays = wire.pack(self._scoped.get_many(keys))
                worker.send(answer, arrays)
            case LedgerPut(entries=entries):
                self._scoped.put_many(entries)
                self._measured += len(entries)
                self._limits.progressed()
                worker.send({"type": "kept"})
            case LedgerSize():
                worker.send({"size": len(self._scoped)})
            case Idle(done=done):
                progress = self._pool.idle(worker, done)
                if progress is not None:
                    self._progress = self._whole.shared(*progress)
                    self._limits.progressed(progress[0])
            case _:
                return False
        return True

    def _failed(self, error: BitquotaError) -> int:
        if isinstance(error, Cancelled) and self._cancel_with is not None:
            if self._stopping.is_set() and not isinstance(
                self._cancel_with, Cancelled | ServiceTimeout
            ):
                return self._release()
            error = self._cancel_with
        return self._fail(error)

    def _fail(self, error: BitquotaError) -> int:
        job, shown = self._job, presentable(error, self._settings.data_dir)
        return self._end(lambda: self._store.fail(job.id, job.epoch, shown))

    def _died(self, cancel: BitquotaError | None, why: BaseException | None = None) -> int:
        job = self._job
        self._engine.close()
        if isinstance(why, MeasurementFailed):  # a limit, or what was no message
            _log.warning("evaluator ended", job=job.id, why=why.message)
            return self._fail(why)
        if isinstance(cancel, Cancelled | ServiceTimeout):
            return self._fail(cancel)
        if self._stopping.is_set():
            return self._release()
        self._heartbeat(0.0)
        self._store.requeue(job.id, job.epoch, self._settings.max_attempts, "its worker died")
        return EXIT_EVALUATOR_DIED

    def _release(self) -> int:
        self._heartbeat(0.0)
        self._store.release(self._job.id, self._job.epoch, "the server was stopped")
        return EXIT_RELEASED

    def _succeed(self, peak_bytes: int) -> int:
        job = self._job
        with self._beating("keep"):
            results, kept = self._receiver.complete()
        self._progress = self._whole.ended()

        def finish() -> None:
            self._heartbeat(0.0)
            self._store.succeed(job.id, job.epoch, results, kept, peak_bytes)

        return self._end(finish)

    def _end(self, write: Any) -> int:  # noqa: ANN401  # a closure without arguments
        try:
            write()
        except LeaseLost:
            return EXIT_LEASE_LOST
        self._checkpoints.remove()
        return 0


def _share(settings: Settings) -> int:
    """Return the threads of one worker; on a cluster, whose nodes may differ, one."""
    if settings.engine != LocalEngine.name:
        return 1
    return max(1, len(os.sched_getaffinity(0)) // max(1, settings.slots * settings.workers))


def _traced(driver: Driver, job: Job, store: JobStore, tracing: Tracing) -> int:
    """Run a job below the request that submitted it, in the same trace."""
    if not tracing.on:
        return driver.run()
    first = json.loads(store.events(job.id, 0, limit=1)[0][2])
    named: dict[str, str | int] = {
        "bitquota.job": job.id,
        "bitquota.kind": job.kind,
        "bitquota.attempt": job.attempts,
    }
    with tracing.span(
        f"job {job.kind}", first.get("trace"), kind="CONSUMER", attributes=named
    ) as span:
        status = driver.run()
        span.set_attribute("bitquota.exit_status", status)
        span.set_attribute("bitquota.status", store.get(job.tenant, job.id).status.value)
    return status


def _order(engine: Engine, settings: Settings, store: JobStore) -> Job | None:
    """Get the engine ready and return the job that arrives meanwhile or afterwards, if any."""
    arrived: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
    ready = threading.Event()

    def read() -> None:
        job = None
        try:
            line = sys.stdin.readline()
            if line:
                order = json.loads(line)
                job = store.get(order["tenant"], order["job"])
                connecting = WholeJob(job.progress).aside("connect")
                with Heartbeats(store, job, settings, connecting):
                    ready.wait()
        finally:
            arrived.put(job)

    threading.Thread(target=read, name="order", daemon=True).start()
    try:
        engine.open()
    except BitquotaError as error:  # told to the job, if it is still so then
        _log.warning("engine not ready", engine=engine.name, error=error.message)
    finally:
        ready.set()
    return arrived.get()


def main() -> None:
    """Get an engine ready, wait for one assignment on standard input, run it."""
    die_with_parent(int(os.environ.get("BITQUOTA_PARENT_PID", "0")))
    # Ctrl-C reaches the whole process group; the server tells its drivers by SIGTERM itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings = Settings.from_environment()
    configure(settings.log_level)
    os.nice(settings.nice)
    engine = engine_of(settings)
    tracing = Tracing()
    store = JobStore(Database(settings.url), time.time)
    status = 0
    try:
        job = _order(engine, settings, store)
        if job is not None:
            driver = Driver(settings, job, engine)
            signal.signal(signal.SIGTERM, driver.stop)
            status = _traced(driver, job, store, tracing)
    finally:
        engine.close()
        tracing.close()
    sys.exit(status)


if __name__ == "__main__":
    main()

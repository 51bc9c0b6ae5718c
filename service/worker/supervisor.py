"""The supervisor: claims jobs by lease and gives each to a driver process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitquota.errors import BitquotaError
from bitquota.progress import stage_words
from bitquota.service.logs import logger
from bitquota.service.security.sandbox import kernel_folders, sandbox_of
from bitquota.service.worker.maintenance import collect
from bitquota.service.worker.processes import owner_is_gone, owner_name

if TYPE_CHECKING:
    from bitquota.service.jobs.job import Job
    from bitquota.service.jobs.job_store import JobStore
    from bitquota.service.settings import Settings
    from bitquota.service.store.database import Database

_log = logger("supervisor")
_TICK_S = 0.2
COMPILING = {"text": stage_words("compile"), "stage": "compile", "done": 0, "total": 1}
_WARM_UP = (sys.executable, "-m", "bitquota.service.worker.evaluator", "--warm-up")
_LOST_CHECK_S = 1.0
_START_S = 60.0
"""Seconds beyond a lease that a driver may take to start on a busy machine, until its first
heartbeat. A driver that dies meanwhile, or a server, is noticed without a lease."""
_LONGEST_START_S = 600.0
"""Seconds for which the supervisor renews the lease of a driver that lives and has not begun: where
starts take minutes, killing one and starting another only adds to that."""
_CANCEL_S = 1.2
"""Seconds that a driver gets to end a job that was cancelled, its evaluator's included; with the
ticks before and after, a cancelled job has ended within two seconds, whatever they are doing."""


@dataclass(slots=True, kw_only=True)
class _Running:
    job: Job
    process: subprocess.Popen[str]
    since: float
    """When it was started, on the monotonic clock."""
    lease_until: float | None
    """The end of its lease while that is the supervisor's to renew: until its first heartbeat."""
    unwanted_since: float | None = None


class Supervisor:
    """Keeps ``settings.slots`` jobs running and, if wanted, one started driver in reserve.

    Drivers are killed with the thread that runs this, so a server that dies takes them along and
    the next one begins where the ledger ends.
    """

    def __init__(self, settings: Settings, database: Database, store: JobStore) -> None:
        self._settings = settings
        self._database = database
        self._store = store
        self._running: list[_Running] = []
        self._spare: subprocess.Popen[str] | None = None
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._lease_s = settings.lease_s + _START_S
        self.owner = owner_name(os.getpid())

    def start(self) -> None:
        """Begin to work in a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Look for a job now rather than at the next tick."""
        self._wake.set()

    def stop(self) -> None:
        """Hand running jobs back to the queue, end every driver, and return when that is done."""
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def stopping(self) -> bool:
        """Whether the server is on its way out."""
        return self._stop.is_set()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None and self._thread.is_alive()

    def _run(self) -> None:
        checked = 0.0
        collected = time.monotonic()
        recovered = False
        while not self._stop.is_set():
            try:
                if not recovered:
                    self._compile()
                    if self.stopping:
                        break
                    self._recover()
                    recovered = True
                self._reap()
                self._kill_unwanted()
                if time.monotonic() - checked > _LOST_CHECK_S:
                    self._await_starts()
                    self._store.requeue_lost(self._settings.max_attempts)
                    checked = time.monotonic()
                self._fill()
                if time.monotonic() - collected > self._settings.collect_every_s:
                    collected = time.monotonic()
                    threading.Thread(target=self._collect, name="collector", daemon=True).start()
            except BitquotaError as error:
                _log.warning("database or store", error=str(error))
            except Exception:  # noqa: BLE001  # see below
                # The supervisor outlives whatever happens to one job.
                _log.exception("unexpected")
            self._wake.wait(_TICK_S)
            self._wake.clear()
        self._drain()

    def _compile(self) -> None:
        """Compile the kernels once, outside of any sandbox: inside nothing is kept.

        Jobs that wait meanwhile say so.
        """
        here = self._settings.slots and self._settings.engine == "local"
        if not here:
            return
        if sandbox_of(self._settings) is None or kernel_folders():
            self._store.tell_queued(None)  # a server that was stopped may have told them
            return
        _log.info("compiling kernels for this machine, once; jobs wait for a minute or two")
        with subprocess.Popen(_WARM_UP) as compiler:  # noqa: S603  # our own module
            while compiler.poll() is None:
                if self.stopping:
                    compiler.terminate()
                    return
                self._store.tell_queued(COMPILING)
                self._wake.wait(_TICK_S)
                self._wake.clear()
        self._store.tell_queued(None)
        if not kernel_folders():
            _log.warning(
                "kernels are compiled anew for every job: run "
                "'python -m bitquota.service.worker.evaluator --warm-up' as a user who may write "
                "to the installed package"
            )

    def _collect(self) -> None:
        try:
            removed = collect(self._settings, self._database, time.time())
            _log.info("collected", **removed.to_json())
        except (BitquotaError, OSError) as error:
            _log.warning("collection failed", error=str(error))

    def _recover(self) -> None:
        """Queue the jobs again whose server ran on this host and is gone."""
        for job, epoch, owner in self._store.running_owners():
            if owner is not None and owner_is_gone(owner):
                reason = "the server had ended"
                self._store.requeue(job, epoch, self._settings.max_attempts, reason)

    def _fill(self) -> None:
        slots, reserve = self._settings.slots, self._settings.reserve
        while len(self._running) < slots:
            if reserve and (self._spare is None or self._spare.poll() is not None):
                self._spare = self._start_driver()
            job = self._store.claim(self.owner, self._lease_s, self._settings.max_running)
            if job is None:
                return
            process, self._spare = self._spare or self._start_driver(), None
            self._running.append(
                _Running(
                    job=job, process=process, since=time.monotonic(), lease_until=job.lease_until
                )
            )
            _log.info("job started", job=job.id, epoch=job.epoch, driver=process.pid)
            try:
                assert process.stdin is not None  # noqa: S101  # PIPE
                process.stdin.write(json.dumps({"tenant": job.tenant, "job": job.id}) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                _log.warning("driver had ended", job=job.id, driver=process.pid)
            if reserve:
                self._spare = self._start_driver()

    def _reap(self) -> None:
        for running in self._running[:]:
            job, status = running.job, running.process.poll()
            if status is None:
                continue
            self._running.remove(running)
            _close(running.process)
            if status != 0:
                _log.warning("driver ended", job=job.id, status=status)
            reason = f"its driver ended with status {status}"
            self._store.requeue(job.id, job.epoch, self._settings.max_attempts, reason)

    def _await_starts(self) -> None:
        """Renew the leases of drivers that live and have not sent a heartbeat yet."""
        late = time.monotonic() - _LONGEST_START_S
        for running in self._running:
            if running.lease_until is None or running.since < late:
                continue
            running.lease_until = self._store.await_driver(
                running.job.id, running.job.epoch, running.lease_until, self._lease_s
            )

    def _kill_unwanted(self) -> None:
        """Kill drivers that go on although their job was cancelled, or is no longer theirs.

        A driver sees both by itself unless it is stuck, and its evaluators die with it.
        """
        if not self._running:
            return
        wanted = self._store.wanted([running.job.id for running in self._running])
        now = time.monotonic()
        for running in self._running:
            epoch, cancelled = wanted.get(running.job.id, (None, False))
            ours = epoch == running.job.epoch
            if ours and not cancelled:
                continue
            if running.unwanted_since is None:
                running.unwanted_since = now
            if now - running.unwanted_since > (_CANCEL_S if ours else self._settings.grace_s):
                running.process.kill()
                running.process.wait()
        self._reap()

    def _start_driver(self) -> subprocess.Popen[str]:
        environment = (
            os.environ | self._settings.to_environment() | {"BITQUOTA_PARENT_PID": str(os.getpid())}
        )
        return subprocess.Popen(
            [sys.executable, "-m", "bitquota.service.worker.driver"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=environment,
            text=True,
        )

    def _drain(self) -> None:
        if self._spare is not None:
            _close(self._spare)  # it waits for an assignment; the end of its input ends it
        for running in self._running:
            running.process.send_signal(signal.SIGTERM)
        until = time.monotonic() + self._settings.grace_s + 2.0
        for running in self._running:
            job_id = running.job.id
            try:
                running.process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                running.process.kill()
                running.process.wait()
            _close(running.process)
            try:
                self._store.release(job_id, running.job.epoch, "the server was stopped")
            except BitquotaError as error:
                _log.warning("job could not be handed back", job=job_id, error=str(error))
        if self._spare is not None:
            try:
                self._spare.wait(2.0)
            except subprocess.TimeoutExpired:
                self._spare.kill()
                self._spare.wait()


def _close(process: subprocess.Popen[str]) -> None:
    if process.stdin is not None:
        try:
            process.stdin.close()
        except BrokenPipeError:
            return

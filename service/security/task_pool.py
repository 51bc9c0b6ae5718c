"""Processes that read what strangers sent, so that the API process need not.

Headers, JSON and archive directories of uploads, the matrices of ``POST /v1/solve`` and the files
behind charts are opened here only. Each process has its own limit on memory and each task one on
time: an upload that is made to be slow or large ends its own process, and nobody else waits.

Design: docs/design/sandbox.md
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import anyio

from bitquota.errors import BitquotaError, InvalidInput, TooLarge, Unavailable
from bitquota.problems import error_of
from bitquota.service import wire
from bitquota.service.logs import logger

if TYPE_CHECKING:
    from collections.abc import Callable

    from bitquota.canonical import JsonObject

_log = logger("tasks")
_PASSED_ON = ("PATH", "PYTHONPATH", "VIRTUAL_ENV", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH",
              "OMP_NUM_THREADS", "TMPDIR", "NUMBA_CACHE_DIR")  # fmt: skip
_END_S = 5.0
_WAIT_S = 60.0
"""Seconds that a task may wait for its turn."""

_RETRY_AFTER_S = 5
_KEPT_BYTES = 32 * 2**20
"""Of answers that stay good, together."""


@dataclass(slots=True, eq=False)
class _Process:
    """One process and what is known about its current task."""

    process: subprocess.Popen[bytes]
    late: bool = False

    @property
    def source(self) -> BinaryIO:
        assert self.process.stdout is not None  # noqa: S101  # it was opened with pipes
        return self.process.stdout  # type: ignore[return-value]

    @property
    def sink(self) -> BinaryIO:
        assert self.process.stdin is not None  # noqa: S101  # it was opened with pipes
        return self.process.stdin  # type: ignore[return-value]

    def kill_late(self) -> None:
        """End it because its task takes too long."""
        self.late = True
        self.process.kill()

    def end(self) -> None:
        """End it and forget it."""
        self.process.kill()
        self.source.close()
        with contextlib.suppress(OSError):  # what was not written yet cannot be any more
            self.sink.close()
        self.process.wait(_END_S)


class TaskPool:
    """Runs tasks of ``bitquota.service.security.task_process`` in at most ``size`` processes.

    Processes are started when they are first needed. One tenant gets all of them but one, if there
    are several, so that its own tasks wait for each other before they delay others'.

    Args:
        size: Tasks at the same time.
        memory_bytes: Private memory of one process.
        time_limit_s: Seconds of one task.
        nice: Niceness of the processes.
    """

    def __init__(self, size: int, *, memory_bytes: int, time_limit_s: float, nice: int) -> None:
        self._memory_bytes = memory_bytes
        self._time_limit_s = time_limit_s
        self._nice = nice
        self._at_once = anyio.CapacityLimiter(size)
        share = max(1, size - 1)
        self._by_tenant: dict[str, anyio.Semaphore] = defaultdict(lambda: anyio.Semaphore(share))
        self._waiting: dict[str, int] = defaultdict(int)
        self._lock = threading.Lock()
        self._idle: list[_Process] = []
        self._busy: set[_Process] = set()
        self._closed = False
        self._kept: OrderedDict[str, tuple[JsonObject, bytes]] = OrderedDict()
        self._kept_bytes = 0

    async def run(
        self,
        tenant: str,
        task: str,
        arguments: JsonObject,
        *,
        what: str,
        resolve: Callable[[JsonObject], JsonObject] | None = None,
        lasting: bool = False,
    ) -> tuple[JsonObject, bytes]:
        """Return the verdict of a task, and the bytes that it made, if it makes any.

        Args:
            tenant: Whose task it is.
            task: Its name.
            arguments: Of the task, as JSON.
            what: What it reads, for errors: ``the upload``.
            resolve: Answers what the task asks back, in a thread.
            lasting: Equal arguments always lead to the same answer, which may be kept.

        Raises:
            BitquotaError: As the task raised it, or ``resolve``.
            TooLarge: It took more memory or time than it may.
            InvalidInput: It failed in a way that was not foreseen.
            Unavailable: Too many others are waiting.
        """
        key = f"{task} {json.dumps(arguments, sort_keys=True)}" if lasting else ""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        answer = await self._run(tenant, task, arguments, what, resolve)
        if lasting:
            self._keep(key, answer)
        return answer

    def _keep(self, key: str, answer: tuple[JsonObject, bytes]) -> None:
        """Keep an answer; those that were asked for longest ago make room."""
        if key not in self._kept:
            self._kept_bytes += _size(answer)
        self._kept[key] = answer
        while self._kept_bytes > _KEPT_BYTES:
            self._kept_bytes -= _size(self._kept.popitem(last=False)[1])

    async def _run(
        self,
        tenant: str,
        task: str,
        arguments: JsonObject,
        what: str,
        resolve: Callable[[JsonObject], JsonObject] | None,
    ) -> tuple[JsonObject, bytes]:
        self._waiting[tenant] += 1
        own = self._by_tenant[tenant]
        try:
            with anyio.fail_after(_WAIT_S):
                await own.acquire()
            try:
                with anyio.fail_after(_WAIT_S):
                    await self._at_once.acquire()
                try:
                    # The limit on threads is the pool's own: its tasks take none from others.
                    return await anyio.to_thread.run_sync(
                        lambda: self._work(task, arguments, what, resolve),
                        limiter=anyio.CapacityLimiter(1),
                    )
                finally:
                    self._at_once.release()
            finally:
                own.release()
        except TimeoutError as err:
            msg = f"{what} must wait for others that are read; it waited too long: try again"
            raise Unavailable(msg, retry_after_s=_RETRY_AFTER_S) from err
        finally:
            self._waiting[tenant] -= 1
            if not self._waiting[tenant]:
                del self._waiting[tenant], self._by_tenant[tenant]

    def close(self) -> None:
        """End every process; tasks under way fail as ``Unavailable``."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for process in self._busy:
                process.process.kill()
        for process in idle:
            process.end()

    def _work(
        self,
        task: str,
        arguments: JsonObject,
        what: str,
        resolve: Callable[[JsonObject], JsonObject] | None,
    ) -> tuple[JsonObject, bytes]:
        process = self._take()
        timer = threading.Timer(self._time_limit_s, process.kill_late)
        timer.daemon = True
        timer.start()
        reusable = False
        failure: BitquotaError | None = None
        try:
            wire.send(process.sink, {"task": task, "arguments": arguments})
            while (received := wire.receive(process.source)) is not None:
                head, parts = received
                if head["type"] != "need":
                    reusable = head["reusable"]
                    break
                try:
                    found = {} if resolve is None else resolve(head["need"])
                    wire.send(process.sink, {"found": found})
                except BitquotaError as error:
                    failure = error
                    wire.send(process.sink, {"found": None})
        except (BrokenPipeError, ConnectionResetError):
            received = None
        finally:
            timer.cancel()
            self._give_back(process, reusable=reusable and not process.late)
        if failure is not None:
            raise failure
        if received is None:
            raise self._lost(process, task, what)
        if head["type"] == "error":
            if head["problem"] is not None:
                raise error_of(head["problem"])
            _log.error("task failed", task=task, error=head["why"])
            msg = f"{what} must be well formed; it cannot be read ({head['why']})"
            raise InvalidInput(msg)
        return head["verdict"], parts[0] if parts else b""

    def _lost(self, process: _Process, task: str, what: str) -> BitquotaError:
        if self._closed:
            return Unavailable("the server is about to stop; try again", retry_after_s=1)
        status = process.process.returncode
        _log.warning("task ended its process", task=task, late=process.late, status=status)
        if process.late:
            seconds = f"{self._time_limit_s:g} s"
            msg = f"{what} must be read within {seconds}; it took longer: make it smaller"
            return TooLarge(msg, seconds=self._time_limit_s)
        msg = (
            f"{what} must be read within {self._memory_bytes:,} bytes of memory; it took more: "
            "make it smaller"
        )
        return TooLarge(msg, bytes=self._memory_bytes)

    def _take(self) -> _Process:
        with self._lock:
            if self._closed:
                raise Unavailable("the server is about to stop; try again", retry_after_s=1)
            while self._idle:
                process = self._idle.pop()
                if process.process.poll() is None:
                    self._busy.add(process)
                    return process
                process.end()
            process = self._start()
            self._busy.add(process)
            return process

    def _give_back(self, process: _Process, *, reusable: bool) -> None:
        with self._lock:
            self._busy.discard(process)
            if reusable and not self._closed:
                self._idle.append(process)
                return
        process.end()

    def _start(self) -> _Process:
        """Start a process that inherits no secrets and no files."""
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        environment |= {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        line = [
            sys.executable, "-m", "bitquota.service.security.task_process", str(self._memory_bytes),
            str(self._nice), str(os.getpid()),
        ]  # fmt: skip
        return _Process(
            subprocess.Popen(  # noqa: S603  # our own module
                line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
            )
        )


def _size(answer: tuple[JsonObject, bytes]) -> int:
    return len(json.dumps(answer[0])) + len(answer[1])

"""The process behind ``TaskPool``: takes one task after the other from standard input.

``python -m bitquota.service.security.task_process MEMORY_BYTES NICE PARENT_PID``; messages are
those of ``bitquota.service.wire``. It is given paths, never opens the database, and imports what a
task needs when the first such task comes.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, BinaryIO

from bitquota.errors import BitquotaError, TooLarge, Unavailable
from bitquota.service import wire
from bitquota.service.problem_json import problem_json
from bitquota.service.security.sandbox import limit_resources
from bitquota.service.store.storage_errors import storage_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from bitquota.canonical import JsonObject

    Ask = Callable[[JsonObject], JsonObject]
    Task = Callable[[JsonObject, Ask], tuple[JsonObject, bytes]]

TASKS = {
    "inspect": "bitquota.service.security.upload_inspection",
    "solve": "bitquota.service.api.solve_task",
    "charts": "bitquota.service.web.chart_tasks",
    "cross": "bitquota.service.web.chart_tasks",
    "report": "bitquota.service.web.chart_tasks",
    "model_page": "bitquota.service.web.chart_tasks",
    "runs": "bitquota.service.web.chart_tasks",
    "plan_rows": "bitquota.service.web.chart_tasks",
    "graph": "bitquota.service.web.layer_graph",
}
"""Module of every task, which is its function ``TASK_task``."""

_LOOK_S = 1.0
_CACHE_BYTES = 64 * 2**20
"""Largest file that may be written: compiled kernels, the first time."""


class _AbandonedError(Exception):
    """The server cannot answer what the task asked: it has told the client."""


def main() -> None:
    """Work until standard input ends, or the server does."""
    memory_bytes, nice, parent = map(int, sys.argv[1:])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group
    os.nice(nice)
    limit_resources(memory_bytes, _CACHE_BYTES)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    source = sys.stdin.buffer
    # Whatever is printed must not get between the messages.
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    fresh = _resident()
    while (message := wire.receive(source)) is not None:
        head, parts = _answer(message[0], source, sink, memory_bytes)
        # What a large task leaves behind is not kept; numba and torch-free solvers take 200 MB.
        head["reusable"] = _resident() - fresh < memory_bytes // 2
        wire.send(sink, head, parts)


def _answer(
    message: JsonObject, source: BinaryIO, sink: BinaryIO, memory_bytes: int
) -> tuple[JsonObject, list[bytes]]:
    name = message["task"]

    def ask(need: JsonObject) -> JsonObject:
        wire.send(sink, {"type": "need", "need": need})
        received = wire.receive(source)
        if received is None or received[0]["found"] is None:
            raise _AbandonedError
        found: JsonObject = received[0]["found"]
        return found

    try:
        task: Task = getattr(importlib.import_module(TASKS[name]), f"{name}_task")
        verdict, data = task(message["arguments"], ask)
    except _AbandonedError:
        error: BitquotaError = Unavailable("the server answered already")
    except BitquotaError as known:
        error = known
    except MemoryError:
        error = TooLarge(
            f"what is sent must be read within {memory_bytes:,} bytes of memory; it took more: "
            "make it smaller",
            bytes=memory_bytes,
        )
    except Exception as unknown:  # noqa: BLE001  # a stranger's bytes must not end the process
        told = storage_error(unknown) if isinstance(unknown, OSError) else None
        if told is not None:
            return {"type": "error", "problem": problem_json(told)}, []
        traceback.print_exc()
        return {"type": "error", "problem": None, "why": type(unknown).__name__}, []
    else:
        return {"type": "verdict", "verdict": verdict}, [data]
    return {"type": "error", "problem": problem_json(error)}, []


def _resident() -> int:
    """Return the bytes of memory that this process takes; 0 where that cannot be told."""
    try:
        with open("/proc/self/statm") as file:  # noqa: PTH123  # called after every task
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _end_with(parent: int) -> None:
    """End this process when the server has, also in the middle of a task.

    The kernel's signal for that is of no use: it comes when the *thread* ends that started us.
    """
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    os._exit(3)


if __name__ == "__main__":
    main()

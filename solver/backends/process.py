"""Run an external solver in a child process: no shared libraries, no shared fate.

Design: docs/design/external-solvers.md
"""

from __future__ import annotations

import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

import bitquota
from bitquota.errors import SolverFailed
from bitquota.solver.backends.answer import Answer

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from bitquota.solver.backends.answer import AnswerStatus
    from bitquota.solver.backends.model import Model
    from bitquota.solver.control import Cancelled, Options

GRACE_S = 10.0
"""Beyond its time limit a child may take this long to react."""
START_S = 120.0
"""A child may take this long to load its libraries; its time limit begins then."""
_POLL_S = 0.05
_SAID = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came back from a child.

    Attributes:
        answer: The child's own, or its last report with the limit ``time`` or ``cancelled`` when
            it was stopped from here.
        cpu_seconds: As far as known.
        loading_cpu_seconds: Of them, what loading libraries took.
    """

    answer: Answer
    cpu_seconds: float
    loading_cpu_seconds: float = 0.0


def run_child(
    name: str,
    model: Model,
    options: Options,
    *,
    on_incumbent: Callable[[NDArray[np.int64]], None] | None = None,
    cancelled: Cancelled | None = None,
    grace_s: float = GRACE_S,
    command: tuple[str, ...] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Solve ``model`` by backend ``name`` in a new process.

    The child gets the time limit, from when its libraries are loaded; when it overruns it by more
    than ``grace_s``, or on cancellation, it is killed and what it reported is kept.

    Raises:
        SolverFailed: The child died, or wrote something that is no answer.
    """
    limit_s = math.inf if options.time_limit_s is None else options.time_limit_s + grace_s
    command = command or (sys.executable, "-P", "-m", "bitquota.solver.backends.child", name)
    before, loading = _children_seconds(), 0.0
    incumbent: NDArray[np.int64] | None = None
    stopped: str | None = None
    last: dict[str, Any] = {}
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as said:
        # Start.
        given.write(json.dumps(asdict(options)).encode() + b"\n" + model.to_bytes())
        given.seek(0)
        child = subprocess.Popen(  # noqa: S603 - our own module, by the running interpreter
            command, stdin=given, stdout=subprocess.PIPE, stderr=said, env=_environment()
        )
        lines: queue.Queue[bytes | None] = queue.Queue()
        assert child.stdout is not None  # noqa: S101 - it was asked for
        reader = threading.Thread(target=_read, args=(child.stdout, lines), daemon=True)
        reader.start()
        deadline = clock() + START_S + limit_s
        try:
            # Listen, until it ends or must.
            while (stopped := _reason_to_stop(deadline, clock, cancelled)) is None:
                try:
                    line = lines.get(timeout=_POLL_S)
                except queue.Empty:
                    continue
                if line is None:
                    break
                last = _parse(name, line)
                if "ready" in last:
                    loading, deadline = float(last.get("cpu_seconds", 0.0)), clock() + limit_s
                if "incumbent" in last:
                    incumbent = np.array(last["incumbent"], dtype=np.int64)
                    if on_incumbent is not None:
                        on_incumbent(incumbent)
        finally:
            if stopped is not None or sys.exc_info()[0] is not None:
                child.kill()
            code = child.wait()
            reader.join()
            child.stdout.close()
        # Understand what it said.
        if stopped is not None:
            status: AnswerStatus = "unknown" if incumbent is None else "feasible"
            answer = Answer(status=status, limit=stopped, chosen=incumbent)
            seconds = _children_seconds() - before
        else:
            answer = _answer(name, code, last, said)
            seconds = float(last.get("cpu_seconds", 0.0))
    return Outcome(answer=answer, cpu_seconds=seconds, loading_cpu_seconds=loading)


def _reason_to_stop(
    deadline: float, clock: Callable[[], float], cancelled: Cancelled | None
) -> str | None:
    if cancelled is not None and cancelled():
        return "cancelled"
    return "time" if clock() > deadline else None


def _answer(name: str, code: int, last: dict[str, Any], said: IO[bytes]) -> Answer:
    """Return the answer of a child that ended with ``code`` after the message ``last``."""
    if code != 0 or "answer" not in last:
        said.seek(0)
        words = said.read().decode(errors="replace").strip()[-_SAID:]
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        last_words = ": " + words.splitlines()[-1] if words else ""
        msg = (
            f"solver backend '{name}' must end with an answer; its process ended with {how}"
            f"{last_words}; try another solver"
        )
        raise SolverFailed(msg, backend=name, exit_code=code, stderr=words)
    try:
        return Answer.from_json(last["answer"])
    except ValueError as err:
        msg = f"solver backend '{name}' must write an answer; {err}"
        raise SolverFailed(msg, backend=name) from err


def _environment() -> dict[str, str]:
    """Return this process's environment, one thread per library, our package in reach.

    A folder of installed packages is in reach already; on ``PYTHONPATH`` it would come before the
    standard library.
    """
    home = Path(bitquota.__file__).resolve().parents[1]
    paths = [] if home.name in {"site-packages", "dist-packages"} else [str(home)]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return os.environ | threads | {"PYTHONPATH": os.pathsep.join(paths)}


def _children_seconds() -> float:
    """CPU seconds of all children that have ended; 0 where the system does not tell."""
    times = os.times()
    return times.children_user + times.children_system


def _read(stream: IO[bytes], lines: queue.Queue[bytes | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _parse(name: str, line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
        if isinstance(message, dict):
            return message
        cause: ValueError | None = None
    except ValueError as err:
        cause = err
    msg = f"solver backend '{name}' must write JSON objects; got {line[:80]!r}; report this"
    raise SolverFailed(msg, backend=name) from cause

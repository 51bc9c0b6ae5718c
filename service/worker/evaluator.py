"""The evaluator: the one process that loads an uploaded model and runs it.

It is forked from a fork server, gets one assignment over a socket, asks the driver for ledger
entries, hands it every new one at once, and answers with results; or it helps another evaluator of
the same job to measure. It opens no database and no network, so that it can live in a sandbox;
whatever a model does in here, it can only send messages that the driver checks.

Design: docs/design/sandbox.md
"""

from __future__ import annotations

import ctypes
import gc
import os
import queue
import signal
import socket
import sys
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bitquota.context import Context
from bitquota.errors import BitquotaError, MeasurementFailed
from bitquota.progress import peak_bytes
from bitquota.request import PlanRequest
from bitquota.sensitivity.tasks import Task, samples_digest
from bitquota.service import wire
from bitquota.service.jobs.kinds import kind_by_name
from bitquota.service.jobs.messages import (
    Ahead,
    Ended,
    Failed,
    Idle,
    LedgerGet,
    LedgerPut,
    LedgerSize,
    encode,
)
from bitquota.service.jobs.work import Work
from bitquota.service.security.sandbox import discard_stale_kernels, limit_resources
from bitquota.service.worker.forkserver import serve, torch_on_one_thread

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import BinaryIO

    import numpy as np
    from numpy.typing import NDArray

    from bitquota.canonical import JsonObject
    from bitquota.measurement_setup import Setup
    from bitquota.service.jobs.messages import Message
    from bitquota.service.jobs.work import Loaded

_PR_SET_PDEATHSIG = 1
_COLD_GC_THRESHOLD = 5000
"""New objects after which a job that imports everything itself looks for garbage. At Python's 700
it spends a tenth of its processor time on looking through modules."""


class Channel:
    """Both directions to the driver; a thread reads, so that a cancel is seen at any time."""

    def __init__(self, source: BinaryIO, sink: BinaryIO) -> None:
        self._source = source
        self._sink = sink
        self._sending = threading.Lock()
        self._answers: queue.SimpleQueue[tuple[JsonObject, list[bytes]]] = queue.SimpleQueue()
        self.cancelled = threading.Event()

    def start(self) -> None:
        """Begin to read."""
        threading.Thread(target=self._read, name="driver", daemon=True).start()

    def _read(self) -> None:
        while (message := wire.receive(self._source)) is not None:
            if message[0].get("type") == "cancel":
                self.cancelled.set()
            else:
                self._answers.put(message)
        # The driver is gone: nobody can take what would still be measured.
        os._exit(3)

    def send(self, message: Message) -> None:
        """Send one message."""
        with self._sending:
            wire.send(self._sink, *encode(message))

    def next(self) -> tuple[JsonObject, list[bytes]]:
        """Return the next message that is not a cancel."""
        return self._answers.get()

    def ask(self, message: Message) -> tuple[JsonObject, list[bytes]]:
        """Send one message and return its answer."""
        self.send(message)
        return self.next()


class RemoteLedger:
    """The tenant's ledger, which the driver keeps; a put returns when it is committed."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def __len__(self) -> int:
        """Return the number of entries."""
        return int(self._channel.ask(LedgerSize())[0]["size"])

    def get(self, key: str) -> NDArray[np.float64] | None:
        """Return the array under ``key``, or ``None``."""
        return self.get_many([key]).get(key)

    def get_many(self, keys: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """Return the arrays of those ``keys`` that are there."""
        return wire.unpack(*self._channel.ask(LedgerGet(keys=tuple(keys))))

    def put(self, key: str, array: NDArray[np.float64]) -> None:
        """Store one array."""
        self.put_many({key: array})

    def put_many(self, entries: Mapping[str, NDArray[np.float64]]) -> None:
        """Store several arrays, all of them or none."""
        self._channel.ask(LedgerPut(entries=entries))


def measure_ahead(channel: Channel, tasks: Sequence[Task], do: Callable[[Task], object]) -> None:
    """Have the driver share out ``tasks``, and take part until all are done."""
    head, _ = channel.ask(Ahead(tasks=tuple(tasks)))
    while head["type"] == "task":
        do(tasks[head["number"]])
        head, _ = channel.ask(Idle(done=head["number"]))


def main() -> None:
    """Import what is needed and serve forks to the driver.

    Arguments: bytes of private memory, bytes of one file, number of processes (0: not limited),
    whether to warm up first (0 or 1), and the number of the control socket; or ``--warm-up``, which
    compiles all kernels into ``NUMBA_CACHE_DIR`` and ends.
    """
    if sys.argv[1:] == ["--warm-up"]:
        discard_stale_kernels()
        load_all_kernels()
        return
    die_with_parent(int(os.environ.get("BITQUOTA_PARENT_PID", "0")))
    limit_resources(*map(int, sys.argv[1:4]))
    if int(sys.argv[4]):
        # Modules are no garbage: looking for some costs a quarter of the start. Frozen, the
        # collector of a fork leaves them alone, so that their pages stay shared.
        gc.disable()
        torch_on_one_thread()
        warm_up()
        gc.freeze()
        gc.enable()
    else:
        gc.set_threshold(_COLD_GC_THRESHOLD)
    parent = os.getpid()

    def work(assignment: JsonObject, source: BinaryIO, sink: BinaryIO, loaded: Loaded) -> None:
        die_with_parent(parent)
        answer(assignment, Channel(source, sink), loaded)

    with socket.socket(fileno=int(sys.argv[5])) as control:
        serve(control, work)


def answer(assignment: JsonObject, channel: Channel, loaded: Loaded) -> None:
    """Carry out one assignment and tell how it ended."""
    channel.start()
    if assignment["threads"] and kind_by_name(assignment["kind"]).runs_model:
        import torch

        torch.set_num_threads(assignment["threads"])
    try:
        if assignment.get("helper"):
            help_out(assignment, channel, loaded)
        else:
            carry_out(assignment, channel, loaded)
    except BitquotaError as error:
        channel.send(Failed(error=error))
    except MemoryError:
        msg = "the job must fit the memory of a worker; it does not: use fewer samples"
        channel.send(Failed(error=MeasurementFailed(msg)))
    except Exception as error:  # noqa: BLE001  # a stranger's model may raise anything
        import traceback

        traceback.print_exc()
        said = " ".join(str(error).split())[:500]
        msg = f"the model must run on the calibration set; it raised {type(error).__name__}: {said}"
        channel.send(Failed(error=MeasurementFailed(msg)))
    channel.send(Ended(peak_bytes=peak_bytes()))


def warm_up() -> None:
    """Run a whole allocation of two tiny layers, so that all that loads late is loaded.

    torch, numba and the solver import half of themselves on first use: three seconds of processor
    time that the first real job would wait for.
    """
    import torch

    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import finish
    from bitquota.search.allocate import allocate

    tiny = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    for parameter in tiny.parameters():
        values = torch.linspace(-1, 1, parameter.numel())
        parameter.data = values.reshape(parameter.shape)
    inputs = torch.linspace(-1, 1, 32).reshape(8, 4)
    request = PlanRequest(budgets=("3 bits",), weight_bits=(2, 4), samples=4, holdout_samples=4)
    model = finish(tiny, source="warm-up", architecture="warm-up")
    # On the processor: looking for a GPU would forbid every fork to use one.
    samples = CalibrationSet(inputs=(inputs,))
    allocate(model, samples, request, context=Context(device="cpu"))
    load_all_kernels()


def load_all_kernels() -> None:
    """Load what numba compiles, the solver's kernels and those of rounding."""
    from bitquota.quantizers import column_kernels, scale_kernels
    from bitquota.solver import loading

    column_kernels.load_kernels()
    scale_kernels.load_kernels()
    loading.load_kernels()


def carry_out(assignment: JsonObject, channel: Channel, loaded: Loaded) -> None:
    """Run one assignment and send its results in pieces and messages of type ``result``."""
    work = _work(assignment, channel, loaded)
    kind_by_name(assignment["kind"]).run(work)


def help_out(assignment: JsonObject, channel: Channel, loaded: Loaded) -> None:
    """Measure what the driver asks for, task after task, into its ledger."""
    from bitquota.measurement_setup import build_setup

    work = _work(assignment, channel, loaded)
    context = work.context.part()
    request = PlanRequest.from_json(assignment["request"])
    measure = task_measurer(
        build_setup(work.measured_model(), work.samples(), request, context=context)
    )
    head, _ = channel.ask(Idle())
    while head["type"] == "task":
        measure(Task.from_json(head["task"]))
        head, _ = channel.ask(Idle(done=head["number"]))


def task_measurer(setup: Setup) -> Callable[[Task], None]:
    """Return what carries out tasks of a job into the ledger of ``setup``.

    It keeps one runner at a time, on the samples of the last task: runners hold activations.
    """
    from bitquota.search.portfolio import raced_samples
    from bitquota.sensitivity.measures.parts import carry_out as run_task

    searched = (setup.holdout, raced_samples(setup), *setup.spare)
    sets = {samples_digest(samples): samples for samples in searched}
    held = ("", setup.runner())

    def measure(task: Task) -> None:
        nonlocal held
        wanted = task.samples if task.samples in sets else ""
        if wanted != held[0]:
            held = (wanted, setup.runner(sets.get(wanted)))
        run_task(task, held[1], setup.table, setup.loss, context=setup.context)

    return measure


def _work(assignment: JsonObject, channel: Channel, loaded: Loaded) -> Work:
    return Work(
        request=assignment["request"],
        inputs=assignment["inputs"],
        loaded=loaded,
        ledger=RemoteLedger(channel),
        send=channel.send,
        cancelled=channel.cancelled.is_set,
        device=_device(assignment),
        memory_bytes=int(assignment["memory_bytes"]),
        scratch=Path.cwd(),
        executor=partial(measure_ahead, channel) if assignment.get("helped") else None,
    )


def _device(assignment: JsonObject) -> str:
    """Return the device of this evaluator; helpers on one host take its GPUs in turn."""
    rank = int(assignment.get("rank", 0))
    if assignment["device"] != "auto" or not rank:
        return str(assignment["device"])

    import torch

    return f"cuda:{rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "auto"


def die_with_parent(parent: int) -> None:
    """Have this process killed when its parent ends (Linux), at once if it ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent and os.getppid() != parent:
        os._exit(3)


if __name__ == "__main__":
    main()

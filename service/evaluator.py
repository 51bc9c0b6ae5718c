"""The evaluator: the one process that loads an uploaded model and runs it.

It gets one order over its standard input, asks the driver for ledger entries, hands it every new
one at once, and answers with plans. It opens no database and no network, so that it can live in a
sandbox; whatever a model does in here, it can only send messages that the driver checks.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

from bitquota.canonical import canonical_json
from bitquota.errors import BitquotaError, MeasurementFailed
from bitquota.service import wire
from bitquota.service.sandbox import limit_resources

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import BinaryIO

    import numpy as np
    from numpy.typing import NDArray

    from bitquota.canonical import JsonObject
    from bitquota.progress import Progress

_PR_SET_PDEATHSIG = 1


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

    def send(self, head: JsonObject, parts: Sequence[bytes] = ()) -> None:
        """Send one message."""
        with self._sending:
            wire.send(self._sink, head, parts)

    def next(self) -> tuple[JsonObject, list[bytes]]:
        """Return the next message that is not a cancel."""
        return self._answers.get()

    def ask(self, head: JsonObject, parts: Sequence[bytes] = ()) -> tuple[JsonObject, list[bytes]]:
        """Send one message and return its answer."""
        self.send(head, parts)
        return self.next()


class RemoteLedger:
    """The tenant's ledger, which the driver keeps; a put returns when it is committed."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def __len__(self) -> int:
        """Return the number of entries."""
        return int(self._channel.ask({"type": "ledger_size"})[0]["size"])

    def get(self, key: str) -> NDArray[np.float64] | None:
        """Return the array under ``key``, or ``None``."""
        return self.get_many([key]).get(key)

    def get_many(self, keys: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """Return the arrays of those ``keys`` that are there."""
        return wire.unpack(*self._channel.ask({"type": "ledger_get", "keys": list(keys)}))

    def put(self, key: str, array: NDArray[np.float64]) -> None:
        """Store one array."""
        self.put_many({key: array})

    def put_many(self, entries: Mapping[str, NDArray[np.float64]]) -> None:
        """Store several arrays, all of them or none."""
        head, parts = wire.pack(entries)
        self._channel.ask({"type": "ledger_put"} | head, parts)


def main() -> None:
    """Import everything heavy, wait for one order, carry it out, end.

    Arguments: bytes of private memory, bytes of one file; or ``--warm-up``, which compiles the
    solver's kernels into ``NUMBA_CACHE_DIR`` and ends.
    """
    if sys.argv[1:] == ["--warm-up"]:
        warm_up()
        return
    die_with_parent(int(os.environ.get("BITQUOTA_PARENT_PID", "0")))
    limit_resources(int(sys.argv[1]), int(sys.argv[2]))
    source = os.fdopen(os.dup(0), "rb")
    sink = os.fdopen(os.dup(1), "wb")
    # A model or a library that prints must not speak into the protocol.
    os.dup2(2, 1)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    channel = Channel(source, sink)

    import torch

    channel.start()
    warm_up()
    channel.send({"type": "ready", "pid": os.getpid()})
    order, _ = channel.next()
    if order["threads"]:
        torch.set_num_threads(order["threads"])
    try:
        carry_out(order, channel)
    except BitquotaError as error:
        channel.send(_failed(error))
    except MemoryError:
        msg = "the job must fit the memory of a worker; it does not: use fewer samples"
        channel.send(_failed(MeasurementFailed(msg)))
    except Exception as error:  # noqa: BLE001  # a stranger's model may raise anything
        import traceback

        traceback.print_exc()
        said = " ".join(str(error).split())[:500]
        msg = f"the model must run on the calibration set; it raised {type(error).__name__}: {said}"
        channel.send(_failed(MeasurementFailed(msg)))
    channel.send({"type": "end"})


def warm_up() -> None:
    """Run a whole allocation of two tiny layers, so that all that loads late is loaded.

    torch, numba and the solver import half of themselves on first use: three seconds of processor
    time that the first real job would wait for.
    """
    import torch

    from bitquota.allocate import allocate
    from bitquota.formats.models import finish
    from bitquota.request import PlanRequest
    from bitquota.sensitivity.calibration import CalibrationSet
    from bitquota.sensitivity.ledger import MemoryLedger

    tiny = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    for parameter in tiny.parameters():
        values = torch.linspace(-1, 1, parameter.numel())
        parameter.data = values.reshape(parameter.shape)
    inputs = torch.linspace(-1, 1, 32).reshape(8, 4)
    request = PlanRequest(budgets=("3 bits",), weight_bits=(2, 4), samples=4, holdout_samples=4)
    model = finish(tiny, source="warm-up", architecture="warm-up")
    allocate(model, CalibrationSet(inputs=(inputs,)), request, ledger=MemoryLedger())


def _failed(error: BitquotaError) -> JsonObject:
    from bitquota.service.problems import problem_json

    return {"type": "error", "problem": problem_json(error)}


def carry_out(order: JsonObject, channel: Channel) -> None:
    """Run one order and send its results as messages of type ``result``."""
    from bitquota.allocate import allocate
    from bitquota.formats import load_calibration, load_model
    from bitquota.request import PlanRequest

    def on_progress(progress: Progress) -> None:
        channel.send({"type": "progress", "progress": progress.to_json()})

    def say(stage: str) -> None:
        channel.send({"type": "progress", "progress": {"stage": stage, "done": 0, "total": 1}})

    request = PlanRequest.from_json(order["request"])
    say("load")
    model = load_model(order["model"], allow_factory=False)
    calibration = load_calibration(order["dataset"])
    common: dict[str, Any] = {
        "ledger": RemoteLedger(channel),
        "on_progress": on_progress,
        "cancelled": channel.cancelled.is_set,
        "device": order["device"],
    }
    if order["kind"] == "measure":
        from bitquota.allocate import measure_matrix

        matrix = measure_matrix(model, calibration, request, **common)
        channel.send({"type": "result", "name": "matrix"}, [matrix.to_bytes()])
        return
    allocation = allocate(model, calibration, request, **common)
    channel.send({"type": "result", "name": "matrix"}, [allocation.matrix.to_bytes()])
    inventory = canonical_json(allocation.inventory.to_json()).encode()
    channel.send({"type": "result", "name": "inventory"}, [inventory])
    for plan in allocation.plans:
        channel.send({"type": "result", "name": "plan"}, [plan.dumps().encode()])


def die_with_parent(parent: int) -> None:
    """Have this process killed when its parent ends (Linux), at once if it ended already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent and os.getppid() != parent:
        os._exit(3)


if __name__ == "__main__":
    main()

"""One function of many numbers, computed in several processes, with the results in order.

The processes are forked, so that they see everything that the function does: the weights of a
block, samples, what is kept in memory and in files. Nothing is sent to them, and tensors come back
through pipes. What is made of results is made here, in the order of the numbers, so it does not
depend on how many processes there are.

Design: docs/design/language-models.md
"""

from __future__ import annotations

import json
import os
import signal
import warnings
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import torch

from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor

MOST = 4
"""Processes at most: each takes an eighth of the memory of a measurement for its batch."""


@dataclass(frozen=True, slots=True)
class Processes:
    """How many processes share the work, this one included."""

    count: int = 1

    def __post_init__(self) -> None:
        """Raise ``InvalidInput`` where there cannot be so many."""
        if not 1 <= self.count <= MOST:
            msg = f"there must be 1 to {MOST} processes; got {self.count}"
            raise InvalidInput(msg, processes=self.count)
        if self.count > 1 and not hasattr(os, "fork"):
            msg = f"several processes need a system that can fork; got {self.count}: leave it out"
            raise InvalidInput(msg, processes=self.count)

    def check_device(self, device: torch.device) -> None:
        """Raise ``InvalidInput`` unless processes may compute on a device."""
        if self.count > 1 and device.type != "cpu":
            msg = (
                f"several processes must compute on the CPU; got --device {device}: leave "
                "one out; several GPUs take a job each, every one with its own CUDA_VISIBLE_DEVICES"
            )
            raise InvalidInput(msg, processes=self.count, device=str(device))

    def map(
        self, function: Callable[[int], Mapping[str, Tensor]], n: int
    ) -> Iterator[Mapping[str, Tensor]]:
        """Yield ``function(0)`` to ``function(n - 1)``, in this order.

        What a process that died had not handed over is computed here.

        Args:
            function: Returns tensors by name. What else it does is seen here only where it is
                called here, so it should do nothing else.
            n: How many results there are.

        Cost: each process holds one result until it was taken. Forking takes some 10 ms.
        """
        count = min(self.count, n)
        if count < 2:
            yield from map(function, range(n))
            return
        with ExitStack() as stack, _one_thread():
            helpers = [
                stack.enter_context(_helper(function, range(first, n, count)))
                for first in range(1, count)
            ]
            for k in range(n):
                found = _received(helpers[k % count - 1]) if k % count else None
                yield function(k) if found is None else found


@contextmanager
def _one_thread() -> Iterator[None]:
    """Within the context torch computes in one thread: those of OpenMP do not outlive a fork."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _helper(function: Callable[[int], Mapping[str, Tensor]], numbers: range) -> Iterator[IO[bytes]]:
    """Yield the end of a pipe into which a new process writes results."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # Other threads hold nothing that the new process asks for.
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process == 0:
        try:
            os.close(reading)
            with os.fdopen(writing, "wb") as pipe:
                for number in numbers:
                    _send(pipe, function(number))
        finally:
            # Whatever went wrong is found again where it can be told.
            os._exit(0)
    os.close(writing)
    try:
        with os.fdopen(reading, "rb") as pipe:
            yield pipe
    finally:
        # It may be at work still where this process gives up.
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def _send(pipe: IO[bytes], result: Mapping[str, Tensor]) -> None:
    tensors = {name: value.detach().contiguous() for name, value in result.items()}
    about = [
        [name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()
    ]
    header = json.dumps(about).encode()
    pipe.write(len(header).to_bytes(8, "little") + header)
    for tensor in tensors.values():
        pipe.write(_bytes_of(tensor))
    pipe.flush()


def _bytes_of(tensor: Tensor) -> bytearray | memoryview:
    if not tensor.numel():
        return bytearray()
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _received(pipe: IO[bytes]) -> dict[str, Tensor] | None:
    """Return the next result, or ``None`` if its process has ended without it."""
    found: dict[str, Tensor] = {}
    with suppress(EOFError):
        length = bytearray(8)
        _read(pipe, length)
        header = bytearray(int.from_bytes(length, "little"))
        _read(pipe, header)
        for name, kind, shape in json.loads(header):
            found[name] = torch.empty(shape, dtype=getattr(torch, kind))
            _read(pipe, _bytes_of(found[name]))
        return found
    return None


def _read(pipe: IO[bytes], place: bytearray | memoryview) -> None:
    """Fill a place; raises ``EOFError`` if there are fewer bytes."""
    if pipe.readinto(place) < len(place):  # type: ignore[attr-defined]
        raise EOFError

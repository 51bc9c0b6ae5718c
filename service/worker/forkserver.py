"""The process in the sandbox that evaluators are forked from: torch and the model loaded once.

It runs on one thread, because a fork copies only the thread that calls it, and never touches a
GPU, because CUDA does not survive a fork; evaluators do both afterwards.

Design: docs/design/sandbox.md
"""

from __future__ import annotations

import os
import signal
import socket
from functools import partial
from typing import TYPE_CHECKING, Any

from bitquota.service import wire
from bitquota.service.jobs.kinds import kind_by_name
from bitquota.service.jobs.work import Loaded

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import BinaryIO

    from bitquota.canonical import JsonObject


def preload(assignment: JsonObject, loaded: Loaded) -> None:
    """Load the one model and the one calibration set of an assignment, if it has them."""
    if not kind_by_name(assignment["kind"]).runs_model:
        return
    torch_on_one_thread()

    from bitquota.models.load import load_within
    from bitquota.models.samples import load_calibration

    ways: dict[str, Callable[[str], Any]] = {
        "model": partial(
            load_within, memory_bytes=int(assignment["memory_bytes"]), allow_factory=False
        ),
        "dataset": load_calibration,
    }
    for role, how in ways.items():
        paths = assignment["inputs"].get(role, ())
        if len(paths) == 1:
            try:
                loaded.load(paths[0], how)
            except Exception:  # noqa: BLE001  # kept in ``loaded`` for the evaluator
                return


def torch_on_one_thread() -> None:
    """Import torch and keep it from starting threads, which would not survive a fork."""
    import torch

    torch.set_num_threads(1)


def serve(
    control: socket.socket, work: Callable[[JsonObject, BinaryIO, BinaryIO, Loaded], None]
) -> None:
    """Fork an evaluator for each socket that arrives over ``control``, until that is closed.

    Args:
        control: Where sockets to drivers arrive.
        work: What a fork does with its assignment, over its two streams; then it ends.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies: nobody asks how a fork ended
    loaded = Loaded()
    while True:
        data, handles, _, _ = socket.recv_fds(control, 1, 1)
        if not data or not handles:
            return
        with socket.socket(fileno=handles[0]) as stream:
            source, sink = stream.makefile("rb"), stream.makefile("wb")
            with source, sink:
                message = wire.receive(source)
                if message is None:
                    continue
                preload(message[0], loaded)
                if os.fork() == 0:
                    control.close()
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    _become_evaluator(work, message[0], source, sink, loaded)


def _become_evaluator(
    work: Callable[[JsonObject, BinaryIO, BinaryIO, Loaded], None],
    assignment: JsonObject,
    source: BinaryIO,
    sink: BinaryIO,
    loaded: Loaded,
) -> None:
    status = 1
    try:
        work(assignment, source, sink, loaded)
        status = 0
    finally:
        os._exit(status)  # never back into the loop of the fork server

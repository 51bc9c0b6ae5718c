"""The local engine: a fork server in a sandbox, and one forked evaluator for each worker.

One process in the sandbox imports torch, warms the solver and, once there is a job, loads the
model; every worker is a fork of it. So further workers of a job cost milliseconds, and all share
one copy of torch and of the model. A fork server serves one job and never sees another's. One that
neither waits in reserve nor has several workers warms up nothing: its job imports what it needs.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from bitquota.errors import UnsafeModel
from bitquota.service import wire
from bitquota.service.security.limits import Group, group_of, limits_of
from bitquota.service.security.sandbox import SandboxDirectory, counts_processes, launch, sandbox_of
from bitquota.service.security.watch import Watch
from bitquota.service.worker.engines.engine import Assignment, Inbox, stage
from bitquota.service.worker.output import log_output
from bitquota.service.worker.processes import OWNER_FILE, owner_name

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bitquota.canonical import JsonObject
    from bitquota.errors import LimitExceeded
    from bitquota.service.settings import Settings

EVALUATOR = ("-m", "bitquota.service.worker.evaluator")
"""What Python runs in the sandbox."""


class LocalWorker:
    """One forked evaluator at the other end of a socket, and the thread that reads it.

    Args:
        stream: Our end.
        inbox: Where its messages go.
        verdict: Tells, once it is gone, which limit its job was ended for, if it was.
    """

    place = "local"

    def __init__(
        self, stream: socket.socket, inbox: Inbox, verdict: Callable[[], LimitExceeded | None]
    ) -> None:
        self._verdict = verdict
        self._socket = stream
        self._source = stream.makefile("rb")
        self._sink = stream.makefile("wb")
        self._inbox = inbox

    def listen(self) -> None:
        """Begin to read."""
        threading.Thread(target=self._read, name="evaluator", daemon=True).start()

    def _read(self) -> None:
        try:
            while (message := wire.receive(self._source)) is not None:
                self._inbox.put((self, message))
        except BaseException as err:  # noqa: BLE001  # handed to the thread that waits
            self._inbox.put((self, self._verdict() or err))
        else:
            self._inbox.put((self, self._verdict()))
        finally:
            with contextlib.suppress(OSError):
                self._sink.close()
            self._source.close()
            self._socket.close()

    def send(self, head: JsonObject, parts: Sequence[bytes] = ()) -> None:
        """Send one message; a dead evaluator is noticed by its silence."""
        try:
            wire.send(self._sink, head, parts)
        except (OSError, ValueError):
            return

    def end(self) -> None:
        """Hang up: an evaluator that nobody listens to ends."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)


class ForkServer:
    """The process that evaluators are forked from, in a sandbox directory of its own.

    Args:
        settings: Of the server.
        scratches: Folder for the sandbox directory.
    """

    def __init__(self, settings: Settings, scratches: Path) -> None:
        scratches.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix="job-", dir=scratches.absolute()))
        self.directory = SandboxDirectory(scratch=scratch)
        self.directory.create()
        (scratch / OWNER_FILE).write_text(owner_name(os.getpid()))
        program = sandbox_of(settings)
        self.sandboxed = program is not None
        self._group: Group | None = group_of(settings)
        limits = limits_of(settings)
        # More than the limit: at the limit itself forks would fail, and nobody would tell why.
        most = limits.processes * 5 // 4 if self.sandboxed and counts_processes() else 0
        ours, theirs = socket.socketpair()
        with theirs:
            warm = settings.reserve or settings.workers > 1
            numbers = (limits.memory_bytes, limits.file_bytes, most, warm, theirs.fileno())
            self._control = ours
            self.process = launch(
                program,
                self.directory.view(settings.data_dir, limits.tmp_bytes),
                [*EVALUATOR, *(str(int(number)) for number in numbers)],
                enter=() if self._group is None else self._group.enter,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        log_output(self.process)
        self._watch = Watch(
            self.process.pid,
            self.directory.work,
            limits,
            sandboxed=self.sandboxed,
            verdict=self._group_verdict,
        )
        self._watch.start()

    def _group_verdict(self) -> LimitExceeded | None:
        return None if self._group is None else self._group.verdict()

    def verdict(self) -> LimitExceeded | None:
        """Return which limit the job was ended for, or has died of, if it was a limit."""
        if self._watch.verdict is None:
            with contextlib.suppress(OSError):  # all of it is gone
                return self._watch.look()
        return self._watch.verdict or self._group_verdict()

    def fork(self, inbox: Inbox) -> LocalWorker:
        """Return a worker that waits for its assignment."""
        ours, theirs = socket.socketpair()
        with theirs:
            worker = LocalWorker(ours, inbox, self.verdict)
            try:
                socket.send_fds(self._control, [b"w"], [theirs.fileno()])
            except OSError:  # it has died; the worker's silence says so
                ours.shutdown(socket.SHUT_RDWR)
        return worker

    def close(self) -> None:
        """Kill it and all that it forked, and remove the sandbox directory."""
        self._watch.stop()
        self._control.close()
        self._watch.end()
        self.process.wait()
        if self._group is not None:
            self._group.remove()
        self.directory.remove()


class LocalEngine:
    """Evaluators on this host.

    Args:
        settings: Of the server.
        scratches: Folder for sandbox directories; by default below the data folder.
    """

    name: ClassVar[str] = "local"
    starts_slowly: ClassVar[bool] = False

    def __init__(self, settings: Settings, scratches: Path | None = None) -> None:
        self._settings = settings
        self._scratches = scratches or settings.data_dir / "scratch"
        self._server: ForkServer | None = None

    def open(self) -> None:
        """Start the fork server; see ``ForkServer`` for what it loads."""
        if self._server is None:
            self._server = ForkServer(self._settings, self._scratches)

    def start(self, assignment: Assignment, inbox: Inbox) -> LocalWorker:
        """Fork one evaluator; see ``Engine.start``."""
        self.open()
        assert self._server is not None  # noqa: S101  # opened above
        if assignment.needs_sandbox and not self._server.sandboxed:
            msg = (
                "a .pt2 of somebody else holds a program and must run in a sandbox; "
                f"'{socket.gethostname()}' has none: install bubblewrap there, or upload a zip of "
                "config.json and safetensors files"
            )
            raise UnsafeModel(msg, host=socket.gethostname())
        inputs = stage(self._server.directory, assignment.input_files)
        worker = self._server.fork(inbox)
        worker.send(assignment.head | {"inputs": inputs})
        worker.listen()
        return worker

    def close(self) -> None:
        """End the fork server and every evaluator."""
        if self._server is not None:
            self._server.close()
            self._server = None

"""The Ray engine: every evaluator is the child of an actor somewhere in a cluster.

An actor does on its node what the local engine does here: it starts a fork server in that node's
sandbox. It carries messages in both directions and nothing else; models never enter the actor's
own process. Inputs go once to each node through Ray's object store and lie there as files that
their digest names. Whoever holds the cluster's token may run anything on every node, so the token
is for the operator, never for tenants.

Design: docs/design/sandbox.md
"""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bitquota.canonical import digest_file
from bitquota.errors import (
    BitquotaError,
    InvalidInput,
    MeasurementFailed,
    MissingDependency,
    ServiceError,
)
from bitquota.service.jobs.messages import Failed, encode
from bitquota.service.settings import Settings
from bitquota.service.store.blobs import BlobStore, trim_copies
from bitquota.service.worker.engines.local import LocalEngine
from bitquota.service.worker.processes import remove_abandoned

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bitquota.canonical import JsonObject
    from bitquota.service.worker.engines.engine import Assignment, Inbox, InputFile

_BATCH_S = 5.0
_BATCH = 64
_JOIN_S = 2.0
_CALLS = 4
"""Calls of one actor at the same time: one waits for messages, others deliver them."""


class Host:
    """What runs as an actor: one local engine on its node.

    Args:
        settings: Variables of ``Settings``, as the driver has them.
    """

    def __init__(self, settings: dict[str, str]) -> None:
        import queue

        given = Settings.from_environment(settings)
        self._folder = node_folder(given)
        remove_abandoned(self._folder / "scratch")
        # Actors of all slots and workers may be on this node, and share its memory.
        self._settings = replace(
            given,
            data_dir=self._folder,
            engine="local",
            slots=max(1, given.slots) * given.workers,
            workers=1,
            reserve=False,
        )
        os.nice(given.nice)
        self._inbox: Inbox = queue.SimpleQueue()
        self._engine: Any = None
        self._worker: Any = None
        self._held: dict[int, tuple[JsonObject, Sequence[bytes]]] = {}
        self._passed_on = 0
        self._passing = threading.Lock()

    def begin(self, assignment: Assignment, *contents: Any) -> str:  # noqa: ANN401  # arrays of bytes
        """Start the evaluator with its assignment and return the address of this node."""
        import ray

        input_files = [
            replace(input_file, path=self._stored(input_file, content))
            for input_file, content in zip(assignment.input_files, contents, strict=True)
        ]
        trim_copies(self._folder / "blobs", self._settings.blob_cache_bytes, time.time())
        self._engine = LocalEngine(self._settings, self._folder / "scratch")
        try:
            self._worker = self._engine.start(
                replace(assignment, input_files=tuple(input_files)), self._inbox
            )
        except BitquotaError as error:
            said = encode(Failed(error=error))
            self._inbox.put((None, said))  # type: ignore[arg-type]  # nobody looks at it
        self._pass_on()
        return str(ray.util.get_node_ip_address())

    def _stored(self, input_file: InputFile, content: Any) -> Path:  # noqa: ANN401
        """Return a file with the bytes of an input, written once for all actors of the node."""
        store = BlobStore(self._folder / "blobs")
        place = store.place(input_file.digest)
        if place.is_file():
            if digest_file(place) == input_file.digest:
                os.utime(place)
                return place
            place.unlink()
        incoming = store.incoming(len(content))
        try:
            incoming.write(memoryview(content))
            found = store.keep(incoming)
        finally:
            incoming.discard()
        if found != input_file.digest:
            msg = f"what arrives at a node must have its digest {input_file.digest}; it has {found}"
            raise ServiceError(msg)
        return place

    def send(self, number: int, head: JsonObject, parts: Sequence[bytes]) -> None:
        """Pass message ``number`` on to the evaluator, after all before it.

        Calls of an actor with several threads may overtake each other.
        """
        with self._passing:
            self._held[number] = head, parts
        self._pass_on()

    def _pass_on(self) -> None:
        with self._passing:
            while self._worker is not None and self._passed_on in self._held:
                self._worker.send(*self._held.pop(self._passed_on))
                self._passed_on += 1

    def receive(self) -> list[tuple[JsonObject, list[bytes]] | None]:
        """Return what the evaluator has said since; ``None`` once it is gone."""
        import queue

        said: list[tuple[JsonObject, list[bytes]] | None] = []
        with contextlib.suppress(queue.Empty):
            while len(said) < _BATCH:
                message = self._inbox.get(timeout=0.0 if said else _BATCH_S)[1]
                if isinstance(message, MeasurementFailed):  # why its job was ended here
                    return [*said, encode(Failed(error=message)), None]
                if message is None or isinstance(message, BaseException):
                    return [*said, None]
                said.append(message)
        return said

    def end(self) -> None:
        """End the evaluator and remove what it left."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


class RayWorker:
    """One actor, and the thread that fetches what its evaluator says."""

    def __init__(
        self,
        ray: Any,  # noqa: ANN401  # the module and its handles have no types
        actor: Any,  # noqa: ANN401
        assignment: Assignment,
        contents: list[Any],
        inbox: Inbox,
    ) -> None:
        self._ray, self._actor, self._inbox = ray, actor, inbox
        self._order, self._contents = assignment, contents
        self._ended = threading.Event()
        self._sent = 0
        self._thread = threading.Thread(target=self._run, name="actor", daemon=True)
        self.place = "a node of the cluster"

    def listen(self) -> None:
        """Begin; the actor may have to wait for a free node first."""
        self._thread.start()

    def _run(self) -> None:
        try:
            began = self._actor.begin.remote(self._order, *self._contents)
            self.place = self._ray.get(began)
            while not self._ended.is_set():
                for message in self._ray.get(self._actor.receive.remote()):
                    self._inbox.put((self, message))
                    if message is None:
                        return
        except BaseException as err:  # noqa: BLE001  # handed to the thread that waits
            self._inbox.put((self, err))

    def send(self, head: JsonObject, parts: Sequence[bytes] = ()) -> None:
        """Send one message; a dead actor is noticed by its silence."""
        with contextlib.suppress(Exception):
            self._actor.send.remote(self._sent, head, list(parts))
            self._sent += 1

    def end(self) -> None:
        """End evaluator and actor."""
        if self._ended.is_set():
            return
        self._ended.set()
        with contextlib.suppress(Exception):
            self._ray.get(self._actor.end.remote(), timeout=2.0)
        with contextlib.suppress(Exception):
            self._ray.kill(self._actor)
        self._thread.join(_JOIN_S)


class RayEngine:
    """Evaluators on the nodes of a Ray cluster that this host belongs to.

    Args:
        settings: Of the server.
    """

    name: ClassVar[str] = "ray"
    starts_slowly: ClassVar[bool] = True

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._ray: Any = None
        self._stored: dict[str, Any] = {}
        self._workers: list[RayWorker] = []

    def open(self) -> None:
        """Connect; see ``Engine.open``."""
        if self._ray is None:
            self._ray = connect(self._settings)

    def start(self, assignment: Assignment, inbox: Inbox) -> RayWorker:
        """Start one actor; see ``Engine.start``."""
        self.open()
        settings = self._settings
        threads = max(1, settings.threads)
        # SPREAD: a helper on the same node would only share what the node has.
        kind = self._ray.remote(Host).options(
            num_cpus=threads,
            num_gpus=settings.ray_gpus or None,
            max_concurrency=_CALLS,
            max_restarts=0,
            scheduling_strategy="SPREAD",
        )
        # The database, its password and the keys stay here.
        known = settings.to_environment()
        passed = {
            f"BITQUOTA_{name}": known[f"BITQUOTA_{name}"]
            for name in (
                "SANDBOX", "MAX_MEMORY_BYTES", "MAX_PROCESSES", "MAX_TMP_BYTES",
                "MAX_SCRATCH_BYTES", "MAX_SCRATCH_FILES", "MAX_UPLOAD_BYTES", "THREADS", "NICE",
                "DANGEROUSLY_RUN_CODE_OF_STRANGERS", "RAY_SCRATCH", "SLOTS", "WORKERS",
                "BLOB_CACHE_BYTES",
            )
        }  # fmt: skip
        contents = [self._put(input_file) for input_file in assignment.input_files]
        worker = RayWorker(self._ray, kind.remote(passed), assignment, contents, inbox)
        self._workers.append(worker)
        worker.listen()
        return worker

    def _put(self, input_file: InputFile) -> Any:  # noqa: ANN401  # an object reference
        """Return the object of a stored file; each node fetches it once."""
        import numpy as np

        if input_file.digest not in self._stored:
            content = np.memmap(input_file.path, dtype=np.uint8, mode="r")
            self._stored[input_file.digest] = self._ray.put(np.asarray(content))
        return self._stored[input_file.digest]

    def close(self) -> None:
        """End every actor and leave the cluster."""
        for worker in self._workers:
            worker.end()
        self._workers.clear()
        self._stored.clear()
        if self._ray is not None:
            self._ray.shutdown()
            self._ray = None


def connect(settings: Settings) -> Any:  # noqa: ANN401  # the module
    """Return Ray, connected to the cluster that the settings name.

    Raises:
        MissingDependency: Ray is not installed.
        InvalidInput: There is no token, or the token file is not there.
        ServiceError: The cluster cannot be reached.
    """
    # Ray 2.60 leaves authentication off in clients unless told otherwise; the head has it on.
    os.environ["RAY_AUTH_MODE"] = "token"
    if settings.ray_token_file:
        if not Path(settings.ray_token_file).is_file():
            msg = f"BITQUOTA_RAY_TOKEN_FILE must exist; '{settings.ray_token_file}' does not"
            raise InvalidInput(msg, path=settings.ray_token_file)
        os.environ["RAY_AUTH_TOKEN_PATH"] = settings.ray_token_file
    elif not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        msg = (
            "a cluster must be protected by a token that this host has too; set "
            "BITQUOTA_RAY_TOKEN_FILE to the file that every node reads as RAY_AUTH_TOKEN_PATH"
        )
        raise InvalidInput(msg)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray = importlib.import_module("ray")
    except ImportError as err:
        msg = "the engine 'ray' needs Ray; install it with: pip install 'bitquota[ray]'"
        raise MissingDependency(msg, extra="ray") from err
    try:
        ray.init(
            address=settings.ray_address,
            namespace="bitquota",
            log_to_driver=False,
            configure_logging=False,
            include_dashboard=False,
        )
    except (ConnectionError, RuntimeError, ValueError, OSError) as err:
        said = " ".join(str(err).split())[:300]
        msg = (
            f"the Ray cluster at '{settings.ray_address}' must be reachable and this host a node "
            f"of it ('ray start --address=...'); it says: {said}"
        )
        raise ServiceError(msg, address=settings.ray_address) from err
    return ray


def node_folder(settings: Settings) -> Path:
    """Return the folder for models and scratch space on a node, made for this user alone."""
    chosen = settings.ray_scratch or str(Path(tempfile.gettempdir()) / f"bitquota-{os.getuid()}")
    folder = Path(chosen)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        msg = f"BITQUOTA_RAY_SCRATCH must be a folder of our own; '{folder}' is somebody else's"
        raise InvalidInput(msg, path=str(folder))
    return folder

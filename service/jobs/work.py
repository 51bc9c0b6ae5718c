"""The work of one job inside the sandbox: its inputs, its ledger, and the way out for results."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bitquota.context import DEFAULT_MEMORY_BYTES, Context
from bitquota.errors import Cancelled, InvalidInput
from bitquota.journal import Journal
from bitquota.plan import Plan
from bitquota.progress import Progress
from bitquota.service.jobs.messages import Piece, Progressed, Whole

if TYPE_CHECKING:
    from collections.abc import Callable

    from bitquota.canonical import JsonObject
    from bitquota.context import Executor, Ledger
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel
    from bitquota.progress import IsCancelled
    from bitquota.service.jobs.messages import Message

PIECE_BYTES = 4 * 2**20
"""Results travel in pieces of this size, so that neither side holds a large one in memory."""

CHECKPOINT = "checkpoint"
"""Role of what an earlier attempt left, among the inputs of an evaluator."""

KEPT_PREFIX = f"{CHECKPOINT}-"
"""Of the names of these files."""

JOURNALED = re.compile(r"(?P<work>[0-9a-f]{32})-(?P<name>[a-z][a-z0-9-]{0,59})")
"""Name that the driver keeps a file of a journal under: which work, and what of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What the ``run`` of a job kind gets.

    Attributes:
        request: As the kind accepted it.
        inputs: Files of every input, by role.
        loaded: Inputs that the fork server loaded before this process was forked.
        ledger: The tenant's measurements.
        send: Sends one message to the driver.
        cancelled: Whether the driver asked for the end.
        device: ``auto``, or a torch device.
        memory_bytes: What a measurement may keep in memory.
        scratch: An empty folder to write to.
        executor: Shares a measurement out to helpers, where the job has any.
    """

    request: JsonObject
    inputs: dict[str, list[str]]
    loaded: Loaded
    ledger: Ledger
    send: Callable[[Message], None]
    cancelled: IsCancelled
    device: str
    scratch: Path
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    executor: Executor | None = None

    @property
    def context(self) -> Context:
        """How long work runs here: whom it tells, and where measurements are kept."""
        return Context(
            ledger=self.ledger,
            on_progress=self.on_progress,
            cancelled=self.cancelled,
            device=self.device,
            memory_bytes=self.memory_bytes,
            executor=self.executor,
            journal=self._journal(),
        )

    def _journal(self) -> Journal:
        """Return the journal of long walks, with what an earlier attempt wrote in it."""
        folder = self.scratch / "unfinished"
        if not folder.exists():
            folder.mkdir()
            for path in self.paths(CHECKPOINT):
                if found := JOURNALED.fullmatch(path.name.removeprefix(KEPT_PREFIX)):
                    (folder / found["work"]).mkdir(exist_ok=True)
                    shutil.copyfile(path, folder / found["work"] / found["name"])
        return Journal(
            folder, written=lambda path: self.keep(path, f"{path.parent.name}-{path.name}")
        )

    def on_progress(self, progress: Progress) -> None:
        """Tell the client how far the work is; raises ``Cancelled`` if that is no longer wanted."""
        if self.cancelled():
            msg = "the work was cancelled"
            raise Cancelled(msg)
        self.send(Progressed(progress=progress))

    def say(self, stage: str) -> None:
        """Tell the client what begins now."""
        self.send(Progressed(progress=Progress(stage=stage, done=0, total=1)))

    def paths(self, role: str) -> tuple[Path, ...]:
        """Return the files of an input; none where it was left out."""
        return tuple(Path(text) for text in self.inputs.get(role, ()))

    def model(self, role: str = "model") -> LoadedModel:
        """Load a model that must be there, with all weights in memory."""
        from bitquota.models.loaded import in_memory

        return in_memory(self.measured_model(role))

    def measured_model(self, role: str = "model") -> LoadedModel:
        """Load a model; weights that would not fit stay in their files."""
        from bitquota.models.load import load_within

        return self._loaded(
            role, partial(load_within, memory_bytes=self.memory_bytes, allow_factory=False)
        )

    def _loaded(self, role: str, how: Callable[[str], LoadedModel]) -> LoadedModel:
        self.say("load")
        found = cast("LoadedModel", self.loaded.load(str(self._one(role)), how))
        return replace(found, weights=self.paths("quantized"))

    def samples(self, role: str = "dataset") -> CalibrationSet:
        """Load a dataset that must be there."""
        from bitquota.models.samples import load_calibration

        return cast("CalibrationSet", self.loaded.load(str(self._one(role)), load_calibration))

    def samples_if_any(self, role: str) -> CalibrationSet | None:
        """Load a dataset, or return ``None`` where it was left out."""
        return self.samples(role) if self.paths(role) else None

    def plans(self, role: str = "plans") -> tuple[Plan, ...]:
        """Read every plan of an input."""
        return tuple(Plan.from_json(json.loads(path.read_bytes())) for path in self.paths(role))

    def give(self, name: str, data: bytes | Path) -> None:
        """Hand over a result, or the next of several, in pieces."""
        if isinstance(data, Path):
            self.send_file(data)
        else:
            for start in range(0, len(data), PIECE_BYTES):
                self.send(Piece(data=data[start : start + PIECE_BYTES]))
        self.send(Whole(name=name))

    def keep(self, path: Path, name: str) -> None:
        """Have the driver keep a file, in place of one of the same name, for another attempt."""
        self.send_file(path, checkpoint=True)
        self.send(Whole(name=name, checkpoint=True))

    def send_file(self, path: Path, *, checkpoint: bool = False) -> None:
        """Send the bytes of a file in pieces."""
        with path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                self.send(Piece(data=piece, checkpoint=checkpoint))

    def _one(self, role: str) -> Path:
        paths = self.paths(role)
        if len(paths) != 1:
            msg = f"the job must have one '{role}'; it has {len(paths)}"
            raise InvalidInput(msg, role=role)
        return paths[0]


@dataclass(slots=True)
class Loaded:
    """Inputs of the job that every evaluator needs; pages are shared until one writes to them.

    Attributes:
        inputs: What was loaded, or why it could not be, by path.
    """

    inputs: dict[str, Any] = field(default_factory=dict)

    def load(self, path: str, how: Callable[[str], Any]) -> Any:  # noqa: ANN401  # model or samples
        """Return what ``how`` makes of a file, loaded once; raises what it raised."""
        if path not in self.inputs:
            try:
                self.inputs[path] = how(path)
            except Exception as error:  # noqa: BLE001  # told by the evaluator that needs it
                self.inputs[path] = error
        found = self.inputs[path]
        if isinstance(found, Exception):
            raise found
        return found

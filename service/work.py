"""The work of one job inside the sandbox: its inputs, its ledger, and the way out for results."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from bitquota.errors import Cancelled, InvalidInput
from bitquota.plan import Plan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from bitquota.canonical import JsonObject
    from bitquota.formats import LoadedModel
    from bitquota.progress import IsCancelled, Progress
    from bitquota.sensitivity.calibration import CalibrationSet
    from bitquota.sensitivity.ledger import Ledger
    from bitquota.service.forkserver import Loaded

PIECE_BYTES = 4 * 2**20
"""Results travel in pieces of this size, so that neither side holds a large one in memory."""


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
        scratch: An empty folder to write to.
    """

    request: JsonObject
    inputs: dict[str, list[str]]
    loaded: Loaded
    ledger: Ledger
    send: Callable[[JsonObject, Sequence[bytes]], None]
    cancelled: IsCancelled
    device: str
    scratch: Path

    def on_progress(self, progress: Progress) -> None:
        """Tell the client how far the work is; raises ``Cancelled`` if that is no longer wanted."""
        if self.cancelled():
            msg = "the work was cancelled"
            raise Cancelled(msg)
        self.send({"type": "progress", "progress": progress.to_json()}, ())

    def say(self, stage: str) -> None:
        """Tell the client what begins now."""
        self.send({"type": "progress", "progress": {"stage": stage, "done": 0, "total": 1}}, ())

    def paths(self, role: str) -> tuple[Path, ...]:
        """Return the files of an input; none where it was left out."""
        return tuple(Path(text) for text in self.inputs.get(role, ()))

    def model(self) -> LoadedModel:
        """Load the input ``model``."""
        from bitquota.formats import load_model

        self.say("load")
        return cast(
            "LoadedModel",
            self.loaded.load(
                str(self._one("model")), lambda path: load_model(path, allow_factory=False)
            ),
        )

    def samples(self, role: str = "dataset") -> CalibrationSet:
        """Load a dataset that must be there."""
        from bitquota.formats import load_calibration

        return cast("CalibrationSet", self.loaded.load(str(self._one(role)), load_calibration))

    def samples_if_any(self, role: str) -> CalibrationSet | None:
        """Load a dataset, or return ``None`` where it was left out."""
        return self.samples(role) if self.paths(role) else None

    def plans(self, role: str = "plans") -> tuple[Plan, ...]:
        """Read every plan of an input."""
        return tuple(Plan.from_json(json.loads(path.read_bytes())) for path in self.paths(role))

    def give(self, name: str, data: bytes | Path) -> None:
        """Hand over a result, or the next of several, in pieces."""
        pieces = _of_file(data) if isinstance(data, Path) else _of_bytes(data)
        for piece in pieces:
            self.send({"type": "piece"}, [piece])
        self.send({"type": "result", "name": name}, ())

    def _one(self, role: str) -> Path:
        paths = self.paths(role)
        if len(paths) != 1:
            msg = f"the job must have one '{role}'; it has {len(paths)}"
            raise InvalidInput(msg, role=role)
        return paths[0]


def _of_bytes(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), PIECE_BYTES):
        yield data[start : start + PIECE_BYTES]


def _of_file(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(PIECE_BYTES):
            yield piece

"""Checkpoints of a job's training: they outlive the attempt that wrote them; the next goes on.

An evaluator has no folder that survives it. What its training writes is sent to the driver, which
keeps it below the data folder for as long as the job has not ended, and puts it into the inbox of
the next evaluator. Nobody but that job's evaluator ever reads it: to the driver it is bytes.

Design: docs/design/jobs.md
"""

from __future__ import annotations

import resource
import shutil
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from bitquota.errors import MeasurementFailed
from bitquota.service.blobs import digest_file
from bitquota.service.engines.engine import Parcel
from bitquota.service.messages import Whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import nn

    from bitquota.context import Context
    from bitquota.progress import Progress
    from bitquota.service.blobs import BlobStore, Incoming
    from bitquota.service.work import Work

ROLE = "checkpoint"
"""Role of a kept checkpoint among the inputs of an evaluator."""

FOLDER = "checkpoints"
"""Below the data folder; holds a folder for each job."""

_PREFIX = f"{ROLE}-"
_STATE_BYTES = 20
"""Bytes of a checkpoint for each trained number: itself, two moments of it, its best value, each in
four bytes, and a fourth of that to spare."""


class KeptCheckpoints:
    """The checkpoints of one job on the driver's side.

    Args:
        folder: Of this job; made when there is something to keep.
        names: What the kind of job may leave.
        blobs: Where files arrive.
        limit: Bytes of the largest.
    """

    def __init__(self, folder: Path, names: Sequence[str], blobs: BlobStore, limit: int) -> None:
        self._folder = folder
        self._names = names
        self._blobs = blobs
        self._limit = limit
        self._incoming: Incoming | None = None

    def parcels(self) -> tuple[Parcel, ...]:
        """Return what an earlier attempt left, for the next evaluator."""
        paths = [self._folder / name for name in self._names]
        return tuple(
            Parcel(role=ROLE, name=_PREFIX + path.name, digest=digest_file(path), path=path)
            for path in paths
            if path.is_file()
        )

    def piece(self, parts: Sequence[bytes]) -> None:
        """Write the next bytes of a checkpoint; raises ``TooLarge``."""
        if self._incoming is None:
            self._incoming = self._blobs.incoming(self._limit)
        for part in parts:
            self._incoming.write(part)

    def keep(self, name: str) -> None:
        """Keep what arrived as ``name``; an older one is replaced by a whole one or not at all.

        Raises:
            MeasurementFailed: The kind of job leaves no such checkpoint.
        """
        incoming, self._incoming = self._incoming, None
        if incoming is None:
            return
        try:
            if name not in self._names:
                known = ", ".join(self._names) or "none"
                msg = f"a worker may leave the checkpoints {known} of this job; it left {name!r}"
                raise MeasurementFailed(msg)
            incoming.flush()
            self._folder.mkdir(parents=True, exist_ok=True)
            incoming.path.replace(self._folder / name)
        finally:
            incoming.discard()

    def close(self) -> None:
        """Remove what arrived of a checkpoint that was not finished."""
        if self._incoming is not None:
            self._incoming.discard()

    def remove(self) -> None:
        """Remove all of them: the job has ended."""
        shutil.rmtree(self._folder, ignore_errors=True)


class SentCheckpoints:
    """The checkpoints of one job on the evaluator's side: what is new goes to the driver.

    Args:
        work: Of this attempt.
        module: What is trained.

    Attributes:
        folder: For the checkpoints of the training, those of an earlier attempt in it; ``None``
            where one would be larger than a file of an evaluator may be. Then nothing is kept,
            and another attempt begins anew.
    """

    def __init__(self, work: Work, module: nn.Module) -> None:
        self._work = work
        self._sent: dict[str, tuple[int, int]] = {}
        self.folder: Path | None = None
        limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
        needed = _STATE_BYTES * sum(p.numel() for p in module.parameters())
        if limit != resource.RLIM_INFINITY and needed > limit:
            return
        self.folder = work.scratch / FOLDER
        self.folder.mkdir()
        for path in work.paths(ROLE):
            place = self.folder / path.name.removeprefix(_PREFIX)
            shutil.copyfile(path, place)
            self._sent[place.name] = _state(place)

    @property
    def context(self) -> Context:
        """That of the job, with a look for new checkpoints after every step."""
        return replace(self._work.context, on_progress=self._on_progress)

    def path(self, name: str) -> Path | None:
        """Return where the checkpoint ``name`` belongs."""
        return None if self.folder is None else self.folder / name

    def _on_progress(self, progress: Progress) -> None:
        self.send()
        self._work.on_progress(progress)

    def send(self) -> None:
        """Send what was written since the last time."""
        for path in () if self.folder is None else sorted(self.folder.glob("*.safetensors")):
            state = _state(path)
            if self._sent.get(path.name) != state:
                self._work.send_file(path, checkpoint=True)
                self._work.send(Whole(name=path.name, checkpoint=True))
                self._sent[path.name] = state


def _state(path: Path) -> tuple[int, int]:
    known = path.stat()
    return known.st_ino, known.st_mtime_ns


@contextmanager
def sent_checkpoints(work: Work, module: nn.Module) -> Iterator[SentCheckpoints]:
    """Have checkpoints sent; also the one that a training writes when it is told to stop."""
    made = SentCheckpoints(work, module)
    try:
        yield made
    finally:
        made.send()

"""Checkpoints of a training on the evaluator's side: what is new goes to the driver.

The driver's side is ``bitquota.service.worker.checkpoints``.

Design: docs/design/jobs.md
"""

from __future__ import annotations

import resource
import shutil
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from bitquota.service.jobs.work import CHECKPOINT, KEPT_PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from torch import nn

    from bitquota.context import Context
    from bitquota.progress import Progress
    from bitquota.service.jobs.work import Work

FOLDER = "checkpoints"
"""Below the data folder; holds a folder for each job."""

_STATE_BYTES = 20
"""Bytes of a checkpoint for each trained number: itself, two moments of it, its best value, each in
four bytes, and a fourth of that to spare."""


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
        for path in work.paths(CHECKPOINT):
            place = self.folder / path.name.removeprefix(KEPT_PREFIX)
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
                self._work.keep(path, path.name)
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

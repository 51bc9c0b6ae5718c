"""Checkpoints of a job's training: they outlive the attempt that wrote them; the next goes on.

An evaluator has no folder that survives it. What its training writes is sent to the driver, which
keeps it below the data folder for as long as the job has not ended, and puts it into the inbox of
the next evaluator. Nobody but that job's evaluator ever reads it: to the driver it is bytes.

Design: docs/design/jobs.md
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from bitquota.canonical import digest_file
from bitquota.errors import MeasurementFailed
from bitquota.service.jobs.training_checkpoints import (
    PREFIX,
    ROLE,
)
from bitquota.service.worker.engines.engine import InputFile

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bitquota.service.store.blobs import BlobStore, Incoming


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

    def input_files(self) -> tuple[InputFile, ...]:
        """Return what an earlier attempt left, for the next evaluator."""
        paths = [self._folder / name for name in self._names]
        return tuple(
            InputFile(role=ROLE, name=PREFIX + path.name, digest=digest_file(path), path=path)
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

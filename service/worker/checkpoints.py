"""What a job has done so far, in files that outlive the attempt that wrote them: the next goes on.

An evaluator has no folder that survives it. The checkpoints of its training, or the journal of its
walk through a language model, are sent to the driver, which keeps them below the data folder for as
long as the job has not ended, and puts them into the inbox of the next evaluator. Nobody but that
job's evaluator ever reads them: to the driver they are bytes.

Design: docs/design/jobs.md
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from bitquota.canonical import digest_file
from bitquota.errors import MeasurementFailed, TooLarge
from bitquota.service.jobs.work import CHECKPOINT, JOURNALED, KEPT_PREFIX
from bitquota.service.worker.engines.engine import InputFile

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bitquota.service.store.blobs import BlobStore, Incoming


class KeptCheckpoints:
    """The checkpoints of one job on the driver's side.

    Args:
        folder: Of this job; made when there is something to keep.
        names: What the kind of job may leave; a kind without any may leave a journal.
        blobs: Where files arrive.
        limit: Bytes of the largest.
        total: Bytes of all together.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], blobs: BlobStore, *, limit: int, total: int
    ) -> None:
        self._folder = folder
        self._names = names
        self._blobs = blobs
        self._limit = limit
        self._total = total
        self._incoming: Incoming | None = None

    def input_files(self) -> tuple[InputFile, ...]:
        """Return what an earlier attempt left, for the next evaluator."""
        return tuple(
            InputFile(
                role=CHECKPOINT,
                name=KEPT_PREFIX + path.name,
                digest=digest_file(path),
                path=path,
            )
            for path in self._files()
        )

    def _files(self) -> list[Path]:
        return sorted(self._folder.iterdir()) if self._folder.is_dir() else []

    def piece(self, parts: Sequence[bytes]) -> None:
        """Write the next bytes of a checkpoint; raises ``TooLarge``."""
        if self._incoming is None:
            self._incoming = self._blobs.incoming(self._limit)
        for part in parts:
            self._incoming.write(part)

    def keep(self, name: str) -> None:
        """Keep what arrived as ``name``; an older one is replaced by a whole one or not at all.

        Raises:
            MeasurementFailed: The kind of job leaves no such file.
            TooLarge: All together would be.
        """
        incoming, self._incoming = self._incoming, None
        if incoming is None:
            return
        try:
            if not (name in self._names if self._names else JOURNALED.fullmatch(name)):
                known = ", ".join(self._names) or "those of a journal"
                msg = f"a worker may keep the files {known} of this job; it sent {name!r}"
                raise MeasurementFailed(msg)
            others = sum(path.stat().st_size for path in self._files() if path.name != name)
            if others + incoming.size > self._total:
                msg = (
                    "what a job keeps for another attempt must fit into "
                    f"{self._total:,} bytes (max_scratch_bytes); with {name!r} it would be "
                    f"{others + incoming.size:,}"
                )
                raise TooLarge(msg)
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

"""Measures: ways to turn a model, a calibration set and candidates into a sensitivity matrix.

Design: docs/design/measurement-cache.md
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bitquota.errors import MeasurementFailed
from bitquota.progress import Progress, check_cancelled
from bitquota.quantizers.apply import as_change
from bitquota.sensitivity.base import CODE_VERSION
from bitquota.sensitivity.cache import MemoryLedger, ledger_key
from bitquota.sensitivity.errands import ChunkDone, Errand, HelpedLedger, OneChunk, carry_out
from bitquota.sensitivity.runners.base import describe_change

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from bitquota.candidates.table import CandidateTable
    from bitquota.canonical import JsonObject
    from bitquota.progress import IsCancelled, OnProgress
    from bitquota.sensitivity.cache import Ledger
    from bitquota.sensitivity.losses import Loss
    from bitquota.sensitivity.runners.base import Change, Runner


def row_changes(table: CandidateTable) -> list[dict[str, Any]]:
    """Return the change that each row of the table stands for (all layers of its group)."""
    return [as_change(row.candidates) for row in table.rows]


def base_change(table: CandidateTable, base_point: Sequence[int] | None) -> dict[str, Any]:
    """Return the change that the base point stands for; none for full precision."""
    return {} if base_point is None else as_change(table.decode(base_point))


@dataclass(slots=True)
class Recorder:
    """Looks up and stores per-sample losses, chunk by chunk, and reports progress.

    A *shard* is a fixed list of variants on one chunk. It is stored in one transaction, and
    measured again as a whole if any part of it is missing, so that an interrupted measurement
    continues to the same bits.
    """

    runner: Runner
    loss: Loss
    ledger: Ledger
    stage: str
    total: int
    on_progress: OnProgress | None = None
    cancelled: IsCancelled | None = None
    ahead: tuple[CandidateTable, Sequence[Errand]] | None = None
    done: int = 0
    reused: int = 0

    def __post_init__(self) -> None:
        """Fix what every key depends on."""
        if self.loss.needs_labels and self.runner.calibration.labels is None:
            from bitquota.errors import InvalidCalibration

            msg = (
                f"the loss '{self.loss.name}' needs labels; the calibration set has none: add "
                "labels, or use the loss 'kl'"
            )
            raise InvalidCalibration(msg, loss=self.loss.name)

    def spans(self) -> Iterator[tuple[int, range]]:
        """Return number and positions of each chunk; in an errand, of its chunk, then the end.

        Raises:
            ChunkDone: The chunk of an errand was treated.
        """
        if isinstance(self.ledger, OneChunk):
            yield self.ledger.chunk, self.runner.chunks[self.ledger.chunk]
            raise ChunkDone
        yield from enumerate(self.runner.chunks)

    def keys(self, chunk: int, changes: Sequence[Change], kind: str = "loss") -> list[str]:
        """Return the ledger key of each variant on a chunk."""
        return [self.key(chunk, describe_change(change), kind) for change in changes]

    def key(self, chunk: int, variant: object, kind: str) -> str:
        """Return the ledger key of anything measured on a chunk."""
        calibration = self.runner.calibration
        rows = self.runner.chunks[chunk]
        return ledger_key(
            {
                "kind": kind,
                "code": CODE_VERSION,
                "model": self.runner.inventory.model_digest,
                "data": calibration.digest,
                "indices": list(calibration.indices[rows.start : rows.stop]),
                "loss": self.loss.name,
                "runner": self.runner.describe(),
                "variant": variant,
            }
        )

    def shard(
        self,
        keys: Sequence[str],
        measure: Callable[[], Sequence[NDArray[np.float64]]],
    ) -> dict[str, NDArray[np.float64]]:
        """Return the arrays of ``keys``, from the ledger or by calling ``measure``."""
        check_cancelled(self.cancelled, self.stage)
        found = self.ledger.get_many(keys)
        if len(found) < len(set(keys)) and self._measured_ahead():
            found = self.ledger.get_many(keys)
        if len(found) == len(set(keys)):
            self.reused += 1
        else:
            arrays = measure()
            found = dict(zip(keys, arrays, strict=True))
            self.ledger.put_many(found)
        self.done += 1
        if self.on_progress is not None:
            self.on_progress(
                Progress(stage=self.stage, done=self.done, total=self.total, reused=self.reused)
            )
        return found

    def _measured_ahead(self) -> bool:
        """Have all chunks measured at once, where that is possible; at the first gap only."""
        ahead, self.ahead = self.ahead, None
        if ahead is None or not isinstance(self.ledger, HelpedLedger):
            return False
        table, errands = ahead

        def do(errand: Errand) -> None:
            carry_out(
                errand, self.runner, table, self.loss, ledger=self.ledger, cancelled=self.cancelled
            )

        self.ledger.measure_ahead(errands, do)
        return True

    def losses(self, chunk: int, outputs: Sequence[Tensor]) -> list[NDArray[np.float64]]:
        """Return the per-sample losses of outputs on a chunk, with one device transfer.

        Raises:
            MeasurementFailed: A loss is not finite.
        """
        reference, labels = self.runner.reference(chunk), self.runner.labels(chunk)
        values = torch.stack([self.loss.per_sample(o, reference, labels) for o in outputs])
        return checked_losses(values, self.loss.name)


def checked_losses(values: Tensor, name: str) -> list[NDArray[np.float64]]:
    """Return ``f64[k, n]`` as a list of arrays.

    Raises:
        MeasurementFailed: A value is not finite.
    """
    array = values.double().cpu().numpy()
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).any(axis=0).sum())
        msg = (
            f"the loss '{name}' must be finite; it is not for {bad} of {array.shape[1]} samples: "
            "check the model's weights and the calibration set for NaN and infinity"
        )
        raise MeasurementFailed(msg, loss=name, samples=bad)
    return list(array)


def make_recorder(
    runner: Runner,
    loss: Loss,
    stage: str,
    total: int,
    *,
    ledger: Ledger | None,
    on_progress: OnProgress | None,
    cancelled: IsCancelled | None,
    ahead: tuple[CandidateTable, Sequence[Errand]] | None = None,
) -> Recorder:
    """Return a recorder; without a ledger what it measures is forgotten at the end.

    ``ahead`` is the table and what others may measure at the same time, if the ledger has helpers.
    """
    return Recorder(
        runner=runner,
        loss=loss,
        ledger=MemoryLedger() if ledger is None else ledger,
        stage=stage,
        total=total,
        on_progress=on_progress,
        cancelled=cancelled,
        ahead=ahead,
    )


def one_for_each_chunk(
    runner: Runner,
    measure: str,
    point: Sequence[int] | None,
    choices: Sequence[Sequence[int]] = (),
) -> list[Errand]:
    """Return the errands that together are one measurement."""
    return [
        Errand(
            measure=measure,
            chunk=chunk,
            point=None if point is None else tuple(int(p) for p in point),
            choices=tuple(tuple(int(c) for c in choice) for choice in choices),
        )
        for chunk in range(len(runner.chunks))
    ]


def standard_error(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the standard error of the mean over the last axis; 0 for a single sample."""
    n = values.shape[-1]
    if n < 2:
        return np.zeros(values.shape[:-1])
    error: NDArray[np.float64] = values.std(axis=-1, ddof=1) / np.sqrt(n)
    return error


def provenance(runner: Runner, measure: str, loss: Loss) -> JsonObject:
    """Return where a matrix comes from: digests, samples, seed, versions; no clock."""
    import bitquota

    return {
        "measure": measure,
        "loss": loss.name,
        "model_digest": runner.inventory.model_digest,
        "calibration": runner.calibration.to_json(),
        "runner": dict(runner.describe()),
        "code": CODE_VERSION,
        "versions": {
            "bitquota": bitquota.__version__,
            "torch": torch.__version__.split("+")[0],
            "numpy": np.__version__,
        },
    }


def merged(base: Mapping[str, Any], *changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the base with changes on top."""
    both = dict(base)
    for change in changes:
        both.update(change)
    return both

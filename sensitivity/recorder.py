"""Measures: ways to turn a model, a calibration set and candidates into a sensitivity matrix.

Design: docs/design/measurement-cache.md
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import bitquota
from bitquota.errors import InvalidCalibration, MeasurementFailed
from bitquota.quantizers.apply import as_change
from bitquota.sensitivity.base import CODE_VERSION
from bitquota.sensitivity.cache import ledger_key
from bitquota.sensitivity.losses import key_of
from bitquota.sensitivity.runners.base import describe_change
from bitquota.sensitivity.tasks import samples_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from bitquota.candidates.table import CandidateTable
    from bitquota.canonical import JsonObject
    from bitquota.context import Context
    from bitquota.sensitivity.losses import Loss
    from bitquota.sensitivity.runners.base import Change, Runner
    from bitquota.sensitivity.tasks import Task


def row_changes(table: CandidateTable) -> list[dict[str, Any]]:
    """Return the change that each row of the table stands for (all layers of its group)."""
    return [as_change(row.candidates) for row in table.rows]


def base_change(table: CandidateTable, base_point: Sequence[int] | None) -> dict[str, Any]:
    """Return the change that the base point stands for; none for full precision."""
    return {} if base_point is None else as_change(table.decode(base_point))


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """How the chunks of a measurement can be measured apart, at the same time.

    Attributes:
        task: What another process is told; which chunk is filled in.
        measure: Measures one chunk here, into the ledger.
    """

    task: Task
    measure: Callable[[int], object]


def check_labels(loss: Loss, runner: Runner) -> None:
    """Raise ``InvalidCalibration`` if ``loss`` needs labels and the samples have none."""
    if loss.needs_labels and runner.calibration.labels is None:
        msg = (
            f"the loss '{loss.name}' needs labels; the calibration set has none: add "
            "labels, or use the loss 'kl'"
        )
        raise InvalidCalibration(msg, loss=loss.name)


@dataclass(slots=True, kw_only=True)
class Recorder:
    """Looks up and stores per-sample losses, chunk by chunk, and reports progress.

    A *shard* is a fixed list of variants on one chunk. It is stored in one transaction, and
    measured again as a whole if any part of it is missing, so that an interrupted measurement
    continues to the same bits; unless its *parts* have the same bits alone.

    Attributes:
        runner: Executes the model.
        loss: What is measured.
        stage: Name in progress reports.
        context: Where measurements are kept, whom to tell, when to stop.
        shards: How many shards a chunk has.
        only: Which chunks to measure on, by default all.
        shared: How its chunks can be measured apart, if they can.
        passes: Returns what the measurement takes over all chunks, in passes, where that is
            known; asked only where somebody is told of the whole job.
        chunks: The chunks, in order.
    """

    runner: Runner
    loss: Loss
    stage: str
    context: Context
    shards: int = 1
    only: Sequence[int] | None = None
    shared: Shared | None = None
    passes: Callable[[], float] | None = None
    weight: float | None = field(init=False, default=None)
    chunks: Sequence[int] = field(init=False)
    done: int = 0
    reused: int = 0

    def __post_init__(self) -> None:
        """Fix what every key depends on."""
        every = range(len(self.runner.chunks))
        self.chunks = every if self.only is None else sorted(set(self.only))
        if self.passes is not None and self.context.course is not None:
            # Courses count in passes over single samples: stages run on different sets of them.
            self.weight = self.passes() * sum(len(self.runner.chunks[c]) for c in self.chunks)
        check_labels(self.loss, self.runner)

    @property
    def positions(self) -> list[int]:
        """Positions in the calibration set of the samples that are measured, chunk by chunk."""
        return [p for chunk in self.chunks for p in self.runner.chunks[chunk]]

    def spans(self) -> Iterator[tuple[int, slice]]:
        """Return the number of each chunk, and where its samples stand among ``positions``."""
        end = 0
        for chunk in self.chunks:
            start, end = end, end + len(self.runner.chunks[chunk])
            yield chunk, slice(start, end)

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
                "loss": key_of(self.loss),
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
        return self._filled(keys, lambda _: dict(zip(keys, measure(), strict=True)))

    def parts(
        self,
        keys: Sequence[str],
        measure: Callable[[list[int]], Sequence[NDArray[np.float64]]],
    ) -> dict[str, NDArray[np.float64]]:
        """Return the arrays of ``keys``, where each has the same bits alone.

        ``measure`` is told the positions of the keys that the ledger does not hold.
        """

        def missing(found: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
            places = {key: k for k, key in enumerate(keys) if key not in found}
            return dict(zip(places, measure(list(places.values())), strict=True))

        return self._filled(keys, missing)

    def _filled(
        self,
        keys: Sequence[str],
        measure: Callable[[Mapping[str, NDArray[np.float64]]], dict[str, NDArray[np.float64]]],
    ) -> dict[str, NDArray[np.float64]]:
        """Return what the ledger holds of ``keys`` and, if that is not all, what is measured."""
        self.context.check(self.stage)
        found = self.context.ledger.get_many(keys)
        if len(found) < len(set(keys)) and self._measured_ahead():
            found = self.context.ledger.get_many(keys)
        if len(found) == len(set(keys)):
            self.reused += 1
        else:
            arrays = measure(found)
            self.context.ledger.put_many(
                {key: array for key, array in arrays.items() if key not in found}
            )
            found = arrays | found
        self.done += 1
        self._report()
        return found

    def _report(self) -> None:
        total = max(1, self.shards * len(self.chunks))
        self.context.report(self.stage, self.done, total, self.reused, weight=self.weight)

    def _measured_ahead(self) -> bool:
        """Have all chunks measured at once, where that is possible; at the first gap only."""
        shared, self.shared = self.shared, None
        if shared is None or self.context.executor is None:
            return False
        self._report()  # so that who carries out the tasks knows where the job is meanwhile
        samples = samples_digest(self.runner.calibration)
        tasks = [replace(shared.task, chunk=chunk, samples=samples) for chunk in self.chunks]
        self.context.executor(tasks, lambda task: shared.measure(task.chunk))
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


def standard_error(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the standard error of the mean over the last axis; 0 for a single sample."""
    n = values.shape[-1]
    if n < 2:
        return np.zeros(values.shape[:-1])
    error: NDArray[np.float64] = values.std(axis=-1, ddof=1) / np.sqrt(n)
    return error


def free_rows(
    table: CandidateTable, base_point: Sequence[int] | None, only: Sequence[int] | None = None
) -> list[int]:
    """Return the rows to measure: all, or those of ``only``, but not those of the base point."""
    fixed = {int(table.offsets[g] + r) for g, r in enumerate(base_point or ())}
    return [r for r in (range(len(table.rows)) if only is None else sorted(only)) if r not in fixed]


def cross_terms(
    table: CandidateTable,
    moments: NDArray[np.float64],
    n_samples: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and standard error of each cross-layer term, ``f64[n, n]``; 0 within groups.

    Args:
        table: What the rows stand for.
        moments: f64[2, n, n]: sums over samples of each term and of its square.
        n_samples: How many samples.
    """
    cross = moments[0] / n_samples
    variance = np.maximum(moments[1] / n_samples - cross**2, 0.0)
    error = np.sqrt(variance / max(n_samples - 1, 1))
    same = table.group_of_row[:, None] == table.group_of_row[None, :]
    cross[same], error[same] = 0.0, 0.0
    return (cross + cross.T) / 2, (error + error.T) / 2


def provenance(runner: Runner, measure: str, loss: Loss) -> JsonObject:
    """Return where a matrix comes from: digests, samples, seed, versions; no clock."""
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

"""Exact pairwise measurement: every pair of candidates by a forward pass.

References:
    [CLADO] Deng, Sharify, Wang, Orshansky. Mixed-precision quantization with cross-layer
    dependencies. 2023. arXiv 2307.05657.

We differ from the paper: the default loss is the KL divergence to the full-precision output
(their published runs use labelled cross-entropy), the first and last layers take part, any base
point may be measured around, and only the suffix behind the later change of a pair is executed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Unpack

import numpy as np

from bitquota.context import Context
from bitquota.matrix import SensitivityMatrix
from bitquota.sensitivity.recorder import (
    Recorder,
    Shared,
    base_change,
    free_rows,
    merged,
    provenance,
    row_changes,
    standard_error,
)
from bitquota.sensitivity.tasks import Task, as_point

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from bitquota.candidates.table import CandidateTable
    from bitquota.sensitivity.base import MeasureOptions
    from bitquota.sensitivity.losses import Loss
    from bitquota.sensitivity.runners.base import Change, Runner, State


def measure_pairs(
    runner: Runner,
    table: CandidateTable,
    loss: Loss,
    **options: Unpack[MeasureOptions],
) -> SensitivityMatrix:
    """Measure all singles and pairs around a base point: exact up to float32 forward passes.

    With ``L(S)`` the mean loss with the rows ``S`` on top of the base point,

        ``diagonal_i = L(i) - L()``,  ``cross_ij = L(i, j) - L(i) - L(j) + L()``

    for rows of different groups, each with the standard error of its mean over samples. A row
    that the base point already has changes nothing: its terms are zero.

    Cost: ``1 + n + (number of pairs)`` runs; a pair runs the suffix behind its later group, on
    a chain of equal layers a third of a pass. See ``Measure.measure`` for arguments and errors.
    """
    return _measure(runner, table, loss, "pairs", pairs=True, **options)


def measure_singles(
    runner: Runner,
    table: CandidateTable,
    loss: Loss,
    **options: Unpack[MeasureOptions],
) -> SensitivityMatrix:
    """Measure the diagonal only: ``diagonal_i = L(i) - L()``; see ``measure_pairs``.

    Cost: ``1 + n`` runs, each behind one group: on a chain of equal layers half a pass.
    """
    return _measure(runner, table, loss, "diagonal", pairs=False, **options)


@dataclass(frozen=True, slots=True)
class PairsMeasure:
    """``measure_pairs`` as a ``Measure``."""

    name: ClassVar[str] = "pairs"
    has_cross_terms: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    def cost(self, runner: Runner, table: CandidateTable) -> float:
        """Return the forward-equivalents of all singles and pairs."""
        return _cost(runner, table, pairs=True)

    def measure(
        self,
        runner: Runner,
        table: CandidateTable,
        loss: Loss,
        **options: Unpack[MeasureOptions],
    ) -> SensitivityMatrix:
        """Measure; see ``measure_pairs``."""
        return measure_pairs(runner, table, loss, **options)


@dataclass(frozen=True, slots=True)
class DiagonalMeasure:
    """``measure_singles`` as a ``Measure``: one-layer loss increase."""

    name: ClassVar[str] = "diagonal"
    has_cross_terms: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False

    def cost(self, runner: Runner, table: CandidateTable) -> float:
        """Return the forward-equivalents of all singles."""
        return _cost(runner, table, pairs=False)

    def measure(
        self,
        runner: Runner,
        table: CandidateTable,
        loss: Loss,
        **options: Unpack[MeasureOptions],
    ) -> SensitivityMatrix:
        """Measure; see ``measure_singles``."""
        return measure_singles(runner, table, loss, **options)


def _order(runner: Runner, table: CandidateTable) -> list[int]:
    """Return the groups from the front of the model to its back (largest suffix first)."""
    members = {row.group: [c.layer for c in row.candidates] for row in table.rows}
    shares = [runner.share(members[group]) for group in table.groups]
    return sorted(range(len(shares)), key=lambda g: (-shares[g], g))


Shard = tuple[int, list[int]]
"""A row that is measured alone, and the rows behind it that are measured together with it."""


def _shards(
    runner: Runner, table: CandidateTable, base_point: Sequence[int] | None, *, pairs: bool
) -> list[Shard]:
    """Return what is measured on each chunk: a shard for each row that the base point lacks."""
    offsets, order = table.offsets, _order(runner, table)
    free = free_rows(table, base_point)
    rows_of = [[r for r in free if offsets[g] <= r < offsets[g + 1]] for g in range(len(order))]
    return [
        (row, [r for h in order[k + 1 :] for r in rows_of[h]] if pairs else [])
        for k, g in enumerate(order)
        for row in rows_of[g]
    ]


def passes_of_shards(runner: Runner, table: CandidateTable, shards: Sequence[Shard]) -> float:
    """Return the forward-equivalents of ``shards`` where the ledger holds nothing.

    They are scheduled as the measurement schedules them. Rows of one group change the same
    layers, so one of each is scheduled. Cost: O(groups²) schedules for pairs, O(groups) else.
    """
    group_of = table.group_of_row.tolist()
    layers = [tuple(c.layer for c in row.candidates) for row in table.rows]
    start = runner.schedule(None, (), None)
    total = runner.passes_before + start.passes
    known: dict[int, float] = {}
    for row, partners in shards:
        group = group_of[row]
        if group not in known:
            later = tuple(sorted({name for partner in partners for name in layers[partner]}))
            front = runner.schedule(start, layers[row], later)
            counts = Counter(group_of[partner] for partner in partners)
            behind = {group_of[p]: layers[p] for p in partners}
            known[group] = front.passes + sum(
                n * runner.schedule(front, behind[h]).passes for h, n in counts.items()
            )
        total += known[group]
    return total


def _cost(runner: Runner, table: CandidateTable, *, pairs: bool) -> float:
    return passes_of_shards(runner, table, _shards(runner, table, None, pairs=pairs))


def _measure(
    runner: Runner,
    table: CandidateTable,
    loss: Loss,
    name: str,
    *,
    pairs: bool,
    base_point: Sequence[int] | None = None,
    context: Context | None = None,
    chunks: Sequence[int] | None = None,
) -> SensitivityMatrix:
    context = context or Context()
    n = len(table.rows)
    changes, base = row_changes(table), base_change(table, base_point)
    shards = _shards(runner, table, base_point, pairs=pairs)

    def one_chunk(chunk: int) -> None:
        alone = context.part()
        _measure(
            runner, table, loss, name, pairs=pairs, base_point=base_point, context=alone,
            chunks=[chunk],
        )  # fmt: skip

    recorder = Recorder(
        runner=runner,
        loss=loss,
        stage=name,
        context=context,
        shards=1 + len(shards),
        only=chunks,
        passes=lambda: passes_of_shards(runner, table, shards),
        shared=Shared(
            task=Task(measure=name, chunk=0, point=as_point(base_point)), measure=one_chunk
        ),
    )

    # Shard by shard: losses of full precision, of the base point, of every row and of every pair.
    n_samples = len(recorder.positions)
    base_losses = np.empty(n_samples)
    start_losses = np.empty(n_samples)
    singles = np.empty((n, n_samples))
    sums: dict[tuple[int, int], NDArray[np.float64]] = {}
    for chunk, where in recorder.spans():
        measured = _Chunk(recorder, chunk, base)
        start_losses[where], base_losses[where] = measured.base()
        singles[:, where] = base_losses[where]
        for row, partners in shards:
            variants = [changes[row], *(merged(changes[row], changes[p]) for p in partners)]
            found = measured.shard(changes[row], [changes[p] for p in partners], variants)
            singles[row, where] = found[0]
            for partner, values in zip(partners, found[1:], strict=True):
                if (row, partner) not in sums:
                    sums[row, partner] = np.empty(n_samples)
                sums[row, partner][where] = values

    # What two rows lose together beyond what each loses alone.
    increases = singles - base_losses
    cross = cross_error = None
    if pairs:
        cross, cross_error = np.zeros((n, n)), np.zeros((n, n))
        for (i, j), values in sums.items():
            terms = values - singles[i] - singles[j] + base_losses
            cross[i, j] = cross[j, i] = terms.mean()
            cross_error[i, j] = cross_error[j, i] = standard_error(terms)
    return SensitivityMatrix(
        table=table,
        diagonal=increases.mean(axis=1),
        diagonal_error=standard_error(increases),
        cross=cross,
        cross_error=cross_error,
        constant=float((base_losses - start_losses).mean()),
        base_point=as_point(base_point),
        loss=loss.name,
        unit=loss.unit,
        provenance=provenance(runner, name, loss),
    )


class _Chunk:
    """One chunk of a measurement; the model runs only if the ledger lacks something."""

    def __init__(self, recorder: Recorder, chunk: int, base: Change) -> None:
        self._recorder, self._chunk, self._base = recorder, chunk, base
        self._state: State | None = None

    def _start(self) -> State:
        if self._state is None:
            self._state = self._recorder.runner.start(self._chunk, self._base)
        return self._state

    def base(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the losses of the full-precision model and of the base point."""
        recorder, chunk = self._recorder, self._chunk
        reference_key = recorder.key(chunk, "reference", "loss")
        (base_key,) = recorder.keys(chunk, [self._base])

        def run() -> list[NDArray[np.float64]]:
            outputs = [recorder.runner.reference(chunk), self._start().output]
            return recorder.losses(chunk, outputs)

        found = recorder.shard([reference_key, base_key], run)
        return found[reference_key], found[base_key]

    def shard(
        self, front: Change, partners: Sequence[Change], variants: Sequence[Change]
    ) -> list[NDArray[np.float64]]:
        """Return the losses of ``front`` alone and with each of ``partners``."""
        recorder, chunk = self._recorder, self._chunk
        keys = recorder.keys(chunk, [merged(self._base, variant) for variant in variants])

        def run() -> list[NDArray[np.float64]]:
            runner = recorder.runner
            if not partners:
                return recorder.losses(chunk, [runner.output(self._start(), front)])
            later = {name for partner in partners for name in partner}
            state = runner.extend(self._start(), front, keep_for=tuple(sorted(later)))
            outputs = [state.output, *(runner.output(state, partner) for partner in partners)]
            return recorder.losses(chunk, outputs)

        found = recorder.shard(keys, run)
        return [found[key] for key in keys]

"""Carry out a task: one chunk of a measurement that somebody else asked for."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from bitquota.errors import InvalidInput
from bitquota.sensitivity.measures.choices import measure_choices
from bitquota.sensitivity.measures.gram import measure_gram
from bitquota.sensitivity.measures.pairs import measure_pairs, measure_singles
from bitquota.sensitivity.tasks import CHOICES

if TYPE_CHECKING:
    from bitquota.candidates.table import CandidateTable
    from bitquota.context import Context
    from bitquota.sensitivity.losses import Loss
    from bitquota.sensitivity.runners.base import Runner
    from bitquota.sensitivity.tasks import Task


def carry_out(
    task: Task,
    runner: Runner,
    table: CandidateTable,
    loss: Loss,
    *,
    context: Context,
) -> None:
    """Measure what ``task`` says into the ledger; exact, to the same bits as the whole loop.

    Raises:
        InvalidInput: The runner has no such chunk, or the table no such rows.
        MeasurementFailed: A loss is not finite.
        Cancelled: The context said so.

    Cost: that of the measure, times the chunk's share of the samples.
    """
    counts = [int(b - a) for a, b in itertools.pairwise(table.offsets)]
    points = [p for p in (task.point, *task.choices) if p is not None]
    fits = all(
        len(p) == len(counts) and all(0 <= r < n for r, n in zip(p, counts, strict=True))
        for p in points
    )
    if task.chunk >= len(runner.chunks) or not fits:
        msg = (
            f"a task must name one of {len(runner.chunks)} chunks and a row of each of "
            f"{len(counts)} groups; got {task}"
        )
        raise InvalidInput(msg)
    own, chunks = context.part(), [task.chunk]
    if task.measure == CHOICES:
        measure_choices(
            runner, table, loss, task.choices, centre=task.point, context=own, chunks=chunks
        )
    else:
        measures = {"gram": measure_gram, "pairs": measure_pairs, "diagonal": measure_singles}
        measures[task.measure](
            runner, table, loss, base_point=task.point, context=own, chunks=chunks
        )

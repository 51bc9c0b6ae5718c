"""Carry out an errand: one chunk of a measurement that somebody else asked for."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from bitquota.errors import InvalidInput
from bitquota.sensitivity.errands import CHOICES
from bitquota.sensitivity.measures.choices import measure_choices
from bitquota.sensitivity.measures.gram import measure_gram
from bitquota.sensitivity.measures.pairs import measure_pairs, measure_singles

if TYPE_CHECKING:
    from bitquota.candidates.table import CandidateTable
    from bitquota.context import Context
    from bitquota.sensitivity.errands import Errand
    from bitquota.sensitivity.losses import Loss
    from bitquota.sensitivity.runners.base import Runner


def carry_out(
    errand: Errand,
    runner: Runner,
    table: CandidateTable,
    loss: Loss,
    *,
    context: Context,
) -> None:
    """Measure what ``errand`` says into the ledger; exact, to the same bits as the whole loop.

    Raises:
        InvalidInput: The runner has no such chunk, or the table no such rows.
        MeasurementFailed: A loss is not finite.
        Cancelled: The context said so.

    Cost: that of the measure, times the chunk's share of the samples.
    """
    counts = [int(b - a) for a, b in itertools.pairwise(table.offsets)]
    points = [p for p in (errand.point, *errand.choices) if p is not None]
    fits = all(
        len(p) == len(counts) and all(0 <= r < n for r, n in zip(p, counts, strict=True))
        for p in points
    )
    if errand.chunk >= len(runner.chunks) or not fits:
        msg = (
            f"an errand must speak of the {len(runner.chunks)} chunks and {len(counts)} groups "
            f"there are; got {errand}"
        )
        raise InvalidInput(msg)
    own, chunks = context.part(), [errand.chunk]
    if errand.measure == CHOICES:
        measure_choices(
            runner, table, loss, errand.choices, centre=errand.point, context=own, chunks=chunks
        )
    else:
        measures = {"gram": measure_gram, "pairs": measure_pairs, "diagonal": measure_singles}
        measures[errand.measure](
            runner, table, loss, base_point=errand.point, context=own, chunks=chunks
        )

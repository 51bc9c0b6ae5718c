"""Errands: parts of a measurement that others carry out at the same time.

The forward-only measures treat chunk after chunk, and everything that they find goes through the
ledger. So any process with the same model, samples and request can run the same loop for one chunk
only; whoever runs the whole loop afterwards finds that chunk in the ledger and computes the same
bits as if it had done everything alone.

Design: docs/design/sandbox.md
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self, runtime_checkable

from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from bitquota.candidates.table import CandidateTable
    from bitquota.canonical import JsonObject
    from bitquota.progress import IsCancelled
    from bitquota.sensitivity.cache import Ledger
    from bitquota.sensitivity.losses import Loss
    from bitquota.sensitivity.runners.base import Runner

CHOICES = "choices"
"""The errand of ``measure_choices``; the others are named after their measure."""

MEASURES = ("gram", "pairs", "diagonal", CHOICES)
"""What can be done chunk by chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """One chunk of one measurement.

    Attributes:
        measure: One of ``MEASURES``.
        chunk: Which chunk of the runner.
        point: Base point, or for ``choices`` their centre; a row within each group.
        choices: What ``choices`` measures.
    """

    measure: str
    chunk: int
    point: tuple[int, ...] | None = None
    choices: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        """Check name and chunk."""
        if self.measure not in MEASURES or self.chunk < 0:
            msg = f"an errand must be one of {', '.join(MEASURES)} on a chunk; got {self}"
            raise InvalidInput(msg, measure=self.measure, chunk=self.chunk)

    def to_json(self) -> JsonObject:
        """Return the fields as plain JSON."""
        return {
            "measure": self.measure,
            "chunk": self.chunk,
            "point": None if self.point is None else list(self.point),
            "choices": [list(choice) for choice in self.choices],
        }

    @classmethod
    def from_json(cls, data: JsonObject) -> Self:
        """Return the errand that ``to_json`` wrote; raises ``InvalidInput`` for anything else."""
        try:
            point = data["point"]
            return cls(
                measure=str(data["measure"]),
                chunk=int(data["chunk"]),
                point=None if point is None else tuple(int(p) for p in point),
                choices=tuple(tuple(int(c) for c in choice) for choice in data["choices"]),
            )
        except (KeyError, TypeError, ValueError) as err:
            msg = f"an errand must have measure, chunk, point and choices; got {data!r:.200}"
            raise InvalidInput(msg) from err


@runtime_checkable
class HelpedLedger(Protocol):
    """A ledger whose owner can have several chunks measured at once."""

    def measure_ahead(self, errands: Sequence[Errand], do: Callable[[Errand], None]) -> None:
        """Return when the ledger holds what ``errands`` measure, as far as that can be had.

        ``do`` carries out one errand in this process; others may carry out the rest elsewhere.
        What is missing afterwards is simply measured by the loop that asked.
        """
        ...


class OneChunk:
    """The ledger of an errand: loops that keep their results in it treat one chunk only."""

    def __init__(self, ledger: Ledger, chunk: int) -> None:
        self._ledger = ledger
        self.chunk = chunk

    def __len__(self) -> int:
        """Return the number of entries."""
        return len(self._ledger)

    def get(self, key: str) -> NDArray[np.float64] | None:
        """Return the array under ``key``, or ``None``."""
        return self._ledger.get(key)

    def get_many(self, keys: Sequence[str]) -> dict[str, NDArray[np.float64]]:
        """Return the arrays of those ``keys`` that are there."""
        return self._ledger.get_many(keys)

    def put(self, key: str, array: NDArray[np.float64]) -> None:
        """Store one array."""
        self._ledger.put(key, array)

    def put_many(self, entries: Mapping[str, NDArray[np.float64]]) -> None:
        """Store several arrays."""
        self._ledger.put_many(entries)


class ChunkDone(Exception):
    """Ends a loop over chunks after the only one that was asked for: there is no result."""


def carry_out(
    errand: Errand,
    runner: Runner,
    table: CandidateTable,
    loss: Loss,
    *,
    ledger: Ledger,
    cancelled: IsCancelled | None = None,
) -> None:
    """Measure what ``errand`` says into ``ledger``; exact, to the same bits as the whole loop.

    Raises:
        InvalidInput: The runner has no such chunk, or the table no such rows.
        MeasurementFailed: A loss is not finite.
        Cancelled: ``cancelled`` said so.

    Cost: that of the measure, times the chunk's share of the samples.
    """
    from bitquota.sensitivity.measures.choices import measure_choices
    from bitquota.sensitivity.measures.gram import measure_gram
    from bitquota.sensitivity.measures.pairs import measure_pairs, measure_singles

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
    own = OneChunk(ledger, errand.chunk)
    measures = {"gram": measure_gram, "pairs": measure_pairs, "diagonal": measure_singles}
    try:
        if errand.measure == CHOICES:
            measure_choices(
                runner, table, loss, errand.choices, centre=errand.point,
                ledger=own, cancelled=cancelled,
            )  # fmt: skip
        else:
            measures[errand.measure](
                runner, table, loss, base_point=errand.point, ledger=own, cancelled=cancelled
            )
    except ChunkDone:
        return

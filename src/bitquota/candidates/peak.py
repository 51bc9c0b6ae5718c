"""What the largest cut of a model takes, and the linear constraints that keep it below a limit.

A budget such as ``act peak 96 KiB`` limits the peak. Each cut is a sum over groups of layers, so
the solver gets it as a constraint.

References:
    [MCT] H. V. Habi et al. Model Compression Toolkit, "max cut": the memory of activations as the
    largest cut of the graph along its schedule. github.com/sony/model_optimization.

Design: docs/design/live-tensors.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bitquota.candidates.storage import FULL_PRECISION_BITS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from bitquota.candidates.live import Cut, Schedule
    from bitquota.candidates.table import Candidate, CandidateTable


def peak_of(schedule: Schedule, candidates: Sequence[Candidate]) -> int:
    """Return the peak of a choice in bits: of each tensor alive those of its widest reader."""
    chosen, full = {c.layer: _width(c) for c in candidates}, FULL_PRECISION_BITS
    return max(
        sum(
            t.elements * max((chosen.get(r, full) for r in t.readers), default=full)
            for t in cut.tensors
        )
        for cut in schedule.cuts
    )


def constraints(
    schedule: Schedule, table: CandidateTable, limit: int
) -> list[tuple[NDArray[np.int64], int]]:
    """Return costs, i64[n], and limits that all hold if and only if the peak keeps ``limit``.

    A tensor whose readers decide in several groups counts as the widest that any of their rows may
    have: with one bit-width of inputs on offer that is exact unless all of them are pruned, and
    with several such layers are tied. Left out are cuts that no choice brings above the limit, and
    cuts that are below another one whatever is chosen; if none is left, the largest stands for all.

    Cost: O(cuts^2 n), for the cuts that some choice brings above the limit.
    """
    every = _costs(schedule, table)
    starts = table.offsets[:-1]
    most = [kept + int(np.maximum.reduceat(costs, starts).sum()) for costs, kept in every]
    left: list[tuple[NDArray[np.int64], int]] = []
    for k in sorted(range(len(every)), key=lambda k: -most[k]):
        costs, kept = every[k]
        if left and (
            most[k] <= limit
            or any(
                kept - other_kept + int(np.maximum.reduceat(costs - other, starts).sum()) <= 0
                for other, other_kept in left
            )
        ):
            continue
        left.append((costs, kept))
    return [(costs, limit - kept) for costs, kept in left]


def least_peak(schedule: Schedule, table: CandidateTable) -> int:
    """Return a peak that no choice is below: the largest of what each cut takes at least."""
    starts = table.offsets[:-1]
    every = _costs(schedule, table)
    return max(kept + int(np.minimum.reduceat(costs, starts).sum()) for costs, kept in every)


def _costs(schedule: Schedule, table: CandidateTable) -> list[tuple[NDArray[np.int64], int]]:
    """Return for each cut i64[n], what each row adds, and what is alive whatever is chosen."""
    starts = enumerate(table.offsets[:-1])
    group_of = {c.layer: g for g, start in starts for c in table.rows[start].candidates}
    widths: dict[str, NDArray[np.int64]] = {}
    for p, row in enumerate(table.rows):
        for c in row.candidates:
            widths.setdefault(c.layer, np.zeros(len(table.rows), dtype=np.int64))[p] = _width(c)
    return [_cost(cut, table, group_of, widths) for cut in schedule.cuts]


def _cost(
    cut: Cut,
    table: CandidateTable,
    group_of: dict[str, int],
    widths: dict[str, NDArray[np.int64]],
) -> tuple[NDArray[np.int64], int]:
    """Return what each row adds to a cut, and what is alive whatever is chosen."""
    found = np.zeros(len(table.rows), dtype=np.int64)
    kept = 0
    for tensor in cut.tensors:
        if not tensor.readers or any(r not in group_of for r in tensor.readers):
            kept += tensor.elements * FULL_PRECISION_BITS
            continue
        taken = np.max([widths[r] for r in tensor.readers], axis=0)
        groups = {group_of[r] for r in tensor.readers}
        if len(groups) > 1:
            kept += tensor.elements * int(taken.max())
            continue
        (g,) = groups
        rows = slice(table.offsets[g], table.offsets[g + 1])
        found[rows] += tensor.elements * taken[rows]
    return found, kept


def _width(candidate: Candidate) -> int:
    """Return the bits of a number that a layer reads; nothing where it is pruned."""
    if candidate.pruned:
        return 0
    bits = candidate.activation_bits
    return FULL_PRECISION_BITS if bits is None else bits

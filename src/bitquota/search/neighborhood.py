"""Small changes of a choice that keep every budget: one group up, one down, or both."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from bitquota.candidates.table import CandidateTable

Choice = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Limits:
    """What the rows of a table cost, and how much may be spent.

    Attributes:
        costs: i64[m, n], of every row of the table.
        limits: i64[m].
    """

    costs: NDArray[np.int64]
    limits: NDArray[np.int64]

    def __post_init__(self) -> None:
        """Check shapes."""
        costs, limits = np.array(self.costs, dtype=np.int64), np.array(self.limits, dtype=np.int64)
        if costs.ndim != 2 or limits.shape != costs.shape[:1]:
            msg = f"costs must be [m, n] and limits [m]; got {costs.shape} and {limits.shape}"
            raise InvalidInput(msg)
        costs.flags.writeable = limits.flags.writeable = False
        object.__setattr__(self, "costs", costs)
        object.__setattr__(self, "limits", limits)

    def spent(self, table: CandidateTable, choice: Sequence[int]) -> NDArray[np.int64]:
        """Return ``i64[m]``: what ``choice`` takes of each resource."""
        rows = table.offsets[:-1] + np.asarray(choice, dtype=np.int64)
        total: NDArray[np.int64] = self.costs[:, rows].sum(axis=1)
        return total

    def allow(self, table: CandidateTable, choice: Sequence[int]) -> bool:
        """Whether ``choice`` keeps all limits."""
        return bool((self.spent(table, choice) <= self.limits).all())

    def within(self, table: CandidateTable, centre: Sequence[int], radius: int) -> Limits:
        """Return these limits and one more: at most ``radius`` groups differ from ``centre``.

        Distance to a fixed choice is linear in the one-hot ``x``, so a trust region is one more
        row of costs: 0 for the rows of the centre, 1 for all others.
        """
        away = np.ones((1, self.costs.shape[1]), dtype=np.int64)
        away[0, table.offsets[:-1] + np.asarray(centre, dtype=np.int64)] = 0
        return Limits(
            costs=np.vstack([self.costs, away]),
            limits=np.append(self.limits, np.int64(radius)),
        )

    def only(self, rows: Sequence[int]) -> Limits:
        """Return these limits and one more: nothing but ``rows`` of the table may be taken."""
        others = np.ones((1, self.costs.shape[1]), dtype=np.int64)
        others[0, np.asarray(rows, dtype=np.int64)] = 0
        return Limits(
            costs=np.vstack([self.costs, others]), limits=np.append(self.limits, np.int64(0))
        )


def rows_near(table: CandidateTable, choice: Sequence[int], reach: int) -> list[int]:
    """Return the rows at most ``reach`` places from ``choice`` within their group, itself included.

    Rows of a group stand in the order of their widths.
    """
    offsets = table.offsets
    return [
        row
        for g, k in enumerate(choice)
        for row in range(offsets[g], offsets[g + 1])
        if abs(row - offsets[g] - int(k)) <= reach
    ]


def distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the number of groups in which two choices differ."""
    return sum(x != y for x, y in zip(a, b, strict=True))


def neighbours(table: CandidateTable, limits: Limits, choice: Sequence[int]) -> list[Choice]:
    """Return the feasible choices that differ from ``choice`` in one or two groups.

    Pairs of moves that both save in every resource are left out: each alone is a neighbour
    too. Cost: O(n²).
    """
    offsets = table.offsets
    counts = [int(b - a) for a, b in itertools.pairwise(offsets)]
    slack = limits.limits - limits.spent(table, choice)
    rows = offsets[:-1] + np.asarray(choice, dtype=np.int64)
    # i64[m, n]: what changing a group to a row adds.
    added = limits.costs - limits.costs[:, rows][:, table.group_of_row]
    moves = [(g, k) for g, count in enumerate(counts) for k in range(count) if k != int(choice[g])]
    found: list[Choice] = []
    for g, k in moves:
        if (added[:, offsets[g] + k] <= slack).all():
            found.append(_changed(choice, (g, k)))
    for (g, k), (h, j) in itertools.combinations(moves, 2):
        if g == h:
            continue
        one, two = added[:, offsets[g] + k], added[:, offsets[h] + j]
        if not (one + two <= slack).all():
            continue
        # Two moves that spend nothing more than before in any resource only lose precision.
        if (one <= 0).all() and (two <= 0).all():
            continue
        found.append(_changed(choice, (g, k), (h, j)))
    return found


def _changed(choice: Sequence[int], *moves: tuple[int, int]) -> Choice:
    changed = [int(c) for c in choice]
    for g, k in moves:
        changed[g] = k
    return tuple(changed)

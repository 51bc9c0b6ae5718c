"""Find what looks wrong in a sensitivity matrix; nothing is changed.

Design: docs/design/measures.md
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from bitquota.codec import Document

if TYPE_CHECKING:
    from bitquota.matrix import SensitivityMatrix


class FlagKind(StrEnum):
    """What is odd."""

    NEGATIVE = "negative"
    """Quantizing alone seems to lower the loss."""
    INCREASING = "increasing"
    """More bits seem to cost more than fewer bits of the same group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag(Document):
    """One oddity.

    Attributes:
        kind: What is odd.
        group: Where.
        label: The row that is flagged.
        against: For ``increasing`` the row with fewer bits and a smaller score.
        excess: By how much: the negative value's magnitude, or the difference.
        standard_errors: ``excess`` in standard errors (both rows' together, taken as
            independent), or ``None`` where there are none; below about 2 it may be noise.
    """

    kind: FlagKind
    group: str
    label: str
    against: str = ""
    excess: float
    standard_errors: float | None = None


def find_flags(matrix: SensitivityMatrix) -> tuple[Flag, ...]:
    """Return every row that is negative or exceeds a row of its group with fewer bits.

    A row is flagged once as increasing, against the smallest of those. Around full precision, and
    in any unit. Cost: O(n · rows per group).
    """
    table, diagonal, errors = matrix.table, matrix.diagonal, matrix.diagonal_error
    offsets = table.offsets
    flags: list[Flag] = []

    def in_errors(excess: float, *rows: int) -> float | None:
        if errors is None:
            return None
        combined = float(sum(errors[r] ** 2 for r in rows)) ** 0.5
        return excess / combined if combined > 0 else None

    for a, b in itertools.pairwise(offsets):
        for r in range(a, b):
            row, value = table.rows[r], float(diagonal[r])
            if value < 0:
                flags.append(
                    Flag(
                        kind=FlagKind.NEGATIVE,
                        group=row.group,
                        label=row.label,
                        excess=-value,
                        standard_errors=in_errors(-value, r),
                    )
                )
            fewer = [q for q in range(a, b) if _below(matrix, q, r)]
            best = min(fewer, key=lambda q: (float(diagonal[q]), q), default=r)
            if value > float(diagonal[best]):
                excess = value - float(diagonal[best])
                flags.append(
                    Flag(
                        kind=FlagKind.INCREASING,
                        group=row.group,
                        label=row.label,
                        against=table.rows[best].label,
                        excess=excess,
                        standard_errors=in_errors(excess, r, best),
                    )
                )
    return tuple(flags)


def _below(matrix: SensitivityMatrix, q: int, r: int) -> bool:
    """Whether row ``q`` has nowhere more bits than row ``r``, somewhere fewer, else the same."""
    smaller = False
    rows = matrix.table.rows
    for one, two in zip(rows[q].candidates, rows[r].candidates, strict=True):
        if one.scheme != two.scheme:
            return False
        pairs = ((one.weight_bits, two.weight_bits), (_act(one), _act(two)))
        if any(x > y for x, y in pairs):
            return False
        smaller |= any(x < y for x, y in pairs)
    return smaller


def _act(candidate: object) -> int:
    bits = getattr(candidate, "activation_bits", None)
    return 32 if bits is None else int(bits)

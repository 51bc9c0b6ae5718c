"""Every measure by name.

Design: docs/design/measures.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitquota.errors import InvalidInput
from bitquota.sensitivity.measures.gram import GramMeasure
from bitquota.sensitivity.measures.pairs import DiagonalMeasure, PairsMeasure
from bitquota.sensitivity.measures.tangent import TangentMeasure
from bitquota.sensitivity.metrics import METRICS

if TYPE_CHECKING:
    from bitquota.sensitivity.base import Measure


def measures() -> dict[str, Measure]:
    """Return every measure by name: those of the loss itself, then metrics by preference."""
    offered: tuple[Measure, ...] = (
        GramMeasure(),
        PairsMeasure(),
        DiagonalMeasure(),
        TangentMeasure(),
    )
    return {measure.name: measure for measure in offered} | METRICS


def measure_by_name(name: str) -> Measure:
    """Return the measure called ``name``.

    Raises:
        InvalidInput: There is no such measure.
    """
    offered = measures()
    if name not in offered:
        msg = f"a measure must be one of {', '.join(offered)}; got '{name}'"
        raise InvalidInput(msg, measure=name)
    return offered[name]

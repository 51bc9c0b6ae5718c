"""What a measure is: a model, a calibration set and candidates in, a sensitivity matrix out.

Design: docs/design/measures.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypedDict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bitquota.candidates.table import CandidateTable
    from bitquota.context import Context
    from bitquota.matrix import SensitivityMatrix
    from bitquota.sensitivity.losses import Loss
    from bitquota.sensitivity.runners.base import Runner


CODE_VERSION = 2
"""Part of every ledger key; raised whenever the same call would give other numbers."""


class MeasureOptions(TypedDict, total=False):
    """What measures of the loss take besides runner, table and loss; see ``Measure.measure``.

    ``chunks`` names those to measure on, by default all.
    """

    base_point: Sequence[int] | None
    context: Context | None
    chunks: Sequence[int] | None


class Measure(Protocol):
    """One way to measure sensitivities.

    Attributes:
        name: Stable name, as users write it.
        has_cross_terms: Whether the matrix has cross-layer terms.
        needs_labels: Whether the calibration set must be labelled.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def has_cross_terms(self) -> bool: ...  # noqa: D102
    @property
    def needs_labels(self) -> bool: ...  # noqa: D102

    def cost(self, runner: Runner, table: CandidateTable) -> float:
        """Return the forward-equivalents that ``measure`` will take (an upper estimate)."""
        ...

    def measure(
        self,
        runner: Runner,
        table: CandidateTable,
        loss: Loss,
        *,
        base_point: Sequence[int] | None = None,
        context: Context | None = None,
    ) -> SensitivityMatrix:
        """Measure.

        Args:
            runner: Executes the model on the calibration set.
            table: What may become of each group.
            loss: What to measure.
            base_point: For each group the row that it has while others are measured, or ``None``
                for full precision.
            context: Where measurements are looked up and kept, whom to tell, when to stop.

        Raises:
            Cancelled: The context said so; everything measured is in the ledger.
            MeasurementFailed: A loss is not finite.
        """
        ...

"""What a refinement is told, and what it returns.

Design: docs/design/search.md
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from bitquota.codec import Document
from bitquota.errors import InvalidInput
from bitquota.search.neighborhood import Choice

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from bitquota.matrix import SensitivityMatrix
    from bitquota.search.neighborhood import Limits
    from bitquota.sensitivity.measures.gram import OutputDifferences


class Solve(Protocol):
    """What refinement needs of a solver."""

    def __call__(self, matrix: SensitivityMatrix, limits: Limits) -> Choice | None:
        """Return the best choice for ``matrix`` within ``limits``, or ``None`` if there is none."""
        ...


CLEARLY = 2.0
"""Paired standard errors by which one choice must be better than another to be held for better."""

LEAST_PASSES = 96.0
"""What a refinement may always spend: of a small model everything is cheap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RefineSettings:
    """How much work refinement may do.

    Attributes:
        iterations: Linearisations at most (each costs one run per row that it measures).
        starts: How many starts are linearised around, the best measured ones.
        far_share: Part of the samples that a linearisation around a start is measured on, with all
            rows: a start can be far from good, and that shows on few samples.
        near_share: Part of the samples of later ones, in whole chunks; the next takes others.
        reach: Rows of each group that later ones measure: at most so many places above and below
            the plan's own. ``None`` measures all.
        radii: Trust regions, as shares of the groups that may change in one step.
        proposals: Choices measured per linearisation.
        swap_rounds: Rounds of measured swaps, at most, each time linearisation is stuck.
        patience: Rounds of swaps in a row that may fail before the search ends.
        swaps: Swaps measured in each round.
        accept_errors: A step must improve by this many paired standard errors: it is the best of
            many that were measured.
        effort: No linearisation or round of swaps is begun that would lead beyond this many times
            the forward-equivalents of a linearisation around full precision, or beyond ``least``
            where that is more. What the ledger holds counts as if it were run,
            so that a run that was interrupted ends with the same plan. ``None`` for no limit.
        least: Passes that it may always spend.
    """

    iterations: int = 12
    starts: int = 3
    far_share: float = 0.25
    near_share: float = 0.5
    reach: int | None = 1
    radii: tuple[float, ...] = (1.0, 0.4, 0.2)
    proposals: int = 6
    swap_rounds: int = 6
    patience: int = 2
    swaps: int = 8
    accept_errors: float = CLEARLY
    effort: float | None = 2.0
    least: float = LEAST_PASSES

    def __post_init__(self) -> None:
        """Check ranges."""
        counts = self.iterations, self.swap_rounds, self.proposals - 1, self.swaps - 1
        if min(*counts, self.patience - 1, self.starts - 1) < 0:
            msg = f"refinement settings must be positive; got {self}"
            raise InvalidInput(msg)
        shares = self.far_share, self.near_share
        if not all(0 < share <= 1 for share in shares):
            msg = f"shares of the samples must be above 0 and at most 1; got {shares}"
            raise InvalidInput(msg)
        if not self.radii or not all(0 < r <= 1 for r in self.radii):
            msg = f"trust radii must be shares between 0 and 1; got {self.radii}"
            raise InvalidInput(msg)


EFFORTS = {
    "quick": RefineSettings(iterations=0, starts=1, swap_rounds=0),
    "normal": RefineSettings(
        iterations=6, starts=2, swap_rounds=2, patience=1, effort=0.75, least=LEAST_PASSES / 2
    ),
    "thorough": RefineSettings(),
}
"""How much a refinement does, by the effort of a request; without refinement as ``quick``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step(Document):
    """One accepted or rejected step.

    Attributes:
        kind: ``start``, ``linearised`` or ``swap``.
        origin: Where the best proposal came from.
        choice: The best proposal.
        loss: Its measured mean loss increase on the deciding samples.
        gain: By how much it is better than the choice before it (paired mean).
        gain_error: Standard error of ``gain``.
        accepted: Whether it became the new choice.
        passes: Forward-equivalents since the refinement began.
    """

    kind: str
    origin: str
    choice: Choice
    loss: float
    gain: float
    gain_error: float
    accepted: bool
    passes: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Linearisation:
    """What was measured around one point.

    Attributes:
        point: The base point, or ``None`` for full precision.
        matrix: Around that point; entries of rows beyond ``rows`` mean nothing.
        differences: Output differences, unless they are huge.
        rows: Rows of the table that were measured.
    """

    point: Choice | None
    matrix: SensitivityMatrix
    differences: OutputDifferences | None
    rows: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Refinement:
    """The result of ``refine``.

    Attributes:
        choice: The best measured choice.
        per_sample: f64[N], its loss increase on the deciding samples.
        last: The last linearisation, for predictions near ``choice``.
        steps: What happened.
        measured: Mean loss increase of every choice that was measured, in order.
    """

    choice: Choice
    per_sample: NDArray[np.float64]
    last: Linearisation
    steps: tuple[Step, ...]
    measured: dict[Choice, float] = field(default_factory=dict)

    @property
    def loss(self) -> float:
        """Mean measured loss increase."""
        return float(self.per_sample.mean())

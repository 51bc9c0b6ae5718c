"""What the part of a backend that runs in a child process is told, and what it answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from bitquota.codec import Document, Form, LowerBound

if TYPE_CHECKING:
    from collections.abc import Callable

    from bitquota.solver.backends.model import Model

AnswerStatus = Literal["optimal", "feasible", "infeasible", "unknown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One call of an external solver.

    Attributes:
        model: What to solve.
        covers: Row sets of which not all groups may be chosen (``Model.cover``).
        gap: Relative gap to prove.
        time_limit_s: Seconds left, or ``None``.
        node_limit: Nodes, or ``None``.
        seed: For solvers that take one.
        report: Call it with the chosen rows of better solutions on the way, where possible.
    """

    model: Model
    covers: tuple[NDArray[np.int64], ...] = ()
    gap: float
    time_limit_s: float | None
    node_limit: int | None
    seed: int
    report: Callable[[NDArray[np.int64]], None]

    def cover_limit(self, rows: NDArray[np.int64]) -> int:
        """Return how many of a cover's rows may be chosen."""
        return len(set(self.model.group[rows].tolist())) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer(Document):
    """What an external solver said about the scaled model.

    Attributes:
        status: ``optimal`` within the gap and its own tolerances.
        limit: ``time``, ``node`` or ``memory`` when that stopped it.
        chosen: i64[G], rows of the model, or ``None``.
        bound: Scaled lower bound, or ``-inf``.
        tolerance: How far the bound may be above the truth, scaled: a float solver's own
            tolerances, by order of magnitude.
        nodes: Nodes it counted.
        details: Further numbers.
    """

    FORM: ClassVar[Form] = Form(what="an answer")

    status: AnswerStatus
    limit: str | None = None
    chosen: NDArray[np.int64] | None = None
    bound: LowerBound = -math.inf
    tolerance: float = 0.0
    nodes: int = 0
    details: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that what was found is there."""
        if self.status in ("optimal", "feasible") and self.chosen is None:
            msg = f"must have chosen rows where its status is '{self.status}'"
            raise ValueError(msg)

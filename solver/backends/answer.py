"""What the part of a backend that runs in a child process is told, and what it answers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from bitquota.solver.backends.model import Model

JsonObject = dict[str, Any]

STATUSES = ("optimal", "feasible", "infeasible", "unknown")


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
class Answer:
    """What an external solver said about the scaled model.

    Attributes:
        status: One of ``STATUSES``; ``optimal`` within the gap and its own tolerances.
        limit: ``time``, ``node`` or ``memory`` when that stopped it.
        chosen: i64[G], rows of the model, or ``None``.
        bound: Scaled lower bound, or ``-inf``.
        tolerance: How far the bound may be above the truth, scaled: a float solver's own
            tolerances, by order of magnitude.
        nodes: Nodes it counted.
        details: Further numbers.
    """

    status: str
    limit: str | None = None
    chosen: NDArray[np.int64] | None = None
    bound: float = -math.inf
    tolerance: float = 0.0
    nodes: int = 0
    details: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> JsonObject:
        """Return the fields as plain JSON."""
        return {
            "status": self.status,
            "limit": self.limit,
            "chosen": None if self.chosen is None else self.chosen.tolist(),
            "bound": self.bound if math.isfinite(self.bound) else None,
            "tolerance": self.tolerance,
            "nodes": self.nodes,
            "details": self.details,
        }

    @classmethod
    def from_json(cls, data: JsonObject) -> Answer:
        """Rebuild from ``to_json``.

        Raises:
            ValueError: A field is missing or of the wrong type.
        """
        if not isinstance(data, dict) or data.get("status") not in STATUSES:
            msg = f"an answer must have a status of {STATUSES}; got {data!r:.200}"
            raise ValueError(msg)
        try:
            chosen = data["chosen"]
            return cls(
                status=data["status"],
                limit=data["limit"],
                chosen=None if chosen is None else np.array(chosen, dtype=np.int64),
                bound=-math.inf if data["bound"] is None else float(data["bound"]),
                tolerance=float(data["tolerance"]),
                nodes=int(data["nodes"]),
                details={str(k): float(v) for k, v in data["details"].items()},
            )
        except (KeyError, TypeError, AttributeError) as err:
            msg = f"an answer must have all fields of Answer; got {data!r:.200}"
            raise ValueError(msg) from err

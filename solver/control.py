"""Limits, cancellation and events of one solve."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitquota.solver.solution import Event, Limit

if TYPE_CHECKING:
    from collections.abc import Callable

    from bitquota.solver.branch import Incumbent
    from bitquota.solver.problem import Problem


@dataclass(slots=True, kw_only=True, eq=False)
class Control:
    """What may stop a solve, and who listens to it.

    Attributes:
        time_limit_s: Seconds by ``clock``.
        node_limit: Branch-and-bound nodes.
        on_event: Gets better choices and bounds.
        cancelled: Asked between steps.
        clock: What the time limit is measured with.
        limit: What stopped the solve, once something has.
    """

    time_limit_s: float | None = None
    node_limit: int | None = None
    on_event: Callable[[Event], None] | None = None
    cancelled: Callable[[], bool] | None = None
    clock: Callable[[], float] = time.monotonic
    begin: float = 0.0
    cpu_begin: float = 0.0
    limit: Limit | None = None

    def start(self) -> None:
        """Note the time."""
        self.begin, self.cpu_begin = self.clock(), time.process_time()

    def stopped(self) -> bool:
        """Return whether a limit was reached, and remember which."""
        if self.limit is None:
            if self.cancelled is not None and self.cancelled():
                self.limit = Limit.CANCELLED
            elif self.time_limit_s is not None and self.elapsed() >= self.time_limit_s:
                self.limit = Limit.TIME
        return self.limit is not None

    def elapsed(self) -> float:
        """Seconds since the start, by ``clock``."""
        return self.clock() - self.begin

    def cpu_seconds(self) -> float:
        """CPU seconds of this process since the start."""
        return time.process_time() - self.cpu_begin

    def tell(
        self, kind: str, incumbent: Incumbent, bound: float, nodes: int, problem: Problem
    ) -> None:
        """Send an event, if anyone listens."""
        if self.on_event is None:
            return
        choice = None
        if kind == "incumbent" and incumbent.rows is not None:
            choice = tuple((incumbent.rows - problem.offsets[:-1]).tolist())
        self.on_event(
            Event(
                kind=kind,
                objective=incumbent.objective,
                bound=min(bound, incumbent.objective),
                nodes=nodes,
                cpu_seconds=self.cpu_seconds(),
                choice=choice,
            )
        )

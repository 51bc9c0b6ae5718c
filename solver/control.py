"""Limits, cancellation and events of one solve."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from bitquota.errors import InvalidProblem
from bitquota.solver.solution import Event, Limit

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from bitquota.solver.branch import Incumbent
    from bitquota.solver.problem import Problem
    from bitquota.solver.solution import Solution

WATCH_S = 0.01
"""How often a limit is looked at while a kernel runs."""

OnEvent = Callable[[Event], None]
Cancelled = Callable[[], bool]


class Wishes(TypedDict, total=False):
    """Options of ``bitquota.solver.solve`` that callers hand on as they are; explained there."""

    gap: float
    node_limit: int | None
    seed: int
    cancelled: Cancelled | None


class Limits(Wishes, total=False):
    """The same, with the time limit of each solve."""

    time_limit_s: float | None
    clock: Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Limits and goal of one run.

    Attributes:
        gap: Relative gap that counts as solved.
        time_limit_s: Seconds, start of a child process not counted; ``None`` for as long as it
            takes.
        node_limit: Branch-and-bound nodes, for backends that count them.
        seed: For backends with a random part.
    """

    gap: float = 1e-4
    time_limit_s: float | None = None
    node_limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check that nothing is negative."""
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None and not value >= 0:
                msg = f"'{name}' must not be negative; got {value}"
                raise InvalidProblem(msg)
        # Kernels are compiled for each type that they meet.
        object.__setattr__(self, "gap", float(self.gap))


@dataclass(slots=True, kw_only=True, eq=False)
class Control:
    """One solve from its start: what it is for, what may stop it, and who listens to it.

    Attributes:
        options: Goal and limits; seconds by ``clock``.
        on_event: Gets better choices and bounds.
        cancelled: Asked between steps, and from a thread of its own while a kernel runs.
        clock: What the time limit is measured with.
        limit: What stopped the solve, once something has.
        halt: u8[1], 1 from then on: what kernels read, as they cannot call Python.
        closing_s: What putting the answer together will take; the limit strikes so much earlier.
    """

    options: Options = field(default_factory=Options)
    on_event: OnEvent | None = None
    cancelled: Cancelled | None = None
    clock: Callable[[], float] = time.monotonic
    limit: Limit | None = None
    halt: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(1, dtype=np.uint8))
    closing_s: float = 0.0
    begin: float = field(init=False)
    cpu_begin: float = field(init=False)

    def __post_init__(self) -> None:
        """Note the time."""
        self.begin, self.cpu_begin = self.clock(), time.process_time()

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Leave out of the time what is done meanwhile; before ``watched``."""
        since = self.clock()
        yield
        self.begin += self.clock() - since

    def stopped(self) -> bool:
        """Return whether a limit was reached, and remember which."""
        if self.limit is None:
            if self.cancelled is not None and self.cancelled():
                self.limit = Limit.CANCELLED
            elif self._left_s() <= 0.0:
                self.limit = Limit.TIME
            self.halt[0] = self.limit is not None
        return self.limit is not None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Raise ``halt`` in time for kernels that run long, from a thread of its own."""
        if self.cancelled is None and self.options.time_limit_s is None:
            yield
            return
        over = threading.Event()

        def watch() -> None:
            while not over.wait(self._watch_s()):
                try:
                    if self.stopped():
                        return
                except Exception:  # noqa: BLE001  # raised where the solve itself asks
                    return

        watcher = threading.Thread(target=watch, name="bitquota-limits", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()

    def _watch_s(self) -> float:
        """Return when to look at the limits next."""
        return min(WATCH_S, max(self._left_s(), 0.1 * WATCH_S))

    def _left_s(self) -> float:
        """Return how long the work may go on."""
        limit = self.options.time_limit_s
        return math.inf if limit is None else limit - self.closing_s - self.elapsed()

    def elapsed(self) -> float:
        """Seconds since the start, by ``clock``."""
        return self.clock() - self.begin

    def cpu_seconds(self) -> float:
        """CPU seconds of this process since the start."""
        return time.process_time() - self.cpu_begin

    def tell_of(self, solution: Solution) -> None:
        """Send the choice of a solution, if there is one and anyone listens."""
        if self.on_event is not None and solution.choice is not None:
            self.on_event(
                Event(
                    kind="incumbent",
                    objective=solution.objective,
                    bound=solution.bound,
                    cpu_seconds=solution.cpu_seconds,
                    choice=tuple(solution.choice.tolist()),
                )
            )

    def tell(
        self, kind: str, incumbent: Incumbent, bound: float, nodes: int, problem: Problem
    ) -> None:
        """Send an event, if anyone listens; it may cancel the solve at this very step."""
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
        self.stopped()

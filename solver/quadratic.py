"""The exact solver for problems with cross-layer terms."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bitquota.solver.branch import Incumbent, Record, Tree
from bitquota.solver.convex import convexify
from bitquota.solver.core import propagate_steps, reduce
from bitquota.solver.search import Effort, search
from bitquota.solver.semidefinite import DualPoint, Lifted, dual_point, interior_point
from bitquota.solver.solution import Event, Limit, Solution, Stats, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from bitquota.solver.core import Core
    from bitquota.solver.problem import Problem

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

MEMORY_LIMIT_BYTES = 2 * 2**30
"""Node arrays beyond this stop the search with what is proved by then."""
_BATCH = 64


@dataclass(slots=True, kw_only=True, eq=False)
class Control:
    """Limits, cancellation and events of one solve.

    Attributes:
        clock: Seconds; what the time limit is measured with.
    """

    time_limit_s: float | None
    node_limit: int | None
    on_event: Callable[[Event], None] | None
    cancelled: Callable[[], bool] | None
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
        self, kind: str, incumbent: Incumbent, bound: float, nodes: int, offsets: Ints
    ) -> None:
        """Send an event, if anyone listens."""
        if self.on_event is None:
            return
        choice = None
        if kind == "incumbent" and incumbent.rows is not None:
            choice = tuple((incumbent.rows - offsets[:-1]).tolist())
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


def solve_quadratic(
    problem: Problem,
    control: Control,
    *,
    gap: float,
    seed: int,
    starts: tuple[Ints, ...] = (),
    effort: Effort | None = None,
) -> Solution:
    """Solve ``problem`` to relative gap ``gap``, or as far as the limits allow. Exact.

    Args:
        problem: Budgets already checked one by one (``Problem.check_budgets``).
        control: Limits and callbacks, started.
        gap: Relative gap to prove.
        seed: For the search; a seed gives one answer when no time limit strikes.
        starts: Choices to begin with; infeasible ones are ignored.
        effort: How long to search before proving.
    """
    record = Record(problem=problem)
    record.chain(problem.allowed)
    keep = problem.allowed
    for step in propagate_steps(problem, problem.allowed):
        if step is None:
            return _infeasible(record, control)
        keep = step
        record.chain(keep)
    scale = float(np.abs(problem.diagonal[keep]).max(initial=0.0))
    incumbent = Incumbent(gap=gap, floor=1e-12 * scale)
    core = reduce(problem, keep)
    for start in starts:
        if problem.is_feasible(start):
            incumbent.offer(problem.evaluate(start), problem.rows(start))
    if core.n_groups == 0:
        rows = core.lift(np.zeros(0, dtype=np.int64))
        if not core.feasible:
            return _infeasible(record, control)
        incumbent.offer(core.constant, rows)
        return _solution(problem, record, None, incumbent, core.constant, control, 0, 0)

    def better(cur: Ints, value: float) -> None:
        if incumbent.offer(value, core.lift(cur)):
            control.tell("incumbent", incumbent, -math.inf, 0, problem.offsets)

    known = [] if incumbent.rows is None else [_inside(core, incumbent.rows)]
    cur, value = search(
        core,
        effort=effort or Effort(),
        seed=seed,
        starts=[k for k in known if k is not None],
        on_better=better,
        stop=control.stopped,
    )
    if cur is not None and incumbent.offer(value, core.lift(cur)):
        control.tell("incumbent", incumbent, -math.inf, 0, problem.offsets)
    point = _bound(core, incumbent, control, problem)
    iterations = point.iterations
    convex = convexify(core, point)
    tree = Tree(core, convex)
    z = np.clip(np.diag(point.pair_values), 1e-6, None)
    code = tree.root(incumbent, z, point.multipliers)
    record.formula(tree)
    root_bound = float(tree.bound[0])
    control.tell("bound", incumbent, root_bound, 1, problem.offsets)
    if code == 0 and tree.kind[0] == 0:
        return _infeasible(record, control)
    last_told = 0.0
    while code == 1 and not tree.done(incumbent):
        if control.stopped():
            break
        if control.node_limit is not None and tree.n_nodes >= control.node_limit:
            control.limit = Limit.NODE
            break
        if tree.memory_bytes > MEMORY_LIMIT_BYTES:
            control.limit = Limit.MEMORY
            break
        most = _BATCH
        if control.node_limit is not None:
            most = max(1, min(most, (control.node_limit - tree.n_nodes + 1) // 2))
        kind = "incumbent" if tree.grow(incumbent, most) else "progress"
        if kind == "incumbent" or control.cpu_seconds() - last_told > 0.2:
            last_told = control.cpu_seconds()
            control.tell(kind, incumbent, tree.open_bound(), tree.n_nodes, problem.offsets)
    if tree.kind[0] == 2:
        bound = min(float(tree.bound[0]), incumbent.objective)
    else:
        bound = min(tree.open_bound(), incumbent.cutoff)
        bound = max(bound, root_bound)
    return _solution(
        problem, record, tree, incumbent, bound, control, tree.n_nodes, iterations, root_bound
    )


def _bound(core: Core, incumbent: Incumbent, control: Control, problem: Problem) -> DualPoint:
    """Return the root's dual point: none needed without cross terms, else the interior point."""
    if not core.C.any():
        n, m = core.n, len(core.b)
        empty = np.zeros(0, dtype=np.int64)
        return DualPoint(
            shift=np.zeros((n, int(np.diff(core.off).max()))),
            cut_rows=empty,
            cut_columns=empty,
            cut_values=np.zeros(0),
            products=np.zeros((m, n)),
            multipliers=np.zeros(m),
            bound=-math.inf,
            iterations=0,
            pair_values=np.diag(1.0 / np.diff(core.off)[core.grp]),
        )
    lifted = Lifted(core, products=False)

    def enough(value: float) -> bool:
        control.tell("bound", incumbent, value, 0, problem.offsets)
        return value >= incumbent.cutoff or control.stopped()

    state, iterations = interior_point(lifted, tolerance=1e-2, stop=enough)
    return dual_point(lifted, state, iterations)


def _inside(core: Core, rows: Ints) -> Ints | None:
    index = np.full(int(max(rows.max(), core.rows.max())) + 1, -1, dtype=np.int64)
    index[core.rows] = np.arange(core.n)
    cur = index[rows[core.full < 0]]
    return None if bool((cur < 0).any()) else cur


def _infeasible(record: Record, control: Control) -> Solution:
    return Solution(
        status=Status.INFEASIBLE,
        objective=math.inf,
        bound=math.inf,
        stats=Stats(cpu_seconds=control.cpu_seconds()),
        certificate=record.finish(math.inf, None),
    )


def _solution(
    problem: Problem,
    record: Record,
    tree: Tree | None,
    incumbent: Incumbent,
    bound: float,
    control: Control,
    nodes: int,
    iterations: int,
    root_bound: float = -math.inf,
) -> Solution:
    stats = Stats(
        nodes=nodes,
        cpu_seconds=control.cpu_seconds(),
        bound_iterations=iterations,
        root_bound=root_bound,
    )
    if incumbent.rows is None:
        if control.limit is None:
            return Solution(
                status=Status.INFEASIBLE,
                bound=math.inf,
                stats=stats,
                certificate=record.finish(math.inf, tree),
            )
        return Solution(
            status=Status.UNKNOWN,
            limit=control.limit,
            bound=bound,
            stats=stats,
            certificate=record.finish(bound, tree),
        )
    choice = incumbent.rows - problem.offsets[:-1]
    objective = problem.evaluate(choice)
    bound = min(bound, objective)
    proved = objective - bound <= max(incumbent.gap * abs(objective), incumbent.floor) * (1 + 1e-9)
    return Solution(
        status=Status.OPTIMAL if proved else Status.FEASIBLE,
        limit=None if proved else (control.limit or Limit.METHOD),
        choice=choice,
        objective=objective,
        bound=bound,
        stats=stats,
        certificate=record.finish(bound, tree),
    )

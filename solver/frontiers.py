"""Loss against size: many budgets in one call, and the smallest plan for a loss tolerance."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Unpack

import numpy as np
from numpy.typing import NDArray

from bitquota.codec import Document, Form, UpperBound
from bitquota.errors import InvalidProblem
from bitquota.solver.core import propagated, reduce
from bitquota.solver.dispatch import GAP, solve
from bitquota.solver.native import is_knapsack, verified
from bitquota.solver.quadratic import INTERIOR_ROWS
from bitquota.solver.search import Effort, meets_all, repaired, search
from bitquota.solver.separable import solve_knapsack
from bitquota.solver.solution import Limit, Solution, Stats, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bitquota.solver.control import Wishes
    from bitquota.solver.problem import Problem
    from bitquota.solver.solution import Event

    Ints = NDArray[np.int64]

_QUICK = Effort(restarts=0, patience=12, bisections=16)


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierPoint:
    """One budget and its answer.

    Attributes:
        limit: The budget of the varied resource.
        solution: Best choice, with bound and certificate where it was asked for.
    """

    limit: int
    solution: Solution


def even_limits(problem: Problem, points: int, *, resource: int = 0) -> Ints:
    """Return ``points`` budgets, evenly spaced from the cheapest choice to the dearest needed."""
    starts = problem.offsets[:-1]
    cost = problem.costs[resource]
    big = np.iinfo(np.int64).max
    least = int(np.minimum.reduceat(np.where(problem.allowed, cost, big), starts).sum())
    most = int(np.maximum.reduceat(np.where(problem.allowed, cost, 0), starts).sum())
    return np.unique(np.linspace(least, most, points).astype(np.int64))


def frontier(
    problem: Problem,
    limits: Sequence[int] | Ints,
    *,
    resource: int = 0,
    certify: bool = True,
    time_limit_s: float | None = None,
    on_point: Callable[[FrontierPoint], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
    **wishes: Unpack[Wishes],
) -> tuple[FrontierPoint, ...]:
    """Solve ``problem`` at every budget of one resource, in rising order.

    Good choices are carried up (a choice fits every larger budget) and down (repaired to fit),
    then each point is proved. A larger budget never has a worse choice.

    Args:
        problem: Its own limit of ``resource`` is ignored.
        limits: Budgets; those below the cheapest choice give infeasible points.
        resource: Index of the resource that varies.
        certify: Prove every point; otherwise answers are heuristic, without bounds.
        time_limit_s: Seconds by ``clock`` for all points together; what is left is shared evenly
            by the points to come.
        on_point: Called with each finished point.
        clock: What the time limit is measured with.
        wishes: For each point; see ``bitquota.solver.solve``. Points that are not reached before
            ``cancelled`` stay heuristic.

    Raises:
        InvalidProblem: The problem has no such resource.
    """
    if not 0 <= resource < len(problem.limits):
        msg = f"a frontier needs a resource from 0 to {len(problem.limits) - 1}; got {resource}"
        raise InvalidProblem(msg)
    begin, cancelled = clock(), wishes.get("cancelled")
    # Search at all budgets, each from its neighbours' choices.
    levels = sorted({int(limit) for limit in limits})
    problems = [problem.within(resource, limit) for limit in levels]
    # The search takes pair terms as a matrix; large ones in other forms are searched as bounded.
    whole = problem.factor is None and not len(problem.terms)
    whole = whole or problem.n_rows <= INTERIOR_ROWS
    choices = _sweep(problems, wishes.get("seed", 0)) if whole else [None] * len(levels)
    # Prove one after the other.
    points: list[FrontierPoint] = []
    for index, (limit, one) in enumerate(zip(levels, problems, strict=True)):
        start = choices[index]
        if points and points[-1].solution.choice is not None:
            carried = points[-1].solution.choice
            if start is None or one.evaluate(carried) < one.evaluate(start):
                start = carried
        left = None
        if time_limit_s is not None:
            left = max(0.0, time_limit_s - (clock() - begin)) / (len(levels) - index)
        if start is None and _hopeless(one):
            solution = Solution(status=Status.INFEASIBLE, bound=math.inf)
        elif (not certify and whole) or (cancelled is not None and cancelled()):
            solution = _heuristic(one, start)
        else:
            solution = solve(one, time_limit_s=left, start=start, clock=clock, **wishes)
        points.append(FrontierPoint(limit=limit, solution=solution))
        if on_point is not None:
            on_point(points[-1])
    return tuple(points)


def _hopeless(problem: Problem) -> bool:
    return propagated(problem, problem.allowed) is None


def _heuristic(problem: Problem, choice: Ints | None) -> Solution:
    if choice is None:
        return Solution(status=Status.UNKNOWN, limit=Limit.METHOD)
    return verified(
        problem,
        Solution(
            status=Status.FEASIBLE,
            limit=Limit.METHOD,
            choice=choice,
            objective=problem.evaluate(choice),
            backend="bitquota search",
        ),
    )


def _sweep(problems: list[Problem], seed: int) -> list[Ints | None]:
    """Return a good choice per problem (limits rising), carried up, then down."""
    found: list[Ints | None] = [None] * len(problems)
    for index, problem in enumerate(problems):
        if is_knapsack(problem):
            if not _hopeless(problem):
                found[index] = solve_knapsack(problem, gap=GAP).choice
            continue
        near = found[index - 1] if index else None
        found[index] = _improve(problem, near, seed)
    for index in range(len(problems) - 2, -1, -1):
        if not is_knapsack(problems[index]):
            found[index] = _better(problems[index], found[index], found[index + 1], seed)
    for index in range(1, len(problems)):
        found[index] = _least(problems[index], found[index], found[index - 1])
    return found


def _least(problem: Problem, first: Ints | None, second: Ints | None) -> Ints | None:
    fits = [c for c in (first, second) if c is not None and problem.is_feasible(c)]
    return min(fits, key=problem.evaluate) if fits else None


def _improve(problem: Problem, near: Ints | None, seed: int) -> Ints | None:
    keep = propagated(problem, problem.allowed)
    if keep is None:
        return None
    core = reduce(problem, keep)
    if core.n_groups == 0:
        rows = core.lift(np.zeros(0, dtype=np.int64))
    else:
        starts = []
        if near is not None:
            cur = core.lower(problem.rows(near))
            if bool((cur >= 0).all()):
                starts.append(cur)
        found, _ = search(core, effort=_QUICK, seed=seed, starts=starts)
        if found is None or not meets_all(core, found):
            return _least(problem, near, None)
        rows = core.lift(found)
    choice = rows - problem.offsets[:-1]
    return _least(problem, choice, near)


def _better(problem: Problem, own: Ints | None, above: Ints | None, seed: int) -> Ints | None:
    """Return the better of ``own`` and what becomes of the next budget's choice here."""
    if above is None:
        return own
    if problem.is_feasible(above):
        return _least(problem, own, above)
    return _least(problem, own, repaired(problem, above, seed))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Smallest(Document):
    """The smallest cost whose loss is within a tolerance.

    Attributes:
        status: ``optimal`` when ``cost`` is within the gap of ``bound``; ``infeasible`` when no
            choice meets the tolerance.
        limit: What stopped the search early, or ``None``.
        choice: i64[G], or ``None``.
        cost: What it takes of the resource.
        bound: No choice that costs less than this meets the tolerance, proved.
        objective: Its loss.
        stats: Effort.
    """

    FORM: ClassVar[Form] = Form(what="a smallest cost", unwritten=("stats",))

    status: Status
    limit: Limit | None
    choice: NDArray[np.int64] | None
    cost: int | None
    bound: int
    objective: UpperBound
    stats: Stats


def smallest(
    problem: Problem,
    tolerance: float,
    *,
    resource: int = 0,
    gap: float = GAP,
    time_limit_s: float | None = None,
    seed: int = 0,
    cancelled: Callable[[], bool] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Smallest:
    """Return the cheapest choice whose objective is at most ``tolerance``.

    Bisection on the budget; at each one the solver runs only until it knows whether the tolerance
    can be met (a choice below it, or a bound above it). Exact to relative ``gap`` of the cost.

    Args:
        problem: Its own limit of ``resource`` still holds.
        tolerance: Largest objective, in the objective's unit, the constant included.
        resource: Index of the resource to save.
        gap: Relative gap of the cost at which the bisection ends; 0 goes to the last unit.
        time_limit_s: Seconds by ``clock`` in all.
        seed: For the search.
        cancelled: Asked now and then.
        clock: What the time limit is measured with.

    Raises:
        BudgetTooSmall: The problem's own budgets cannot be met.
        InvalidProblem: The problem has no such resource, or the tolerance is no number.
    """
    if math.isnan(tolerance):
        msg = f"'tolerance' must be a number; got {tolerance}"
        raise InvalidProblem(msg)
    if not 0 <= resource < len(problem.limits):
        msg = f"'resource' must be 0 to {len(problem.limits) - 1}; got {resource}"
        raise InvalidProblem(msg)
    problem.check_budgets()
    begin, cpu = clock(), time.process_time()
    nodes = 0
    # Between a cost that is too low and one that does.
    least = int(even_limits(problem, 2, resource=resource)[0])
    low, high = least - 1, int(problem.limits[resource])
    best: Ints | None = None
    limit: Limit | None = None
    trial = high
    while True:
        one = problem.within(resource, trial)
        left = None if time_limit_s is None else max(0.0, time_limit_s - (clock() - begin))
        met, solution = _meets(one, tolerance, left, seed, best, cancelled, clock)
        nodes += solution.stats.nodes
        if met is None:
            limit = solution.limit
            break
        if met and solution.choice is not None:
            best = solution.choice
            high = int(one.spent(best)[resource])
        else:
            low = trial
            if best is None:
                break
        if high - low <= max(1, math.floor(gap * high)):
            break
        trial = (low + high) // 2
    # What is known by then.
    stats = Stats(nodes=nodes, cpu_seconds=time.process_time() - cpu)
    done, stopped = Status.OPTIMAL, Status.FEASIBLE
    if best is None:
        done, stopped = Status.INFEASIBLE, Status.UNKNOWN
    return Smallest(
        status=done if limit is None else stopped,
        limit=limit,
        choice=best,
        cost=None if best is None else int(problem.spent(best)[resource]),
        bound=low + 1,
        objective=math.inf if best is None else problem.evaluate(best),
        stats=stats,
    )


def _meets(
    problem: Problem,
    tolerance: float,
    time_limit_s: float | None,
    seed: int,
    start: Ints | None,
    cancelled: Callable[[], bool] | None,
    clock: Callable[[], float],
) -> tuple[bool | None, Solution]:
    """Return whether a choice within ``tolerance`` exists; ``None`` when a limit struck first."""
    known = [math.inf, -math.inf]

    def see(event: Event) -> None:
        known[0] = min(known[0], event.objective)
        known[1] = max(known[1], event.bound)

    def decided() -> bool:
        if known[0] <= tolerance or known[1] > tolerance:
            return True
        return cancelled is not None and cancelled()

    solution = solve(
        problem,
        gap=0.0,
        time_limit_s=time_limit_s,
        seed=seed,
        on_event=see,
        cancelled=decided,
        start=start,
        clock=clock,
    )
    if solution.objective <= tolerance:
        return True, solution
    if solution.bound > tolerance or solution.status is Status.INFEASIBLE:
        return False, solution
    if solution.status is Status.OPTIMAL:  # a gap that is all rounding
        return solution.objective <= tolerance, solution
    return None, solution

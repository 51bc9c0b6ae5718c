"""Exact solution of separable problems with one budget, at thousands of layers.

The linear relaxation of a multiple-choice knapsack follows the groups' convex hulls. Its price
gives every row a reduced cost; only rows whose reduced cost is below the gap between the best
choice and the relaxation can be in a better choice, and few groups have two of them (the *core*).
A recursion over (cost, price) states of the core finds the best choice.

References:
    [SZ79] P. Sinha, A. Zoltners: The multiple-choice knapsack problem, 1979 (hulls).
    [P95] D. Pisinger: A minimal algorithm for the multiple-choice knapsack problem, 1995 (core).

Design: docs/design/solver.md
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from bitquota.errors import InvalidProblem
from bitquota.solver import separable_kernels as kernels
from bitquota.solver.separable_kernels import States

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from bitquota.solver.problem import Problem

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]
    Bytes = NDArray[np.uint8]

MOST_STATES = 4_000_000
"""States of one step beyond which the recursion gives up."""
ROUNDING = 1e-12
_SORTED = 20_000
"""Steps around the budget that are sorted."""
_FILLED = 2000
"""Steps beyond the budget that are tried with what it leaves over."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Hull:
    """All vertices of the linear relaxation's frontier, cheapest first.

    Attributes:
        rows: i64[h], hull rows, group by group, cheapest first.
        first: i64[G+1], where each group's hull rows start.
        steps: i64[s], indices into ``rows`` in the order in which a growing budget takes them.
        cost: i64[s+1], total cost before any step and after each.
        loss: f64[s+1], objective likewise.
        slope: f64[s], loss gained per unit of cost by each step, falling.
    """

    rows: Ints
    first: Ints
    steps: Ints
    cost: Ints
    loss: Floats
    slope: Floats

    def choice(self, problem: Problem, taken: int) -> Ints:
        """Return the choice after ``taken`` steps."""
        at = self.first[:-1].copy()
        steps = self.steps[:taken]
        group = np.searchsorted(self.first, steps, side="right") - 1
        np.maximum.at(at, group, steps)
        return self.rows[at] - problem.offsets[:-1]


def hull(problem: Problem, resource: int = 0) -> Hull:
    """Return the frontier of the linear relaxation over one resource: every vertex is a choice.

    Cross terms, other budgets and pairs are ignored. Exact at its vertices: no choice of at most
    that cost has less loss. ``O(n B + n log n)``.

    Raises:
        InvalidProblem: The problem has no such resource, or a group without allowed rows.
    """
    if not 0 <= resource < len(problem.limits):
        msg = f"a hull needs a resource from 0 to {len(problem.limits) - 1}; got {resource}"
        raise InvalidProblem(msg)
    cost = problem.costs[resource]
    rows, first, slope = _group_hulls(problem, resource)
    steps = np.flatnonzero(np.isfinite(slope))
    steps = steps[np.argsort(-slope[steps], kind="stable")]
    base = rows[first[:-1]]
    taken, before = rows[steps], rows[steps - 1]
    total = np.concatenate([[cost[base].sum()], cost[taken] - cost[before]]).cumsum()
    start = problem.constant + float(problem.diagonal[base].sum())
    change = problem.diagonal[taken] - problem.diagonal[before]
    return Hull(
        rows=rows,
        first=first,
        steps=steps,
        cost=total.astype(np.int64),
        loss=np.concatenate([[start], start + np.cumsum(change)]),
        slope=slope[steps],
    )


def _group_hulls(problem: Problem, resource: int) -> tuple[Ints, Ints, Floats]:
    """Return the hulls' rows, where each group's start, and the slope of the step to each row.

    Raises:
        InvalidProblem: A group without allowed rows.
    """
    rows, slope = np.zeros(problem.n_rows, dtype=np.int64), np.zeros(problem.n_rows)
    first = np.zeros(problem.n_groups + 1, dtype=np.int64)
    count = int(
        kernels.group_hulls(
            problem.diagonal, problem.costs[resource], problem.offsets, problem.allowed, rows,
            first, slope,
        )
    )  # fmt: skip
    if bool((np.diff(first) < 1).any()):
        msg = "a hull needs an allowed row in every group; got a group without"
        raise InvalidProblem(msg)
    return rows[:count], first, slope[:count]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Break:
    """Where the relaxation spends the budget: what a hull tells near there, without a sort.

    Attributes:
        choice: i64[G], after all steps that the budget pays for.
        price: Slope of the first step that it does not; ``None`` where it pays for all.
        steps: i64[k, 2], group and row of the steps from there on, best first.
    """

    choice: Ints
    price: float | None
    steps: Ints

    @classmethod
    def of(cls, problem: Problem) -> _Break:
        """Narrow the steps down around the budget by their median slopes; ``O(n)``."""
        rows, first, slope = _group_hulls(problem, 0)
        cost, budget = problem.costs[0], int(problem.limits[0])
        last = rows[first[1:] - 1]
        if int(cost[last].sum()) <= budget:
            choice = last - problem.offsets[:-1]
            return cls(choice=choice, price=None, steps=np.zeros((0, 2), dtype=np.int64))
        more = np.diff(cost[rows], prepend=0)
        left = budget - int(cost[rows[first[:-1]]].sum())
        alive, taken = np.flatnonzero(np.isfinite(slope)), np.zeros(len(rows), dtype=np.bool_)
        while len(alive) > _SORTED:
            slopes = slope[alive]
            pivot = float(np.median(slopes[:: len(alive) // 1000]))
            above = slopes > pivot if pivot < slopes.max() else slopes >= pivot
            if above.all():
                break
            upper = alive[above]
            if (spent := int(more[upper].sum())) <= left:
                taken[upper], left, alive = True, left - spent, alive[~above]
            else:
                alive = upper
        alive = alive[np.argsort(-slope[alive], kind="stable")]
        paid = int(np.searchsorted(np.cumsum(more[alive]), left, side="right"))
        taken[alive[:paid]] = True
        at = first[:-1] + np.add.reduceat(taken.astype(np.int64), first[:-1])
        # The steps that follow, those beyond the last that is alive included.
        rest = ~taken & (slope < slope[alive[-1]])
        later = np.flatnonzero(rest)
        if len(later) > _FILLED:
            later = later[np.argpartition(-slope[later], _FILLED)[:_FILLED]]
        later = later[np.argsort(-slope[later], kind="stable")]
        steps = np.concatenate([alive[paid:], later])[:_FILLED]
        # Where the alive ones are all paid for, the budget is spent to the last unit.
        price = float(slope[alive[paid] if paid < len(alive) else later[0]])
        group = np.searchsorted(first, steps, side="right") - 1
        return cls(
            choice=rows[at] - problem.offsets[:-1],
            price=price,
            steps=np.stack([group, rows[steps]], axis=1),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Knapsack:
    """Answer of ``solve_knapsack``.

    Attributes:
        choice: i64[G].
        objective: Its value.
        bound: Proved by the recursion where ``exact``, else by the relaxation.
        relaxed_bound: Proved by the relaxation.
        price: Loss per unit of cost at the budget (the shadow price).
        exact: Whether the recursion was completed (or not needed for the gap).
        states: Largest number of states.
    """

    choice: Ints
    objective: float
    bound: float
    relaxed_bound: float
    price: float
    exact: bool
    states: int


def solve_knapsack(
    problem: Problem,
    *,
    gap: float,
    stop: Callable[[], bool] = lambda: False,
    halt: Bytes | None = None,
) -> Knapsack:
    """Solve a separable problem with at most one budget and no pairs to relative gap ``gap``.

    Exact. ``O(n log n)`` for the relaxation; the recursion is pseudo-polynomial, in practice a
    few thousand states. ``stop`` is asked before every group of the recursion; within one, ``halt``
    u8[1] is read.

    Raises:
        InvalidProblem: The problem is not of that kind.
    """
    if not problem.separable or len(problem.limits) > 1 or len(problem.all_forbidden_pairs()):
        msg = "a knapsack must be separable with one budget and no pairs; got another problem"
        raise InvalidProblem(msg)
    d = problem.diagonal
    if not len(problem.limits):
        loss = np.where(problem.allowed, d, np.inf)
        return _exact(problem, _first_least(loss, problem.offsets))
    # The relaxation: its break step, price and bound.
    cost, budget = problem.costs[0], int(problem.limits[0])
    stop_at = _Break.of(problem)
    if stop_at.price is None:
        return _exact(problem, stop_at.choice)
    lam = stop_at.price
    paid = lam * cost.astype(np.float64)
    priced = np.where(problem.allowed, d + paid, np.inf)
    least = np.minimum.reduceat(priced, problem.offsets[:-1])
    # Each term less its rounding, which is what terms of opposite signs leave most of; and what
    # the checker's sums may lose in the widest float, which would go on in integers otherwise.
    lost = max(1e-15, 2e-19 * problem.n_groups)
    low = np.minimum.reduceat(priced - lost * (np.abs(d) + paid), problem.offsets[:-1])
    spent = lam * float(budget) * (1.0 + (lost if budget > 0 else -lost))
    relaxed = rounded_down([problem.constant, *low.tolist(), -spent])
    # A choice nearby, and whether it is good enough.
    choice = _fill(problem, stop_at, budget)
    objective = problem.evaluate(choice)
    # Rows that lose more than the choice is off, a diverged one say, set no scale.
    reduced = priced - least[problem.group_of_row]
    scale = float(np.abs(d[reduced <= objective - relaxed]).max(initial=0.0))
    tolerance = max(gap * abs(objective), ROUNDING * scale)
    answer = Knapsack(
        choice=choice, objective=objective, bound=min(relaxed, objective), relaxed_bound=relaxed,
        price=lam, exact=False, states=MOST_STATES,
    )  # fmt: skip
    if objective - relaxed <= tolerance:
        return replace(answer, exact=True, states=0)
    # The best choice; once more where it is so much better that the gap is a smaller one.
    states = 0
    while True:
        result = _core(problem, reduced, lam, choice, objective - relaxed, tolerance, stop, halt)
        if result is None:
            return answer
        better, states = result[0], max(states, result[1])
        if (value := problem.evaluate(better)) >= objective:
            break
        choice, objective = better, value
        needed = max(gap * abs(objective), ROUNDING * scale)
        if tolerance <= needed:
            break
        tolerance = needed
    bound = min(max(relaxed, objective - tolerance), objective)
    return replace(
        answer, choice=choice, objective=objective, bound=bound, exact=True, states=states
    )


def _exact(problem: Problem, choice: Ints) -> Knapsack:
    """Every group takes its best row: the sum, rounded down, is a bound."""
    value = problem.evaluate(choice)
    terms = [problem.constant, *problem.diagonal[problem.rows(choice)].tolist()]
    bound = min(rounded_down(terms), value)
    return Knapsack(
        choice=choice, objective=value, bound=bound, relaxed_bound=bound, price=0.0, exact=True,
        states=0,
    )  # fmt: skip


def rounded_down(terms: list[float]) -> float:
    """Return a number not above the exact sum of ``terms``, and the sum itself where it is 0."""
    total = math.fsum(terms)  # rounded once; 0 for a sum of 0 alone
    return math.nextafter(total, -math.inf) if total else total


def value_below(problem: Problem, rows: Ints) -> float:
    """Return a number just below the exact objective of ``rows``."""
    terms = [problem.constant, *problem.diagonal[rows]]
    if problem.cross is not None:
        chosen = problem.cross[np.ix_(rows, rows)]
        terms += chosen[np.triu_indices(len(rows), 1)].tolist()
    if problem.factor is not None:
        y, squares = problem.factor_sum(rows)
        most = np.abs(problem.factor[rows]).sum(axis=0)
        lost = 2.3e-16 * (sum(problem.factor.shape) + 8) * float(most @ most)
        terms += [0.5 * float(y @ y), -0.5 * squares, -lost]
    terms += problem.terms_between(rows).tolist()
    return rounded_down(terms)


def _first_least(values: Floats, offsets: Ints) -> Ints:
    least = np.minimum.reduceat(values, offsets[:-1])
    at = np.where(values == np.repeat(least, np.diff(offsets)), np.arange(len(values)), len(values))
    best: Ints = np.minimum.reduceat(at, offsets[:-1]) - offsets[:-1]
    return best


def _fill(problem: Problem, stop_at: _Break, budget: int) -> Ints:
    """Spend what the relaxation's break step leaves over on later steps that still fit."""
    d, cost = problem.diagonal, problem.costs[0]
    rows = problem.offsets[:-1] + stop_at.choice
    left = budget - int(cost[rows].sum())
    for g, p in stop_at.steps.tolist():
        old = int(rows[g])
        if d[p] < d[old] and cost[p] - cost[old] <= left:
            left -= int(cost[p] - cost[old])
            rows[g] = p
    return rows - problem.offsets[:-1]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Undecided:
    """A group of which several rows can be in a better choice.

    Attributes:
        rows: i64[k], by cost.
        cost: i64[k], less that of the base row.
        price: f64[k], reduced costs.
        saves: Least reduced cost of a unit of cost saved; ``inf`` when none can be.
        spends: Likewise of a unit spent.
    """

    rows: Ints
    cost: Ints
    price: Floats
    saves: float
    spends: float

    @classmethod
    def of(cls, rows: Ints, cost: Ints, price: Floats) -> _Undecided:
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = np.where(cost != 0, price / np.abs(cost).astype(np.float64), np.inf)
        return cls(
            rows=rows,
            cost=cost,
            price=price,
            saves=float(rate[cost < 0].min(initial=np.inf)),
            spends=float(rate[cost > 0].min(initial=np.inf)),
        )


def _core(
    problem: Problem, reduced: Floats, lam: float, choice: Ints, limit: float,
    tolerance: float, stop: Callable[[], bool], halt: Bytes | None,
) -> tuple[Ints, int] | None:  # fmt: skip
    """Run the recursion over the core; returns the best choice, or ``None`` when it was stopped.

    ``limit`` is the best choice's distance to the relaxation: better ones are below it.
    """
    offsets, cost, budget = problem.offsets, problem.costs[0], int(problem.limits[0])
    halt = np.zeros(1, dtype=np.uint8) if halt is None else halt
    # The core: groups with several rows below the limit, those of small prices first.
    inside = reduced < limit
    counts = np.add.reduceat(inside.astype(np.int64), offsets[:-1])
    base = offsets[:-1] + _first_least(np.where(problem.allowed, reduced, np.inf), offsets)
    groups = []
    for g in np.flatnonzero(counts > 1).tolist():
        rows = offsets[g] + np.flatnonzero(inside[offsets[g] : offsets[g + 1]])
        rows = rows[np.lexsort((reduced[rows], cost[rows]))]
        groups.append(_Undecided.of(rows, cost[rows] - cost[base[g]], reduced[rows]))
    groups.sort(key=lambda group: min(group.saves, group.spends))
    down = _suffix_least([group.saves for group in groups])
    up = _suffix_least([group.spends for group in groups])
    # The recursion, one group after the other.
    total, none = int(cost[base].sum()), np.zeros(1, dtype=np.int64)
    states = States(np.array([total], dtype=np.int64), np.zeros(1), none, none)
    history: list[tuple[Ints, Ints]] = []
    best, best_at, largest = limit, (-1, 0), 1
    if total <= budget and lam * float(budget - total) < best:
        best, best_at = lam * float(budget - total), (0, 0)
    for t, group in enumerate(groups, start=1):
        if stop():
            return None
        room = min(len(states.cost) * len(group.rows), MOST_STATES)
        whole = np.empty((3, room), dtype=np.int64)
        out = States(whole[0], np.empty(room), whole[1], whole[2])
        prices = kernels.Prices(lam, down[t], up[t])
        most = best - tolerance * 0.5
        n = kernels.extend(states, group.cost, group.price, budget, prices, most, halt, out)
        if n < 0:
            return None
        states = States._make([array[:n].copy() for array in out])
        history.append((states.parent, states.option))
        largest = max(largest, n)
        if n == 0:
            break
        left = budget - states.cost
        value = np.where(left >= 0, states.price + lam * left.astype(np.float64), np.inf)
        at = int(np.argmin(value))
        if value[at] < best:
            best, best_at = float(value[at]), (t, at)
    # Follow the best state back.
    stage, state = best_at
    if stage < 0:
        return choice, largest
    chosen = base.copy()
    for t in range(stage, 0, -1):
        parent, option = history[t - 1]
        row = int(groups[t - 1].rows[option[state]])
        chosen[np.searchsorted(offsets, row, side="right") - 1] = row
        state = int(parent[state])
    return chosen - offsets[:-1], largest


def _suffix_least(values: list[float]) -> list[float]:
    """Return ``out[t] = min(values[t:])`` with ``inf`` at the end."""
    return list(itertools.accumulate([*values, math.inf][::-1], min))[::-1]

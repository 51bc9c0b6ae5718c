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

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from bitquota.errors import InvalidProblem
from bitquota.solver import separable_kernels as kernels

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from bitquota.solver.problem import Problem

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

MOST_STATES = 4_000_000
"""States of one step beyond which the recursion gives up."""
ROUNDING = 1e-12


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
    rows, slope = np.zeros(problem.n_rows, dtype=np.int64), np.zeros(problem.n_rows)
    first = np.zeros(problem.n_groups + 1, dtype=np.int64)
    count = int(
        kernels.group_hulls(
            problem.diagonal, cost, problem.offsets, problem.allowed, rows, first, slope
        )
    )
    if bool((np.diff(first) < 1).any()):
        msg = "a hull needs an allowed row in every group; got a group without"
        raise InvalidProblem(msg)
    rows, slope = rows[:count], slope[:count]
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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Knapsack:
    """Answer of ``solve_knapsack``.

    Attributes:
        choice: i64[G].
        objective: Its value.
        bound: Proved by the recursion where ``exact``, else by the relaxation.
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
    problem: Problem, *, gap: float, stop: Callable[[], bool] | None = None
) -> Knapsack:
    """Solve a separable problem with at most one budget and no pairs to relative gap ``gap``.

    Exact. ``O(n log n)`` for the relaxation; the recursion is pseudo-polynomial, in practice a
    few thousand states. ``stop`` is asked before every group of the recursion.

    Raises:
        InvalidProblem: The problem is not of that kind.
    """
    if problem.cross is not None or len(problem.limits) > 1 or len(problem.all_forbidden_pairs()):
        msg = "a knapsack must be separable with one budget and no pairs; got another problem"
        raise InvalidProblem(msg)
    d, starts, group = problem.diagonal, problem.offsets[:-1], problem.group_of_row
    if not len(problem.limits):
        loss = np.where(problem.allowed, d, np.inf)
        choice = _first_least(loss, problem.offsets)
        value = problem.evaluate(choice)
        return _exact(problem, choice, value)
    cost, budget = problem.costs[0], int(problem.limits[0])
    frontier = hull(problem)
    taken = int(np.searchsorted(frontier.cost, budget, side="right")) - 1
    choice = frontier.choice(problem, taken)
    if taken == len(frontier.steps):
        return _exact(problem, choice, problem.evaluate(choice))
    lam = float(frontier.slope[taken])
    priced = np.where(problem.allowed, d + lam * cost.astype(np.float64), np.inf)
    least = np.minimum.reduceat(priced, starts)
    relaxed = problem.constant + math.fsum(least) - lam * float(budget)
    relaxed -= 1e-15 * (math.fsum(np.abs(least)) + lam * float(budget))
    choice = _fill(problem, frontier, taken, choice, budget)
    objective = problem.evaluate(choice)
    tolerance = max(gap * abs(objective), ROUNDING * float(np.abs(d[problem.allowed]).max()))
    if objective - relaxed <= tolerance:
        return Knapsack(
            choice=choice, objective=objective, bound=min(relaxed, objective),
            relaxed_bound=relaxed, price=lam, exact=True, states=0,
        )  # fmt: skip
    reduced = priced - least[group]
    result = _core(problem, reduced, lam, budget, choice, objective - relaxed, tolerance, stop)
    if result is None:
        return Knapsack(
            choice=choice, objective=objective, bound=relaxed, relaxed_bound=relaxed, price=lam,
            exact=False, states=MOST_STATES,
        )  # fmt: skip
    better, states = result
    if problem.evaluate(better) < objective:
        choice, objective = better, problem.evaluate(better)
    bound = max(relaxed, objective - tolerance)
    return Knapsack(
        choice=choice, objective=objective, bound=min(bound, objective), relaxed_bound=relaxed,
        price=lam, exact=True, states=states,
    )  # fmt: skip


def _exact(problem: Problem, choice: Ints, value: float) -> Knapsack:
    """Every group takes its best row: the sum, rounded down, is a bound."""
    rows = problem.rows(choice)
    bound = math.nextafter(
        math.fsum([problem.constant, *problem.diagonal[rows].tolist()]), -math.inf
    )
    return Knapsack(
        choice=choice, objective=value, bound=min(bound, value), relaxed_bound=min(bound, value),
        price=0.0, exact=True, states=0,
    )  # fmt: skip


def _first_least(values: Floats, offsets: Ints) -> Ints:
    least = np.minimum.reduceat(values, offsets[:-1])
    at = np.where(values == np.repeat(least, np.diff(offsets)), np.arange(len(values)), len(values))
    best: Ints = np.minimum.reduceat(at, offsets[:-1]) - offsets[:-1]
    return best


def _fill(problem: Problem, frontier: Hull, taken: int, choice: Ints, budget: int) -> Ints:
    """Spend what the relaxation's break step leaves over on later steps that still fit."""
    d, cost = problem.diagonal, problem.costs[0]
    rows = problem.offsets[:-1] + choice
    left = budget - int(cost[rows].sum())
    steps = frontier.steps[taken : taken + 2000]
    group = np.searchsorted(frontier.first, steps, side="right") - 1
    for g, step in zip(group.tolist(), steps.tolist(), strict=True):
        p, old = int(frontier.rows[step]), int(rows[g])
        if d[p] < d[old] and cost[p] - cost[old] <= left:
            left -= int(cost[p] - cost[old])
            rows[g] = p
    return rows - problem.offsets[:-1]


def _core(
    problem: Problem, reduced: Floats, lam: float, budget: int, choice: Ints, limit: float,
    tolerance: float, stop: Callable[[], bool] | None,
) -> tuple[Ints, int] | None:  # fmt: skip
    """Run the recursion over the core; returns the best choice, or ``None`` when it was stopped.

    ``limit`` is the best choice's distance to the relaxation: better ones are below it.
    """
    offsets, cost = problem.offsets, problem.costs[0]
    inside = reduced < limit
    counts = np.add.reduceat(inside.astype(np.int64), offsets[:-1])
    base = offsets[:-1] + _first_least(np.where(problem.allowed, reduced, np.inf), offsets)
    total = int(cost[base].sum())
    groups = np.flatnonzero(counts > 1)
    options, rates_down, rates_up = [], [], []
    for g in groups.tolist():
        rows = offsets[g] + np.flatnonzero(inside[offsets[g] : offsets[g + 1]])
        rows = rows[np.lexsort((reduced[rows], cost[rows]))]
        da, dp = cost[rows] - cost[base[g]], reduced[rows]
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = np.where(da != 0, dp / np.abs(da).astype(np.float64), np.inf)
        rates_down.append(float(rate[da < 0].min(initial=np.inf)))
        rates_up.append(float(rate[da > 0].min(initial=np.inf)))
        options.append((rows, da, dp))
    order = np.argsort(np.minimum(rates_down, rates_up), kind="stable")
    down = _suffix_least(np.array(rates_down)[order])
    up = _suffix_least(np.array(rates_up)[order])
    states_cost, states_price = np.array([total], dtype=np.int64), np.zeros(1)
    history: list[tuple[Ints, Ints, Ints]] = []
    best, best_at, largest = limit, None, 1
    if total <= budget and lam * float(budget - total) < best:
        best, best_at = lam * float(budget - total), (0, 0)
    for t, index in enumerate(order.tolist()):
        if stop is not None and stop():
            return None
        rows, da, dp = options[index]
        room = min(len(states_cost) * len(rows), MOST_STATES)
        out_cost, out_price = np.empty(room, dtype=np.int64), np.empty(room)
        parent, option = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.int64)
        n = int(
            kernels.extend(
                states_cost, states_price, da, dp, budget, lam, best - tolerance * 0.5,
                down[t + 1], up[t + 1], out_cost, out_price, parent, option,
            )
        )  # fmt: skip
        if n < 0:
            return None
        history.append((parent[:n].copy(), option[:n].copy(), rows))
        states_cost, states_price = out_cost[:n].copy(), out_price[:n].copy()
        largest = max(largest, n)
        if n == 0:
            break
        fits = states_cost <= budget
        value = np.where(
            fits, states_price + lam * (budget - states_cost).astype(np.float64), np.inf
        )
        at = int(np.argmin(value))
        if value[at] < best:
            best, best_at = float(value[at]), (t + 1, at)
    rows_best = offsets[:-1] + choice
    if best_at is not None:
        rows_best = base.copy()
        stage, state = best_at
        while stage > 0:
            parent, option, rows = history[stage - 1]
            row = int(rows[option[state]])
            rows_best[int(groups[order[stage - 1]])] = row
            state, stage = int(parent[state]), stage - 1
    return rows_best - offsets[:-1], largest


def _suffix_least(values: Floats) -> Floats:
    """Return ``out[t] = min(values[t:])`` with ``inf`` at the end."""
    out = np.full(len(values) + 1, np.inf)
    if len(values):
        out[:-1] = np.minimum.accumulate(values[::-1])[::-1]
    return out

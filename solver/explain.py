"""What a solution's bits cost and buy, and where the next ones would go.

Design: docs/design/solver.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Unpack

import numpy as np

from bitquota.codec import Document, UpperBound
from bitquota.errors import Infeasible, InvalidProblem
from bitquota.solver.dispatch import solve

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from bitquota.solver.control import Limits
    from bitquota.solver.problem import Problem
    from bitquota.solver.solution import Solution

    Ints = NDArray[np.int64]

KIB_BITS = 8192
_MOST_WORK = 10_000_000_000
"""Rows times groups (times a factor's rank) that are looked at: minutes."""
_SHARE = 100
"""A budget that is not in bits is changed by this part of itself, unless told otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """Another row of one group, all other groups as they are. Exact.

    Attributes:
        label: Its name.
        loss_change: Objective with it, less the objective now.
        cost_changes: Per resource, what it takes more.
        feasible: Whether all constraints still hold.
    """

    label: str
    loss_change: float
    cost_changes: tuple[int, ...]
    feasible: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupAccount:
    """What one group's row costs and buys.

    Attributes:
        group: Its name.
        label: Of the chosen row.
        costs: What it takes of each resource.
        bought: Loss that the chosen row avoids against the group's cheapest allowed row (by the
            first resource), the rest as it is; with cross-layer terms these do not add up.
        paid: What it takes of each resource beyond that cheapest row.
        alternatives: The group's other allowed rows.
    """

    group: str
    label: str
    costs: tuple[int, ...]
    bought: float
    paid: tuple[int, ...]
    alternatives: tuple[Alternative, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One group that changes its row."""

    group: str
    before: str
    after: str
    cost_changes: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What another limit of one budget would do: the problem solved again.

    Attributes:
        limit: The other limit.
        objective: Of the best choice found there; ``inf`` when there is none.
        bound: No choice there is below it.
        moves: How that choice differs; empty when it is the same.
    """

    limit: int
    objective: UpperBound
    bound: UpperBound
    moves: tuple[Move, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Upgrade:
    """A better row of one group that a budget has no room for, all other groups as they are.

    Attributes:
        move: The group and its rows.
        needed_more: By how much the budget would have to grow. The other constraints hold.
        loss_change: Negative. Exact.
    """

    move: Move
    needed_more: int
    loss_change: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetAccount:
    """The price of one budget.

    Attributes:
        resource: Its name.
        limit, spent: In the resource's unit.
        step: By how much the limit was changed.
        more: With ``step`` more.
        less: With ``step`` less.
        price: Loss that one more unit avoids, on average over ``step``: the shadow price.
        price_low, price_high: Between these by proved bounds (as safe as the solutions' are).
        next_upgrade: The single change that would buy most per unit that the budget lacks;
            ``None`` when no such change is left. Where ``more`` has no moves, ``step`` is too
            little for any plan, and this says what would be enough for one.
    """

    resource: str
    limit: int
    spent: int
    step: int
    more: Change
    less: Change
    price: float
    price_low: float
    price_high: UpperBound
    next_upgrade: Upgrade | None

    @property
    def slack(self) -> int:
        """What is left of the budget."""
        return self.limit - self.spent


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation(Document):
    """A solution explained."""

    budgets: tuple[BudgetAccount, ...]
    groups: tuple[GroupAccount, ...]


def explain(
    problem: Problem,
    solution: Solution,
    *,
    steps: Mapping[str, int] | None = None,
    **limits: Unpack[Limits],
) -> Explanation:
    """Return what each budget is worth and what each group's bits cost and buy.

    Args:
        problem: What was solved.
        solution: Its solution, with a choice.
        steps: For a resource, by how much to change its limit; 1 KiB for resources in bits and a
            hundredth of the limit for others by default.
        limits: Of each solve at a changed limit; see ``bitquota.solver.solve``.

    Raises:
        InvalidProblem: The solution has no choice, a step is below 1, or names no budget, or the
            problem is too large.

    Cost: two solves per budget; ``O(n G)`` for the groups.
    """
    if solution.choice is None:
        msg = f"only a solution with a choice can be explained; got status {solution.status}"
        raise InvalidProblem(msg)
    choice = solution.choice
    rank = 1 if problem.factor is None else problem.factor.shape[1]
    if problem.n_rows * problem.n_groups * rank > _MOST_WORK:
        msg = (
            "an explanation looks at every row beside the choice, and rows times groups (times "
            f"the factor's rank) must be at most {_MOST_WORK:,}; got {problem.n_rows:,} rows and "
            f"{problem.n_groups:,} groups: solve at two budgets and compare instead"
        )
        raise InvalidProblem(msg)
    steps = dict(steps or {})
    for name, step in steps.items():
        if name not in problem.resources or step < 1:
            msg = (
                f"a step must be at least 1, of one of {', '.join(problem.resources) or 'none'}; "
                f"got {name}={step}"
            )
            raise InvalidProblem(msg)

    def at(k: int, limit: int) -> Change:
        try:
            other = solve(problem.within(k, limit), start=choice, **limits)
        except Infeasible:
            return Change(limit=limit, objective=math.inf, bound=math.inf, moves=())
        moves = () if other.choice is None else moves_between(problem, choice, other.choice)
        if other.objective >= solution.objective and limit > int(problem.limits[k]):
            # Nothing better was found: the same choice still stands.
            return Change(limit=limit, objective=solution.objective, bound=other.bound, moves=())
        return Change(limit=limit, objective=other.objective, bound=other.bound, moves=moves)

    # Every budget a little larger and a little smaller.
    spent = problem.spent(choice)
    budgets = []
    for k, name in enumerate(problem.resources):
        limit = int(problem.limits[k])
        step = steps.get(name, default_step(name, limit))
        more, less = at(k, limit + step), at(k, limit - step)
        budgets.append(
            BudgetAccount(
                resource=name,
                limit=limit,
                spent=int(spent[k]),
                step=step,
                more=more,
                less=less,
                price=max(0.0, solution.objective - more.objective) / step,
                price_low=max(0.0, solution.bound - more.objective) / step,
                price_high=max(0.0, solution.objective - more.bound) / step,
                next_upgrade=next_upgrade(problem, choice, k),
            )
        )
    return Explanation(budgets=tuple(budgets), groups=group_accounts(problem, choice))


def default_step(resource: str, limit: int) -> int:
    """Return 1 KiB for resources in bits, else a hundredth of the limit, at least 1."""
    return KIB_BITS if resource.endswith("_bits") else max(1, limit // _SHARE)


def group_accounts(problem: Problem, choice: Sequence[int] | Ints) -> tuple[GroupAccount, ...]:
    """Return for each group what its row costs and buys. Exact; ``O(n G)``."""
    rows = problem.rows(choice)
    total = problem.evaluate(choice)
    accounts = []
    for g, row in enumerate(rows.tolist()):
        start, stop = int(problem.offsets[g]), int(problem.offsets[g + 1])
        allowed = [p for p in range(start, stop) if problem.allowed[p]] or [row]
        alternatives = {}
        for p in allowed:
            if p == row:
                continue
            other = np.array(choice, dtype=np.int64)
            other[g] = p - start
            alternatives[p] = Alternative(
                label=problem.labels[p],
                loss_change=problem.evaluate(other) - total,
                cost_changes=tuple((problem.costs[:, p] - problem.costs[:, row]).tolist()),
                feasible=problem.is_feasible(other),
            )
        cheapest = min(allowed, key=lambda p: (*problem.costs[:1, p].tolist(), p))
        saved = alternatives[cheapest].loss_change if cheapest != row else 0.0
        accounts.append(
            GroupAccount(
                group=problem.groups[g],
                label=problem.labels[row],
                costs=tuple(problem.costs[:, row].tolist()),
                bought=saved,
                paid=tuple((problem.costs[:, row] - problem.costs[:, cheapest]).tolist()),
                alternatives=tuple(alternatives.values()),
            )
        )
    return tuple(accounts)


def next_upgrade(problem: Problem, choice: Sequence[int] | Ints, k: int) -> Upgrade | None:
    """Return the single change that buys most per unit that budget ``k`` lacks, or ``None``."""
    limit = int(problem.limits[k])
    free = problem.within(k, np.iinfo(np.int64).max)
    total = problem.evaluate(choice)
    best: tuple[float, Upgrade] | None = None
    for g, (start, stop) in enumerate(
        zip(problem.offsets[:-1].tolist(), problem.offsets[1:].tolist(), strict=True)
    ):
        for p in range(start, stop):
            other = np.array(choice, dtype=np.int64)
            other[g] = p - start
            needed = int(problem.spent(other)[k]) - limit
            change = problem.evaluate(other) - total
            if needed <= 0 or change >= 0 or not free.is_feasible(other):
                continue
            rate = change / needed
            if best is None or rate < best[0]:
                (move,) = moves_between(problem, choice, other)
                best = rate, Upgrade(move=move, needed_more=needed, loss_change=change)
    return None if best is None else best[1]


def moves_between(
    problem: Problem, before: Sequence[int] | Ints, after: Sequence[int] | Ints
) -> tuple[Move, ...]:
    """Return the groups whose row differs."""
    pairs = zip(problem.rows(before).tolist(), problem.rows(after).tolist(), strict=True)
    return tuple(
        Move(
            group=problem.groups[g],
            before=problem.labels[a],
            after=problem.labels[b],
            cost_changes=tuple((problem.costs[:, b] - problem.costs[:, a]).tolist()),
        )
        for g, (a, b) in enumerate(pairs)
        if a != b
    )

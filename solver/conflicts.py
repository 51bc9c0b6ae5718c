"""Why a problem has no solution: a smallest set of constraints that conflict, and what would help.

Every step asks one question, "is there any choice at all?", of a problem without an objective. The
answers are exact: a choice is checked in integers, and "no" is proved by the solver.

Design: docs/design/solver.md
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from bitquota.codec import Document, Form
from bitquota.errors import Infeasible, InvalidProblem
from bitquota.solver.dispatch import solve
from bitquota.solver.problem import Problem
from bitquota.solver.solution import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Ints = NDArray[np.int64]


class Kind(StrEnum):
    """What a constraint is."""

    BUDGET = "budget"
    FORBIDDEN_ROWS = "forbidden rows"
    FORBIDDEN_PAIR = "forbidden pair"
    REQUIRED_PAIR = "required pair"


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint(Document):
    """One constraint of a problem.

    Attributes:
        kind: What it is.
        index: Budget, group (for forbidden rows) or pair.
        text: In words.
    """

    FORM: ClassVar[Form] = Form(unwritten=("index",))

    kind: Kind
    index: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Raise:
    """The least limits that give the problem a solution.

    Attributes:
        resources: Names of the budgets that change.
        limits: Their least limits, or the least common enlargement of all.
        needed_more: What each limit lacks.
        choice: A choice that meets the new limits.
        exact: Whether it was proved that less does not do.
    """

    resources: tuple[str, ...]
    limits: tuple[int, ...]
    needed_more: tuple[int, ...]
    choice: tuple[int, ...]
    exact: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict(Document):
    """Why there is no solution.

    Attributes:
        constraints: They cannot be met together; without any one of them the others can
            (``exact``). One row per group is a rule of every problem and not listed.
        exact: Whether every step was proved; ``False`` when a limit struck, and then the set may
            hold more than needed.
        raises: For each budget that alone could be raised to give a solution, how far; when
            there is none, one proposal to enlarge all budgets alike, if that helps.
    """

    constraints: tuple[Constraint, ...]
    exact: bool
    raises: tuple[Raise, ...]


def constraints_of(problem: Problem) -> tuple[Constraint, ...]:
    """Return every constraint of ``problem``, in words.

    Pairs first, then forbidden rows, then budgets: a deletion filter drops early ones first, and a
    user would rather read about budgets.
    """

    def row(p: int) -> str:
        return f"{problem.groups[int(group[p])]}={problem.labels[p]}"

    group = problem.group_of_row
    found = [
        Constraint(
            kind=Kind.FORBIDDEN_PAIR, index=k, text=f"{row(a)} and {row(b)} must not go together"
        )
        for k, (a, b) in enumerate(problem.forbidden_pairs.tolist())
    ]
    found += [
        Constraint(kind=Kind.REQUIRED_PAIR, index=k, text=f"{row(a)} requires {row(b)}")
        for k, (a, b) in enumerate(problem.required_pairs.tolist())
    ]
    for g, name in enumerate(problem.groups):
        rows = range(int(problem.offsets[g]), int(problem.offsets[g + 1]))
        out = [problem.labels[p] for p in rows if not problem.allowed[p]]
        if out:
            text = f"{name} must not be {' or '.join(out)}"
            found.append(Constraint(kind=Kind.FORBIDDEN_ROWS, index=g, text=text))
    found += [
        Constraint(kind=Kind.BUDGET, index=k, text=f"{name} at most {int(problem.limits[k]):,}")
        for k, name in enumerate(problem.resources)
    ]
    return tuple(found)


def explain_infeasible(
    problem: Problem,
    *,
    time_limit_s: float | None = None,
    cancelled: Callable[[], bool] | None = None,
) -> Conflict:
    """Return a smallest conflicting set of constraints and the nearest feasible budgets.

    The set is found by a deletion filter: constraints that are not needed for the conflict are
    dropped, many at once where possible. It is irreducible, not of least number.

    Args:
        problem: One without solution.
        time_limit_s: Seconds for each question asked of the solver.
        cancelled: ``True`` stops as a time limit does.

    Raises:
        InvalidProblem: The problem has a solution, or none was excluded in time.

    Cost: ``O(c log n)`` questions for a set of ``c`` out of ``n`` constraints, and
    ``O(log limit)`` at most per budget.
    """
    oracle = _Oracle(problem, time_limit_s, cancelled)
    everything = list(constraints_of(problem))
    answer, _ = oracle.ask(everything)
    if answer is not False:
        got = "one that has a solution" if answer else "one that could not be decided in time"
        msg = f"only a problem without a solution can be explained; got {got}"
        raise InvalidProblem(msg)
    kept = _irreducible(everything, oracle)
    order = {c: k for k, c in enumerate(everything)}
    constraints = tuple(sorted(kept, key=lambda c: -order[c]))
    exact = oracle.decided
    raises = [r for k in range(len(problem.limits)) if (r := _single_raise(problem, k, oracle))]
    if not raises and len(problem.limits) and (common := _common_raise(problem, oracle)):
        raises = [common]
    return Conflict(constraints=constraints, exact=exact, raises=tuple(raises))


class _Oracle:
    """Answers "is there a choice?" for parts of a problem's constraints and other limits."""

    def __init__(
        self,
        problem: Problem,
        time_limit_s: float | None,
        cancelled: Callable[[], bool] | None,
    ) -> None:
        self.problem, self.time_limit_s, self.cancelled = problem, time_limit_s, cancelled
        self.everything = constraints_of(problem)
        self.decided = True

    def ask(
        self, constraints: Sequence[Constraint], limits: Ints | None = None
    ) -> tuple[bool | None, Ints | None]:
        """Return whether a choice meets ``constraints``, and one; ``None`` if undecided."""
        problem = self.problem
        index = {kind: [c.index for c in constraints if c.kind is kind] for kind in Kind}
        limits = problem.limits if limits is None else limits
        banned = np.isin(problem.group_of_row, index[Kind.FORBIDDEN_ROWS]) & ~problem.allowed
        part = Problem(
            diagonal=np.zeros(problem.n_rows),
            offsets=problem.offsets,
            costs=problem.costs[index[Kind.BUDGET]],
            limits=limits[index[Kind.BUDGET]],
            allowed=~banned,
            forbidden_pairs=problem.forbidden_pairs[index[Kind.FORBIDDEN_PAIR]],
            required_pairs=problem.required_pairs[index[Kind.REQUIRED_PAIR]],
        )
        try:
            solution = solve(part, time_limit_s=self.time_limit_s, cancelled=self.cancelled)
        except Infeasible:
            return False, None
        if solution.choice is not None:
            return True, solution.choice
        if solution.status is Status.INFEASIBLE:
            return False, None
        self.decided = False
        return None, None


def _irreducible(constraints: list[Constraint], oracle: _Oracle) -> list[Constraint]:
    """Return constraints that conflict, each of them needed.

    Blocks are dropped whole where what is left still conflicts, else halved.
    """
    needed: list[Constraint] = []
    blocks = [constraints]
    while blocks:
        block = blocks.pop(0)
        rest = needed + [c for other in blocks for c in other]
        if oracle.ask(rest)[0] is False:
            continue
        if len(block) == 1:
            needed += block
            continue
        half = len(block) // 2
        blocks = [block[:half], block[half:], *blocks]
    return needed


def _single_raise(problem: Problem, k: int, oracle: _Oracle) -> Raise | None:
    """Return the least limit of budget ``k`` that gives a solution, or ``None``."""
    others = [c for c in oracle.everything if (c.kind, c.index) != (Kind.BUDGET, k)]
    answer, choice = oracle.ask(others)
    if not answer or choice is None:
        return None
    low = int(problem.limits[k])  # known to be too small
    high, best, exact = int(problem.spent(choice)[k]), choice, True
    while high - low > 1:
        # The solver may find a far cheaper choice than asked for: use what it spends.
        limits = problem.limits.copy()
        limits[k] = (low + high) // 2
        answer, choice = oracle.ask(oracle.everything, limits)
        if answer is None:
            exact = False
            break
        if choice is None:
            low = int(limits[k])
        else:
            high, best = int(problem.spent(choice)[k]), choice
    return Raise(
        resources=(problem.resources[k],),
        limits=(high,),
        needed_more=(high - int(problem.limits[k]),),
        choice=tuple(best.tolist()),
        exact=exact,
    )


def _common_raise(problem: Problem, oracle: _Oracle) -> Raise | None:
    """Return the least enlargement of all budgets in the same proportion, or ``None``.

    In steps of a thousandth: ``limit + ceil(max(limit, 1) · step / 1000)``.
    """
    rest = [c for c in oracle.everything if c.kind is not Kind.BUDGET]
    answer, choice = oracle.ask(rest)
    if not answer or choice is None:
        return None
    base = np.maximum(problem.limits, 1)

    def limits(step: int) -> Ints:
        enlarged: Ints = problem.limits + np.array([-(-int(b) * step // 1000) for b in base])
        return enlarged

    low, high = 0, 1
    while not bool((problem.spent(choice) <= limits(high)).all()):
        high *= 2
    best, exact = choice, True
    while high - low > 1:
        middle = (low + high) // 2
        answer, choice = oracle.ask(oracle.everything, limits(middle))
        if answer is None:
            exact = False
            break
        if choice is None:
            low = middle
        else:
            high, best = middle, choice
    return Raise(
        resources=tuple(problem.resources),
        limits=tuple(limits(high).tolist()),
        needed_more=tuple((limits(high) - problem.limits).tolist()),
        choice=tuple(best.tolist()),
        exact=exact,
    )

"""A problem document as the solver takes it: names become rows, texts become limits.

Design: docs/design/solver.md
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from bitquota.candidates.budget import LARGEST_LIMIT, Budget
from bitquota.errors import InvalidBudget, InvalidProblem
from bitquota.solver.build import build_problem, restricted, rows_of
from bitquota.solver.matrix_budgets import budget_of, inventory_of_weights
from bitquota.solver.pair_costs import with_pair_costs
from bitquota.solver.problem import Problem
from bitquota.solver.problem_document import shown_integer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from bitquota.candidates.layers import Inventory
    from bitquota.matrix import SensitivityMatrix
    from bitquota.solver.pair_costs import PairCosts
    from bitquota.solver.problem_document import (
        BudgetEntry,
        CandidateEntry,
        CrossTerm,
        PairCost,
        ProblemDocument,
        Rule,
    )

    FindMatrix = Callable[[str], tuple[SensitivityMatrix, Inventory | None]]
    """Returns the matrix that a document names, and the inventory of its model if there is one."""

MOST_DENSE_ROWS = 8_000
"""Candidates up to which cross-layer terms are taken: they become a matrix of all of them."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Posed:
    """A problem as the solver takes it, and how to read its answer.

    Attributes:
        problem: It; groups that stand for pair costs come last.
        shown: How many groups are the user's.
        top, distance: As in the document.
        matrix: The matrix that it was made from, if from one, ``robust`` applied.
        robust: The standard errors that were added.
    """

    problem: Problem
    shown: int
    top: int = 1
    distance: int = 1
    matrix: SensitivityMatrix | None = None
    robust: float = 0.0

    @classmethod
    def plain(cls, problem: Problem) -> Posed:
        """Return a problem without pair costs."""
        return cls(problem=problem, shown=problem.n_groups)


def posed(document: ProblemDocument, find_matrix: FindMatrix) -> Posed:
    """Return the problem that a document states.

    Args:
        document: It.
        find_matrix: Returns the matrix that it names.

    Raises:
        InvalidProblem: A name stands twice or for nothing, numbers are not finite or too large.
        InvalidBudget: A budget cannot be read, or lacks costs.
        UnknownLayer: A rule names a group that does not exist.
        BudgetTooSmall: A budget of a matrix is below its smallest plan.
        InvalidInput: ``robust`` for a matrix without standard errors.
    """
    # Groups and losses, and the budgets whose costs the matrix knows.
    matrix = None
    own = [entry for entry in document.budgets if entry.costs]
    known = [entry for entry in document.budgets if not entry.costs]
    if document.matrix is not None:
        matrix, inventory = find_matrix(document.matrix)
        matrix = matrix.robust(document.robust)
        budgets = [_of_matrix(entry, matrix, inventory) for entry in known]
        problem = build_problem(matrix, budgets)
    else:
        problem = _stated(document, known)
    # Tables of costs, and limits on numbers of groups.
    for entry in own:
        limit = _limit_of(entry, document, entry.resource or "cost")
        problem = _with_row(problem, _table(problem, entry), limit, entry.resource or "cost")
    for most in document.at_most:
        uses = np.zeros(problem.n_rows, dtype=np.int64)
        uses[rows_of(problem, most.of)[0]] = 1
        limit = max(-1, min(most.groups, problem.n_groups))
        problem = _with_row(problem, uses, limit, f"groups at {' '.join(most.of)}")
    problem = restricted(
        problem,
        fixed=document.fixed,
        forbidden=document.forbidden,
        forbidden_pairs=document.forbidden_pairs,
        required_pairs=document.required_pairs,
    )
    # What pairs cost.
    _unique(list(problem.resources), "resources of budgets")
    order = [*known, *own]
    at = _places(problem, order)
    terms = {at[k]: _pair_costs(problem, e) for k, e in enumerate(order) if e.pairs}
    return Posed(
        problem=with_pair_costs(problem, terms), shown=problem.n_groups, top=document.top,
        distance=document.distance, matrix=matrix, robust=document.robust,
    )  # fmt: skip


def _of_matrix(
    entry: BudgetEntry, matrix: SensitivityMatrix, inventory: Inventory | None
) -> Budget:
    if entry.limit is not None:
        return Budget(resource=entry.resource or "size_bits", limit=entry.limit)
    budget = budget_of(entry.text, matrix, inventory)
    if entry.resource not in {"", budget.resource}:
        msg = (
            f"'{entry.text}' limits {budget.resource}; got the resource '{entry.resource}': leave "
            "it out, or give a 'limit' in its unit"
        )
        raise InvalidBudget(msg)
    return budget


def _stated(document: ProblemDocument, budgets: list[BudgetEntry]) -> Problem:
    """Return the problem of the document's own groups, with those budgets that they have costs of.

    One that no candidate names is refused: it would limit nothing.
    """
    groups = document.groups
    _unique([group.name for group in groups], "groups")
    offsets = np.cumsum([0, *(len(group.candidates) for group in groups)], dtype=np.int64)
    for group in groups:
        _unique([candidate.label for candidate in group.candidates], f"candidates of {group.name}")
    entries = [candidate for group in groups for candidate in group.candidates]
    kappa = document.robust
    resources = [entry.resource or "size_bits" for entry in budgets]
    for name in resources:
        if not any(name in candidate.costs for candidate in entries):
            msg = f"a budget of '{name}' must limit something; no candidate has such a cost"
            raise InvalidBudget(msg)
    with np.errstate(over="ignore"):  # a problem refuses infinities
        diagonal = _floats([c.loss for c in entries]) + kappa * _floats(
            [c.standard_error for c in entries]
        )
    problem = Problem(
        diagonal=diagonal,
        offsets=offsets,
        costs=np.array(
            [[_whole(c.costs.get(name, 0), "a cost") for c in entries] for name in resources],
            dtype=np.int64,
        ).reshape(len(resources), len(entries)),
        limits=np.array(
            [_limit_of(e, document, n) for e, n in zip(budgets, resources, strict=True)],
            dtype=np.int64,
        ),
        resources=tuple(resources),
        groups=tuple(group.name for group in groups),
        labels=tuple(candidate.label for candidate in entries),
        constant=float(_floats([document.constant])[0]),
        factor=_factor(entries),
    )
    if not document.cross:
        return problem
    problem = _with_terms(problem, document)
    # As a matrix where it would be a quarter full.
    full = 8 * len(problem.terms) >= problem.n_rows**2 and problem.factor is None
    if full and problem.n_rows > MOST_DENSE_ROWS:
        msg = (
            f"a problem with cross-layer terms between a quarter of its candidates must have at "
            f"most {MOST_DENSE_ROWS:,}; got {problem.n_rows:,}: leave terms or candidates out"
        )
        raise InvalidProblem(msg)
    return problem.dense() if full else problem


def _with_terms(problem: Problem, document: ProblemDocument) -> Problem:
    """Return ``problem`` with the document's cross-layer terms as a list."""
    groups, offsets = document.groups, problem.offsets
    place = {
        (group.name, candidate.label): int(offsets[g]) + k
        for g, group in enumerate(groups)
        for k, candidate in enumerate(group.candidates)
    }
    found: dict[tuple[int, int], float] = {}
    group = problem.group_of_row
    losses = _floats([t.loss for t in document.cross])
    errors = _floats([t.standard_error for t in document.cross])
    for term, loss, error in zip(document.cross, losses, errors, strict=True):
        p, q = (_row(place, rule) for rule in (term.first, term.second))
        if (pair := (min(p, q), max(p, q))) in found or group[p] == group[q]:
            msg = f"a cross-layer term must stand once and join two groups; got {_said(term)}"
            raise InvalidProblem(msg)
        found[pair] = loss + document.robust * error
    return replace(
        problem,
        terms=np.array(list(found), dtype=np.int64),
        term_values=np.array([*found.values()]),
    )


def _factor(entries: list[CandidateEntry]) -> NDArray[np.float64] | None:
    """Return f64[n, r], or ``None`` where no candidate has a vector."""
    lengths = {len(entry.factor) for entry in entries}
    if lengths == {0}:
        return None
    if len(lengths) > 1 or any(e.standard_error for e in entries):
        msg = (
            "a 'factor' must have the same length for every candidate and goes without standard "
            "errors; got several lengths, or one of these"
        )
        raise InvalidProblem(msg)
    return _floats([value for entry in entries for value in entry.factor]).reshape(len(entries), -1)


def _limit_of(entry: BudgetEntry, document: ProblemDocument, resource: str) -> int:
    if entry.limit is not None:
        return entry.limit
    weights = {group.name: group.weights for group in document.groups}
    if not weights or min(weights.values()) < 1:
        msg = (
            f"the budget '{entry.text[:80]}' of '{resource}' needs the 'weights' of every group; "
            "state them, or give a 'limit'"
        )
        raise InvalidBudget(msg)
    return Budget.parse(entry.text, inventory_of_weights(weights)).limit


def _table(problem: Problem, entry: BudgetEntry) -> NDArray[np.int64]:
    """Return i64[n], the costs that an entry states by rule."""
    found: dict[int, int] = {}
    for cost in entry.costs:
        value = _whole(cost.cost, "a cost")
        found |= dict.fromkeys(rows_of(problem, cost.of)[0], value)
    for p in range(problem.n_rows):
        if p not in found:
            group = problem.groups[int(problem.group_of_row[p])]
            msg = (
                f"a table of costs must cover every candidate; '{problem.labels[p]}' of '{group}' "
                f"has no cost of '{entry.resource}'"
            )
            raise InvalidBudget(msg)
    return np.array([found[p] for p in range(problem.n_rows)], dtype=np.int64)


def _pair_costs(problem: Problem, entry: BudgetEntry) -> PairCosts:
    found: PairCosts = {}
    group = problem.group_of_row
    for pair in entry.pairs:
        firsts, seconds = (rows_of(problem, rule)[0] for rule in (pair.first, pair.second))
        joined = [(p, q) for p in firsts for q in seconds if group[p] != group[q]]
        if not joined:
            msg = f"a pair cost must join two groups; got {_said(pair)}"
            raise InvalidProblem(msg)
        value = _whole(abs(pair.cost), "a pair cost") * (1 if pair.cost > 0 else -1)
        for p, q in joined:
            key = (min(p, q), max(p, q))
            found[key] = value  # the last entry that matches counts
    return found


def _places(problem: Problem, order: list[BudgetEntry]) -> list[int]:
    """Return for each budget its index in ``problem``; those that only forbid rows have none."""
    if any(entry.pairs for entry in order) and len(order) > len(problem.limits):
        msg = "a budget of 'activation_bits_max' must not go with pair costs: forbid rows instead"
        raise InvalidBudget(msg)
    return list(range(len(order)))


def _with_row(problem: Problem, cost: NDArray[np.int64], limit: int, name: str) -> Problem:
    return replace(
        problem,
        costs=np.concatenate([problem.costs, cost[None]]),
        limits=np.append(problem.limits, np.int64(limit)),
        resources=(*problem.resources, name),
    )


def _floats(values: list[float]) -> NDArray[np.float64]:
    """Return f64 of JSON numbers, of which integers may have any size."""
    try:
        found = np.array([float(value) for value in values], dtype=np.float64)
    except OverflowError:
        found = np.array([np.inf])
    if not np.isfinite(found).all():
        msg = "losses, standard errors and the constant must be finite; one is not"
        raise InvalidProblem(msg)
    return found


def _whole(value: int, what: str) -> int:
    if not 0 <= value < LARGEST_LIMIT:
        msg = f"{what} must be from 0 to below 2^62; got {shown_integer(value)}: use a larger unit"
        raise InvalidProblem(msg)
    return value


def _unique(names: list[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            msg = f"the {what[:80]} must have different names; '{name[:80]}' stands twice"
            raise InvalidProblem(msg)
        seen.add(name)


def _row(place: Mapping[Rule, int], rule: Rule) -> int:
    if rule not in place:
        msg = f"a cross-layer term must name a group and its candidate; got {list(rule)}"
        raise InvalidProblem(msg)
    return place[rule]


def _said(term: CrossTerm | PairCost) -> str:
    return f"{' '.join(term.first)} with {' '.join(term.second)}"[:160]

"""From a sensitivity matrix and a user's wishes to a problem."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import numpy as np

from bitquota.errors import InvalidProblem, UnknownLayer
from bitquota.solver.problem import Problem

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from bitquota.candidates.budget import Budget
    from bitquota.matrix import SensitivityMatrix

Rule = tuple[str, str]
"""A group (name or shell pattern) and a candidate label such as ``W4`` (or a pattern)."""


def build_problem(
    matrix: SensitivityMatrix,
    budgets: Sequence[Budget],
    *,
    at_most: Mapping[int, int] | None = None,
    fixed: Sequence[Rule] = (),
    forbidden: Sequence[Rule] = (),
    forbidden_pairs: Sequence[tuple[Rule, Rule]] = (),
    required_pairs: Sequence[tuple[Rule, Rule]] = (),
) -> Problem:
    """Return the problem of choosing one row per group of ``matrix`` within ``budgets``.

    Args:
        matrix: Measured loss increases.
        budgets: Any number, of any resource; ``activation_bits_max`` forbids rows above it, a peak
            is a constraint for each of its cuts that may exceed it.
        at_most: Weight bits to the largest number of groups that may use them.
        fixed: Groups that must take the candidate.
        forbidden: Groups that must not take the candidate.
        forbidden_pairs: Two rules whose rows must not be chosen together.
        required_pairs: The first rule's rows require the second's candidate.

    Raises:
        BudgetTooSmall: A budget is below the smallest plan.
        UnknownLayer: A rule names a group that does not exist.
        InvalidProblem: A rule's candidate does not exist.
        InvalidInput: The cost table of a budget lacks a candidate.
    """
    table = matrix.table
    n = len(table.rows)
    costs: list[NDArray[np.int64]] = []
    limits: list[int] = []
    resources: list[str] = []
    allowed = np.ones(n, dtype=np.bool_)
    # Budgets, and the limits on how many groups may use a bit-width.
    for budget in budgets:
        budget.check(table)
        if budget.resource == "activation_bits_max":
            allowed &= budget.costs(table) <= budget.available
            continue
        for cost, limit in budget.constraints(table):
            costs.append(cost)
            limits.append(limit)
            resources.append(budget.resource)
    for bits, most in (at_most or {}).items():
        uses = [any(c.weight_bits == bits for c in row.candidates) for row in table.rows]
        costs.append(np.array(uses, dtype=np.int64))
        limits.append(int(most))
        resources.append(f"groups at {bits} bits")
    problem = Problem(
        diagonal=matrix.diagonal,
        cross=matrix.cross,
        offsets=table.offsets,
        costs=np.array(costs, dtype=np.int64).reshape(len(limits), n),
        limits=np.array(limits, dtype=np.int64),
        resources=tuple(resources),
        groups=table.groups,
        labels=table.labels,
        constant=matrix.constant,
        allowed=allowed,
    )
    return restricted(
        problem,
        fixed=fixed,
        forbidden=forbidden,
        forbidden_pairs=forbidden_pairs,
        required_pairs=required_pairs,
    )


def restricted(
    problem: Problem,
    *,
    fixed: Sequence[Rule] = (),
    forbidden: Sequence[Rule] = (),
    forbidden_pairs: Sequence[tuple[Rule, Rule]] = (),
    required_pairs: Sequence[tuple[Rule, Rule]] = (),
) -> Problem:
    """Return ``problem`` with these rules too, as in ``build_problem``.

    Raises:
        UnknownLayer: A rule names a group that does not exist.
        InvalidProblem: A rule's candidate does not exist.
    """
    if not (fixed or forbidden or forbidden_pairs or required_pairs):
        return problem
    allowed = problem.allowed.copy()
    for rule in fixed:
        rows, groups = rows_of(problem, rule)
        keep = ~np.isin(problem.group_of_row, groups)
        keep[rows] = True
        allowed &= keep
    for rule in forbidden:
        allowed[rows_of(problem, rule)[0]] = False
    return replace(
        problem,
        allowed=allowed,
        forbidden_pairs=np.concatenate([problem.forbidden_pairs, _pairs(problem, forbidden_pairs)]),
        required_pairs=np.concatenate([problem.required_pairs, _pairs(problem, required_pairs)]),
    )


def rows_of(problem: Problem, rule: Rule) -> tuple[list[int], list[int]]:
    """Return the rows that a rule names, and their groups' indices; errors as ``restricted``."""
    pattern, label = rule
    names = problem.groups
    groups = [g for g, name in enumerate(names) if name == pattern or fnmatchcase(name, pattern)]
    if not groups:
        msg = (
            f"a rule must name one of the {len(names)} groups; '{pattern}' matches none; they are "
            f"called {', '.join(names[:5])}{' …' if len(names) > 5 else ''}"
        )
        raise UnknownLayer(msg, pattern=pattern)
    offsets = problem.offsets
    rows = [
        p
        for g in groups
        for p in range(int(offsets[g]), int(offsets[g + 1]))
        if problem.labels[p] == label or fnmatchcase(problem.labels[p], label)
    ]
    if not rows:
        offered = list(dict.fromkeys(problem.labels[int(offsets[g])] for g in groups))
        msg = (
            f"a rule must name a candidate of its group; '{pattern}' has no '{label}', only "
            f"candidates like {', '.join(offered)}"
        )
        raise InvalidProblem(msg, pattern=pattern, label=label)
    return rows, groups


def _pairs(problem: Problem, rules: Sequence[tuple[Rule, Rule]]) -> NDArray[np.int64]:
    group = problem.group_of_row
    pairs = [
        (p, q)
        for first, second in rules
        for p in rows_of(problem, first)[0]
        for q in rows_of(problem, second)[0]
        if group[p] != group[q]
    ]
    return np.array(sorted(set(pairs)), dtype=np.int64).reshape(-1, 2)

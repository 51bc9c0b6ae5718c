"""Answers of the solver as plain JSON: what ``bitquota solve --json`` prints and a job returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

from bitquota.errors import InvalidInput
from bitquota.solver.conflicts import explain_infeasible
from bitquota.solver.cross_check import cross_check as checked
from bitquota.solver.dispatch import GAP, solve
from bitquota.solver.diverse import top_k
from bitquota.solver.explain import explain as explained
from bitquota.solver.frontiers import even_limits, frontier, smallest
from bitquota.solver.solution import Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from bitquota.canonical import JsonObject
    from bitquota.solver.control import Limits
    from bitquota.solver.frontiers import FrontierPoint, Smallest
    from bitquota.solver.problem import Problem
    from bitquota.solver.solution import Certificate, Solution


def solve_document(
    problem: Problem,
    *,
    solver: str = "auto",
    top: int = 1,
    explain: bool = False,
    cross_check: bool = False,
    on_certificate: Callable[[Certificate], None] | None = None,
    **limits: Unpack[Limits],
) -> JsonObject:
    """Solve ``problem`` and return everything about the answer.

    Args:
        problem: What to solve.
        solver: Backend.
        top: Also list this many different choices, best first, under ``top``.
        explain: Add ``explanation``: the price of each budget, and what each group's bits buy.
        cross_check: Add ``cross_check``: the certificate verified, every other solver asked.
        on_certificate: Called with the certificate of the bound; other solvers than ours give none.
        limits: Of each solve; see ``bitquota.solver.solve``.

    A problem that has no choice gets ``conflict`` instead: what conflicts, and which budget must
    be raised how far.
    """
    solution = solve(problem, backend=solver, **limits)
    if on_certificate is not None and solution.certificate is not None:
        on_certificate(solution.certificate)
    # The answer, or why there is none.
    document = solution_json(problem, solution)
    if solution.choice is None:
        if solution.status is Status.INFEASIBLE:
            document["conflict"] = explain_infeasible(problem).to_json()
        return document
    # What else was asked for.
    if top > 1:
        others = top_k(problem, top, **limits)
        document["top"] = [solution_json(problem, other) for other in others]
    if explain:
        document["explanation"] = explained(problem, solution).to_json()
    if cross_check:
        document["cross_check"] = checked(problem, solution).to_json()
    return document


def smallest_document(
    problem: Problem,
    tolerance: float,
    *,
    gap: float = GAP,
    time_limit_s: float | None = None,
    seed: int = 0,
) -> JsonObject:
    """Return the smallest size whose loss is at most ``tolerance``; arguments as above."""
    found = smallest(problem, tolerance, gap=gap, time_limit_s=time_limit_s, seed=seed)
    return _named(problem, found) | {"resource": problem.resources[0]}


def frontier_document(
    problem: Problem,
    points: int,
    *,
    certify: bool = True,
    on_point: Callable[[FrontierPoint], None] | None = None,
    **limits: Unpack[Limits],
) -> list[JsonObject]:
    """Solve ``problem`` at many budgets of its first resource and return one object for each.

    Args:
        problem: What to solve.
        points: Budgets, evenly spaced from the smallest choice to the largest.
        certify: Prove a bound for every point.
        on_point: Called with each finished point.
        limits: Seconds for all points together, the rest for each of them; see ``frontier``.

    Raises:
        InvalidInput: Fewer than two points.
    """
    if points < 2:
        msg = f"a frontier must have at least 2 points; got {points}"
        raise InvalidInput(msg, points=points)
    levels = even_limits(problem, points)
    found = frontier(problem, levels, certify=certify, on_point=on_point, **limits)
    rows = []
    for point in found:
        row = solution_json(problem, point.solution)
        row["limits"] |= {problem.resources[0]: point.limit}
        rows.append(row)
    return rows


def solution_json(problem: Problem, solution: Solution) -> JsonObject:
    """Return a solution in the words of its problem; infinite numbers become ``null``."""
    spent = None
    if solution.choice is not None:
        amounts = problem.spent(solution.choice).tolist()
        spent = dict(zip(problem.resources, amounts, strict=True))
    return _named(problem, solution) | {
        "spent": spent,
        "limits": dict(zip(problem.resources, map(int, problem.limits), strict=True)),
    }


def _named(problem: Problem, found: Solution | Smallest) -> JsonObject:
    """Return an answer with the names of the groups and of the rows that it chooses."""
    labels = None
    if found.choice is not None:
        labels = [problem.labels[row] for row in problem.rows(found.choice)]
    return found.to_json() | {"groups": list(problem.groups), "labels": labels}

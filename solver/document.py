"""Answers of the solver as plain JSON: what ``bitquota solve --json`` prints and a job returns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Unpack

from bitquota.errors import InvalidInput
from bitquota.solver.conflicts import explain_infeasible
from bitquota.solver.cross_check import cross_check as checked
from bitquota.solver.dispatch import GAP, solve
from bitquota.solver.diverse import alternatives
from bitquota.solver.explain import explain as explained
from bitquota.solver.frontiers import even_limits, frontier, smallest
from bitquota.solver.posed_problem import Posed
from bitquota.solver.solution import Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from bitquota.canonical import JsonObject
    from bitquota.solver.control import Limits
    from bitquota.solver.frontiers import FrontierPoint, Smallest
    from bitquota.solver.problem import Problem
    from bitquota.solver.solution import Certificate, Solution


def solve_document(
    problem: Problem | Posed,
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
        problem: What to solve, perhaps read from a document.
        solver: Backend.
        top: Also list this many different choices, best first, under ``top``; 1 leaves it to the
            document. Where there are fewer, ``top_limit`` names the limit that stopped the search
            for others, ``null`` if no others exist.
        explain: Add ``explanation``: the price of each budget, and what each group's bits buy.
        cross_check: Add ``cross_check``: the certificate verified, every other solver asked.
        on_certificate: Called with the certificate of the bound; other solvers than ours give none.
        limits: Of each solve; see ``bitquota.solver.solve``.

    A problem that has no choice gets ``conflict`` instead: what conflicts, and which budget must
    be raised how far.

    Raises:
        InvalidInput: An explanation of a problem with pair costs.
    """
    asked = problem if isinstance(problem, Posed) else Posed.plain(problem)
    problem, top = asked.problem, top if top > 1 else asked.top
    if explain and asked.shown < problem.n_groups:
        msg = "no explanation is given where pairs have costs: prices of single groups say nothing"
        raise InvalidInput(msg)
    solution = solve(problem, backend=solver, **limits)
    if on_certificate is not None and solution.certificate is not None:
        on_certificate(solution.certificate)
    # The answer, or why there is none.
    document = solution_json(asked, solution)
    if solution.choice is None:
        if solution.status is Status.INFEASIBLE:
            document["conflict"] = explain_infeasible(problem).to_json()
        return document
    # What else was asked for.
    if top > 1:
        weights = [int(g < asked.shown) for g in range(problem.n_groups)]
        others = alternatives(
            problem, top, first=solution, distance=asked.distance, weights=weights, **limits
        )
        chosen = [other for other in others if other.choice is not None]
        document["top"] = [solution_json(asked, other) for other in chosen]
        document["top_limit"] = None if len(chosen) == top else others[-1].to_json()["limit"]
    if explain:
        document["explanation"] = explained(problem, solution).to_json()
    if cross_check:
        document["cross_check"] = checked(problem, solution).to_json()
    return document


def plain_problem(problem: Problem | Posed, what: str) -> Problem:
    """Return a problem whose groups are all the user's; raises ``InvalidInput`` for ``what``."""
    if not isinstance(problem, Posed):
        return problem
    if problem.shown < problem.problem.n_groups:
        msg = f"{what} takes no costs of pairs; solve this problem for one budget"
        raise InvalidInput(msg)
    return problem.problem


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
    return _named(Posed.plain(problem), found) | {"resource": problem.resources[0]}


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


def solution_json(asked: Problem | Posed, solution: Solution) -> JsonObject:
    """Return a solution in the words of its problem; infinite numbers become ``null``."""
    asked = asked if isinstance(asked, Posed) else Posed.plain(asked)
    problem, spent = asked.problem, None
    if solution.choice is not None:
        amounts = problem.spent(solution.choice).tolist()
        spent = dict(zip(problem.resources, amounts, strict=True))
    return _named(asked, solution) | {
        "spent": spent,
        "limits": dict(zip(problem.resources, map(int, problem.limits), strict=True)),
    }


def _named(asked: Posed, found: Solution | Smallest) -> JsonObject:
    """Return an answer with the names of the user's groups and of the rows that it chooses."""
    problem, document = asked.problem, found.to_json()
    labels = None
    if found.choice is not None:
        labels = [problem.labels[row] for row in problem.rows(found.choice)[: asked.shown]]
        document["choice"] = document["choice"][: asked.shown]
    return document | {"groups": list(problem.groups[: asked.shown]), "labels": labels}

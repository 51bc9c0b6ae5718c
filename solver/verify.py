"""Check what a plan or a solution claims against a certificate that lies in a file of its own.

Nothing here runs the solver: the problem is built again from the matrix and the budgets, and the
certificate goes through the independent checker.

Design: docs/design/certificates.md
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from bitquota.errors import GateFailed, Infeasible, InvalidInput
from bitquota.solver.archive import CertificateFile, problem_digest
from bitquota.solver.build import build_problem
from bitquota.solver.checker import check_solution
from bitquota.solver.pair_costs import completed
from bitquota.solver.solution import Limit, Solution, Status

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from bitquota.candidates import Candidate, CandidateTable
    from bitquota.canonical import JsonObject
    from bitquota.matrix import SensitivityMatrix
    from bitquota.plan import Plan
    from bitquota.solver.problem import Problem

_OPTIMAL_GAP = 1e-4
"""Relative gap up to which a choice is called the optimum; that of ``bitquota solve``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What was proved of a plan or a solution.

    Attributes:
        subject: ``plan`` or ``solution``.
        budgets: The limits, in words.
        objective: What the matrix predicts for the choice; exact to the rounding of a sum.
        bound: Proved: no choice within the budgets is predicted below it.
        unit: Unit of both; empty where it is not known.
        nodes: Nodes of the certificate.
        problem: Digest of the problem.
        matrix: Digest of the sensitivity matrix, or ``None`` where there is none.
        base: What the matrix was measured around, in words; empty where it is not known.
    """

    subject: str
    budgets: str
    objective: float
    bound: float
    unit: str
    nodes: int
    problem: str
    matrix: str | None
    base: str

    @property
    def gap(self) -> float:
        """How far the prediction for the choice can be above the best possible one."""
        return max(0.0, self.objective - self.bound)

    @property
    def optimal(self) -> bool:
        """Whether the choice is the optimum of the matrix, but for a relative gap of 1e-4."""
        return self.gap <= _OPTIMAL_GAP * abs(self.objective)

    def proved(self) -> list[str]:
        """Return what is proved, in sentences."""
        unit = f" {self.unit}" if self.unit else ""
        above = f"{self.gap:.3g}{unit}"
        if self.gap and self.objective:
            above += f" ({100 * self.gap / abs(self.objective):.3g} %)"
        matrix = f"the matrix {self.matrix}" if self.matrix else "this problem file"
        around = f", measured around {self.base}," if self.base else ""
        bound = (
            f"Bound: no choice within {self.budgets} has a predicted loss below "
            f"{self.bound:.6g}{unit} according to {matrix}{around} as problem {self.problem}."
        )
        gap = (
            f"Gap: the {self.subject} keeps every limit, and its predicted loss is "
            f"{self.objective:.6g}{unit}: at most {above} above the best possible."
        )
        check = (
            f"Check: all nodes of the certificate ({self.nodes:,}) were checked by code that is "
            "independent of the solver, with every rounding accounted for."
        )
        return [bound, gap, check]

    def not_proved(self) -> list[str]:
        """Return what is not proved, in sentences."""
        model = (
            "That no choice has a smaller loss when measured: the matrix is a model of the "
            "network, and only a measurement speaks of the network itself."
        )
        found = [model, "That the matrix was measured well: its numbers are taken as they are."]
        if not self.optimal:
            why = (
                "plans are refined by measurements and chosen by the measured loss, so a plan "
                "need not be the optimum"
                if self.subject == "plan"
                else "the solver stopped before the gap was closed"
            )
            found.insert(0, f"That the {self.subject} is the optimum of the matrix: {why}.")
        return found

    def to_json(self) -> JsonObject:
        """Return the fields and the sentences as plain JSON."""
        return {name: getattr(self, name) for name in self.__slots__} | {
            "bound": self.bound if math.isfinite(self.bound) else None,
            "gap": self.gap if math.isfinite(self.gap) else None,
            "optimal": self.optimal,
            "proved": self.proved(),
            "not_proved": self.not_proved(),
        }


def verify_plan(plan: Plan, matrix: SensitivityMatrix, certificate: bytes) -> Verified:
    """Check the bound of ``plan`` by ``certificate``, a file of ``bitquota plan``.

    Raises:
        GateFailed: Plan, matrix and certificate do not belong together, or something that they
            claim is not proved; the message says what.

    Cost: that of the checker, ``O(N n²)`` for ``N`` nodes and ``n`` rows.
    """
    proof = plan.proof
    if proof is None or proof.bound is None:
        msg = "a plan must carry a bound to be verified; this one has none: no solver proved one"
        raise GateFailed(msg)
    _require_same("matrix", proof.matrix_digest, matrix.digest(), "the plan")
    choice = choice_of(matrix.table, plan.candidates)
    try:
        problem = build_problem(matrix, plan.budgets)
    except (Infeasible, InvalidInput) as err:
        msg = f"the budgets of the plan must fit the matrix; they do not: {err}"
        raise GateFailed(msg) from err
    budgets = [f"'{b.text}'" if b.text else _limit(b.resource, b.limit) for b in plan.budgets]
    claimed = _claim(choice, proof.objective, proof.bound)
    return _check(problem, matrix, certificate, claimed, "plan", budgets)


def verify_solution(
    document: Mapping[str, object],
    problem: Problem,
    matrix: SensitivityMatrix | None,
    certificate: bytes,
) -> Verified:
    """Check an answer of ``bitquota solve --json`` by the file of ``--certificate``.

    Args:
        document: The answer.
        problem: The problem, built again.
        matrix: The sensitivity matrix, if the problem was made from one.
        certificate: The file's bytes.

    Raises:
        GateFailed: As ``verify_plan``.
        InvalidInput: The document lacks a member, or has no choice.
    """
    try:
        choice = completed(problem, np.array(document["choice"], dtype=np.int64))
        bound = document["bound"]
        claimed = _claim(
            choice,
            float(document["objective"]),  # type: ignore[arg-type]  # the except is for these
            -math.inf if bound is None else float(bound),  # type: ignore[arg-type]
        )
    except (KeyError, TypeError, ValueError, OverflowError, IndexError) as err:
        msg = (
            "a solution must have a choice, an objective and a bound as 'bitquota solve --json' "
            f"prints them; got {err!r}"
        )
        raise InvalidInput(msg) from err
    budgets = list(map(_limit, problem.resources, problem.limits.tolist()))
    return _check(problem, matrix, certificate, claimed, "solution", budgets)


def choice_of(table: CandidateTable, chosen: Sequence[Candidate]) -> NDArray[np.int64]:
    """Return ``i64[G]``, the row within each group whose candidates are all in ``chosen``.

    Raises:
        GateFailed: A group has no such row, or layers are left over.
    """
    by_layer = {candidate.layer: candidate for candidate in chosen}
    found: dict[str, int] = {}
    place: dict[str, int] = {}
    covered = 0
    for row in table.rows:
        local = place[row.group] = place.get(row.group, -1) + 1
        if row.group not in found and all(by_layer.get(c.layer) == c for c in row.candidates):
            found[row.group] = local
            covered += len(row.candidates)
    lacking = [name for name in table.groups if name not in found]
    if lacking or covered != len(by_layer):
        where = f"group '{lacking[0]}'" if lacking else "layers that the matrix does not have"
        msg = (
            "a plan must choose among the candidates of its matrix in every group; it does not in "
            f"{where}: this is another model's matrix, or the plan was edited"
        )
        raise GateFailed(msg)
    return np.array([found[name] for name in table.groups], dtype=np.int64)


def _claim(choice: NDArray[np.int64], objective: float, bound: float) -> Solution:
    if not bound <= objective < math.inf:
        msg = f"a bound must not exceed the objective, {objective}; got {bound}"
        raise GateFailed(msg)
    return Solution(
        status=Status.FEASIBLE,
        limit=Limit.METHOD,
        choice=choice,
        objective=objective,
        bound=bound,
    )


def _check(
    problem: Problem,
    matrix: SensitivityMatrix | None,
    data: bytes,
    claimed: Solution,
    subject: str,
    budgets: Sequence[str],
) -> Verified:
    """Return what the certificate in ``data`` proves of ``claimed``, or raise ``GateFailed``."""
    try:
        kept = CertificateFile.from_bytes(data)
    except InvalidInput as err:
        msg = f"a certificate must be whole and unchanged to be believed; {err}"
        raise GateFailed(msg) from err
    name, digest = problem_digest(problem), None if matrix is None else matrix.digest()
    _require_same("matrix", kept.matrix, digest, "the certificate")
    _require_same("problem", kept.problem, name, "the certificate")
    verdict = check_solution(problem, replace(claimed, certificate=kept.certificate))
    if not verdict.holds:
        msg = f"what is claimed must be proved; it is not: {verdict.reason}"
        raise GateFailed(msg, reason=verdict.reason)
    base = ""
    if matrix is not None:
        point = matrix.base_point
        base = "full precision" if point is None else "the choice " + " ".join(
            problem.labels[row] for row in problem.rows(point)
        )  # fmt: skip
    return Verified(
        subject=subject,
        budgets=" + ".join(budgets) or "no budget",
        objective=claimed.objective,
        bound=claimed.bound,
        unit="" if matrix is None else matrix.unit,
        nodes=verdict.nodes,
        problem=name,
        matrix=digest,
        base=base,
    )


def _require_same(what: str, named: str | None, given: str | None, by: str) -> None:
    if named != given:
        msg = (
            f"the {what} must be the one that {by} was made for, {named or 'a plain archive'}; "
            f"got {given or 'a plain archive'}: name the files that were written together"
        )
        raise GateFailed(msg, wanted=named, got=given)


def _limit(resource: str, limit: int) -> str:
    return f"{resource} at most {limit:,}"

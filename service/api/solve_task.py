"""The task behind ``POST /v1/solve``: parses the body, reads the matrix, solves every budget."""

from __future__ import annotations

import base64
import binascii
import json
import tempfile
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from bitquota.candidates.cost_table import CostTable
from bitquota.candidates.layers import Inventory
from bitquota.canonical import digest_bytes
from bitquota.errors import InvalidInput
from bitquota.matrix import SensitivityMatrix
from bitquota.service.api.request_limits import check_budget_texts
from bitquota.service.api.schemas import (
    LONGEST_SOLVE_S,
    ProblemAnswer,
    SolveAnswer,
    SolvedBudget,
    SolveOrder,
    invalid_request,
)
from bitquota.service.security.json_limits import REQUEST, check_texts, parse_json
from bitquota.service.security.upload_inspection import inspect_matrix
from bitquota.solver.matrix_budgets import budget_of, inventory_of

if TYPE_CHECKING:
    from bitquota.candidates.table import Candidate
    from bitquota.canonical import JsonObject
    from bitquota.service.security.task_process import Ask

_KEPT = 8
MOST_VALUES = 1_000_000
"""JSON values of one body: a problem of 300 candidates may have 50,000 cross-layer terms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A matrix and what its budgets are shares of.

    Attributes:
        matrix: The matrix.
        inventory: All tensors of the model; only the quantizable ones when ``whole`` is false.
        whole: Whether sizes of the whole model can be told.
    """

    matrix: SensitivityMatrix
    inventory: Inventory
    whole: bool


_recent: OrderedDict[tuple[str, str | None], Measured] = OrderedDict()
"""The last few matrices that were read: reading one can take longer than solving it."""


def solve_task(arguments: JsonObject, ask: Ask) -> tuple[JsonObject, bytes]:
    """Return the ``SolveAnswer`` to the body in the file ``body``, as JSON.

    ``ask`` says where the files of ``{"job": …}`` or of an uploaded ``{"matrix": …}`` lie.
    """
    clock = _Clock()
    order = _parse(arguments)
    if order.problem is not None:
        return {}, _solve_problem(order, arguments, ask, clock).model_dump_json().encode()
    check_budget_texts(order.budgets)
    source = order.job or order.matrix
    assert source is not None  # noqa: S101  # one of them is given
    answer = SolveAnswer(data=_solve(order, _measured(source, arguments, ask), clock))
    return {}, answer.model_dump_json().encode()


class _Clock:
    """Who waits for an answer waits for its reading, too: that counts for the time limit."""

    def __init__(self) -> None:
        """Begin to count."""
        self.begin = time.monotonic()

    def left(self, limit_s: float) -> float:
        """Return what a solve may take of ``limit_s``, half of it at least."""
        return max(limit_s - (time.monotonic() - self.begin), 0.5 * limit_s)


def _parse(arguments: JsonObject) -> SolveOrder:
    body = Path(arguments["body"]).read_bytes()
    what = "a request body"
    limits = replace(REQUEST, size=arguments["max_bytes"], values=MOST_VALUES)
    value = parse_json(body, limits, what)
    check_texts(body, what)
    try:
        order = SolveOrder.model_validate(value)
    except ValidationError as err:
        found = err.errors(include_url=False, include_context=False, include_input=False)
        raise invalid_request([{**e, "loc": ("body", *e["loc"])} for e in found]) from err
    matrices = (order.job is not None) + (order.matrix is not None)
    if matrices != (order.problem is None) or bool(order.budgets) != (order.problem is None):
        msg = "either 'job' or 'matrix' must be given with 'budgets', or a 'problem' alone"
        raise InvalidInput(msg)
    if order.explain and order.problem is None:
        msg = "'explain' must come with a 'problem'; got budgets of a matrix: state them as one"
        raise InvalidInput(msg)
    seconds = order.time_limit_s * len(order.budgets)
    if seconds > LONGEST_SOLVE_S:
        msg = (
            f"all budgets of one request may take at most {LONGEST_SOLVE_S:g} s together; "
            f"{len(order.budgets)} of {order.time_limit_s:g} s take {seconds:g}: submit a "
            "'frontier' job, or send fewer"
        )
        raise InvalidInput(msg, seconds=seconds)
    return order


def _solve_problem(
    order: SolveOrder, arguments: JsonObject, ask: Ask, clock: _Clock
) -> ProblemAnswer:
    """Return the answer to a problem that is stated in full."""
    from bitquota.solver.document import solve_document
    from bitquota.solver.posed_problem import posed
    from bitquota.solver.problem_document import ProblemDocument

    def find(source: str) -> tuple[SensitivityMatrix, Inventory | None]:
        found = _measured(source, arguments, ask)
        return found.matrix, found.inventory if found.whole else None

    document = ProblemDocument.from_json(order.problem)
    # One solve, one more time limit for alternatives, and two solves for the price of a budget.
    solves = 1 + (document.top > 1) + 2 * len(document.budgets) * order.explain
    if (seconds := order.time_limit_s * solves) > LONGEST_SOLVE_S:
        msg = (
            f"a problem may take at most {LONGEST_SOLVE_S:g} s; with what is asked for this one "
            f"takes {seconds:g}: lower 'time_limit_s'"
        )
        raise InvalidInput(msg, seconds=seconds)
    asked = posed(document, find)
    answer: dict[str, Any] = solve_document(
        asked,
        explain=order.explain,
        gap=order.gap,
        time_limit_s=clock.left(order.time_limit_s),
        seed=order.seed,
    )
    if asked.robust:
        answer["robust"] = asked.robust
    return ProblemAnswer(**answer)


def _solve(order: SolveOrder, measured: Measured, clock: _Clock) -> list[SolvedBudget]:
    from bitquota.solver import build_problem, solve

    answers = []
    tables = [CostTable.from_json(table) for table in order.tables]
    inventory = measured.inventory if measured.whole else None
    for text in order.budgets:
        budgets = [budget_of(part, measured.matrix, inventory, tables) for part in text.split("+")]
        problem = build_problem(measured.matrix, budgets)
        left = clock.left(order.time_limit_s)
        solution = solve(problem, gap=order.gap, time_limit_s=left, seed=order.seed)
        said: dict[str, Any] = solution.to_json()
        assignments: dict[str, dict[str, Any]] = {}
        if solution.choice is not None:
            chosen = measured.matrix.table.decode([int(c) for c in solution.choice])
            for candidate in chosen:
                assignments[candidate.layer] = assignment(candidate)
        answers.append(
            SolvedBudget(
                budget=text,
                limits=[replace(b, prices=None, schedule=None).to_json() for b in budgets],
                status=said["status"],
                limit=said["limit"],
                predicted=said["objective"],
                bound=said["bound"],
                absolute_gap=said["absolute_gap"],
                relative_gap=said["relative_gap"],
                assignments=assignments,
            )
        )
        clock = _Clock()
    return answers


def assignment(candidate: Candidate) -> dict[str, Any]:
    """Return what a layer becomes; ``mean_bits`` where the bit-width does not say it all."""
    found: dict[str, Any] = {
        "weight_bits": candidate.weight_bits,
        "activation_bits": candidate.activation_bits,
        "size_bits": candidate.size_bits,
    }
    if candidate.row_bits:
        found["row_bits"] = list(candidate.row_bits)
    if candidate.sparse:
        found["sparsity"] = str(candidate.scheme.sparsity)
    if candidate.mean_bits != candidate.weight_bits:
        found["mean_bits"] = candidate.mean_bits
    return found


def _measured(source: str, arguments: JsonObject, ask: Ask) -> Measured:
    """Return the matrix of a job or an upload, or the one that is base64 itself."""
    if source.startswith("sha256:"):
        return _stored(ask({"matrix": source}))
    if source.startswith("job_"):
        return _stored(ask({"job": source}))
    key = (digest_bytes([source.encode()]), None)
    if key in _recent:
        _recent.move_to_end(key)
        return _recent[key]
    try:
        data = base64.b64decode(source, validate=True)
    except (binascii.Error, ValueError) as err:
        msg = (
            "a matrix must be the digest of an upload, the id of a job, or base64 of the .npz that "
            "a job's /sensitivity returns"
        )
        raise InvalidInput(msg) from err
    # Before anything is unpacked: a few megabytes may claim to hold gigabytes.
    with tempfile.NamedTemporaryFile(dir=Path(arguments["body"]).parent) as file:
        file.write(data)
        file.flush()
        inspect_matrix(
            Path(file.name),
            max_ratio=arguments["max_ratio"],
            max_bytes=arguments["max_unpacked_bytes"],
        )
    return _keep(key, SensitivityMatrix.from_bytes(data), None)


def _stored(found: JsonObject) -> Measured:
    """Return the matrix, with the inventory if there is one, whose files are named by content."""
    key = (found["matrix"], found["inventory"])
    if key in _recent:
        _recent.move_to_end(key)
        return _recent[key]
    matrix = SensitivityMatrix.from_bytes(Path(found["matrix"]).read_bytes())
    inventory = None
    if found["inventory"] is not None:
        inventory = Inventory.from_json(json.loads(Path(found["inventory"]).read_bytes()))
    return _keep(key, matrix, inventory)


def _keep(
    key: tuple[str, str | None], matrix: SensitivityMatrix, inventory: Inventory | None
) -> Measured:
    found = Measured(
        matrix=matrix, inventory=inventory or inventory_of(matrix), whole=inventory is not None
    )
    _recent[key] = found
    while len(_recent) > _KEPT:
        _recent.popitem(last=False)
    return found

"""The task behind ``POST /v1/solve``: parses the body, reads the matrix, solves every budget."""

from __future__ import annotations

import base64
import binascii
import json
import tempfile
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from bitquota.candidates.budget import Budget, Scope
from bitquota.candidates.layers import Inventory, Layer, LayerKind
from bitquota.canonical import digest_bytes
from bitquota.errors import InvalidBudget, InvalidInput
from bitquota.matrix import SensitivityMatrix
from bitquota.service.api.request_limits import check_budget_texts
from bitquota.service.api.schemas import (
    LONGEST_SOLVE_S,
    SolveAnswer,
    SolvedBudget,
    SolveOrder,
    invalid_request,
)
from bitquota.service.security.json_limits import REQUEST, check_texts, parse_json
from bitquota.service.security.upload_inspection import inspect_matrix

if TYPE_CHECKING:
    from bitquota.canonical import JsonObject
    from bitquota.service.security.task_process import Ask

_KEPT = 8


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
    order = _parse(arguments)
    check_budget_texts(order.budgets)
    answer = SolveAnswer(data=_solve(order, _measured(order, arguments, ask)))
    return {}, answer.model_dump_json().encode()


def _parse(arguments: JsonObject) -> SolveOrder:
    body = Path(arguments["body"]).read_bytes()
    what = "a request body"
    value = parse_json(body, replace(REQUEST, size=arguments["max_bytes"]), what)
    check_texts(body, what)
    try:
        order = SolveOrder.model_validate(value)
    except ValidationError as err:
        found = err.errors(include_url=False, include_context=False, include_input=False)
        raise invalid_request([{**e, "loc": ("body", *e["loc"])} for e in found]) from err
    if (order.job is None) == (order.matrix is None):
        msg = "either 'job' or 'matrix' must be given, and not both"
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


def inventory_of(matrix: SensitivityMatrix) -> Inventory:
    """Return the layers that a matrix speaks of, as far as it knows them."""
    layers: dict[str, Layer] = {}
    for row in matrix.table.rows:
        for candidate in row.candidates:
            n = candidate.size.codes // candidate.weight_bits
            layers.setdefault(
                candidate.layer,
                Layer(
                    name=candidate.layer,
                    kind=LayerKind.LINEAR,
                    weight_name=candidate.layer,
                    weight_shape=(n,),
                    rows=1,
                    columns=n,
                    n_weights=n,
                ),
            )
    return Inventory(model_digest="", layers=tuple(layers.values()))


def _solve(order: SolveOrder, measured: Measured) -> list[SolvedBudget]:
    from bitquota.solver import build_problem, solve

    answers = []
    for text in order.budgets:
        budgets = [_budget(part, measured) for part in text.split("+")]
        for budget in budgets:
            budget.check(measured.matrix.table)
        problem = build_problem(measured.matrix, budgets)
        solution = solve(problem, gap=order.gap, time_limit_s=order.time_limit_s, seed=order.seed)
        said: dict[str, Any] = solution.to_json()
        assignments: dict[str, dict[str, Any]] = {}
        if solution.choice is not None:
            chosen = measured.matrix.table.decode([int(c) for c in solution.choice])
            for candidate in chosen:
                assignments[candidate.layer] = {
                    "weight_bits": candidate.weight_bits,
                    "activation_bits": candidate.activation_bits,
                    "size_bits": candidate.size_bits,
                }
        answers.append(
            SolvedBudget(
                budget=text,
                limits=[b.to_json() for b in budgets],
                status=said["status"],
                limit=said["limit"],
                predicted=said["objective"],
                bound=said["bound"],
                absolute_gap=said["absolute_gap"],
                relative_gap=said["relative_gap"],
                assignments=assignments,
            )
        )
    return answers


def _measured(order: SolveOrder, arguments: JsonObject, ask: Ask) -> Measured:
    if order.job is not None:
        return _stored(ask({"job": order.job}))
    assert order.matrix is not None  # noqa: S101  # one of them is given
    if order.matrix.startswith("sha256:"):
        return _stored(ask({"matrix": order.matrix}))
    try:
        data = base64.b64decode(order.matrix, validate=True)
    except (binascii.Error, ValueError) as err:
        msg = (
            "a matrix must be the digest of an upload, or base64 of the .npz that a job's "
            "/sensitivity returns"
        )
        raise InvalidInput(msg) from err
    key = (digest_bytes([data]), None)
    if key in _recent:
        _recent.move_to_end(key)
        return _recent[key]
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


def _budget(text: str, measured: Measured) -> Budget:
    budget = Budget.parse(text, measured.inventory)
    of_model = budget.resource == "size_bits" and budget.scope is Scope.MODEL
    if of_model and not measured.whole:
        msg = (
            f"without the whole model a budget must be of its weights; got '{text}': write "
            f"'{text.strip()} of weights', or solve by the id of a plan job"
        )
        raise InvalidBudget(msg, budget=text)
    return budget

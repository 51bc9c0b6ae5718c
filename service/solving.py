"""``POST /v1/solve``: a measured matrix and budgets in, choices with bounds out, at once."""

from __future__ import annotations

import base64
import binascii
import json
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anyio
from fastapi import APIRouter

from bitquota.budget import Budget, Scope
from bitquota.candidates import Inventory, Layer, LayerKind
from bitquota.canonical import digest_bytes
from bitquota.errors import InvalidBudget, InvalidInput, NotFound
from bitquota.matrix import SensitivityMatrix
from bitquota.service.inspection import ArtifactKind, inspect_matrix
from bitquota.service.job_routes import results_of
from bitquota.service.schemas import Problem, SolveAnswer, SolvedBudget, SolveOrder
from bitquota.service.state import Calling, Service, State  # noqa: TC001  # FastAPI reads them

if TYPE_CHECKING:
    from bitquota.canonical import JsonObject

router = APIRouter(prefix="/v1", tags=["solve"])
_KEPT = 8
_AT_ONCE = 2
_limiter: anyio.CapacityLimiter | None = None


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


class _Recent:
    """The last few matrices that were read: reading one can take longer than solving it."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, str | None], Measured] = OrderedDict()
        self._lock = threading.Lock()

    def stored(self, service: State, results: JsonObject) -> Measured:
        """Return the matrix of a job's results."""
        key = (results["matrix"], results.get("inventory"))
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        matrix = SensitivityMatrix.from_bytes(service.blobs.read(key[0]))
        inventory = None
        if key[1] is not None:
            inventory = Inventory.from_json(json.loads(service.blobs.read(key[1])))
        return self._keep(key, matrix, inventory)

    def inline(self, data: bytes) -> Measured:
        """Return the matrix of an archive that was sent along."""
        key = (digest_bytes([data]), None)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        return self._keep(key, SensitivityMatrix.from_bytes(data), None)

    def _keep(
        self, key: tuple[str, str | None], matrix: SensitivityMatrix, inventory: Inventory | None
    ) -> Measured:
        found = Measured(
            matrix=matrix, inventory=inventory or inventory_of(matrix), whole=inventory is not None
        )
        with self._lock:
            self._kept[key] = found
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return found


_recent = _Recent()


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


@router.post(
    "/solve", responses={status: {"model": Problem} for status in (401, 403, 404, 409, 413, 422)}
)
async def solve_now(order: SolveOrder, service: Service, caller: Calling) -> SolveAnswer:
    """Solve a stored or inline matrix for each budget; predictions only, nothing is measured.

    Each budget gets `time_limit_s`; the answer says how far from the best it can be at most.
    """
    global _limiter  # noqa: PLW0603  # a limiter belongs to the loop it was made in
    if _limiter is None:
        _limiter = anyio.CapacityLimiter(_AT_ONCE)
    solved = await anyio.to_thread.run_sync(_solve, order, service, caller.tenant, limiter=_limiter)
    return SolveAnswer(data=solved)


def _solve(order: SolveOrder, service: State, tenant: str) -> list[SolvedBudget]:
    from bitquota.solver import build_problem, solve

    measured = _measured(order, service, tenant)
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


def _measured(order: SolveOrder, service: State, tenant: str) -> Measured:
    if (order.job is None) == (order.matrix is None):
        msg = "either 'job' or 'matrix' must be given, and not both"
        raise InvalidInput(msg)
    if order.job is not None:
        results = results_of(service, tenant, order.job)
        if "matrix" not in results:
            msg = "the job must have left a matrix; it left none"
            raise NotFound(msg, job=order.job)
        return _recent.stored(service, results)
    assert order.matrix is not None  # noqa: S101  # checked above
    if order.matrix.startswith("sha256:"):
        stored = service.artifacts.get(tenant, ArtifactKind.MATRIX, order.matrix)
        return _recent.stored(service, {"matrix": stored.digest})
    try:
        data = base64.b64decode(order.matrix, validate=True)
    except (binascii.Error, ValueError) as err:
        msg = (
            "a matrix must be the digest of an upload, or base64 of the .npz that a job's "
            "/sensitivity returns"
        )
        raise InvalidInput(msg) from err
    # Before anything is unpacked: a few megabytes may claim to hold gigabytes.
    incoming = service.blobs.incoming(len(data))
    try:
        incoming.write(data)
        incoming.flush()
        settings = service.settings
        inspect_matrix(
            incoming.path,
            max_ratio=settings.max_unpacked_ratio,
            max_bytes=settings.max_calibration_bytes,
        )
    finally:
        incoming.discard()
    return _recent.inline(data)


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

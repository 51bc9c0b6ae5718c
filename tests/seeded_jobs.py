"""Finished jobs over synthetic measurements, put into a server's data folder without a worker.

The sensitivities are made up (few bits hurt more, some layers much more than others); the plans
are what our own solver makes of them.
"""

from __future__ import annotations

import sqlite3
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from bitquota.candidates.budget import Budget
from bitquota.candidates.cost_table import CostTable, LayerCost, TogetherCost
from bitquota.candidates.layers import Inventory, Layer, LayerKind
from bitquota.candidates.table import enumerate_candidates
from bitquota.canonical import canonical_json
from bitquota.matrix import SensitivityMatrix
from bitquota.plan import Assignment, Baseline, MeasuredLoss, Plan, Proof
from bitquota.service.jobs.job import NewJob
from bitquota.service.jobs.job_store import JobStore
from bitquota.service.store.artifacts import ArtifactKind, ArtifactStore
from bitquota.service.store.blobs import BlobStore
from bitquota.service.store.database import Database
from bitquota.solver import build_problem, solve
from live_server import folder_zip, npz

if TYPE_CHECKING:
    from pathlib import Path

WIDTHS = (2, 3, 4, 5, 6, 8)


def inventory_of(n_layers: int, prefix: str = "model.layers") -> Inventory:
    """Return ``n_layers`` linear layers of uneven size, named as in a transformer."""
    parts = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.gate", "mlp.down")
    rng = np.random.default_rng(n_layers)
    layers = []
    for k in range(n_layers):
        rows = int(rng.choice([64, 128, 256]))
        columns = int(rng.choice([64, 128]))
        name = f"{prefix}.{k // len(parts)}.{parts[k % len(parts)]}"
        layers.append(
            Layer(
                name=name, kind=LayerKind.LINEAR, weight_name=f"{name}.weight",
                weight_shape=(rows, columns), rows=rows, columns=columns, n_weights=rows * columns,
            )
        )  # fmt: skip
    return Inventory(model_digest="sha256:" + "0" * 64, layers=tuple(layers))


def matrix_of(
    inventory: Inventory, *, cross: bool = True, widths: tuple[int, ...] = WIDTHS, seed: int = 0
) -> SensitivityMatrix:
    """Return a matrix over ``inventory`` with standard errors."""
    rng = np.random.default_rng(seed)
    table = enumerate_candidates(inventory, widths)
    bits = np.array([row.candidates[0].weight_bits for row in table.rows], dtype=float)
    group = table.group_of_row
    weight = rng.lognormal(-4, 1.3, len(inventory.layers))[group]
    root = np.sqrt(weight) * 2.0 ** (2.0 - bits)
    n = len(table.rows)
    diagonal = root**2 * rng.lognormal(0, 0.1, n) + rng.normal(0, 2e-6, n)
    cross_terms = cross_error = None
    if cross:
        factors = rng.normal(0.25, 1.0, (len(inventory.layers), 12))[group] / 12**0.5
        cross_terms = 0.5 * np.outer(root, root) * (factors @ factors.T)
        cross_terms[group[:, None] == group[None, :]] = 0.0
        cross_error = 0.2 * np.abs(cross_terms) + 1e-7
        cross_error[group[:, None] == group[None, :]] = 0.0
    return SensitivityMatrix(
        table=table,
        diagonal=diagonal,
        cross=cross_terms,
        diagonal_error=0.08 * np.abs(diagonal) + 1e-6,
        cross_error=cross_error,
    )


def plan_of(inventory: Inventory, matrix: SensitivityMatrix, budget: str) -> Plan:
    """Return the solver's plan with uniform plans as baselines; 'measured' is the prediction."""
    limit = Budget.parse(budget, inventory)
    solution = solve(build_problem(matrix, [limit]), gap=1e-2)
    chosen = matrix.table.decode([int(c) for c in solution.choice])
    widths = sorted({row.candidates[0].weight_bits for row in matrix.table.rows})
    baselines = []
    for k, width in enumerate(widths):
        choice = [k] * len(matrix.table.groups)
        size = sum(c.size.codes for c in matrix.table.decode(choice))
        if size <= limit.limit:
            lost = matrix.predict(choice)
            baselines.append(
                Baseline(
                    name=f"uniform {width}-bit",
                    weight_bits=tuple([width] * len(inventory.layers)),
                    size_bits=sum(c.size_bits for c in matrix.table.decode(choice)),
                    measured=MeasuredLoss(
                        mean=lost, standard_error=0.02 * lost, n_samples=512,
                        accuracy=max(0.1, 0.9 - lost / 10),
                    ),
                    paired_difference=lost - solution.objective,
                    paired_error=0.01 * lost,
                )
            )  # fmt: skip
    return Plan(
        model_digest=inventory.model_digest,
        assignments=tuple(
            Assignment(layer=la, candidate=c)
            for la, c in zip(inventory.layers, chosen, strict=True)
        ),
        budgets=(limit,),
        predicted=solution.objective,
        measured=MeasuredLoss(
            mean=1.03 * solution.objective,
            standard_error=0.02 * solution.objective,
            n_samples=512,
            accuracy=max(0.1, 0.9 - solution.objective / 10),
        ),
        proof=Proof(
            status=str(solution.status),
            limit=None if solution.limit is None else str(solution.limit),
            objective=solution.objective,
            bound=solution.bound,
            solver=solution.backend,
            matrix_digest=matrix.digest(),
            certified=True,
        ),
        baselines=tuple(baselines),
    )


def with_latency(plan: Plan, inventory: Inventory, matrix: SensitivityMatrix) -> Plan:
    """Return the plan with a budget of time: 10 ns a bit, and 7 for the first two layers at W2."""
    layers = [
        LayerCost(layer=c.layer, candidate=c.label, cost=10 * c.weight_bits)
        for row in matrix.table.rows
        for c in row.candidates
    ]
    first, second = ((layer.name, "W2") for layer in inventory.layers[:2])
    table = CostTable(
        resource="latency_ns", model_digest=plan.model_digest, constant=1000,
        layers=tuple(layers), pairs=(TogetherCost(first=first, second=second, cost=7),),
    )  # fmt: skip
    budget = Budget.parse("1 ms", inventory, (table,))
    return replace(plan, budgets=(budget, *plan.budgets))


def seed_job(
    data_dir: Path,
    matrix: SensitivityMatrix,
    plans: tuple[Plan, ...],
    inventory: Inventory,
    *,
    name: str = "synthetic.onnx",
    labels: dict[str, str] | None = None,
    tenant: str = "local",
    failure: Exception | None = None,
) -> str:
    """Put a finished plan job into the data folder of a server that need not run; return its id.

    With ``failure`` (one of our errors) the job has failed with it and left nothing.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    database = Database(f"sqlite:///{data_dir / 'bitquota.db'}")
    database.create()
    try:
        blobs = BlobStore(data_dir / "blobs")
        uploads = ArtifactStore(database, time.time)
        digests = {}
        for kind, data, file_format, label in (
            (ArtifactKind.MODEL, folder_zip(), "huggingface-zip", name),
            (ArtifactKind.DATASET, npz(), "npz", "calibration.npz"),
        ):
            digests[kind] = blobs.put(data)
            uploads.record(
                tenant, kind, digests[kind], format_name=file_format, name=label, size=len(data)
            )
        jobs = JobStore(database, time.time)
        ordered, _ = jobs.create(
            NewJob(
                tenant=tenant,
                kind="plan",
                request={"budgets": [p.budgets[0].text for p in plans] or ["3 bits"]},
                model=digests[ArtifactKind.MODEL],
                dataset=digests[ArtifactKind.DATASET],
                labels=labels or {},
            )
        )
        running = jobs.claim("seed", 60.0)
        assert running is not None
        assert running.id == ordered.id, "other jobs wait: seed before the server runs"
        if failure is not None:
            jobs.fail(running.id, running.epoch, failure)
            return running.id
        results = {
            "matrix": blobs.put(matrix.to_bytes()),
            "inventory": blobs.put(canonical_json(inventory.to_json()).encode()),
            "plans": [blobs.put(plan.dumps().encode()) for plan in plans],
        }
        jobs.succeed(running.id, running.epoch, results)
        return running.id
    finally:
        database.close()


def seed_model(data_dir: Path, n_layers: int, *, cross: bool = True, **options: object) -> str:
    """Put a finished job over a synthetic model of ``n_layers`` layers; return its id."""
    inventory = inventory_of(n_layers)
    matrix = matrix_of(inventory, cross=cross)
    plans = tuple(plan_of(inventory, matrix, budget) for budget in ("3 bits", "4 bits"))
    return seed_job(data_dir, matrix, plans, inventory, **options)


def repeat_job(data_dir: Path, job: str, times: int) -> None:
    """Put copies of a finished job into the list, under ids of later and later moments."""
    with sqlite3.connect(data_dir / "bitquota.db") as connection:
        cursor = connection.execute("SELECT * FROM jobs WHERE id = ?", (job,))
        names = [column[0] for column in cursor.description]
        row = dict(zip(names, cursor.fetchone(), strict=True))
        first = int(job.removeprefix("job_"), 16)
        copies = [[*(row | {"id": f"job_{first + k:032x}"}).values()] for k in range(1, times)]
        slots = ", ".join("?" * len(names))
        connection.executemany(f"INSERT INTO jobs ({', '.join(names)}) VALUES ({slots})", copies)  # noqa: S608  # our own names

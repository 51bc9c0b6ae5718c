"""The values behind ``tests/golden``: each is made from fixed inputs, none from a clock.

Run as ``python tests/golden_values.py`` it writes the files that are missing. A file that is there
is the record of what an earlier release wrote, and is never written again.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import TypeAdapter
from safetensors.torch import load_file

from bitquota.candidates.budget import Budget
from bitquota.candidates.storage import Granularity, Grid, Rounding, ScaleFormat, ScaleRule, Scheme
from bitquota.candidates.table import CandidateTable, enumerate_candidates
from bitquota.candidates.targets import TARGETS
from bitquota.canonical import canonical_json
from bitquota.ci.diff import diff_plans
from bitquota.ci.lock import Limits, Lock, make_lock
from bitquota.context import Context
from bitquota.corrections import Correction
from bitquota.evaluate.scores import Estimate, Score
from bitquota.exports.export_report import Difference, ExportedFile, ExportedTensor, ExportReport
from bitquota.matrix import SensitivityMatrix
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.models.identity import model_fingerprint
from bitquota.models.inspection import inspect_model
from bitquota.models.loaded import LoadedModel
from bitquota.plan import Assignment, Baseline, MeasuredLoss, Plan, PlanTarget, Proof
from bitquota.request import PlanRequest
from bitquota.search.allocate import Allocation, allocate
from bitquota.search.compare import compare
from bitquota.sensitivity.cache import SqliteLedger, export_entries
from bitquota.sensitivity.tasks import Task
from bitquota.service.api.submissions import JobSubmission, new_job
from bitquota.service.jobs.kinds import KINDS
from bitquota.solver import solve
from bitquota.solver.archive import certificate_to_bytes, problem_to_bytes
from bitquota.solver.backends.answer import Answer
from bitquota.solver.document import frontier_document, smallest_document, solve_document
from contracts.solver_backend import small, tight
from format_networks import tiny_net
from seeded_jobs import inventory_of, matrix_of

if TYPE_CHECKING:
    from bitquota.candidates.layers import Inventory
    from bitquota.report.comparison import Comparison

GOLDEN = Path(__file__).parent / "golden"

CODEBOOK = Scheme(
    grid=Grid.CODEBOOK, granularity=Granularity.CHANNEL, scale_format=ScaleFormat.FP16
)
GROUPED = Scheme(
    grid=Grid.ASYMMETRIC,
    granularity=Granularity.GROUP,
    group_size=32,
    scale_rule=ScaleRule.ABSMAX,
    scale_format=ScaleFormat.BF16,
    rounding=Rounding.ERROR_FEEDBACK,
    row_alignment_bits=32,
)
REQUEST = PlanRequest(
    budgets=("4.5 bits", "3 bits + act 9 KiB"),
    weight_bits=(2, 3, 4, 8),
    activation_bits=8,
    corrections=(Correction.FOLD_BATCH_NORM, Correction.BIAS_CORRECTION),
    samples=24,
    holdout_samples=20,
    correction_samples=24,
    rounding="nearest",
)

FIRST_CORRECTIONS = (
    Correction.FOLD_BATCH_NORM, Correction.BATCH_NORM_STATISTICS, Correction.BIAS_CORRECTION,
)  # fmt: skip
"""Files that name them were written before there were others."""


def images(n: int = 44) -> CalibrationSet:
    """Return labelled random images for the tiny network."""
    rng = np.random.default_rng(5)
    x = torch.from_numpy(rng.normal(size=(n, 3, 8, 8)).astype(np.float32))
    return CalibrationSet(inputs=(x,), labels=torch.arange(n) % 10)


@cache
def model() -> LoadedModel:
    """Return the tiny network as it comes from a loader.

    Its weights are read: drawn ones differ in their last bits between processors with and without
    fused multiply-add, and so would every digest of the model.
    """
    net = tiny_net()
    net.load_state_dict(load_file(GOLDEN / "tiny_net.safetensors"))
    return LoadedModel(
        module=net, digest=model_fingerprint(net), source="tiny_net", architecture="TinyNet"
    )


def inventory() -> Inventory:
    """Return the tiny network's tensors."""
    return discover(model().module, images(2).inputs, model_digest=model().digest)


def rows_at(table: CandidateTable, row: int) -> dict[str, Any]:
    """Return the candidates of the ``row``-th row of every group by layer."""
    counts = np.diff(table.offsets)
    chosen = table.decode([min(row, int(k) - 1) for k in counts])
    return {candidate.layer: candidate for candidate in chosen}


def plan_of(known: Inventory, table: CandidateTable, row: int, **members: Any) -> Plan:
    """Return the plan that gives every group its ``row``-th row."""
    chosen = rows_at(table, row)
    return Plan(
        model_digest=known.model_digest,
        assignments=tuple(
            Assignment(layer=layer, candidate=chosen[layer.name]) for layer in known.layers
        ),
        unquantized=known.unquantized,
        **members,
    )


def loss(mean: float, accuracy: float | None = None) -> MeasuredLoss:
    """Return a measured loss with an error that no short decimal has."""
    return MeasuredLoss(mean=mean, standard_error=mean / 7, n_samples=20, accuracy=accuracy)


@cache
def plans() -> dict[str, Plan]:
    """Return plans of every kind, none of which needed a measurement."""
    known = inventory()
    proof = Proof(
        status="feasible", limit="time", objective=0.1 + 0.2, bound=1e-17, solver="bitquota",
        matrix_digest="sha256:" + "1" * 64, certified=True,
    )  # fmt: skip
    baseline = Baseline(
        name="uniform W3", weight_bits=(3, 3, 3), size_bits=2**40, measured=loss(0.4, 0.5),
        paired_difference=-0.0, paired_error=1e-300,
    )  # fmt: skip
    made = {
        "bare": plan_of(known, enumerate_candidates(known, (4,)), 0),
        "activations": plan_of(
            known,
            enumerate_candidates(known, (2, 4), activation_bits=8),
            1,
            budgets=(
                Budget(resource="activation_bits_max", limit=10**9, text="act 119 MiB"),
                Budget.parse("20 MBitOps", known),
            ),
        ),
        "corrections": plan_of(
            known,
            enumerate_candidates(known, (3, 8), scheme=GROUPED),
            0,
            corrections=FIRST_CORRECTIONS,
            measured=loss(0.25),
            predicted=1 / 3,
            proof=proof,
            baselines=(baseline,),
            selected="uniform W3",
            loss="cross_entropy",
            provenance={"seed": 0, "größe": [1, 2.5, None, True], "versions": {"torch": "0"}},
        ),
        "codebook": plan_of(known, enumerate_candidates(known, (3,), scheme=CODEBOOK), 0),
        "unproved": plan_of(
            known, enumerate_candidates(known, (2,)), 0, proof=replace(proof, bound=None)
        ),
    }
    for name in ("gguf-k", "ct-vllm-marlin", "ort-cpu", "mlx"):
        big = inventory_of(4)
        fitted = TARGETS[name].prepare(big)
        made[f"target-{name}"] = plan_of(
            fitted, TARGETS[name].candidates(fitted), 0, target=PlanTarget.of(TARGETS[name])
        )
    return made


@cache
def measured() -> tuple[Allocation, bytes, list[str]]:
    """Return a refined allocation of the tiny network, and its ledger as archive and as keys."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = SqliteLedger(Path(folder) / "ledger.sqlite")
        found = allocate(
            model(),
            images(),
            REQUEST,
            context=Context(ledger=ledger, device="cpu"),
        )
        export_entries(ledger, Path(folder) / "ledger.zip")
        keys = ledger.keys()
        ledger.close()
        return found, (Path(folder) / "ledger.zip").read_bytes(), keys


@cache
def compared() -> Comparison:
    """Return a comparison of a few ways to choose for the tiny network."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = SqliteLedger(Path(folder) / "ledger.sqlite")
        asked = replace(REQUEST, budgets=("4.5 bits", "3 bits"), corrections=())
        names = ["gram", "diagonal", "weight_mse", "relative_mse"]
        found = compare(
            model(), images(), asked, names, context=Context(ledger=ledger, device="cpu"), plans=4,
            cpu_clock=lambda: 0.0,
        )  # fmt: skip
        ledger.close()
        return found


def report(plan: Plan) -> ExportReport:
    """Return the report of an export that nobody made."""
    return ExportReport(
        exporter="onnx-qdq",
        target=None,
        plan_digest=plan.digest(),
        model_digest=plan.model_digest,
        files=(ExportedFile(name="a/ü.onnx", size_bytes=123, digest="sha256:" + "2" * 64),),
        tensors=(
            ExportedTensor(
                layer="conv", tensor="conv.weight", planned="W4 channel", stored="int4",
                planned_bits=1120, actual_bits=1120,
            ),
        ),
        unquantized_bits=640,
        planned_unquantized_bits=640,
        container_bytes=17,
        difference=Difference(maximum=1e-7, relative=3e-8, n_samples=8),
        runtime={"name": "onnxruntime", "options": {"threads": 1}},
        notes=("one", "two"),
    )  # fmt: skip


@cache
def locks() -> dict[str, Lock]:
    """Return locks with and without limits, export reports and volatile facts."""
    bare, grouped = plans()["bare"], plans()["corrections"]
    limits = Limits(max_kl=0.2, max_drop=0.5, max_bytes=10_000, not_worse_than="uniform")
    return {
        "bare": make_lock(bare),
        "full": make_lock(
            grouped,
            limits=limits,
            reports=(report(grouped),),
            volatile={"created": "2026-11-28", "wall_s": 3.5},
        ),
    }


def scores() -> dict[str, Score]:
    """Return scores with and without what is compared."""
    of = Estimate(mean=0.1, standard_error=0.01, n_samples=20)
    found = Score(
        name="plan.json", kind="plan", size_bits=4000, metrics={"kl": of, "top1": of},
        kl_tail=2.5, perplexity=1.1, differences={"full precision": {"kl": of}},
    )  # fmt: skip
    bare = Score(name="full precision", kind="full precision", size_bits=None, metrics={})
    return {"plan": found, "bare": bare}


def matrices() -> dict[str, SensitivityMatrix]:
    """Return matrices with and without cross-layer terms, errors, a base point and ties."""
    known = inventory_of(3)
    tied = known.tie([["*.q", "*.k"]])
    table = enumerate_candidates(tied, (2, 4), activation_bits=8)
    return {
        "cross": matrix_of(known),
        "diagonal": SensitivityMatrix(
            table=table,
            diagonal=np.arange(4) / 3,
            constant=-0.0,
            base_point=(1, 0),
            loss="mse",
            unit="nats",
            provenance={"seed": 7, "x": 1e-300},
        ),
    }


def requests() -> dict[str, PlanRequest]:
    """Return requests: by default, with everything, for a target, and the one measured here."""
    return {
        "default": PlanRequest(),
        "measured": replace(REQUEST, rounding="auto"),
        "target": PlanRequest(budgets=("1 MiB",), target="gguf-k", time_limit_s=2.5),
        "full": PlanRequest(
            budgets=("3 bits", "12 MiB of weights + 2 GBitOps"),
            weight_bits=(2, 4),
            activation_bits=4,
            activation_fit="joint",
            scheme=GROUPED,
            fixed={"head": 8, "re:conv.*": 4},
            ties=(("a", "b"), ("c", "d", "e")),
            exclude=("norm",),
            corrections=FIRST_CORRECTIONS,
            loss="mse",
            measure="pairs",
            refine=False,
            seed=3,
            solver="brute_force",
            gap=0.0,
            precision="bf16",
        ),
    }


@cache
def solver_documents() -> dict[str, Any]:
    """Return what the solver says of small problems, without its CPU seconds."""
    named = small(labels=("W2", "W4", "W8") * 3, groups=("a", "b", "c"))
    loose = small(limits=np.array([1000]))
    impossible = small(costs=np.array([[2, 4, 8] * 3, [8, 4, 2] * 3]), limits=np.array([8, 8]))
    found = {
        "plain": solve_document(small()),
        "explained": solve_document(named, top=3, explain=True),
        "loose": solve_document(loose, explain=True),
        "brute": solve_document(small(), solver="brute_force"),
        "tight": solve_document(tight()),
        "impossible": solve_document(impossible),
        "smallest": smallest_document(named, 2.0),
        "unreachable": smallest_document(named, -1e6),
        "frontier": frontier_document(named, 3),
    }
    return _without_seconds(found)


def _without_seconds(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_seconds(v) for k, v in value.items() if k != "cpu_seconds"}
    return [_without_seconds(v) for v in value] if isinstance(value, list) else value


def orders() -> dict[str, Any]:
    """Return, for the example order of every kind of job, what is stored of it."""
    found = {}
    for kind in KINDS.values():
        body = {"kind": kind.name} | kind.example
        new = new_job(TypeAdapter(JobSubmission).validate_python(body), "ann")
        found[kind.name] = {
            "request": new.request,
            "model": new.model,
            "dataset": new.dataset,
            "inputs": new.inputs,
            "fingerprint": new.fingerprint(),
        }
    return found


def tasks() -> dict[str, Task]:
    """Return parts of measurements that another process may be given."""
    return {
        "gram": Task(measure="gram", chunk=0),
        "choices": Task(measure="choices", chunk=2, point=(0, 1), choices=((0, 0), (1, 1))),
    }


def answers() -> dict[str, Answer]:
    """Return answers of a solver in a child process."""
    return {
        "optimal": Answer(
            status="optimal", chosen=np.array([0, 4, 8]), bound=-1.5, tolerance=1e-6, nodes=3,
            details={"cuts": 2.0},
        ),
        "unknown": Answer(status="unknown", limit="time"),
    }  # fmt: skip


def summaries() -> dict[str, Any]:
    """Return what is only ever written: inspection, targets and a diff."""
    shown = {
        name: inspect_model(model(), samples=images(2), target=target)
        for name, target in (("bare", None), ("ref-int", TARGETS["ref-int"]))
    }
    return {
        "inspection": {name: summary.to_json() for name, summary in shown.items()},
        "targets": {
            name: target.to_json() | {"version": target.version, "versions": None}
            for name, target in TARGETS.items()
        },
        "diff": diff_plans(plans()["bare"], plans()["corrections"]).to_json(),
    }


@cache
def texts() -> dict[str, str]:
    """Return every golden text by file name, but those that a measurement gives."""
    found = {f"plan-{name}.json": plan.dumps() for name, plan in plans().items()}
    found |= {f"lock-{name}.json": lock.dumps() for name, lock in locks().items()}
    bodies: dict[str, Any] = {
        "receipt": report(plans()["bare"]).to_json(),
        "scores": {name: score.to_json() for name, score in scores().items()},
        "inventory": inventory().to_json(),
        "candidates": rows_of(),
        "requests": {name: request.to_json() for name, request in requests().items()},
        "errands": {name: task.to_json() for name, task in tasks().items()},
        "answers": {name: answer.to_json() for name, answer in answers().items()},
        "orders": orders(),
    }
    bodies |= summaries()
    return found | {f"{name}.json": canonical_json(body) + "\n" for name, body in bodies.items()}


def rows_of() -> dict[str, Any]:
    """Return the candidates of the tiny network under several schemes."""
    schemes = {"default": Scheme(), "grouped": GROUPED, "codebook": CODEBOOK}
    return {
        name: enumerate_candidates(inventory(), (2, 4, 8), scheme=scheme).to_json()
        for name, scheme in schemes.items()
    }


@cache
def measured_texts() -> dict[str, str]:
    """Return the golden texts that hold measured numbers: the same only on the same processor."""
    found, _, keys = measured()
    texts = {f"plan-measured-{k}.json": plan.dumps() for k, plan in enumerate(found.plans)}
    texts["comparison.json"] = canonical_json(compared().to_json()) + "\n"
    texts["solver.json"] = canonical_json(solver_documents()) + "\n"
    texts["ledger-keys.json"] = canonical_json(keys) + "\n"
    return texts


@cache
def archives() -> dict[str, bytes]:
    """Return golden archives by file name."""
    solution = solve(small())
    found = {f"matrix-{name}.npz": matrix.to_bytes() for name, matrix in matrices().items()}
    found["problem.npz"] = problem_to_bytes(small())
    return found | {"certificate.npz": certificate_to_bytes(solution.certificate)}


@cache
def measured_archives() -> dict[str, bytes]:
    """Return the golden archives that hold measured numbers."""
    found, ledger, _ = measured()
    return {"matrix-measured.npz": found.matrix.to_bytes(), "ledger.zip": ledger}


def main() -> None:
    """Write the files that are missing."""
    every: dict[str, bytes] = {n: t.encode() for n, t in (texts() | measured_texts()).items()}
    every |= archives() | measured_archives()
    for name, data in every.items():
        path = GOLDEN / name
        if not path.exists():
            path.write_bytes(data)
            sys.stdout.write(f"{name} {len(data)}\n")
        elif path.read_bytes() != data:
            sys.stdout.write(f"{name} DIFFERS\n")


if __name__ == "__main__":
    main()

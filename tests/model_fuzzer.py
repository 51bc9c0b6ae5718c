"""Random models through inspect, plan and export, each step compared with what must come out.

``python tests/model_fuzzer.py --seeds 200 --seconds 300`` prints what became of the seeds, every
refusal with its count, and a command for each failure; ``--seed 17`` runs one and shows all.

A seed is a random ONNX graph, a random torch module, or such a module as ``.pt2``. A failure is an
exception that is no ``BitquotaError``; a refusal that says nothing, or comes after the plan; or an
output that differs by more than 1e-3 of its norm: the loaded model from the original file in ONNX
Runtime, the exported files from the plan's weights in our own runner, and an export in which
nothing is quantized from the original.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before torch is loaded: small products on several threads take longer than on one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel
    from bitquota.plan import Plan

TOLERANCE = 1e-3
HALF_TOLERANCE = 1e-2
"""Of graphs in float16, which ONNX Runtime computes in other types where it fuses nodes."""

SAYS_NOTHING = re.compile(
    r"reading '.*' failed|must be able to run|it says|cannot be converted|does not read back|"
    r"it failed:|RuntimeError|NotImplementedError"
)
"""Sentences that hand on another's error: no input may end in them."""


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of a seed.

    Attributes:
        seed: Which.
        result: ``ok``, ``refused``, ``failed``, or ``invalid`` where ONNX Runtime does not run it.
        stage: How far it came.
        reason: Sentence or traceback.
        features: What the model was made of.
    """

    seed: int
    result: str
    stage: str
    reason: str = ""
    features: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """The reason without names and numbers, to count."""
        last = self.reason.strip().splitlines()[-1] if self.reason else ""
        return re.sub(r"\d[\d,.e-]*", "N", re.sub(r"'[^']*'", "'…'", last))[:160]


class Wrong(Exception):  # a finding, not an error of the program
    """An output that is not what it must be."""


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the norm of the difference over the norm of what is expected."""
    if found.shape != expected.shape:
        msg = f"shape {found.shape} instead of {expected.shape}"
        raise Wrong(msg)
    gap, norm = np.float64(found) - np.float64(expected), np.linalg.norm(np.float64(expected))
    if not np.isfinite(gap).all():
        return float("inf")
    return float(np.linalg.norm(gap) / max(norm, 1e-6 * np.sqrt(max(gap.size, 1))))


def compare(
    what: str,
    found: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    tolerance: float,
) -> None:
    """Raise ``Wrong`` unless all outputs in floating point agree; integers may be arg-maxima."""
    if set(found) != set(expected):
        msg = f"{what}: outputs {sorted(found)} instead of {sorted(expected)}"
        raise Wrong(msg)
    for name, value in expected.items():
        if value.dtype.kind != "f":
            continue
        gap = relative(found[name], value)
        if gap > tolerance:
            msg = f"{what}: output '{name}' differs by {gap:.3g} of its norm"
            raise Wrong(msg)


def fuzz(seed: int, folder: Path) -> Outcome:
    """Run one seed; files go to ``folder``, which is empty."""
    from bitquota.errors import BitquotaError

    if seed % 8 == 7:
        from fuzzed_modules import ModuleRun as Run
    else:
        Run = GraphRun  # a class
    run: Any = Run(seed=seed, folder=folder)
    try:
        run.go()
    except BitquotaError as err:
        bad = run.planned or SAYS_NOTHING.search(err.message)
        reason = f"{type(err).__name__}: {err.message}"
        return run.outcome("failed" if bad else "refused", reason)
    except Invalid as err:
        return run.outcome("invalid", str(err))
    except Wrong as err:
        return run.outcome("failed", str(err))
    except Exception:  # noqa: BLE001  # every one of them is a finding
        return run.outcome("failed", traceback.format_exc())
    return run.outcome("ok", "")


class Invalid(Exception):
    """ONNX Runtime does not run the generated file itself."""


@dataclass(slots=True)
class GraphRun:
    """One random ONNX graph on its way.

    Attributes:
        planned: Whether there is a plan: from then on nothing may be refused.
    """

    seed: int
    folder: Path
    stage: str = "generate"
    planned: bool = False
    features: list[str] = field(default_factory=list)

    def outcome(self, result: str, reason: str) -> Outcome:
        """Return what became of it."""
        return Outcome(
            seed=self.seed, result=result, stage=self.stage, reason=reason, features=self.features
        )

    def go(self) -> None:
        """Take the graph through all stages.

        Raises:
            Wrong: An output is not what it must be.
            Invalid: The generated file is at fault.
        """
        import onnx

        from bitquota.models.load import load_model
        from bitquota.models.outputs import outputs_of
        from random_graphs import random_graph

        graph = random_graph(self.seed)
        self.features = graph.features
        rng = np.random.default_rng(self.seed + 1)
        half = "float16" in self.features
        tolerance = HALF_TOLERANCE if half else TOLERANCE

        # What ONNX Runtime makes of the file as it is.
        path = self.folder / "model.onnx"
        if rng.random() < 0.15:
            self.features.append("external data")
            onnx.save(graph.model, path, save_as_external_data=True, size_threshold=0, location="w")
        else:
            onnx.save(graph.model, path)
        truth = run_file(path, graph.inputs)

        self.stage = "load"
        model = load_model(str(path))
        samples = written_samples(self.folder, graph.inputs, rng)
        few = bound_first(model, samples)
        plain = {k: v.numpy() for k, v in outputs_of(model.module, few.inputs).items()}
        n = len(few)
        expected = {k: v[:n] for k, v in truth.items() if v.ndim and k in plain}
        compare("full precision", {k: plain[k] for k in expected}, expected, tolerance)

        plan, target, model = self.plan_of(model, samples, rng)
        self.planned = True
        self.export(model, plan, samples, truth, target, tolerance)

    def plan_of(
        self, model: LoadedModel, samples: CalibrationSet, rng: np.random.Generator
    ) -> tuple[Plan, str | None, LoadedModel]:
        """Return a cheap plan, for a target or with a scheme of its own, and the model for it."""
        target = str(rng.choice(["ort-cpu", "ort-cpu", "ort-cpu", "ref-int", ""])) or None
        return planned(self, model, samples, target, rng)

    def export(
        self,
        model: LoadedModel,
        plan: Plan,
        samples: CalibrationSet,
        truth: dict[str, np.ndarray],
        target: str | None,
        tolerance: float,
    ) -> None:
        """Export the plan, and one that leaves everything as it is; compare both."""
        from bitquota.exports.export import export_plan
        from bitquota.models.outputs import outputs_of
        from bitquota.quantizers.planned import quantized_module

        self.stage = "export"
        form = None if target else "onnx-qdq"
        export_plan(
            model, plan, self.folder / "out", target=target, format_name=form, samples=samples
        )
        few = bound_first(model, samples)
        module = quantized_module(model, plan, fit_data=samples)
        ours = {k: v.numpy() for k, v in outputs_of(module, few.inputs).items()}
        given = dict(zip(few.names, (t.numpy() for t in few.inputs), strict=True))
        if target == "ref-int":
            return
        made = run_file(self.folder / "out" / "model.onnx", given)
        if list(made) != list(truth):
            msg = f"outputs {list(made)} instead of {list(truth)}"
            raise Wrong(msg)
        made = {k: v for k, v in made.items() if k in ours and v.ndim}
        compare("export", made, {k: ours[k] for k in made}, tolerance)

        self.stage = "export as it is"
        whole = as_it_is(plan, target)
        export_plan(
            model, whole, self.folder / "whole", target=target, format_name=form, samples=samples
        )
        made = run_file(self.folder / "whole" / "model.onnx", given)
        compare("export as it is", made, {k: v[: len(few)] if v.ndim else v
                                          for k, v in truth.items()}, tolerance)  # fmt: skip


def planned(
    run: Any, model: LoadedModel, samples: CalibrationSet, target: str | None, rng: Any
) -> tuple[Plan, str | None, LoadedModel]:  # a run of either kind
    """Inspect and plan: few samples, one-layer losses or weight errors, the whole menu."""
    from bitquota.candidates.storage import Granularity, Grid, Scheme
    from bitquota.candidates.targets import target_by_name
    from bitquota.errors import InvalidInput
    from bitquota.models.inspection import inspect_model
    from bitquota.request import PlanRequest
    from bitquota.search.allocate import allocate

    run.stage = "inspect"
    rules = None if target is None else target_by_name(target)
    summary = inspect_model(model, target=rules, samples=samples)
    if summary.smallest_bits is None:
        budget = f"{float(rng.choice([4.5, 5.5, 9.0]))} bits"
    else:
        full = summary.inventory.full_precision_bits
        low = summary.smallest_bits
        budget = f"{(low + int(float(rng.random()) * max(full - low, 0))) // 8 + 1} B"
    run.features.append(f"target {target}")
    scheme, widths = Scheme(), ()
    if target is None:
        grid = Grid(rng.choice(["symmetric", "asymmetric"]))
        widths = (2, 4, 8, 16) if grid is Grid.SYMMETRIC else (4, 8, 16)
        scheme = Scheme(grid=grid, granularity=Granularity(rng.choice(["channel", "tensor"])))
    request = PlanRequest(
        budgets=(budget,), target=target, scheme=scheme, weight_bits=widths, refine=False,
        measure=str(rng.choice(["diagonal", "weight_mse"])), samples=5, holdout_samples=4,
        seed=run.seed,
    )  # fmt: skip
    run.stage = "plan"
    try:
        found = allocate(model, samples, request)
    except InvalidInput as err:
        if "losses" not in err.details:
            raise
        run.features.append("loss named")
        found = allocate(model, samples, replace(request, loss="relative_mse"))
    return found.plans[0], target, found.with_weights(model)


def as_it_is(plan: Plan, target: str | None) -> Plan:
    """Return ``plan`` with every layer in full precision, or without a target at 16 bits."""
    from bitquota.candidates.storage import FULL_PRECISION_BITS, Scheme
    from bitquota.candidates.table import Candidate

    bits = 16 if target is None else FULL_PRECISION_BITS
    scheme = Scheme()
    return replace(
        plan,
        budgets=(),
        assignments=tuple(
            replace(a, candidate=Candidate.of(a.layer, bits, scheme)) for a in plan.assignments
        ),
        weights=None,
    )


def bound_first(model: LoadedModel, samples: CalibrationSet) -> CalibrationSet:
    """Return the first samples in the model's order: an odd number, so that a batch is padded."""
    from bitquota.models.binding import bound

    return bound(model, samples).first(7)


def written_samples(
    folder: Path,
    inputs: dict[str, np.ndarray],
    rng: np.random.Generator,
    *,
    ordered: bool = False,
) -> CalibrationSet:
    """Write the samples as a user does, members in any order unless ``ordered``, and load them."""
    from safetensors.numpy import save_file

    from bitquota.models.samples import load_calibration

    names = list(inputs)
    if not ordered:
        rng.shuffle(names)
    members = {
        name: inputs[name].astype(np.int64) if inputs[name].dtype == np.uint8 else inputs[name]
        for name in names
    }
    plain = all(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) for name in names)
    if plain and rng.random() < 0.5:
        path = folder / "samples.npz"
        np.savez(path, **members)
    else:
        path = folder / "samples.safetensors"
        save_file({k: np.ascontiguousarray(v) for k, v in members.items()}, path)
    return load_calibration(str(path))


def run_file(path: Path, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a file in ONNX Runtime, in its own batches; return all outputs.

    Raises:
        Invalid: It does not run.
    """
    import onnx
    import onnxruntime

    model = onnx.load(path)
    for node in model.graph.node:  # ONNX Runtime refuses two of one name
        node.name = ""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        held = {t.name for t in model.graph.initializer}
        given = [v for v in session.get_inputs() if v.name not in held]
        fixed = {v.shape[0] for v in given if v.shape and isinstance(v.shape[0], int)} - {-1}
        n = len(next(iter(inputs.values())))
        size = min(fixed) if fixed else n
        parts = []
        for start in range(0, n, size):
            feed = {}
            for value in given:
                kind = {"tensor(float16)": np.float16, "tensor(double)": np.float64,
                        "tensor(float)": np.float32, "tensor(int32)": np.int32,
                        "tensor(bool)": np.bool_, "tensor(uint8)": np.uint8}.get(
                            value.type, np.int64)  # fmt: skip
                rows = inputs[value.name][start : start + size].astype(kind)
                feed[value.name] = np.concatenate([rows, rows[-1:].repeat(size - len(rows), 0)])
            parts.append(session.run(None, feed))
    except Exception as err:  # onnxruntime raises its own kinds
        msg = f"{path.name}: {str(err).splitlines()[0]}"
        raise Invalid(msg) from err
    names = [v.name for v in session.get_outputs()]
    return {
        name: np.concatenate(values)[:n] if values[0].ndim else values[0]
        for name, values in zip(names, zip(*parts, strict=True), strict=True)
    }


def main() -> int:
    """Run from the command line; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, help="run this one alone, and show everything")
    parser.add_argument("--keep", type=Path, help="with --seed: keep the files in this folder")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--child", action="store_true", help="print one line of JSON for each seed")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    if given.seed is not None:
        return _show(given.seed, given.keep)
    seeds, start = range(given.first, given.first + given.seeds), time.monotonic()
    if given.child:
        for seed in seeds:
            sys.stdout.write(json.dumps(asdict(run_seed(seed))) + "\n")
            sys.stdout.flush()
        return 0
    outcomes = in_children(seeds, start + given.seconds)
    sys.stdout.write(report(outcomes, time.monotonic() - start))
    return int(any(o.result == "failed" for o in outcomes))


def in_children(seeds: range, until: float) -> list[Outcome]:
    """Run ``seeds`` in a process of their own, a new one after each death; stop at ``until``."""
    outcomes: list[Outcome] = []
    while len(outcomes) < len(seeds) and time.monotonic() < until:
        rest = seeds[len(outcomes) :]
        command = [sys.executable, __file__, "--child", "--first", str(rest[0])]
        child = subprocess.Popen(
            [*command, "--seeds", str(len(rest))],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        with child:
            for line in child.stdout or ():
                outcomes.append(Outcome(**json.loads(line)))
                if time.monotonic() > until:
                    child.kill()
                    return outcomes
        if child.returncode:
            died = rest[0] + (len(outcomes) - (rest[0] - seeds[0]))
            outcomes.append(_dead(died, child.returncode))
    return outcomes


def _dead(seed: int, code: int) -> Outcome:
    """Return what became of a seed whose process died: ONNX Runtime may die of the file itself."""
    alone = subprocess.run(
        [sys.executable, "-c", f"import model_fuzzer; model_fuzzer.run_original({seed})"],
        cwd=Path(__file__).parent,
        capture_output=True,
        check=False,
    )
    result = "invalid" if alone.returncode < 0 else "failed"
    reason = f"the process died ({code})"
    return Outcome(seed=seed, result=result, stage="generate", reason=reason)


def run_original(seed: int) -> None:
    """Run the file of ``seed`` in ONNX Runtime, and nothing else."""
    import onnx

    from random_graphs import random_graph

    graph = random_graph(seed)
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(graph.model, Path(folder) / "model.onnx")
        run_file(Path(folder) / "model.onnx", graph.inputs)


def run_seed(seed: int) -> Outcome:
    """Run one seed in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return fuzz(seed, Path(folder))


def _show(seed: int, keep: Path | None) -> int:
    if keep is not None:
        keep.mkdir(parents=True)
    outcome = run_seed(seed) if keep is None else fuzz(seed, keep)
    sys.stdout.write(f"seed {seed}: {outcome.result} at {outcome.stage}\n{outcome.reason}\n")
    sys.stdout.write(f"made of: {', '.join(outcome.features)}\n")
    return int(outcome.result == "failed")


def report(outcomes: list[Outcome], seconds: float) -> str:
    """Return counts, refusals and failures as text."""
    counts = Counter(o.result for o in outcomes)
    shown = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
    lines = [f"{len(outcomes)} seeds in {seconds:.0f} s: {shown}"]
    for result in ("refused", "invalid", "failed"):
        kinds: dict[tuple[str, str], list[Outcome]] = {}
        for outcome in outcomes:
            if outcome.result == result:
                kinds.setdefault((outcome.stage, outcome.kind), []).append(outcome)
        for (stage, kind), found in sorted(kinds.items(), key=lambda pair: -len(pair[1])):
            lines.append(f"{result} {len(found):4d} at {stage}: {kind}")
            seeds = " ".join(str(o.seed) for o in found[:8])
            lines.append(f"     python tests/model_fuzzer.py --seed {found[0].seed}   ({seeds})")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import model_fuzzer  # under this name, whose classes the other modules import

    sys.exit(model_fuzzer.main())

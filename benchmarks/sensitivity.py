"""The sensitivity bars on the networks of ``../shared/data``, as one table with ratios.

    python benchmarks/sensitivity.py pairs r20-b3 r20-b6 r20-b6-bn r56 llama kill memory
    python benchmarks/sensitivity.py --tiny            # every case, tiny sizes, no shared data

Process CPU time is reported, never wall clock; "passes" are forward-equivalents over the
calibration set by multiply-accumulates. Test images report, they choose nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bitquota.candidates.table import enumerate_candidates
from bitquota.context import Context, MemoryLedger
from bitquota.corrections import Correction
from bitquota.errors import BudgetTooSmall, Infeasible
from bitquota.evaluate.choice import measure_choice
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.models.references import References
from bitquota.quantizers.apply import as_change
from bitquota.search.baselines import baseline_choices, size_only, weight_mse
from bitquota.search.neighborhood import Limits
from bitquota.search.refine import refine
from bitquota.sensitivity.cache import SqliteLedger
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.measures.gram import GramMeasure, measure_differences
from bitquota.sensitivity.measures.pairs import measure_pairs
from bitquota.sensitivity.runners.eager import EagerRunner
from bitquota.sensitivity.runners.make import make_runner
from bitquota.solver import Problem, solve
from resnet_cifar import data_folder, images, load_resnet

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from bitquota.candidates.layers import Inventory
    from bitquota.candidates.table import CandidateTable
    from bitquota.context import Ledger
    from bitquota.matrix import SensitivityMatrix
    from bitquota.sensitivity.runners.base import Runner

KL = loss_by_name("kl")
EXACT_KL = {2.5: 1.27, 3.0: 0.547, 3.5: 0.301, 4.0: 0.088}
"""Test KL of exact pairs on ResNet-20 {2, 4, 8}, as the issue states it."""


@dataclass
class Case:
    """A network, its candidates and its samples."""

    module: nn.Module
    inventory: Inventory
    table: CandidateTable
    fit: CalibrationSet
    holdout: tuple[CalibrationSet, ...]
    test: CalibrationSet
    correcting: CalibrationSet

    def limits(self, bits: float) -> Limits:
        """Average code bits."""
        costs = self.table.costs("code_bits")[None]
        return Limits(costs=costs, limits=np.array([int(bits * self.inventory.n_weights)]))


class TinyResidual(nn.Module):
    """A small stand-in when the shared data is not wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 8, 3, padding=1)
        self.side = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return f32[N, 10]."""
        x = functional.relu(self.norm(self.stem(x)))
        x = functional.relu(self.inner(x)) + self.side(x)
        return self.head(x.mean(dim=(2, 3)))


def vision_case(depth: int, widths: Sequence[int], n: int, *, start: int, tiny: bool) -> Case:
    """Return a CIFAR ResNet, or the tiny stand-in."""
    if tiny:
        torch.manual_seed(0)
        module: nn.Module = TinyResidual().eval()
        x, y = torch.randn(96, 3, 8, 8), torch.randint(0, 10, (96,))
        fit = CalibrationSet(inputs=(x[:48],), labels=y[:48])
        test = CalibrationSet(inputs=(x[48:],), labels=y[48:])
        holdout, correcting = (test,), fit
    else:
        module = load_resnet(depth)
        x, y = images("calibration")
        whole = CalibrationSet(inputs=(x,), labels=y)
        fit = whole.take(range(start, start + n))
        behind = [(start + n + k) % len(whole) for k in range(len(whole) - n)]
        holdout = tuple(whole.take(behind[k : k + n]) for k in range(0, len(behind), n))
        correcting = whole.take(range(start, start + 1024))
        xt, yt = images("test")
        test = CalibrationSet(inputs=(xt,), labels=yt)
    inventory = discover(module, fit.first(2).inputs)
    table = enumerate_candidates(inventory, widths)
    return Case(module, inventory, table, fit, holdout, test, correcting)


class Logits(nn.Module):
    """A language model that takes tokens and returns logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return f32[N, T, vocabulary]."""
        return self.model(input_ids=tokens, use_cache=False).logits


def llama_case(widths: Sequence[int], n: int) -> Case:
    """Return the tiny Llama with tied q/k/v and gate/up."""
    from transformers import LlamaForCausalLM

    module = Logits(LlamaForCausalLM.from_pretrained(data_folder() / "llama_shakespeare")).eval()
    text = np.frombuffer((data_folder() / "tinyshakespeare.txt").read_bytes(), dtype=np.uint8)
    cut = int(0.9 * len(text))
    rng = np.random.default_rng(0)
    starts = rng.integers(0, cut - 128, size=4 * n)
    train = np.stack([text[s : s + 128] for s in starts]).astype(np.int64)
    rest = text[cut:]
    windows = rest[: len(rest) // 128 * 128].reshape(-1, 128).astype(np.int64)
    drawn = CalibrationSet(inputs=(torch.from_numpy(train),))
    fit, holdout = (
        drawn.take(range(n)),
        tuple(drawn.take(range(k, k + n)) for k in range(n, len(drawn), n)),
    )
    test = CalibrationSet(inputs=(torch.from_numpy(windows),))
    inventory = discover(module, fit.first(2).inputs)
    inventory = inventory.tie([["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]])
    table = enumerate_candidates(inventory, widths)
    return Case(module, inventory, table, fit, holdout, test, fit)


def solve_within(matrix: SensitivityMatrix, limits: Limits) -> tuple[int, ...] | None:
    """Solve a matrix; the solver of the project, stopped early where proof takes long."""
    problem = Problem(
        diagonal=matrix.diagonal,
        cross=matrix.cross,
        offsets=matrix.table.offsets,
        costs=limits.costs,
        limits=limits.limits,
    )
    try:
        solution = solve(problem, gap=1e-3, node_limit=200)
    except (BudgetTooSmall, Infeasible):
        return None
    return None if solution.choice is None else tuple(int(c) for c in solution.choice)


def default_run(
    case: Case,
    budgets: Sequence[float],
    *,
    batch_norm: str = "eval",
    ledger: Ledger | None = None,
) -> Iterator[tuple[float, dict[str, Any]]]:
    """Run the default procedure for each budget and the baselines beside it.

    The first linearisation and losses on test images come from ``ledger`` where it holds them;
    a refinement always begins with nothing, so that its passes are those of one budget alone.
    """
    corrections = [Correction.BATCH_NORM_STATISTICS] if batch_norm == "moved" else []
    ledger = MemoryLedger() if ledger is None else ledger

    made: list[Runner] = []

    def runner_on(samples: CalibrationSet) -> Runner:
        made.append(make_runner(case.module, case.inventory, samples, batch_norm=batch_norm))  # type: ignore[arg-type]
        return made[-1]

    def work() -> float:
        return sum(r.passes.passes * len(r.calibration) for r in made) / len(case.fit)

    runner, outputs = runner_on(case.fit), References()
    # Samples that decide, as in ``allocate``: a hold-out part, further ones, those of the fit.
    holdout = (*(cache(partial(runner_on, s)) for s in case.holdout), runner)
    cpu = time.process_time()
    first = measure_differences(runner, case.table, KL, context=Context(ledger=ledger))
    first_cpu, first_passes = time.process_time() - cpu, GramMeasure().cost(runner, case.table)
    scores = {
        "weight MSE": weight_mse(case.module, case.inventory, case.table),
        "size only": size_only(case.table),
        "one-layer KL": replace(first[0], cross=None, cross_error=None),
        "gram": first[0],
    }
    for bits in budgets:
        limits = case.limits(bits)
        cpu, before = time.process_time(), work()
        starts = dict(baseline_choices(case.table))
        for name, matrix in scores.items():
            choice = solve_within(matrix, limits)
            if choice is not None:
                starts[name] = choice
        result = refine(
            runner, case.table, KL, limits=limits, solve=solve_within, starts=starts, first=first,
            holdout=holdout, context=Context(ledger=MemoryLedger()),
        )  # fmt: skip
        spent = first_passes + work() - before
        seconds = first_cpu + time.process_time() - cpu
        row: dict[str, Any] = {
            "passes": spent,
            "cpu_s": seconds,
            "calibration": result.loss,
            "choice": result.choice,
            "steps": [s.to_json() for s in result.steps],
        }
        compared = {"plan": result.choice}
        compared |= {k: v for k, v in starts.items() if k in scores and k != "size only"}
        uniform = [
            k
            for k, v in starts.items()
            if k.startswith("uniform W") and not k.endswith("W2") and limits.allow(case.table, v)
        ]
        if uniform and starts[uniform[-1]] not in compared.values():
            compared["uniform"] = starts[uniform[-1]]
        measured = {}
        for name, choice in compared.items():
            measured[name] = measure_choice(
                case.module, case.inventory, case.table.decode(choice), case.test, KL,
                corrections=corrections, correction_data=case.correcting,
                context=Context(ledger=ledger), references=outputs,
            )  # fmt: skip
        row["test"] = {name: (m.mean, m.standard_error, m.accuracy) for name, m in measured.items()}
        row["paired"] = {name: m.paired(measured["plan"]) for name, m in measured.items()}
        yield bits, row


def report(name: str, bits: float, row: dict[str, Any], naive: float, bar: float) -> None:
    """Print one budget: the plan and what is beside it."""
    share = row["passes"] / naive
    print(
        f"{name} {bits} bits: {row['passes']:.1f} passes = naive / {naive / row['passes']:.1f} "
        f"(bar naive / {bar:g}: {'met' if share <= 1 / bar else 'MISSED'}), "
        f"{row['cpu_s']:.0f} s CPU, hold-out KL {row['calibration']:.4f}"
    )
    reference = EXACT_KL.get(bits) if name.startswith("r20-b3") else None
    for choice, (mean, error, accuracy) in row["test"].items():
        difference, spread = row["paired"][choice]
        shown = "" if accuracy is None else f"  {100 * accuracy:.2f} %"
        ratio = f"  ratio to exact pairs {mean / reference:.2f}" if reference else ""
        print(
            f"    {choice:14s} test KL {mean:.4f} ± {error:.4f}{shown}"
            f"  worse than the plan by {difference:+.4f} ± {spread:.4f}{ratio}"
        )
    sys.stdout.flush()


def naive_passes(table: CandidateTable) -> float:
    """Return ``1 + n + pairs``: full passes of the published procedure."""
    counts = np.bincount(table.group_of_row)
    pairs = sum(int(a * b) for a, b in itertools.combinations(counts, 2))
    return 1.0 + len(table.rows) + pairs


def run_pairs(tiny: bool, _: Ledger) -> None:  # noqa: FBT001
    """Exact pairs: passes, CPU time and entries against naive full passes."""
    case = vision_case(20, (2, 4, 8), 512, start=0, tiny=tiny)
    runner = make_runner(case.module, case.inventory, case.fit)
    cpu = time.process_time()
    matrix = measure_pairs(runner, case.table, KL)
    cpu = time.process_time() - cpu
    naive = EagerRunner(module=case.module, inventory=case.inventory, calibration=case.fit)
    each = time.process_time()
    worst = 0.0
    n = len(case.table.rows)
    rng = np.random.default_rng(0)
    of = case.table.group_of_row
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n) if of[i] != of[j]]
    for i, j in [pairs[k] for k in rng.choice(len(pairs), size=4, replace=False)]:
        losses = {}
        for rows in ((), (i,), (j,), (i, j)):
            change = {}
            for row in rows:
                change |= as_change(case.table.rows[row].candidates)
            values = [
                KL.per_sample(naive.start(c, change).output, naive.reference(c), None)
                for c in range(len(naive.chunks))
            ]
            losses[rows] = float(torch.cat(values).mean())
        expected = losses[i, j] - losses[(i,)] - losses[(j,)] + losses[()]
        worst = max(worst, abs(expected - matrix.cross[i, j]))  # type: ignore[index]
    checked = naive.passes.passes  # of the variants, and once of the reference
    each = (time.process_time() - each) / checked
    total = naive_passes(case.table)
    print(
        f"pairs: {runner.passes.passes:.1f} of {total:.0f} passes = "
        f"{100 * runner.passes.passes / total:.1f} % (bar 36 %); CPU {cpu:.0f} s, naive "
        f"{each * total:.0f} s (extrapolated from {checked:.0f} passes): {each * total / cpu:.2f}x "
        f"(bar 3x); largest difference of four pairs {worst:.1e} (bar 1e-9)"
    )
    sys.stdout.flush()


def run_vision(
    name: str, depth: int, widths: Sequence[int], budgets: Sequence[float], bar: float,
    batch_norm: str, draws: Sequence[int], tiny: bool, out: Path | None,  # noqa: FBT001
    ledger: Ledger,
) -> None:  # fmt: skip
    """Run the default procedure on a ResNet."""
    for start in draws:
        case = vision_case(depth, widths, 512, start=start, tiny=tiny)
        naive = naive_passes(case.table)
        label = name if len(draws) == 1 else f"{name} draw at {start}"
        run = default_run(case, budgets, batch_norm=batch_norm, ledger=ledger)
        for bits, row in run:
            report(label, bits, row, naive, bar)
            if out is not None:
                (out / f"{name}-{start}-{bits}.json").write_text(json.dumps(row, indent=1))


def run_llama(tiny: bool, ledger: Ledger) -> None:  # noqa: FBT001
    """Run the default procedure on the tiny Llama."""
    if tiny:
        print("llama: skipped with --tiny")
        return
    case = llama_case((2, 3, 4, 5, 6, 8), 64)
    naive = naive_passes(case.table)
    for bits, row in default_run(case, (3.0, 4.0), ledger=ledger):
        report("llama", bits, row, naive, 8.0)


class LoggedLedger(SqliteLedger):
    """Notes every entry that it was given, once it is committed."""

    def put_many(self, entries: Mapping[str, NDArray[np.float64]]) -> None:
        """Store and note."""
        super().put_many(entries)
        with self.path.with_suffix(".log").open("a") as log:
            log.write("".join(f"{key}\n" for key in entries))


def measure_for_killing(folder: Path, *, tiny: bool) -> None:
    """Measure exact pairs into a ledger in ``folder``, until done or killed."""
    case = vision_case(20, (2, 8), 64, start=0, tiny=tiny)
    runner = make_runner(case.module, case.inventory, case.fit, chunk_size=32)
    print("ready", flush=True)
    with LoggedLedger(folder / "ledger.sqlite") as ledger:
        matrix = measure_pairs(runner, case.table, KL, context=Context(ledger=ledger))
    matrix.save(folder / "matrix.npz")


def run_kill(tiny: bool, _: Ledger) -> None:  # noqa: FBT001
    """Kill a measurement with SIGKILL at ten random moments, and compare with a quiet one."""
    moments, kills, starts = np.random.default_rng(0), 0, 0
    command = [sys.executable, str(Path(__file__).resolve()), *(["--tiny"] if tiny else [])]
    with tempfile.TemporaryDirectory() as name:
        quiet, noisy = Path(name) / "quiet", Path(name) / "noisy"
        for folder in (quiet, noisy):
            folder.mkdir()
        measure_for_killing(quiet, tiny=tiny)
        while not (noisy / "matrix.npz").exists():
            with subprocess.Popen(
                [*command, "--child", str(noisy)], stdout=subprocess.PIPE
            ) as child:
                assert child.stdout is not None
                if not child.stdout.readline():
                    sys.exit("kill: the measurement did not begin")
                if kills < 10:
                    time.sleep(moments.uniform(0.05, 0.1 if tiny else 1.5))
                    child.kill()
                child.wait()
                kills += child.returncode == -signal.SIGKILL
                starts += 1
        same = (quiet / "matrix.npz").read_bytes() == (noisy / "matrix.npz").read_bytes()
        noted = Counter((noisy / "ledger.log").read_text().split())
        with SqliteLedger(noisy / "ledger.sqlite") as ledger:
            entries = len(ledger)
    print(
        f"kill: {kills} of {starts} runs killed by SIGKILL; {entries} entries, "
        f"{sum(n > 1 for n in noted.values())} of them measured twice; matrix "
        f"{'equal to the last bit' if same else 'DIFFERENT'}"
    )
    sys.stdout.flush()


def run_memory(tiny: bool, _: Ledger) -> None:  # noqa: FBT001
    """Prefix caching of ResNet-56 at N = 512 with moved batch-norm statistics under 1 GiB."""
    import resource

    case = vision_case(56, (2, 4), 512, start=0, tiny=tiny)
    runner = make_runner(
        case.module, case.inventory, case.fit, batch_norm="moved", chunk_size=len(case.fit),
        memory_limit_bytes=2**30,
    )  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    state = runner.start(0, {})
    row = as_change(case.table.rows[0].candidates)
    state = runner.extend(state, row, keep_for=tuple(la.name for la in case.inventory.layers))
    last = as_change(case.table.rows[-1].candidates)
    runner.output(state, last)
    kept = sum(v.numel() * v.element_size() for v in state.store.values())  # type: ignore[attr-defined]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"memory: a state keeps {kept / 2**20:.0f} MiB (limit for two together 1024 MiB); resident "
        f"size grew by {(peak - before) / 1024:.0f} MiB"
    )
    sys.stdout.flush()


CASES = ("pairs", "r20-b3", "r20-b6", "r20-b6-bn", "r56", "llama", "kill", "memory")


def main() -> None:
    """Run the cases that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--budgets", type=lambda t: tuple(float(b) for b in t.split(",")))
    parser.add_argument("--draws", type=lambda t: tuple(int(b) for b in t.split(",")))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ledger", type=Path, help="keep measurements here, to go on later")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    ledger = MemoryLedger() if asked.ledger is None else SqliteLedger(asked.ledger)
    torch.set_num_threads(1)
    if asked.child is not None:
        measure_for_killing(asked.child, tiny=asked.tiny)
        return
    six = (2, 3, 4, 5, 6, 8)
    vision = {
        "r20-b3": (20, (2, 4, 8), (2.5, 3.0, 3.5, 4.0), 12.0, "eval", (0,)),
        "r20-b6": (20, six, (2.5, 3.0, 4.0), 35.0, "eval", (0,)),
        "r20-b6-bn": (20, six, (2.25, 2.5, 3.0, 4.0), 35.0, "moved", (0, 1024, 2048)),
        "r56": (56, (2, 4, 8), (3.0, 4.0), 50.0, "eval", (0,)),
    }
    others = {"pairs": run_pairs, "llama": run_llama, "kill": run_kill, "memory": run_memory}
    for name in asked.cases:
        if name in vision:
            depth, widths, budgets, bar, mode, draws = vision[name]
            run_vision(
                name, depth, widths, asked.budgets or budgets, bar, mode, asked.draws or draws,
                asked.tiny, asked.out, ledger,
            )  # fmt: skip
        else:
            others[name](asked.tiny, ledger)


if __name__ == "__main__":
    main()

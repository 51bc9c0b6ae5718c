"""Every metric on ResNet-20: how well it ranks random plans, and what its own plans are worth.

The setting of ``research/prior-measurements.md``: weights only, per-channel least-squares scales,
all layers; scores from 256 calibration images, rank correlation over 30 random assignments whose
loss increase is measured on 512 other images, accuracy of the exact solution on test images. Prints
a Markdown table; nothing is fine-tuned.

    python benchmarks/metrics.py [--small] [--setting 0|1] [--score-images N] [--rank-images N]
        [--test-images N]
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from bitquota.candidates.budget import Budget
from bitquota.candidates.table import enumerate_candidates
from bitquota.context import Context, MemoryLedger
from bitquota.evaluate.choice import measure_choice
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.report.text import markdown_table
from bitquota.search.agreement import spearman
from bitquota.search.baselines import baseline_choices, size_only
from bitquota.search.neighborhood import Limits
from bitquota.search.threshold import threshold_within
from bitquota.sensitivity.losses import loss_by_name
from bitquota.sensitivity.measures.choices import measure_choices
from bitquota.sensitivity.measures.gram import measure_gram
from bitquota.sensitivity.measures.pairs import measure_singles
from bitquota.sensitivity.metrics import METRICS, Orthogonality, find_flags
from bitquota.sensitivity.runners.make import make_runner
from bitquota.solver import build_problem, solve
from resnet_cifar import images, load_resnet

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from bitquota.candidates.layers import Inventory
    from bitquota.candidates.table import CandidateTable
    from bitquota.matrix import SensitivityMatrix
    from bitquota.sensitivity.runners.base import Runner

KL, CE = loss_by_name("kl"), loss_by_name("cross_entropy")
EMPTY = dict.fromkeys(("metric", "rho KL", "rho CE", "passes", "CPU s", "flags"), "")
SETTINGS = (((2, 3, 4, 6), ("2.5 bits", "3 bits")), ((3, 4, 5, 8), ("3.5 bits", "4 bits")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One choice of widths and everything that is measured with it."""

    module: torch.nn.Module
    inventory: Inventory
    table: CandidateTable
    budgets: list[Budget]
    runner: Runner
    test: CalibrationSet
    ledger: MemoryLedger = field(default_factory=MemoryLedger)
    known: dict[tuple[int, ...], str] = field(default_factory=dict)

    def accuracy(self, choice: tuple[int, ...]) -> str:
        """Return test accuracy and KL of a choice."""
        if choice not in self.known:
            chosen = self.table.decode(choice)
            found = measure_choice(
                self.module,
                self.inventory,
                chosen,
                self.test,
                KL,
                context=Context(ledger=self.ledger),
            )
            self.known[choice] = f"{100 * (found.accuracy or 0.0):.1f} / {found.mean:.3f}"
        return self.known[choice]

    def solved(self, matrix: SensitivityMatrix) -> dict[str, str]:
        """Return what the exact solution for each budget is worth."""
        row = {}
        for budget in self.budgets:
            solution = solve(build_problem(matrix, [budget]))
            assert solution.choice is not None
            row[budget.text] = self.accuracy(tuple(int(c) for c in solution.choice))
        return row

    def fixed(self, name: str, choice: tuple[int, ...]) -> dict[str, str]:
        """Return a row for a choice, under the budgets that it keeps."""
        row = EMPTY | {"metric": name}
        rows = self.table.offsets[:-1] + choice
        for budget in self.budgets:
            fits = int(self.table.costs(budget.resource)[rows].sum()) <= budget.available
            row[budget.text] = self.accuracy(choice) if fits else "-"
        return row

    def threshold(self, matrix: SensitivityMatrix) -> dict[str, str]:
        """Return a row for MixQuant's rule."""
        row = EMPTY | {"metric": "MixQuant threshold"}
        for budget in self.budgets:
            costs = self.table.costs(budget.resource)[None]
            limits = Limits(costs=costs, limits=np.array([budget.available]))
            found = threshold_within(matrix, limits)
            row[budget.text] = "-" if found is None else self.accuracy(found[0])
        return row

    def measures(self) -> dict[str, Callable[[], SensitivityMatrix]]:
        """Return every metric by name."""
        runner, table = self.runner, self.table
        own = {n: partial(m.measure, runner, table, KL) for n, m in METRICS.items()}
        betas = {f"orthogonality, beta {b:g}": Orthogonality(beta=b) for b in (1e-9, 3.3)}
        return {
            "size only": partial(size_only, table),
            "one-layer cross_entropy": partial(measure_singles, runner, table, CE),
            "one-layer kl": partial(measure_singles, runner, table, KL),
            "gram": partial(measure_gram, runner, table, KL),
            **own,
            **{name: partial(metric.measure, runner, table, KL) for name, metric in betas.items()},
        }


def main() -> None:
    """Run both settings and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="A few images: seconds, no meaning.")
    parser.add_argument("--setting", type=int, choices=(0, 1), help="Only this one.")
    parser.add_argument("--score-images", type=int, default=256)
    parser.add_argument("--test-images", type=int, default=2000)
    parser.add_argument("--rank-images", type=int, default=512)
    given = parser.parse_args()
    small = given.small
    n_scores, n_plans = (16, 4) if small else (given.score_images, 30)
    n_rank, n_test = (16, 16) if small else (given.rank_images, given.test_images)
    module = load_resnet(20)
    x, y = images("calibration", n_scores + n_rank)
    everything = CalibrationSet(inputs=(x,), labels=y)
    fit = everything.take(range(n_scores))
    other = everything.take(range(n_scores, n_scores + n_rank))
    tx, ty = images("test", n_test)
    inventory = discover(module, (x[:2],))
    wanted = SETTINGS if given.setting is None else SETTINGS[given.setting :][:1]
    for widths, texts in SETTINGS[:1] if small else wanted:
        setting = Setting(
            module=module,
            inventory=inventory,
            table=enumerate_candidates(inventory, widths),
            budgets=[Budget.parse(text, inventory) for text in texts],
            runner=make_runner(module, inventory, fit),
            test=CalibrationSet(inputs=(tx,), labels=ty),
        )
        print(f"\nWidths {widths}; accuracy % / KL on {n_test} test images\n")
        holdout = make_runner(module, inventory, other)
        print(markdown_table(compared(setting, holdout, n_plans)), flush=True)


def compared(setting: Setting, holdout: Runner, n_plans: int) -> list[dict[str, str]]:
    """Return the table's rows."""
    generator = np.random.default_rng(0)
    counts = np.diff(setting.table.offsets)
    plans = [tuple(int(generator.integers(c)) for c in counts) for _ in range(n_plans)]
    true = {
        loss.name: measure_choices(holdout, setting.table, loss, plans).mean(axis=1)
        for loss in (KL, CE)
    }
    rows = [setting.fixed(name, c) for name, c in baseline_choices(setting.table).items()]
    rows = [row for row in rows if any(row[b.text] != "-" for b in setting.budgets)]
    for name, measure in setting.measures().items():
        before, clock = setting.runner.passes.passes, time.process_time()
        matrix = measure()
        seconds = time.process_time() - clock
        predicted = [matrix.predict(plan) for plan in plans]
        rows.append(
            {
                "metric": name,
                "rho KL": f"{spearman(predicted, true['kl']) or 0:.2f}",
                "rho CE": f"{spearman(predicted, true['cross_entropy']) or 0:.2f}",
                "passes": f"{setting.runner.passes.passes - before:.1f}",
                "CPU s": f"{seconds:.1f}",
                "flags": str(len(find_flags(matrix))),
            }
            | setting.solved(matrix)
        )
        print(rows[-1], file=sys.stderr, flush=True)
        if name == "relative_mse":
            rows.append(setting.threshold(matrix))
    return rows


if __name__ == "__main__":
    main()

"""Exported files timed on this machine, and what a plan's cost table predicted of them.

Design: docs/design/latency.md
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bitquota.candidates.cost_table import LATENCY
from bitquota.candidates.storage import FULL_PRECISION_BITS
from bitquota.candidates.table import Candidate
from bitquota.errors import ExportFailed, InvalidInput
from bitquota.exports.export_report import Timed
from bitquota.exports.profile_fit import Times
from bitquota.exports.profile_order import FILES, RUNTIMES, SCRIPT, TIMES, Order, tokens_of
from bitquota.exports.time_files import ROUNDS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from bitquota.candidates.budget import Budget
    from bitquota.candidates.cost_table import CostTable
    from bitquota.exports.export_report import ExportReport
    from bitquota.exports.prepared import PreparedExport
    from bitquota.plan import Plan

TIMED_NS = 3_000_000_000
"""About how long an exported plan is timed."""


def with_time(
    report: ExportReport,
    write: Callable[[PreparedExport, Path], object],
    prepared: PreparedExport,
    folder: Path,
) -> ExportReport:
    """Return the report of exported files with the time of one run, where a budget asks for it.

    The model in full precision is written (``write``) and timed beside them: the table knows what
    that takes, so it tells how fast the machine is now. Notes say why nothing was timed, or what
    differs from where the table was made.
    """
    budget = timed_budget(prepared.plan)
    if budget is None or budget.prices is None or report.exporter not in RUNTIMES:
        return report
    prices, inputs = budget.prices, prepared.inputs
    if inputs is None or len(inputs[0]) < prices.batch:
        note = f"not timed: provide at least {prices.batch} samples, as the cost table has them"
        return replace(report, notes=(*report.notes, note))
    predicted = budget.spent(prepared.plan.candidates)
    full = full_precision_cost(budget, prepared.plan)
    with tempfile.TemporaryDirectory(prefix="bitquota-timing-") as place:
        home = Path(place)
        (home / "plan").symlink_to(folder.resolve(), target_is_directory=True)
        parts = ["plan"]
        if full is not None:
            (home / "full").mkdir()
            write(replace(prepared, weights={}, reference=None), home / "full")
            parts.append("full")
        order = _order(report, prices, parts, [t[: prices.batch] for t in inputs])
        order.save(home, [t[: prices.batch] for t in inputs])
        rounds = min(max(20, TIMED_NS // (5 * len(parts) * max(predicted, 1))), 2000)
        times = time_here(home, rounds)
    here = {
        "device": (times.device, prices.device),
        "runtime": (times.runtime["version"], prices.runtime.get("version")),
        "number of tokens": (order.length, prices.length),
    }
    notes = tuple(
        f"the cost table was made with another {what}: {made}, here {now}"
        for what, (now, made) in here.items()
        if now != made
    )
    took, _ = times.of_files()
    speed = 1.0 if full is None or notes else round(full / float(took[1]), 4)
    timed = Timed(
        predicted_ns=predicted,
        measured_ns=round(float(took[0]) * speed),
        clocked_ns=round(float(took[0])),
        speed=speed,
        limit_ns=budget.limit,
        table=prices.digest(),
        device=times.device,
        clock=times.clock,
        threads=times.threads,
        batch=order.batch,
        length=order.length,
    )
    return replace(report, timed=timed, notes=(*report.notes, *notes))


def timed_budget(plan: Plan) -> Budget | None:
    """Return the budget of time of a plan, if it has one."""
    return next((b for b in plan.budgets if b.resource == LATENCY and b.prices), None)


def full_precision_cost(budget: Budget, plan: Plan) -> int | None:
    """Return what the table predicts for the model in full precision, if it has the costs."""
    assert budget.prices is not None  # noqa: S101  # callers ask for such a budget
    whole = [
        Candidate.of(a.layer, FULL_PRECISION_BITS, a.candidate.scheme, a.candidate.activation_bits)
        for a in plan.assignments
    ]
    try:
        return budget.spent(whole)
    except InvalidInput:
        return None


def _order(
    report: ExportReport, prices: CostTable, parts: Sequence[str], inputs: Sequence[Tensor]
) -> Order:
    """Return the order to time what lies in the folders ``parts``."""
    runtime = RUNTIMES[report.exporter]
    return Order(
        runtime=runtime,
        options={str(k): str(v) for k, v in report.runtime.get("options", {}).items()},
        threads=prices.threads,
        batch=prices.batch,
        length=tokens_of(inputs),
        model_digest=report.model_digest,
        target=report.target or "",
        layers=(),
        kinds=(),
        files=tuple(f"{part}/{FILES[runtime]}" for part in parts),
        labels=((),) * len(parts),
        checked=0,
    )


def time_here(folder: Path, rounds: int = ROUNDS) -> Times:
    """Run the script of a folder of files in a process of its own; raises ``ExportFailed``."""
    command = [sys.executable, str(folder / SCRIPT), str(folder), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        msg = f"the runtime must run the files of a profile; it says: {last[:300]}"
        raise ExportFailed(msg)
    return Times.load(folder / TIMES)

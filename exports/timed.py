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
from bitquota.errors import ExportFailed
from bitquota.exports.export_report import Timed
from bitquota.exports.profile_fit import Times
from bitquota.exports.profile_order import FILES, RUNTIMES, SCRIPT, TIMES, Order, tokens_of
from bitquota.exports.time_files import ROUNDS

if TYPE_CHECKING:
    from bitquota.exports.export_report import ExportReport
    from bitquota.exports.prepared import PreparedExport

EXPORT_ROUNDS = 200
"""How often an exported plan is timed."""


def with_time(report: ExportReport, prepared: PreparedExport, folder: Path) -> ExportReport:
    """Return the report of exported files with the time of one run, where a budget asks for it.

    Notes say why nothing was timed, or what differs from where the plan's table was made.
    """
    budget = next((b for b in prepared.plan.budgets if b.resource == LATENCY and b.prices), None)
    runtime = RUNTIMES.get(report.exporter)
    if budget is None or budget.prices is None or runtime is None:
        return report
    prices, inputs = budget.prices, prepared.inputs
    if inputs is None or len(inputs[0]) < prices.batch:
        note = f"not timed: provide at least {prices.batch} samples, as the cost table has them"
        return replace(report, notes=(*report.notes, note))
    with tempfile.TemporaryDirectory(prefix="bitquota-timing-") as place:
        (Path(place) / "plan").symlink_to(folder.resolve(), target_is_directory=True)
        given = [t[: prices.batch] for t in inputs]
        order = Order(
            runtime=runtime,
            options={str(k): str(v) for k, v in report.runtime.get("options", {}).items()},
            threads=prices.threads,
            batch=prices.batch,
            length=tokens_of(given),
            model_digest=prepared.plan.model_digest,
            target=report.target or "",
            layers=(),
            kinds=(),
            files=(f"plan/{FILES[runtime]}",),
            labels=((),),
            checked=0,
        )
        order.save(Path(place), given)
        times = time_here(Path(place), EXPORT_ROUNDS)
    timed = Timed(
        predicted_ns=budget.spent(prepared.plan.candidates),
        measured_ns=round(float(times.of_files()[0][0])),
        limit_ns=budget.limit,
        table=prices.digest(),
        device=times.device,
        clock=times.clock,
        threads=times.threads,
        batch=order.batch,
        length=order.length,
    )
    differ = {
        "device": (times.device, prices.device),
        "runtime": (times.runtime["version"], prices.runtime.get("version")),
        "tokens of a sample": (order.length, prices.length),
    }
    notes = tuple(
        f"the cost table was made with another {what}: {made}, here {here}"
        for what, (here, made) in differ.items()
        if here != made
    )
    return replace(report, timed=timed, notes=(*report.notes, *notes))


def time_here(folder: Path, rounds: int = ROUNDS) -> Times:
    """Run the script of a folder of files in a process of its own; raises ``ExportFailed``."""
    command = [sys.executable, str(folder / SCRIPT), str(folder), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        msg = f"the runtime must run the files of a profile; it says: {last[:300]}"
        raise ExportFailed(msg)
    return Times.load(folder / TIMES)

"""Sentences about time and energy: what a plan is predicted to take, and what its files took.

Design: docs/design/latency.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitquota.candidates.cost_table import LATENCY, format_cost

if TYPE_CHECKING:
    from bitquota.exports.export_report import Timed
    from bitquota.plan import Plan


def cost_sentences(plan: Plan) -> list[str]:
    """Return one sentence for each budget that a cost table prices."""
    found = []
    for budget in plan.budgets:
        prices = budget.prices
        if prices is None:
            continue
        spent = budget.spent(plan.candidates)
        tokens = ""
        if prices.tokens and budget.resource == LATENCY:
            tokens = f", {prices.tokens * 1e9 / spent:.4g} tok/s"
        runtime = " ".join(str(prices.runtime.get(k, "")) for k in ("name", "version")).strip()
        where = ", ".join(part for part in (runtime, prices.device) if part)
        found.append(
            f"Predicted for one run of {_samples(prices.batch)}: "
            f"{format_cost(spent, budget.resource)}{tokens} ({where}); the budget is "
            f"{format_cost(budget.limit, budget.resource)}."
        )
    return found


def timed_sentence(timed: Timed) -> str:
    """Return what the exported files took, beside what was predicted."""
    clock = "processor time" if timed.clock == "processor" else "wall time"
    clocked = ""
    if timed.speed != 1:
        clocked = (
            f", as clocked {format_cost(timed.clocked_ns, LATENCY)} on a machine of "
            f"{timed.speed:.2f} times the speed then"
        )
    kept = "keeps" if timed.measured_ns <= timed.limit_ns else "does not keep"
    return (
        f"Timed: {format_cost(timed.measured_ns, LATENCY)} for one run of {_samples(timed.batch)} "
        f"({clock}, {timed.threads} thread{'s' if timed.threads > 1 else ''}{clocked}); the table "
        f"predicted {format_cost(timed.predicted_ns, LATENCY)} ({100 * timed.error:+.1f} %); it "
        f"{kept} the budget of {format_cost(timed.limit_ns, LATENCY)}."
    )


def _samples(n: int) -> str:
    return "1 sample" if n == 1 else f"{n:,} samples"

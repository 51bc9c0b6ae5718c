"""What finer menus are worth: plans of layers, and of rows or with zero bits, in the same budget.

    python benchmarks/rows.py                  # ResNet-20 of $BITQUOTA_DATA, target ort-cpu
    python benchmarks/rows.py --target ref-int --budgets 2.5
    python benchmarks/rows.py --tiny           # untrained, a few images, no shared data
    python benchmarks/rows.py --target ref-int --allow prune,2:4 --budgets "2.5,3 GBitOps"
    python benchmarks/rows.py --allow prune --row-widths 3 --budgets 2.5    # rows of zeros, too
    python benchmarks/rows.py --mixes 1000000    # how long mixes of so many rows take, no network

For each budget two plans with the same settings: one bit-width for each layer, and up to
``--row-widths`` (3) for the rows of each. The second may take as many bits as the first has in its
file. With ``--allow`` the second may leave weights out, and has one bit-width for each layer unless
``--row-widths`` is given; without rows it gets the same budget. Both are exported, and what the
runtime computes from the files is compared with full precision: KL with its standard error, and
the paired difference.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))
import numpy as np

from bitquota.candidates.rows import STEP, mix_rows
from bitquota.candidates.storage import FULL_PRECISION_BITS
from bitquota.context import Context, MemoryLedger
from bitquota.corrections import Correction
from bitquota.exports.export import export_plan, open_export
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate
from rounding import Subject, judged, network, small_network

if TYPE_CHECKING:
    from torch import Tensor

BARS = {"2.5": 0.8, "3": 0.92, "4": 0.7}
"""Largest KL of rows as a share of that of layers, as the issue states it."""


SMOLLM2 = (576, 192, 192, 576, 1536, 1536, 576)
"""Rows of the linear layers of a block of SmolLM2-135M, which has 30."""


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a small network, few images")
    parser.add_argument("--depth", type=int, default=20, help="of the ResNet")
    parser.add_argument("--target", default="ort-cpu")
    parser.add_argument(
        "--budgets", default="2.5,3,4", help="average bits of a code, or with a unit"
    )
    parser.add_argument("--allow", default="", help="zero bits: prune, 2:4 or both")
    parser.add_argument("--bits", default="", help="bit-widths on offer; all if left out")
    parser.add_argument("--row-widths", type=int, help="3, or 1 with --allow, if left out")
    parser.add_argument("--rounding", default="gptq")
    parser.add_argument("--images", type=int, default=10_000, help="of the test set")
    parser.add_argument("--mixes", type=int, help="only time the mixes of so many rows")
    parser.add_argument("--effort", choices=["quick", "normal"], default="normal")
    return parser.parse_args()


def planned(
    subject: Subject,
    options: argparse.Namespace,
    budget: str,
    *,
    row_widths: int = 1,
    allow: tuple[str, ...] = (),
) -> tuple[Tensor, int, float]:
    """Return the KL of each test sample in the runtime, bits of the weights, and CPU seconds."""
    started = time.process_time()
    request = PlanRequest(
        budgets=(budget,),
        weight_bits=tuple(int(b) for b in options.bits.split(",") if b),
        target=options.target,
        corrections=(Correction.BATCH_NORM_STATISTICS,),
        rounding=options.rounding,
        effort=options.effort,
        refine=options.effort == "normal",
        row_widths=row_widths,
        allow=allow,
        samples=subject.samples,
        holdout_samples=subject.samples,
    )
    context = Context(ledger=MemoryLedger())
    found = allocate(subject.model, subject.calibration, request, context=context)
    seconds = time.process_time() - started
    model = found.with_weights(subject.model)
    model = replace(model, example_inputs=subject.calibration.first(2).inputs)
    (plan,) = found.plans
    labels = ",".join(candidate.label.lstrip("W") for candidate in plan.candidates)
    print(f"  {plan.selected}, {found.passes:.0f} passes: {labels}", flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "export"
        export_plan(model, plan, folder, target=options.target, samples=subject.test.first(64))
        module, _, report = open_export(model, folder)
        stored = sum(c.size_bits for c in plan.candidates if c.weight_bits != FULL_PRECISION_BITS)
        assert sum(t.actual_bits for t in report.tensors) == stored
        kl, _ = judged(module, subject)
    return kl, plan.size_bits, seconds


def time_mixes(n: int) -> None:
    """Print how long the mixes of layers of SmolLM2's sizes take, ``n`` rows in all."""
    rng = np.random.default_rng(0)
    widths = [2, 3, 4, 5, 6, 8]
    averages = np.arange(widths[0] + STEP, widths[-1], STEP).tolist()
    blocks = round(n / sum(SMOLLM2))
    seconds = 0.0
    for rows in SMOLLM2 * blocks:
        noise = np.exp(0.2 * rng.normal(size=(len(widths), rows)))
        errors = 4.0 ** -np.array(widths)[:, None] * rng.exponential(size=rows) * noise
        started = time.process_time()
        mix_rows(errors, widths, averages, 3)
        seconds += time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    layers = len(SMOLLM2) * blocks
    print(f"{blocks * sum(SMOLLM2):,} rows in {layers:,} layers: {seconds:.1f} CPU s (bar 10 for")
    print(f"1,000,000), process at most {peak:,.0f} MiB (bar 1,024)")


def main() -> None:
    """Plan, export and run both for each budget."""
    options = arguments()
    if options.mixes:
        time_mixes(options.mixes)
        return
    subject = small_network() if options.tiny else network(options.depth)
    subject = replace(subject, test=subject.test.first(min(options.images, len(subject.test))))
    for bits in options.budgets.split(","):
        budget = f"{bits} bits" if bits.replace(".", "").isdigit() else bits
        layers, size, seconds = planned(subject, options, budget)
        allow = tuple(what for what in options.allow.split(",") if what)
        widths = options.row_widths or (1 if allow else 3)
        same = budget if widths == 1 else f"{size / 8} B of weights"
        rows, rows_size, rows_seconds = planned(
            subject, options, same, row_widths=widths, allow=allow
        )
        means = [float(kl.mean()) for kl in (layers, rows)]
        gap = rows - layers
        error = float(gap.std()) / len(gap) ** 0.5
        known = bits in BARS and not options.tiny and not options.allow
        bar = f", bar {BARS[bits]}" if known else ""
        what = ", ".join(["rows"] * (widths > 1) + list(allow))
        print(
            f"{budget}: layers KL {means[0]:.4f} in {size / 8:,.0f} B, {what} {means[1]:.4f} in "
            f"{rows_size / 8:,.0f} B: {means[1] / means[0]:.3f} of layers{bar}; paired "
            f"{float(gap.mean()):+.4f} +- {error:.4f}; CPU s {seconds:.0f} and {rows_seconds:.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""What widths for weights and inputs together are worth: plans and uniform ones at equal work.

    python benchmarks/activations.py                     # the tiny Llama of $BITQUOTA_DATA
    python benchmarks/activations.py --bits 4,6,8    # beside W6A6, which ONNX cannot hold

The budget is the bit operations of a uniform plan of ``--average`` bits for weights and inputs
(36 for each multiplication at 6 bits). Beside the plan stand that uniform plan, W4A8 everywhere,
and W4A8 whose layers take 8-bit weights for as long as they fit, in the order of the model, from
its end, or the smallest first. All are rounded alike; unseen windows of tinyshakespeare.txt tell KL
per token and the paired difference. The plan is exported to ONNX, and the nodes that ONNX Runtime
runs are counted: those on integers, and those in floating point.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bitquota.candidates.table import spent_on
from bitquota.context import Context, MemoryLedger
from bitquota.errors import InvalidPlan
from bitquota.exports.export import export_plan
from bitquota.measurement_setup import build_setup
from bitquota.models.load import load_model
from bitquota.models.loaded import inventory_of
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate
from language_models import choice_with, rounded, shakespeare, unseen_losses
from resnet_cifar import data_folder

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from bitquota.measurement_setup import Setup
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel
    from bitquota.plan import Plan
    from bitquota.search.neighborhood import Choice


def rivals(setup: Setup, bits: int, limit: int) -> dict[str, Choice]:
    """Return the uniform plan of ``bits``, W4A8, and W4A8 with wider weights up to the limit."""

    def uniform(weights: int, inputs: int) -> Choice:
        return choice_with(
            setup, lambda c: c.weight_bits == weights and c.activation_bits == inputs
        )

    offsets = setup.table.offsets
    work = [spent_on("bit_ops", row.candidates) for row in setup.table.rows]
    found = {"uniform W4A8": uniform(4, 8)}
    offered = {
        (c.weight_bits, c.activation_bits) for row in setup.table.rows for c in row.candidates
    }
    if (bits, bits) in offered:
        found[f"uniform W{bits}A{bits}"] = uniform(bits, bits)
    low, high = uniform(4, 8), uniform(8, 8)
    n = len(low)
    orders = {
        "first": list(range(n)),
        "last": list(range(n))[::-1],
        "smallest": sorted(range(n), key=lambda g: work[offsets[g]]),
    }
    for name, order in orders.items():
        choice = list(low)
        spent = sum(work[offsets[g] + k] for g, k in enumerate(choice))
        for g in order:
            more = work[offsets[g] + high[g]] - work[offsets[g] + low[g]]
            if spent + more <= limit:
                choice[g], spent = high[g], spent + more
        found[f"W4A8 and W8A8, {name} wider"] = tuple(choice)
    return found


def compare(setup: Setup, choices: dict[str, Choice], test: CalibrationSet) -> None:
    """Print what each choice loses on unseen windows, and how far that is from the first."""
    modules: dict[str, Callable[[], torch.nn.Module]] = {
        name: (lambda choice=choice: rounded(setup, choice)) for name, choice in choices.items()
    }
    for name, text in unseen_losses(setup.module, modules, test, digits=5):
        work = spent_on("bit_ops", setup.table.decode(choices[name])) / 1e6
        print(f"  {name:32s} {work:8.1f} MBitOps  {text}", flush=True)


def runtime_nodes(file: Path) -> Counter[str]:
    """Return how often ONNX Runtime runs each operator of a file, as it has fused it."""
    import onnx
    import onnxruntime

    with tempfile.TemporaryDirectory() as place:
        fused = Path(place) / "fused.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(fused)
        onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        return Counter(node.op_type for node in onnx.load(fused).graph.node)


def exported(model: LoadedModel, plan: Plan, test: CalibrationSet) -> None:
    """Export a plan to ONNX and print how far its outputs are off, and what runs on integers."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "export"
        try:
            report = export_plan(
                model, plan, folder, format_name="onnx-qdq", samples=test.first(16)
            )
        except InvalidPlan as err:  # widths that ONNX has not
            print(f"  not exported: {err}")
            return
        apart = None if report.difference is None else report.difference.relative
        print(f"  ONNX Runtime: outputs {apart:.1e} of the norm from the plan's")
        nodes = runtime_nodes(folder / "model.onnx")
        products = ("MatMul", "Gemm", "Conv", "MatMulIntegerToFloat", "QLinearMatMul",
                    "QLinearConv", "MatMulInteger", "FusedMatMul", "MatMulNBits")  # fmt: skip
        print(f"  products: {json.dumps({k: nodes[k] for k in products if nodes[k]})}", flush=True)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--average", type=int, default=6, help="bits of weights and of inputs")
    parser.add_argument("--bits", default="4,8")
    parser.add_argument("--activations", default="4,6,8,16")
    parser.add_argument("--effort", choices=["quick", "normal"], default="quick")
    parser.add_argument("--rounding", default="gptq")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--test-windows", type=int, default=120)
    parser.add_argument("--no-export", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Plan, compare and export."""
    options = arguments()
    calibration, test = shakespeare(options, "bytes")
    model = load_model(str(data_folder() / "llama_shakespeare"))
    layers = [
        la for la in inventory_of(model.module, model, calibration).layers if "embed" not in la.name
    ]
    limit = options.average**2 * sum(layer.n_macs for layer in layers)
    request = PlanRequest(
        budgets=(f"{limit} BitOps",),
        weight_bits=tuple(int(bits) for bits in options.bits.split(",")),
        activation_bits=tuple(int(bits) for bits in options.activations.split(",")),
        exclude=("*embed*",),
        samples=options.samples,
        holdout_samples=options.samples,
        rounding=options.rounding,
        effort=options.effort,
    )
    context = Context(ledger=MemoryLedger())
    started = time.process_time()
    found = allocate(model, calibration, request, context=context)
    (plan,) = found.plans
    print(
        f"{options.effort}: {found.passes:.1f} passes, {time.process_time() - started:.0f} CPU s, "
        f"hold-out {plan.measured.mean:.5f}, {plan.selected}: "
        f"{dict(Counter(c.label for c in plan.candidates))}",
        flush=True,
    )
    setup = build_setup(model, calibration, request, context=context)
    chosen = {a.candidate.layer: a.candidate for a in plan.assignments}
    choices = {"plan": choice_with(setup, lambda c: chosen[c.layer] == c)}
    compare(setup, choices | rivals(setup, options.average, limit), test)
    if not options.no_export:
        exported(found.with_weights(model), plan, test)


if __name__ == "__main__":
    main()

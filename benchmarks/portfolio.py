"""Plans of each effort beside every proposal of the portfolio, and beside other tools' assignments.

    python benchmarks/portfolio.py --depth 20 --draws 0,1,2 --efforts quick,normal
    python benchmarks/portfolio.py --depth 56 --efforts quick --budgets 2.5 --peers modelopt,mct
    python benchmarks/portfolio.py --tiny

Batch-norm statistics are adjusted, weights alone are quantized, six bit-widths. Test images report,
they choose nothing. A proposal is a violation where it measures better than the plan by more than
one paired standard error. CPU seconds are of the process; several budgets share one measurement, so
compare times with one budget.

The networks were trained on the calibration images. With ``--unseen`` these are drawn from the
first half of the test images instead, and the second half reports.

Peers get all images that a plan gets, those that measure and those that decide, and their
assignments are measured with our quantizers and corrections. ``modelopt`` needs nvidia-modelopt:
its gradient score with cross entropy, formats of the same widths, ranges from the largest weight.
``mct`` needs model_compression_toolkit: its sensitivities by distances of outputs, weights alone,
its own ranges.
"""

from __future__ import annotations

import argparse
import re
import site
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bitquota.context import Context, MemoryLedger
from bitquota.corrections import Correction
from bitquota.evaluate.choice import measure_choice
from bitquota.measurement_setup import build_setup
from bitquota.models.calibration import CalibrationSet
from bitquota.models.loaded import finish
from bitquota.models.references import References
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate
from bitquota.search.baselines import baseline_choices
from bitquota.search.portfolio import gather_portfolio, measuring_runner
from bitquota.search.problems import choice_of, solved
from bitquota.solver import build_problem
from resnet_cifar import images, load_resnet, resnet_cifar

if TYPE_CHECKING:
    from bitquota.candidates.table import CandidateTable
    from bitquota.evaluate.choice import ChoiceLoss
    from bitquota.measurement_setup import Setup
    from bitquota.models.loaded import LoadedModel
    from bitquota.search.neighborhood import Choice

WIDTHS = (2, 3, 4, 5, 6, 8)


def prepared(
    depth: int, n_test: int, *, tiny: bool
) -> tuple[LoadedModel, CalibrationSet, CalibrationSet]:
    """Return a model, its calibration set, and test images."""
    if tiny:
        torch.manual_seed(0)
        x, y = torch.randn(96, 3, 16, 16), torch.randint(0, 10, (96,))
        data = CalibrationSet(inputs=(x[:64],), labels=y[:64])
        test = CalibrationSet(inputs=(x[64:],), labels=y[64:])
        return finish(resnet_cifar(8), source="tiny", architecture="ResNet"), data, test
    x, y = images("calibration")
    xt, yt = images("test", n_test)
    model = finish(load_resnet(depth), source=f"resnet{depth}", architecture="ResNet")
    test = CalibrationSet(inputs=(xt,), labels=yt)
    return model, CalibrationSet(inputs=(x,), labels=y), test


def proposed(setup: Setup, budgets: tuple[str, ...]) -> dict[str, dict[str, Choice]]:
    """Return what every matrix of the portfolio proposes under each budget, by budget and name."""
    found = gather_portfolio(setup, measuring_runner(setup))
    matrices = {"matrix": found.matrix, **found.proposals, **found.scores}
    simple = baseline_choices(setup.table)
    named: dict[str, dict[str, Choice]] = {}
    for text in budgets:
        problem = build_problem(found.matrix, setup.budgets(text))
        named[text] = {n: c for n, c in simple.items() if problem.is_feasible(c)}
        for name, matrix in matrices.items():
            solution = solved(setup, build_problem(matrix, setup.budgets(text)))
            named[text][name] = choice_of(solution)
    return named


def model_optimizer(module: torch.nn.Module, few: CalibrationSet, bits: float) -> dict[str, int]:
    """Return bit-widths by layer as NVIDIA Model Optimizer (``mtq.auto_quantize``) chooses them."""
    import modelopt.torch.quantization as mtq

    assert few.labels is not None  # CIFAR-10 has labels
    loader = [(few.inputs[0][k : k + 64], few.labels[k : k + 64]) for k in range(0, len(few), 64)]
    formats = [
        {
            "quant_cfg": [
                {"quantizer_name": "*", "enable": False},
                {
                    "quantizer_name": "*weight_quantizer",
                    "cfg": {"num_bits": bits, "axis": 0},
                    "enable": True,
                },
            ],
            "algorithm": "max",
        }
        for bits in WIDTHS
    ]
    _, state = mtq.auto_quantize(
        module,
        constraints={"effective_bits": bits},
        quantization_formats=formats,
        data_loader=loader,
        forward_step=lambda module, batch: module(batch[0]),
        loss_func=lambda output, batch: functional.cross_entropy(output, batch[1]),
        num_calib_steps=len(loader),
        num_score_steps=len(loader),
    )
    chosen: dict[str, int] = {}
    for name, recipe in state["best"]["recipe"].items():
        found = re.search(r"effective-bits: ([0-9.]+)", str(recipe))
        chosen[name.removesuffix(".quant_recipe")] = round(float(found[1])) if found else 16
    return chosen


def compression_toolkit(
    module: torch.nn.Module, few: CalibrationSet, bits: float
) -> dict[str, int]:
    """Return bit-widths by layer as Sony's Model Compression Toolkit chooses them."""
    import model_compression_toolkit as mct
    from model_compression_toolkit.target_platform_capabilities.constants import (
        KERNEL_ATTR,
        WEIGHTS_N_BITS,
    )
    from model_compression_toolkit.target_platform_capabilities.tpc_models.imx500_tpc.v1_0 import (
        tpc,
    )

    base, _, default = (
        part
        if isinstance(part, list)
        else part.clone_and_edit(enable_activation_quantization=False)
        for part in tpc.get_op_quantization_configs()
    )
    offered = [
        base.clone_and_edit(attr_to_edit={KERNEL_ATTR: {WEIGHTS_N_BITS: width}})
        for width in sorted(WIDTHS, reverse=True)
    ]
    layers = {
        name: part.weight.numel()
        for name, part in module.named_modules()
        if isinstance(part, (torch.nn.Conv2d, torch.nn.Linear))
    }
    searching = mct.core.MixedPrecisionQuantizationConfig(num_of_images=len(few))
    quantized, _ = mct.ptq.pytorch_post_training_quantization(
        module,
        lambda: ([batch.inputs[0]] for batch in few.batches(64)),
        mct.core.ResourceUtilization(weights_memory=bits * sum(layers.values()) / 8),
        mct.core.CoreConfig(mixed_precision_config=searching),
        tpc.generate_tpc(default, offered[0], offered, "weights"),
    )
    # Nodes of its graph are called by the layer's name, and "_bn" where batch norm was folded.
    nodes = {
        name.removesuffix("_bn"): part.weights_quantizers["weight"].num_bits
        for name, part in quantized.named_modules()
        if getattr(part, "weights_quantizers", None)
    }
    return {name: nodes[name.replace(".", "_")] for name in layers}


PEERS = {"modelopt": model_optimizer, "mct": compression_toolkit}


def choice_in(table: CandidateTable, chosen: dict[str, int]) -> Choice:
    """Return bit-widths by layer as a choice of the table; what has none gets the most."""
    choice = []
    for g in range(len(table.groups)):
        rows = table.rows[table.offsets[g] : table.offsets[g + 1]]
        bits_of = [row.candidates[0].weight_bits for row in rows]
        wanted = chosen.get(rows[0].candidates[0].layer, max(WIDTHS))
        choice.append(bits_of.index(min(wanted, max(WIDTHS))))
    return tuple(choice)


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--efforts", default="quick,normal")
    parser.add_argument("--rounding", default="auto")
    parser.add_argument("--draws", default="0")
    parser.add_argument("--budgets", default="2.25,2.5,3.0,4.0")
    parser.add_argument("--test", type=int, default=10_000, help="test images")
    parser.add_argument("--alone", action="store_true", help="plans only, no proposals on test")
    parser.add_argument("--peers", default="", help="modelopt, mct: measured on test too")
    parser.add_argument("--peers-from", help="interpreter of an environment that has these")
    parser.add_argument("--unseen", action="store_true", help="calibrate on images not trained on")
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.peers_from:
        # Behind our own packages: the tools come from there, torch does not.
        for folder in Path(asked.peers_from).absolute().parents[1].glob("lib/*/site-packages"):
            site.addsitedir(str(folder))
    model, data, test = prepared(asked.depth, asked.test, tiny=asked.tiny)
    if asked.unseen:
        assert test.labels is not None  # CIFAR-10 has labels
        (x,), y, half = test.inputs, test.labels, len(test) // 2
        data = CalibrationSet(inputs=(x[:half],), labels=y[:half])
        test = CalibrationSet(inputs=(x[half:],), labels=y[half:])
    budgets = tuple(f"{bits} bits" for bits in asked.budgets.split(","))
    n = 32 if asked.tiny else 512
    outputs, violations = References(), 0
    for draw in map(int, asked.draws.split(",")):
        for effort in asked.efforts.split(","):
            request = PlanRequest(
                budgets=budgets, weight_bits=WIDTHS, seed=draw, effort=effort, samples=n,
                holdout_samples=n, correction_samples=2 * n,
                corrections=(Correction.BATCH_NORM_STATISTICS,), rounding=asked.rounding,
            )  # fmt: skip
            context = Context(ledger=MemoryLedger(), device="cpu")
            begun = time.process_time()
            made = allocate(model, data, request, context=context)
            seconds = time.process_time() - begun
            print(
                f"{effort}, draw {draw}: {made.passes:.1f} passes, {seconds:.1f} s CPU for "
                f"{len(budgets)} budgets, everything included"
            )
            setup = build_setup(model, data, request, context=context)
            rivals: dict[str, dict[str, Choice]] = {text: {} for text in budgets}
            if not asked.alone:
                rivals = proposed(setup, budgets)
            for text, plan in zip(budgets, made.plans, strict=True):
                for name in filter(None, asked.peers.split(",")):
                    fresh = prepared(asked.depth, 1, tiny=asked.tiny)[0].module
                    begun = time.process_time()
                    widths = PEERS[name](fresh, data.subset(2 * n, draw), float(text.split()[0]))
                    rivals[text][name] = choice_in(setup.table, widths)
                    print(f"    {name}, {text}: {time.process_time() - begun:.1f} s CPU")
                known: dict[Any, ChoiceLoss] = {}

                def on_test(
                    candidates: Any,  # noqa: ANN401
                    known: dict[Any, ChoiceLoss] = known,
                    setup: Setup = setup,
                ) -> ChoiceLoss:
                    key = tuple(sorted((c.layer, c.weight_bits) for c in candidates))
                    if key not in known:
                        known[key] = measure_choice(
                            setup.module, setup.inventory, candidates, test, setup.loss,
                            corrections=setup.request.corrections,
                            correction_data=setup.correcting, fitted=setup.fitted,
                            references=outputs,
                        )  # fmt: skip
                    return known[key]

                own = on_test([a.candidate for a in plan.assignments])
                assert plan.measured is not None  # allocate measures
                accuracy = "" if own.accuracy is None else f", {100 * own.accuracy:.2f} %"
                print(
                    f"  {text}: hold-out {plan.measured.mean:.4f}, test {own.mean:.4f} ± "
                    f"{own.standard_error:.4f}{accuracy}"
                )
                for name, choice in rivals[text].items():
                    worse, error = on_test(setup.table.decode(choice)).paired(own)
                    better = worse < -error
                    violations += better
                    print(
                        f"    {name:28s} worse by {worse:+.4f} ± {error:.4f}"
                        f"{'  BETTER THAN THE PLAN' if better else ''}"
                    )
                sys.stdout.flush()
    print(f"{violations} proposals better than a plan by more than one paired standard error")


if __name__ == "__main__":
    main()

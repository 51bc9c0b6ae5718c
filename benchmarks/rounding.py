"""What rounding is worth: uniform and mixed plans, rounded to nearest, by GPTQ and by QEP.

    python benchmarks/rounding.py                 # ResNet-20 of $BITQUOTA_DATA, all test images
    python benchmarks/rounding.py --tiny          # untrained, a few images, no shared data

Each row is a plan that ``allocate`` made with the given rounding, run from its file of quantized
weights on the test images, and exported for ``ort-cpu`` where its widths allow. KL and its
standard error are beside full precision; "paired" is against the same widths rounded to nearest.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bitquota.context import Context, MemoryLedger
from bitquota.corrections import Correction
from bitquota.models.calibration import CalibrationSet
from bitquota.models.loaded import finish
from bitquota.quantizers.planned import quantized_module
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate
from resnet_cifar import data_folder, images, load_resnet, resnet_cifar

BARS = {("uniform", 3.0): 0.026, ("mixed", 3.0): 0.022, ("mixed", 2.5): 0.070}
"""Highest KL on the test images, as the issue states it."""


def labelled(name: str, n: int) -> CalibrationSet:
    """Return the first ``n`` images of a file, with labels."""
    x, y = images(name, n)
    return CalibrationSet(inputs=(x,), labels=y)


def outputs(module: torch.nn.Module, data: CalibrationSet) -> torch.Tensor:
    """Return the logits of all samples."""
    with torch.no_grad():
        return torch.cat([module(*batch.inputs) for batch in data.batches(500)])


def main() -> None:
    """Plan with every rounding and print a row for each plan."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a small network, few images")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--roundings", default="nearest,gptq,qep")
    parser.add_argument("--cases", default="uniform 3,mixed 3,mixed 2.5")
    parser.add_argument("--moved", action="store_true", help="correct batch-norm statistics too")
    parser.add_argument("--effort", choices=["quick", "normal"], default="normal")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.tiny:
        module: torch.nn.Module = resnet_cifar(8)
        calibration, test = (
            CalibrationSet(inputs=(torch.randn(n, 3, 32, 32),), labels=torch.arange(n) % 10)
            for n in (64, 32)
        )
    else:
        if not data_folder().is_dir():
            sys.exit(f"{data_folder()} is missing: set BITQUOTA_DATA, or run with --tiny")
        module = load_resnet(options.depth)
        calibration = labelled("calibration", 2048)
        test = labelled("test", 10_000)
    model = finish(module, source="resnet", architecture="CifarResNet")
    reference = outputs(model.module, test)
    assert test.labels is not None
    right = (reference.argmax(1) == test.labels).float()
    print(f"full precision: {100 * float(right.mean()):.2f} % on {len(test)} images")
    print("case          rounding  hold-out KL      test KL            bar   accuracy  CPU s")
    context = Context(ledger=MemoryLedger())
    for case in options.cases.split(","):
        kind, bits = case.split()
        before: torch.Tensor | None = None
        for rounding in options.roundings.split(","):
            started = time.process_time()
            request = PlanRequest(
                budgets=(f"{bits} bits",),
                weight_bits=(int(bits),) if kind == "uniform" else (2, 3, 4, 5, 6, 8),
                corrections=(Correction.BATCH_NORM_STATISTICS,) if options.moved else (),
                rounding=rounding,
                refine=kind == "mixed" and options.effort == "normal",
                samples=16 if options.tiny else 512,
                holdout_samples=16 if options.tiny else 512,
            )
            found = allocate(model, calibration, request, context=context)
            (plan,), (weights,) = found.plans, found.weights
            seconds = time.process_time() - started
            with tempfile.TemporaryDirectory() as folder:
                ready = model
                if weights is not None:
                    path = Path(folder) / "plan.weights.safetensors"
                    path.write_bytes(weights)
                    ready = replace(model, weights=(path,))
                quantized = quantized_module(ready, plan, correction_data=calibration.first(1024))
                output = outputs(quantized, test)
            kl = functional.kl_div(
                output.log_softmax(1), reference.log_softmax(1), log_target=True, reduction="none"
            ).sum(1)
            error = float(kl.std()) / len(kl) ** 0.5
            paired = ""
            if before is not None:
                gap = kl - before
                paired = f"  {float(gap.mean()):+.4f} +- {float(gap.std()) / len(gap) ** 0.5:.4f}"
            before = kl if before is None else before
            accuracy = 100 * float((output.argmax(1) == test.labels).float().mean())
            bar = "" if rounding != "qep" else f"{BARS.get((kind, float(bits)), float('nan')):.3f}"
            assert plan.measured is not None
            print(
                f"{case:13s} {rounding:8s}  {plan.measured.mean:.4f} ({plan.selected[:14]:14s})"
                f"  {float(kl.mean()):.4f} +- {error:.4f}  {bar:5s}  {accuracy:.2f} %"
                f"  {seconds:6.0f}{paired}",
                flush=True,
            )


if __name__ == "__main__":
    main()

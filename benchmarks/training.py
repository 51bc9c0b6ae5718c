"""Training under plans and learning of bit-widths on ResNet-20: one table.

    python benchmarks/training.py --images 8192 --epochs 3 --seeds 1

prints bytes of the quantized layers, accuracy on the 10,000 test images (reported only, never
used to choose), and CPU minutes of each way to spend the same bits. Statistics of batch norms are
re-estimated for every row, so the rows without training have the same correction.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import nn

from bitquota.budget import Budget
from bitquota.candidates import Candidate, Inventory
from bitquota.corrections import Correction
from bitquota.sensitivity.calibration import CalibrationSet
from bitquota.sensitivity.discovery import discover
from bitquota.sensitivity.evaluate import apply_plan
from bitquota.storage import Scheme
from bitquota.training.finetune import finetune
from bitquota.training.learn import learn
from bitquota.training.loop import TrainingSettings
from resnet_cifar import images, load_resnet

WIDTHS = (2, 3, 4, 5, 6, 8)


def accuracy(model: nn.Module, n_test: int) -> float:
    """Return per cent right on the first ``n_test`` test images."""
    x, y = images("test", n_test)
    with torch.no_grad():
        right = sum(
            int((model(a).argmax(dim=1) == b).sum())
            for a, b in zip(x.split(500), y.split(500), strict=True)
        )
    return 100 * right / len(y)


def uniform(inventory: Inventory, bits: int, ends: int | None = None) -> list[Candidate]:
    """Return every layer at ``bits``, the first and last at ``ends`` if given."""
    last = len(inventory.layers) - 1
    return [
        Candidate.of(layer, ends if ends and k in (0, last) else bits, Scheme())
        for k, layer in enumerate(inventory.layers)
    ]


def main() -> None:
    """Run and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=8192, help="training images")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--test", type=int, default=10_000, help="test images")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--average", type=float, default=2.5, help="bits per weight when learned")
    parser.add_argument("--rows", default="ptq,lsq,direct,stabilised,ellipsoid,uhlich2020")
    args = parser.parse_args()
    rows = args.rows.split(",")
    model = load_resnet(20)
    x, y = images("train_part", args.images)
    data = CalibrationSet(inputs=(x,), labels=y)
    inventory = discover(model, (x[:2],))
    correcting = CalibrationSet(inputs=(images("calibration", 1024)[0],))
    print(f"| way | seed | bytes | bits/weight | test accuracy % | CPU min |\n|{'---|' * 6}")

    def show(way: str, seed: int, size_bits: int, module: nn.Module, start: float) -> None:
        minutes = (time.process_time() - start) / 60
        per_weight = size_bits / inventory.n_weights
        print(
            f"| {way} | {seed} | {size_bits // 8:,} | {per_weight:.3f} | "
            f"{accuracy(module, args.test):.2f} | {minutes:.1f} |",
            flush=True,
        )

    show("full precision", 0, 32 * inventory.n_weights, model, time.process_time())
    plans = {"uniform 2": uniform(inventory, 2), "uniform 3": uniform(inventory, 3)}
    if "ptq" in rows:
        for name, plan in plans.items():
            start = time.process_time()
            quantized = apply_plan(
                model,
                inventory,
                plan,
                corrections=[Correction.BATCH_NORM_STATISTICS],
                correction_data=correcting,
            )
            show(f"{name}, no training", 0, sum(c.size_bits for c in plan), quantized, start)
    for seed in range(args.seeds):
        settings = TrainingSettings(epochs=args.epochs, seed=seed, augmentation="shift_flip")
        for method in ("lsq", "direct"):
            if method in rows:
                start = time.process_time()
                done = finetune(model, inventory, plans["uniform 2"], data, settings, method=method)
                show(f"uniform 2 + {method}", seed, done.size_bits, done.module, start)
        limit = Budget.parse(f"{args.average} bits", inventory)
        first_last = uniform(inventory, 2, ends=8)
        if "first_last" in rows:
            start = time.process_time()
            done = finetune(model, inventory, first_last, data, settings)
            show("first and last at 8 + lsq", seed, done.size_bits, done.module, start)
        for recipe in ("stabilised", "ellipsoid", "uhlich2020"):
            if recipe in rows:
                start = time.process_time()
                learned = learn(model, inventory, data, limit, WIDTHS, recipe=recipe,
                                settings=settings)  # fmt: skip
                bits = "".join(str(c.weight_bits) for c in learned.candidates)
                show(
                    f"{recipe} {bits}", seed, learned.plan.size_bits, learned.trained.module, start
                )


if __name__ == "__main__":
    main()

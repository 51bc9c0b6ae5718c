"""A small network that doubles CIFAR images: plan, fine-tuning and learned widths in decibels.

    python benchmarks/super_resolution.py --images 4096 --epochs 6 --bits 4

The network (Shi et al. 2016, arXiv 1609.05158: convolutions, then a shuffle of pixels) is trained
here, on images and their halves. Peak signal-to-noise ratio on test images, the peak being the
range of the labels; the bar is .1 dB below full precision at 4 bits.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional

from bitquota.models.calibration import CalibrationSet
from bitquota.models.identity import model_fingerprint
from bitquota.models.loaded import LoadedModel
from bitquota.quantizers.planned import quantized_module
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate
from bitquota.sensitivity.losses import MeanSquaredError
from bitquota.training.learn import default_settings
from bitquota.training.objective import Scores
from bitquota.training.qat import finetune_plan, learn_plan
from bitquota.training.settings import TrainingSettings
from resnet_cifar import images


class PixelShuffler(nn.Module):
    """Three convolutions; what they add to the enlarged image is shuffled into place."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, 12, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return f32[N, 3, 2H, 2W]."""
        y = functional.relu(self.middle(functional.relu(self.first(x))))
        smooth = functional.interpolate(x, scale_factor=2.0, mode="bilinear")
        return smooth + functional.pixel_shuffle(self.last(y), 2)


def main() -> None:
    """Train, quantize and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--bits", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    large, test = images("train_part", args.images)[0], images("test", args.test)[0]
    small = functional.avg_pool2d(large, 2)
    module = PixelShuffler()
    optimizer = torch.optim.Adam(module.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * args.epochs)
    for _ in range(2 * args.epochs):
        for rows in torch.randperm(len(small)).split(64):
            optimizer.zero_grad()
            functional.mse_loss(module(small[rows]), large[rows]).backward()
            optimizer.step()
        schedule.step()
    module.eval()
    model = LoadedModel(
        module=module,
        digest=model_fingerprint(module),
        source="trained",
        architecture="PixelShuffler",
    )
    data = CalibrationSet(inputs=(small,), labels=large)

    def shown(name: str, found: nn.Module) -> None:
        scores = Scores(MeanSquaredError())
        with torch.no_grad():
            for part in test.split(250):
                scores.add(found(functional.avg_pool2d(part, 2)), part)
        psnr = scores.psnr()
        print(f"| {name} | {psnr:.2f} dB | {time.process_time():.0f} CPU s |", flush=True)

    shown("full precision", module)
    budget = f"{args.bits} bits"
    (plan,) = allocate(
        model, data.first(512), PlanRequest(budgets=(budget,), samples=256, holdout_samples=256)
    ).plans
    plan = replace(plan, weights=None)
    few = data.first(256)
    shown(f"plan, {budget}", quantized_module(model, plan, correction_data=few, fit_data=few))
    settings = TrainingSettings(epochs=args.epochs, batch_size=64)
    shown("plan + LSQ", finetune_plan(model, plan, data, settings).model.module)
    own = replace(default_settings("stabilised"), epochs=args.epochs, batch_size=64)
    shown(
        "learned", learn_plan(model, data, [budget], (2, 3, 4, 5, 6, 8), settings=own).model.module
    )


if __name__ == "__main__":
    main()

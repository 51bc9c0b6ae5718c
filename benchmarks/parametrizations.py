"""What is learned of a quantizer: U1 to U3 and P1 to P3 on scikit-learn's digits, side by side.

    python benchmarks/parametrizations.py --epochs 20 --seeds 3

The claim of Uhlich et al. 2020 (arXiv 1905.11452, table 1) is that networks train best with step
and range learned (U3), or smallest and largest magnitude (P3). Every layer's weights get one
quantizer, started at ``--bits``; weights and quantizers are trained together by momentum SGD, from
a trained network and from a random one. Nothing limits the size; gradients are not clipped, which
the authors do only under a budget. Bit-widths are kept within 2 to 8 where they are learned, and
grids positive. A rate of learning serves all: the table has one row for each.

Printed is the test error in per cent, mean over seeds and the largest; a run whose loss is not
finite counts 90 (guessing). ``gradient`` is the largest gradient of any quantizer parameter of the
first epoch over the median, over all runs from a trained network: how badly one rate can serve.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from bitquota.cli.demo import N_TEST, DigitsNet, digits, train_digits
from bitquota.quantizers.differentiable import UniformForm, UniformQuantizer
from bitquota.quantizers.power_of_two import PowerOfTwoForm, PowerOfTwoQuantizer

FORMS = (*UniformForm, *PowerOfTwoForm)
N_TRAIN, BATCH, LEAST, MOST = 600, 50, 2.0, 8.0
GUESSING = 90.0


class QuantizedNet(nn.Module):
    """A network whose weights go through one quantizer for each layer."""

    def __init__(self, model: nn.Module, form: UniformForm | PowerOfTwoForm, bits: float) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.names = [n for n, p in model.named_parameters() if p.ndim > 1]
        self.quantizers = nn.ModuleList()
        for name in self.names:
            largest = float(self.model.get_parameter(name).detach().abs().max())
            if isinstance(form, UniformForm):
                step = 2.0 ** math.floor(math.log2(largest / (2 ** (bits - 1) - 1)))
                self.quantizers.append(UniformQuantizer(step, bits, form))
            else:
                self.quantizers.append(
                    PowerOfTwoQuantizer(2.0 ** round(math.log2(largest)), bits, form)
                )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits of ``x``, computed with quantized weights."""
        weights = {
            name: quantizer(self.model.get_parameter(name))
            for name, quantizer in zip(self.names, self.quantizers, strict=True)
        }
        return functional_call(self.model, weights, (x,))

    @torch.no_grad()
    def project(self) -> None:
        """Keep learned bit-widths within 2 to 8, and grids positive and in order."""
        for q in self.quantizers:
            if str(q.form)[1] == "3":
                low = torch.minimum(q.first, q.second).clamp(min=2.0**-16)
                q.second.copy_(torch.maximum(q.first, q.second).clamp(2.0**-16, 127.0))
                q.first.copy_(low)
            else:
                q.first.clamp_(LEAST, MOST)
                q.second.clamp_(2.0**-16, 127.0)


def run(
    model: nn.Module,
    form: UniformForm | PowerOfTwoForm,
    rate: float,
    seed: int,
    epochs: int,
    bits: float,
) -> tuple[float, list[float]]:
    """Return the test error in per cent, and the quantizers' gradients in the first epoch."""
    images, labels = digits()
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    test_x, test_y = x[:N_TEST], y[:N_TEST]
    x, y = x[N_TEST : N_TEST + N_TRAIN], y[N_TEST : N_TEST + N_TRAIN]
    net = QuantizedNet(model, form, bits)
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
    steps = epochs * (N_TRAIN // BATCH)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2, 3 * steps // 4])
    generator = torch.Generator().manual_seed(seed)
    gradients: list[float] = []
    for epoch in range(epochs):
        net.train()
        for rows in torch.randperm(N_TRAIN, generator=generator).split(BATCH):
            loss = functional.cross_entropy(net(x[rows]), y[rows])
            if not torch.isfinite(loss):
                return GUESSING, gradients
            optimizer.zero_grad()
            loss.backward()
            if not epoch:
                gradients += [abs(float(p.grad)) for p in net.quantizers.parameters()]
            optimizer.step()
            schedule.step()
            net.project()
    net.eval()
    with torch.no_grad():
        wrong = (net(test_x).argmax(dim=1) != test_y).double().mean()
    return 100 * float(wrong), gradients


def main() -> None:
    """Run every form and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bits", type=float, default=3, help="where every quantizer starts")
    parser.add_argument("--rates", default="0.1,0.01")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    images, labels = digits()
    fit = slice(N_TEST, N_TEST + N_TRAIN)
    starts: dict[str, list[nn.Module]] = {"trained": [], "random": []}
    for seed in range(args.seeds):
        trained = train_digits(images[fit], labels[fit], seed=seed, epochs=args.epochs)
        starts["trained"].append(trained)
        torch.manual_seed(seed)
        starts["random"].append(DigitsNet())
    print("| start | rate |", " | ".join(FORMS), "|")
    print("|---|---|" + "---|" * len(FORMS))
    spread: dict[str, list[float]] = {form: [] for form in FORMS}
    for name, models in starts.items():
        for rate in map(float, args.rates.split(",")):
            cells = []
            for form in FORMS:
                found = []
                for seed, model in enumerate(models):
                    error, gradients = run(model, form, rate, seed, args.epochs, args.bits)
                    found.append(error)
                    if name == "trained":
                        spread[form] += gradients
                cells.append(f"{statistics.mean(found):.1f} ({max(found):.1f})")
            print(f"| {name} | {rate} |", " | ".join(cells), "|", flush=True)
    ratios = []
    for form in FORMS:
        nonzero = [g for g in spread[form] if g > 0] or [1.0]
        ratios.append(f"{max(nonzero) / statistics.median(nonzero):,.0f}")
    print("| gradient | |", " | ".join(ratios), "|")
    print(f"{time.process_time() - start:.0f} CPU s")


if __name__ == "__main__":
    main()

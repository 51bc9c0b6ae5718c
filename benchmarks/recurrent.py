"""An LSTM language model: trained here, planned at 3 bits, exported to ONNX and run.

``python benchmarks/recurrent.py`` trains a small model of bytes on ``tinyshakespeare.txt`` of the
shared data, writes it as ONNX, plans 3 bits for ONNX Runtime on windows of the text, and compares
the exported file with uniform 3 bits on windows that nothing has seen. It ends with code 1 where a
bar does not hold: 95 % of the bytes quantizable, the plan better than uniform 3 bits by two paired
standard errors, the exported file's output equal to the evaluated one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from bitquota.context import Context, MemoryLedger
from bitquota.exports.export import export_plan
from bitquota.models.calibration import CalibrationSet
from bitquota.models.load import load_model
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate
from resnet_cifar import data_folder

if TYPE_CHECKING:
    from bitquota.models.loaded import LoadedModel
    from bitquota.plan import Plan

WINDOW = 64
MOST_DIFFERENCE = 1e-3


class ByteLSTM(nn.Module):
    """Embedding, LSTM and head of a language model of bytes."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        self.lstm = nn.LSTM(64, width, 2, batch_first=True)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits f32[N, T, 256] of the next byte."""
        logits: torch.Tensor = self.head(self.lstm(self.embedding(tokens))[0])
        return logits


def windows(text: torch.Tensor, n: int, seed: int) -> torch.Tensor:
    """Return ``n`` windows i64[n, WINDOW + 1] at random places of ``text``."""
    starts = torch.randint(len(text) - WINDOW - 1, (n,), generator=seeded(seed))
    return torch.stack([text[s : s + WINDOW + 1] for s in starts.tolist()]).long()


def seeded(seed: int) -> torch.Generator:
    """Return a generator with this seed."""
    return torch.Generator().manual_seed(seed)


def trained(text: torch.Tensor, steps: int) -> ByteLSTM:
    """Train on random windows with Adam and a falling rate."""
    torch.manual_seed(0)
    model = ByteLSTM()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        batch = windows(text, 32, step)
        logits = model(batch[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        if step % 200 == 0:
            print(f"step {step}: {loss.item():.3f} nats per byte", flush=True)
    return model.eval()


def main() -> None:
    """Train, plan, export, and print what held."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--samples", type=int, default=128)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    path = data_folder() / "tinyshakespeare.txt"
    if not path.is_file():
        sys.exit(f"'{path}' must exist; set BITQUOTA_DATA to the folder of the shared data")
    text = torch.from_numpy(np.frombuffer(path.read_bytes(), np.uint8).copy())
    cut = int(0.9 * len(text))
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "lstm.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the older exporter, which writes LSTM as one node
            torch.onnx.export(
                trained(text[:cut], settings.steps), (torch.zeros(2, WINDOW, dtype=torch.long),),
                file, input_names=["tokens"], output_names=["logits"], dynamo=False,
                dynamic_axes={"tokens": {0: "batch"}, "logits": {0: "batch"}},
            )  # fmt: skip
        model = load_model(str(file))
        data = CalibrationSet(inputs=(windows(text[cut:], 2 * settings.samples, 9)[:, :-1],))
        free, _ = planned(model, data, settings.samples, PlanRequest(weight_bits=(2, 3, 4, 6, 8)))
        plan, ready = planned(model, data, settings.samples, PlanRequest(target="ort-cpu"))
        receipt = export_plan(ready, plan, Path(name) / "export", target="ort-cpu", samples=data)
    (uniform,) = [b for b in free.baselines if b.name == "uniform W3"]
    weights = 32 * plan.totals["n_weights"]
    share = weights / (weights + plan.totals["unquantized_bits"])
    difference = receipt.difference
    bars = {
        f"quantizable {share:.1%} of the bytes": share >= 0.95,
        f"widths {{2, 3, 4, 6, 8}}: {free.measured.mean:.4f} ± {free.measured.standard_error:.4f}; "
        f"uniform 3 bits loses {uniform.paired_difference:.4f} ± {uniform.paired_error:.4f} more":
            uniform.paired_difference > 2 * uniform.paired_error,
        f"ONNX Runtime's widths: {plan.measured.mean:.4f} ± {plan.measured.standard_error:.4f}, "
        f"uniform 3 bits {uniform.measured.mean:.4f} ± {uniform.measured.standard_error:.4f}":
            plan.measured.mean < uniform.measured.mean,
        f"the exported file differs by {difference and difference.relative}":
            difference is not None and difference.relative <= MOST_DIFFERENCE,
    }  # fmt: skip
    for text_of_bar, holds in bars.items():
        print(f"{'holds' if holds else 'MISSED'}: {text_of_bar}")
    if not all(bars.values()):
        sys.exit(1)


def planned(
    model: LoadedModel, data: CalibrationSet, n: int, request: PlanRequest
) -> tuple[Plan, LoadedModel]:
    """Return the plan of 3 bits, and the model with its weights."""
    request = replace(request, budgets=("3 bits",), samples=n, holdout_samples=n)
    made = allocate(model, data, request, context=Context(ledger=MemoryLedger()))
    return made.plans[0], made.with_weights(model)


if __name__ == "__main__":
    main()

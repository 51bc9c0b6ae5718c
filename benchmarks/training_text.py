"""A language model under a plan, and after distilled fine-tuning on text: KL of both.

    python benchmarks/training_text.py --bits 2.5 --windows 4096 --epochs 3

The tiny Llama of $BITQUOTA_DATA is planned with the default rounding (QEP) and trained without
labels on the first nine tenths of the text; KL per token, with its standard error, on the last
tenth. Embeddings and the head stay in full precision. Plan, weights and checkpoint are kept in
``--folder``: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from dataclasses import replace

from bitquota.models.text import text_windows
from bitquota.plan import Plan, weights_near
from bitquota.quantizers.planned import quantized_module
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate
from bitquota.training.qat import finetune_plan
from bitquota.training.settings import TrainingSettings
from resnet_cifar import data_folder
from rounding import judged, language_model


def main() -> None:
    """Plan, train, and print a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bits", type=float, default=2.5)
    parser.add_argument("--samples", type=int, default=128, help="windows that the plan sees")
    parser.add_argument("--effort", default="normal", help="of the plan")
    parser.add_argument("--windows", type=int, default=4096, help="windows to train on")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--quantizer-rate", type=float, default=1e-3)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--test-windows", type=int, help="all 871 if left out")
    parser.add_argument("--folder", type=Path, default=Path("build/training-text"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.folder.mkdir(parents=True, exist_ok=True)
    subject = language_model("llama", args.samples, 128, args.test_windows)
    path = args.folder / f"plan-{args.bits}.json"
    if not path.exists():
        request = PlanRequest(
            budgets=(f"{args.bits} bits",), weight_bits=(2, 3, 4, 5, 6, 8),
            exclude=subject.exclude, samples=args.samples, holdout_samples=args.samples,
            effort=args.effort,
        )  # fmt: skip
        found = allocate(subject.model, subject.calibration, request)
        (weights,) = found.weights
        assert weights is not None, "the default rounding keeps codes"
        path.with_suffix(".weights.safetensors").write_bytes(weights)
        found.plans[0].save(path)
    plan = Plan.load(path)
    model = replace(subject.model, weights=weights_near([path]))
    samples = subject.calibration.first(1024)

    def shown(name: str, module: torch.nn.Module) -> None:
        kl, _ = judged(module, subject)
        error = float(kl.std()) / len(kl) ** 0.5
        print(f"| {name} | {float(kl.mean()):.4f} +- {error:.4f} | "
              f"{time.process_time():.0f} CPU s |", flush=True)  # fmt: skip

    shown(
        f"plan, {plan.average_bits:.3f} bits",
        quantized_module(model, plan, correction_data=samples),
    )
    text = (data_folder() / "tinyshakespeare.txt").read_text(encoding="utf-8")
    train = text_windows(
        text[: int(0.9 * len(text))], data_folder() / "tinyshakespeare.txt",
        tokenizer="bytes", length=128, n=args.windows,
    )  # fmt: skip
    for seed in (int(s) for s in args.seeds.split(",")):
        settings = TrainingSettings(
            epochs=args.epochs, batch_size=args.batch, learning_rate=args.rate,
            quantizer_learning_rate=args.quantizer_rate, holdout_fraction=1 / 16, seed=seed,
        )  # fmt: skip
        made = finetune_plan(
            model, plan, train, settings, checkpoint=args.folder / f"finetune-{seed}.safetensors"
        )
        for k, epoch in enumerate(made.model.record.epochs):
            print(f"  epoch {k + 1}: training {epoch['training_loss']:.4f}, "
                  f"hold-out {epoch['holdout_loss']:.4f}")  # fmt: skip
        shown(f"fine-tuned, seed {seed}", made.model.module)


if __name__ == "__main__":
    main()

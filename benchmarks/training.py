"""Training under plans and learning of bit-widths on ResNet-20: one table from many short runs.

    python benchmarks/training.py run --rows plan,plan-lsq --seeds 0,1,2 --results FILE.json
    python benchmarks/training.py table --results FILE.json

Each row can be run alone; results are kept in the file, so that the table can be assembled from
runs of some minutes each. A row gives bytes of the quantized layers, accuracy on the 10,000 test
images (reported only, never used to choose) and CPU minutes, the plan's own included where there is
one. Statistics of batch norms follow quantization in every row, trained or not. ``--holdout`` shows
hold-out accuracy instead and leaves the test images alone: for choosing settings.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from bitquota.candidates.budget import Budget
from bitquota.candidates.storage import Scheme
from bitquota.candidates.table import Candidate
from bitquota.context import Context
from bitquota.corrections import Correction
from bitquota.models.calibration import CalibrationSet
from bitquota.models.discovery import discover
from bitquota.models.layout import from_matrix
from bitquota.models.load import load_model
from bitquota.plan import Plan
from bitquota.quantizers.apply import apply_plan
from bitquota.quantizers.corrections import reestimate_batch_norm
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate
from bitquota.sensitivity.cache import SqliteLedger
from bitquota.training.finetune import finetune
from bitquota.training.learn import RECIPES, default_settings, learn
from bitquota.training.loop import train
from bitquota.training.nested import NestedModel
from bitquota.training.settings import TrainingSettings
from resnet_cifar import images, load_resnet

if TYPE_CHECKING:
    from bitquota.candidates.layers import Inventory

WIDTHS = (2, 3, 4, 5, 6, 8)
ROWS = {
    "full": "full precision",
    "uniform-2": "uniform 2, no training",
    "uniform-3": "uniform 3, no training",
    "uniform-4": "uniform 4, no training",
    "plan": "plan, no training",
    "uniform-2-lsq": "uniform 2 + LSQ",
    "uniform-2-direct": "uniform 2 + direct",
    "uniform-3-lsq": "uniform 3 + LSQ",
    "uniform-4-lsq": "uniform 4 + LSQ",
    "ends-8-lsq": "first and last at 8, rest 2 + LSQ",
    "plan-lsq": "plan + LSQ",
    "plan-direct": "plan + direct",
    "stabilised": "learned, stabilised",
    "ellipsoid": "learned, ellipsoid",
    "uhlich2020": "learned, uhlich2020 (U3)",
    "uhlich2020_p3": "learned, uhlich2020 (P3)",
    "bitpruning": "learned, bitpruning",
    "bsq": "learned, bsq",
    "msq": "learned, msq",
    "djpq": "learned, djpq (channels too)",
    "nested": "nested 2, 3, 4, 8",
    "stabilised-from-plan": "learned from the plan, stabilised",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """The model, its images, and how to train."""

    model: nn.Module
    inventory: Inventory
    data: CalibrationSet
    correcting: CalibrationSet
    settings: TrainingSettings
    average: float
    folder: Path
    n_test: int

    def accuracy(self, model: nn.Module) -> float:
        """Return per cent right on the test images."""
        if not self.n_test:
            return float("nan")
        x, y = images("test", self.n_test)
        with torch.no_grad():
            right = sum(
                int((model(a).argmax(dim=1) == b).sum())
                for a, b in zip(x.split(500), y.split(500), strict=True)
            )
        return 100 * right / len(y)

    def uniform(self, bits: int, ends: int | None = None) -> list[Candidate]:
        """Return every layer at ``bits``, the first and last at ``ends`` if given."""
        last = len(self.inventory.layers) - 1
        return [
            Candidate.of(layer, ends if ends and k in (0, last) else bits, Scheme())
            for k, layer in enumerate(self.inventory.layers)
        ]

    def plan(self) -> tuple[Plan, float]:
        """Return the solved plan and its CPU minutes; made once, on 1,024 calibration images.

        A plan that lies there already, with its minutes beside it, is taken.
        """
        path = self.folder / f"plan-{self.average}.json"
        timing = path.with_suffix(".minutes")
        if not path.exists():
            start = time.process_time()
            x, y = images("calibration", 1024)
            with SqliteLedger(self.folder / "ledger.sqlite") as ledger:
                found = allocate(
                    load_model("resnet_cifar:resnet20"),
                    CalibrationSet(inputs=(x,), labels=y),
                    PlanRequest(
                        budgets=(f"{self.average} bits",),
                        weight_bits=WIDTHS,
                        corrections=(Correction.BATCH_NORM_STATISTICS,),
                        rounding="nearest",
                    ),
                    context=Context(ledger=ledger),
                )
            found.plans[0].save(path)
            timing.write_text(str((time.process_time() - start) / 60))
        return Plan.load(path), float(timing.read_text())

    def checkpoints(self, row: str, seed: int) -> Path:
        """Return the folder in which a run that was stopped left its state.

        The minutes of a row that was continued are those of its last part.
        """
        of = f"{self.settings.epochs}x{len(self.data)}"
        return self.folder / "checkpoints" / f"{row}-{seed}-{self.average}-{of}"

    def corrected(self, model: nn.Module, candidates: list[Candidate]) -> nn.Module:
        """Return the model quantized without training."""
        return apply_plan(
            model,
            self.inventory,
            candidates,
            corrections=[Correction.BATCH_NORM_STATISTICS],
            correction_data=self.correcting,
        )

    def own_statistics(self, learned: nn.Module) -> nn.Module:
        """Return a copy with batch-norm statistics of its weights, not of the quantized ones."""
        model = copy.deepcopy(learned).eval()
        reestimate_batch_norm(model, self.correcting)
        return model

    def run(self, row: str, seed: int) -> list[dict[str, object]]:
        """Return the result of one row, and of what it went through on the way."""
        start, before = time.process_time(), 0.0
        settings = replace(self.settings, seed=seed)
        name, _, method = (
            row.rpartition("-") if row.endswith(("-lsq", "-direct")) else (row, "", "")
        )
        if row == "nested":
            return self._nested(seed, settings)
        if row == "full":
            return [self._result(row, seed, 32 * self.inventory.n_weights, self.model, start)]
        if name in RECIPES or "from" in name:
            return self._learned(name, seed, settings)
        if name == "plan":
            plan, before = self.plan()
            candidates = [a.candidate for a in plan.assignments]
        elif name.startswith("ends"):
            candidates = self.uniform(2, ends=8)
        else:
            candidates = self.uniform(int(name[-1]))
        start = time.process_time()
        if not method:
            quantized = self.corrected(self.model, candidates)
            size = sum(c.size_bits for c in candidates)
            return [self._result(row, seed, size, quantized, start, before, candidates)]
        done = finetune(self.model, self.inventory, candidates, self.data, settings, method=method)
        return [
            self._result(
                row, seed, done.size_bits, done.module, start, before, candidates,
                done.record.epochs,
            )
        ]  # fmt: skip

    def _nested(self, seed: int, settings: TrainingSettings) -> list[dict[str, object]]:
        """Return a row for each width of one payload; its bytes are those of all of them."""
        start = time.process_time()
        modes = {f"W{b}": [b] * len(self.inventory.layers) for b in (2, 3, 4, 8)}
        nested = NestedModel(self.model, self.inventory.layers, modes)
        record = train(nested, self.model, self.data, settings)
        rows = []
        for mode, bits in modes.items():
            nested.select(mode)
            module = copy.deepcopy(nested.model).eval()
            for layer in self.inventory.layers:
                weight = from_matrix(nested.stored()[layer.name].dequantize(), layer)
                module.get_parameter(layer.weight_name).data.copy_(weight)
            size = sum(c.size_bits for c in nested.candidates())
            entry = record.epochs[record.best_epoch]["modes"][mode]
            row = self._result(
                f"nested, {bits[0]} bits", seed, size, module, start, 0.0,
                list(nested.candidates()), [entry],
            )  # fmt: skip
            rows.append(row)
        return rows

    def _learned(self, row: str, seed: int, settings: TrainingSettings) -> list[dict[str, object]]:
        recipe = row.removesuffix("-from-plan")
        options: dict[str, object] = {}
        before = 0.0
        if recipe != row:
            plan, before = self.plan()
            options["start"] = [a.candidate for a in plan.assignments]
        # Half of the epochs learn, half fine-tune: together as long as every other row.
        half = replace(settings, epochs=max(1, settings.epochs // 2))
        own = default_settings(recipe)
        learning = replace(
            half,
            quantizer_learning_rate=own.quantizer_learning_rate,
            quantizer_weight_decay=own.quantizer_weight_decay,
            optimizer=own.optimizer,
            schedule=own.schedule,
            learning_rate=own.learning_rate if own.optimizer == "sgd" else half.learning_rate,
        )
        limit = Budget.parse(f"{self.average} bits", self.inventory)
        start = time.process_time()
        learned = learn(
            self.model, self.inventory, self.data, limit, WIDTHS, recipe=recipe,
            settings=learning, finetuning=replace(half, epochs=settings.epochs - half.epochs),
            checkpoint_folder=self.checkpoints(row, seed),
            **options,
        )  # fmt: skip
        candidates = list(learned.candidates)
        return [
            self._result(
                row, seed, learned.plan.size_bits, learned.trained.module, start, before,
                candidates, learned.learning.epochs + learned.trained.record.epochs,
            ),
            self._result(
                f"{row}, before fine-tuning", seed, learned.plan.size_bits,
                self.corrected(self.own_statistics(learned.before), candidates), start, before,
                candidates,
            ) | {"minutes": None},
        ]  # fmt: skip

    def _result(
        self,
        row: str,
        seed: int,
        size_bits: int,
        module: nn.Module,
        start: float,
        before: float = 0.0,
        candidates: list[Candidate] | None = None,
        epochs: list[dict[str, object]] | None = None,
    ) -> dict[str, object]:
        minutes = (time.process_time() - start) / 60 + before
        return {
            "row": row,
            "seed": seed,
            "bytes": -(-size_bits // 8),
            "bits": size_bits / self.inventory.n_weights,
            "accuracy": self.accuracy(module),
            "holdout": epochs[-1]["holdout_accuracy"] if epochs else None,
            "minutes": round(minutes, 2),
            "epochs": self.settings.epochs,
            "images": len(self.data),
            "weight_bits": "".join(str(c.weight_bits) for c in candidates or ()),
        }


def table(results: list[dict[str, object]]) -> str:
    """Return the table: one line for each row, means over seeds."""
    lines = [
        "| way | bytes | bits/weight | test accuracy % | seeds | CPU min | weight bits (seed 0) |",
        "|---|---|---|---|---|---|---|",
    ]
    order = {name: k for k, name in enumerate(ROWS)}
    names = sorted(
        {str(r["row"]) for r in results}, key=lambda n: (order.get(n.split(",")[0], 99), n)
    )
    for name in names:
        found = sorted((r for r in results if r["row"] == name), key=lambda r: int(str(r["seed"])))
        scores = [float(str(r["accuracy"])) for r in found]
        shown = f"{statistics.mean(scores):.2f}"
        if len(scores) > 1:
            shown += f" ({', '.join(f'{s:.2f}' for s in scores)})"
        minutes = [float(str(r["minutes"])) for r in found if r["minutes"] is not None]
        label = name.replace(name.split(",")[0], ROWS.get(name.split(",")[0], name.split(",")[0]))
        lines.append(
            f"| {label} | {found[0]['bytes']:,} | {float(str(found[0]['bits'])):.3f} | {shown} | "
            f"{len(scores)} | {f'{statistics.mean(minutes):.1f}' if minutes else ''} | "
            f"{found[0]['weight_bits']} |"
        )
    return "\n".join(lines)


def read(path: Path) -> list[dict[str, object]]:
    """Return the results in a file; none if it is not there."""
    found: list[dict[str, object]] = json.loads(path.read_text()) if path.exists() else []
    return found


def main() -> None:
    """Run rows, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--results", type=Path, default=Path("training-results.json"))
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--images", type=int, default=16_384, help="training images")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--test", type=int, default=10_000, help="test images")
    parser.add_argument("--average", type=float, default=2.5, help="bits per weight")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--quantizer-rate", type=float, default=5e-3)
    parser.add_argument("--distillation", type=float, default=0.5)
    parser.add_argument("--mixed-precision", action="store_true", help="for processors with AMX")
    parser.add_argument("--holdout", action="store_true", help="leave the test images alone")
    args = parser.parse_args()
    if args.what == "table":
        print(table(read(args.results)))
        return
    args.results.parent.mkdir(parents=True, exist_ok=True)
    model = load_resnet(20)
    x, y = images("train_part", args.images)
    bench = Bench(
        model=model,
        inventory=discover(model, (x[:2],)),
        data=CalibrationSet(inputs=(x,), labels=y),
        correcting=CalibrationSet(inputs=(images("calibration", 1024)[0],)),
        settings=TrainingSettings(
            epochs=args.epochs,
            learning_rate=args.rate,
            quantizer_learning_rate=args.quantizer_rate,
            distillation=args.distillation,
            holdout_fraction=1 / 16,
            augmentation="shift_flip",
            mixed_precision=args.mixed_precision,
            channels_last=True,
        ),
        average=args.average,
        folder=args.results.parent,
        n_test=0 if args.holdout else args.test,
    )
    for row in args.rows.split(","):
        for seed in (int(s) for s in args.seeds.split(",")):
            for found in bench.run(row, seed):
                # Another run may have written meanwhile.
                known = read(args.results)
                known = [r for r in known if (r["row"], r["seed"]) != (found["row"], found["seed"])]
                known.append(found)
                print(json.dumps(found), flush=True)
                args.results.write_text(json.dumps(known, indent=1) + "\n")
            shutil.rmtree(bench.checkpoints(row, seed), ignore_errors=True)


if __name__ == "__main__":
    main()

"""KV caches: what keys and values lose in few bits, and budgets that hold weights and cache.

    python benchmarks/kv_cache.py                              # the tiny Llama of $BITQUOTA_DATA
    python benchmarks/kv_cache.py --model FOLDER --samples 8 --context 8192 --budgets "150 MB"

Groups of 64 for weights, one scale and offset for each head of a token for the cache; windows are
of tinyshakespeare.txt. First, KL per token with the keys, the values, and both of all layers at 8
and at 4 bits, measured on the hold-out windows, beside what the scores of single candidates add up
to. Then each budget for weights and cache together: a plan of both, and plans of the weights with
the whole cache at 16, 8 or 4 bits.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bitquota.candidates.storage import Granularity, ScaleFormat, Scheme
from bitquota.errors import BudgetTooSmall
from bitquota.measurement_setup import build_setup
from bitquota.models.load import load_model
from bitquota.models.text import text_windows
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate
from bitquota.sensitivity.metrics.gram_weighted import GramWeightedError
from bitquota.sensitivity.runners.stack import StackRunner
from resnet_cifar import data_folder

if TYPE_CHECKING:
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel

WEIGHTS = Scheme(granularity=Granularity.GROUP, group_size=64, scale_format=ScaleFormat.FP16)


def parts_alone(model: LoadedModel, samples: CalibrationSet, request: PlanRequest) -> None:
    """Print what keys, values and both lose, and the sum of scores."""
    setup = build_setup(model, samples, request)
    runner = setup.runner(setup.holdout)
    assert isinstance(runner, StackRunner)
    matrix = GramWeightedError().measure(setup.runner(), setup.table, setup.loss)
    rows = {
        (bits, part): [
            r
            for r, row in enumerate(setup.table.rows)
            if row.label == f"KV{bits}" and part in row.group
        ]
        for bits in (8, 4)
        for part in ("k_cache", "v_cache", "_cache")
    }
    changes = [
        {c.layer: c for r in own for c in setup.table.rows[r].candidates} for own in rows.values()
    ]
    full, *losses = runner.losses(0, [None, *changes], setup.loss)
    for ((bits, part), own), loss in zip(rows.items(), losses, strict=True):
        found = loss - full
        error = float(found.std() / len(found) ** 0.5)
        what = {"k_cache": "keys", "v_cache": "values"}.get(part, "both")
        print(
            f"{what:6} at {bits} bits: {float(found.mean()):.4g} ± {error:.2g}; scores add up to "
            f"{matrix.diagonal[own].sum():.4g}"
        )


def main() -> None:
    """Measure the parts of the cache, then joint budgets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="Hugging Face folder; by default the tiny Llama")
    parser.add_argument("--budgets", nargs="*", default=["1.6 MB", "1.75 MB"])
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounding", default="auto")
    chosen = parser.parse_args()
    folder = data_folder()
    path = chosen.model or str(folder / "llama_shakespeare")
    model = load_model(path)
    text = folder / "tinyshakespeare.txt"
    samples = text_windows(
        text.read_text(encoding="utf-8"),
        text,
        tokenizer=chosen.model or "bytes",
        length=chosen.length,
    )

    def request(**changed: object) -> PlanRequest:
        given = {
            "scheme": WEIGHTS,
            "samples": chosen.samples,
            "holdout_samples": chosen.samples,
            "effort": "quick",
            "context": chosen.context,
            "rounding": chosen.rounding,
        }
        return PlanRequest(**(given | changed))  # type: ignore[arg-type]

    parts_alone(model, samples, request(weight_bits=(32,), kv_bits=(4, 8)))
    for budget in chosen.budgets:
        for widths in ((4, 8, 16), (16,), (8,), (4,)):
            cache = "cache chosen" if len(widths) > 1 else f"cache at {widths[0]} bits"
            try:
                (plan,) = allocate(model, samples, request(budgets=(budget,), kv_bits=widths)).plans
            except BudgetTooSmall:
                print(f"{budget}, {cache}: no plan fits")
                continue
            assert plan.measured is not None
            loss = plan.measured
            print(
                f"{budget}, {cache}: {loss.mean:.4g} ± {loss.standard_error:.2g}; "
                f"weights {plan.effective_bits:.2f} bpw, cache {plan.cache_size_bits / 8e6:.3f} MB",
                flush=True,
            )


if __name__ == "__main__":
    main()

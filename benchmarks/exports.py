"""Exports of real plans: accuracy of the files, bytes as planned, overhead, and repeats.

``python benchmarks/exports.py`` makes plans for two networks of the shared data and exports each
twice: ResNet-20 for ``ort-cpu`` (3.5 average bits, or ``--bits``) and the tiny Llama for
``ct-vllm-humming`` and ``gguf-py``. It prints one table for each, and ends with code 1 where a bar
does not hold.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bitquota.context import Context, MemoryLedger
from bitquota.corrections import Correction
from bitquota.evaluate.scoring import score_plans
from bitquota.exports.export import export_plan, open_export
from bitquota.exports.export_report import REPORT_FILE
from bitquota.models.calibration import CalibrationSet
from bitquota.models.load import load_model
from bitquota.models.loaded import finish
from bitquota.models.text import load_text
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate
from resnet_cifar import calibration, data_folder, images, resnet20

if TYPE_CHECKING:
    from bitquota.exports.export import ExportReport
    from bitquota.models.loaded import LoadedModel
    from bitquota.plan import Plan

LARGEST_POINT = 0.05
"""Top-1 points that an exported file may lie from its fake-quantized model."""

LARGEST_OVERHEAD = 0.08
LARGEST_LOGIT = 1e-5


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One thing that must hold, and whether it did."""

    name: str
    got: str
    holds: bool


def main() -> None:
    """Run everything and print what held."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--samples", type=int, default=256, help="Images that measure the plan.")
    parser.add_argument("--bits", default="3.5", help="Average bits of ResNet-20.")
    parser.add_argument("--moved", action="store_true", help="Adjust its batch-norm statistics.")
    parser.add_argument("--windows", type=int, default=16, help="Windows of 64 bytes of text.")
    parser.add_argument("--skip-llama", action="store_true")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    bars = resnet(settings.test_images, settings.samples, settings.bits, moved=settings.moved)
    if not settings.skip_llama:
        bars += llama(settings.windows)
    print("\n| bar | measured | holds |\n| --- | --- | --- |")
    for bar in bars:
        print(f"| {bar.name} | {bar.got} | {'yes' if bar.holds else 'NO'} |")
    if not all(bar.holds for bar in bars):
        sys.exit(1)


def resnet(n_test: int, n_samples: int, bits: str, *, moved: bool) -> list[Bar]:
    """Plan ResNet-20 for ONNX Runtime, export it, and run the file."""
    model = finish(resnet20(), source="resnet20", architecture="CifarResNet")
    x, y = calibration()
    data = CalibrationSet(inputs=(x,), labels=y)
    request = PlanRequest(
        budgets=(f"{bits} bits",), target="ort-cpu", samples=n_samples, holdout_samples=n_samples,
        corrections=(Correction.BATCH_NORM_STATISTICS,) if moved else (),
    )  # fmt: skip
    made = allocate(model, data, request, context=Context(ledger=MemoryLedger()))
    (plan,), model = made.plans, made.with_weights(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        report, same = export_twice(model, plan, folder, data.first(64))
        test, labels = images("test", n_test)
        scores = score_plans(
            model,
            CalibrationSet(inputs=(test,), labels=labels),
            plans={"plan": plan},
            exported=[folder / "a"],
        )
    for score in scores:
        top = score.metrics["top1"]
        print(
            f"{score.kind}: top-1 {100 * top.mean:.2f} ± {100 * top.standard_error:.2f} %, "
            f"KL {score.metrics['kl'].mean:.5f}, weights {score.size_bits} bits"
        )
    by_kind = {score.kind: score for score in scores}
    apart = 100 * abs(by_kind["exported"].differences["plan"]["top1"].mean)
    return [
        Bar(
            name=f"top-1 of the file within {LARGEST_POINT} point on {n_test:,} images",
            got=f"{apart:.2f}",
            holds=apart <= LARGEST_POINT,
        ),
        *_bytes("ResNet-20, ort-cpu", plan, report, same=same),
        Bar(
            name=f"container overhead below {100 * LARGEST_OVERHEAD:.0f} %",
            got=f"{100 * report.container_overhead:.2f} % ({report.container_bytes:,} B)",
            holds=report.container_overhead < LARGEST_OVERHEAD,
        ),
    ]


def llama(n_windows: int) -> list[Bar]:
    """Plan the tiny Llama for two targets, export both, and run the folders."""
    model = load_model(str(data_folder() / "llama_shakespeare"))
    text = data_folder() / "tinyshakespeare.txt"
    data = load_text(text, tokenizer="bytes", length=64, n=4 * n_windows)
    bars = []
    for target, bits in (("ct-vllm-humming", (3, 4, 5)), ("gguf-py", ())):
        request = PlanRequest(
            budgets=("0.16x",),
            target=target,
            weight_bits=bits,
            samples=n_windows,
            holdout_samples=n_windows,
            refine=False,
        )
        made = allocate(model, data, request, context=Context(ledger=MemoryLedger()))
        (plan,), model = made.plans, made.with_weights(model)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            report, same = export_twice(model, plan, folder, data.first(8))
            module, _, _ = open_export(model, folder / "a")
            with torch.no_grad():
                finite = bool(torch.isfinite(module(*data.first(2).inputs)).all())
        gap = report.difference
        assert gap is not None
        bars += [
            Bar(
                name=f"Llama, {target}: logits of {report.runtime['name']} within {LARGEST_LOGIT}",
                got=f"{gap.maximum:.2g}",
                holds=finite and gap.maximum <= LARGEST_LOGIT,
            ),
            *_bytes(f"Llama, {target}", plan, report, same=same),
            _agreement(target, plan),
        ]
    return bars


def export_twice(
    model: LoadedModel, plan: Plan, folder: Path, samples: CalibrationSet
) -> tuple[ExportReport, bool]:
    """Export to ``a`` and ``b``; return a report, and whether all bytes but the reports' are equal.

    Reports hold measured speeds.
    """
    assert plan.target is not None
    for name in ("a", "b"):
        report = export_plan(model, plan, folder / name, target=plan.target.name, samples=samples)
    files = sorted(p.name for p in (folder / "a").iterdir() if p.name != REPORT_FILE)
    same = all((folder / "a" / f).read_bytes() == (folder / "b" / f).read_bytes() for f in files)
    return report, same and len(files) + 1 == len(list((folder / "b").iterdir()))


def _bytes(what: str, plan: Plan, report: ExportReport, *, same: bool) -> list[Bar]:
    quantized = [a.candidate for a in plan.assignments if a.candidate.weight_bits < 32]
    planned = sum(c.size_bits for c in quantized)
    return [
        Bar(
            name=f"{what}: stored weights take the plan's bits",
            got=f"{report.payload_bits:,} of {planned:,} in {len(report.tensors)} layers",
            holds=report.payload_bits == planned and len(report.tensors) == len(quantized),
        ),
        Bar(name=f"{what}: two exports are byte-identical", got=str(same), holds=same),
    ]


def _agreement(target: str, plan: Plan) -> Bar:
    """Check that q, k and v, and gate and up, have one format in every block."""
    formats: dict[tuple[str, str], set[str]] = {}
    fused = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "gate_up"}
    for a in plan.assignments:
        parent, _, last = a.layer.name.rpartition(".")
        if last in {*fused, "up_proj"}:
            label = replace(a.candidate, layer="").label
            formats.setdefault((parent, fused.get(last, "gate_up")), set()).add(label)
    mixed = [f"{parent}.{name}" for (parent, name), found in formats.items() if len(found) > 1]
    return Bar(
        name=f"Llama, {target}: fused siblings agree",
        got=f"{len(formats) - len(mixed)} of {len(formats)} groups",
        holds=not mixed and len(formats) == 12,
    )


if __name__ == "__main__":
    main()

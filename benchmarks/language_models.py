"""Plans of language models: passes, time and memory, and what they lose beside uniform mixes.

    python benchmarks/language_models.py                       # the tiny Llama of $BITQUOTA_DATA
    python benchmarks/language_models.py --model FOLDER --samples 64 --length 256 --test-windows 64
    python benchmarks/language_models.py --model FOLDER --memory 2GiB --samples 8 --no-test
    python benchmarks/language_models.py --target ct-vllm-nvfp4 --bits 4,8,32 --budgets "5.5 bpw"

Groups of 64, scales of 16 bits, widths 2 to 8, embeddings in full precision; with ``--target`` its
formats, a copy of the model in bfloat16, and the plan exported and run. Windows are of
tinyshakespeare.txt: calibration from its first nine tenths, tests from the rest. A row is a budget
and an effort: forward-equivalents over the calibration windows, CPU seconds of all ``--processes``
and of the one that waits for the others, the peak of its resident memory above that of the loaded
interpreter; then KL per token on unseen windows, of the plan and of
the uniform plan and the mixes of two widths of the same size, all rounded alike, and the paired
difference. A folder whose float32 weights exceed ``--memory`` is read from its files: then what was
read is shown as a multiple of them, and ``--no-test`` leaves out what needs all weights at once.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bitquota.candidates.budget import parse_bytes
from bitquota.candidates.storage import (
    FULL_PRECISION_BITS,
    Granularity,
    ScaleFormat,
    Scheme,
)
from bitquota.candidates.table import CandidateTable, spent_on
from bitquota.context import Context, MemoryLedger
from bitquota.exports.export import export_plan
from bitquota.measurement_setup import build_setup
from bitquota.models.load import load_within
from bitquota.models.loaded import inventory_of
from bitquota.models.text import text_windows
from bitquota.quantizers.quantized_model import QuantizedModel
from bitquota.request import PlanRequest
from bitquota.search.allocate import allocate
from bitquota.search.baselines import baseline_choices, uniform_mixes
from bitquota.sensitivity.losses import divergence
from resnet_cifar import data_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from bitquota.candidates.table import Candidate
    from bitquota.measurement_setup import Setup
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel
    from bitquota.plan import Plan
    from bitquota.search.allocate import Allocation
    from bitquota.search.neighborhood import Choice


GROUPS = Scheme(granularity=Granularity.GROUP, group_size=64, scale_format=ScaleFormat.FP16)


def processor_seconds() -> float:
    """Return what this process and those that it waited for took of processors."""
    return sum(os.times()[:4])


def resident() -> float:
    """Return the largest resident size of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def rivals(setup: Setup, size_bits: int) -> dict[str, Choice]:
    """Return the widest uniform plan and the mixes of two widths of at most a size.

    Or of the widest uniform plan that the budget allows, where a plan leaves a few bytes of it.
    """
    (budget,) = setup.budgets(setup.request.budgets[0])
    for name, choice in baseline_choices(setup.table).items():
        taken = tuple(setup.table.decode(choice))
        if name.startswith("uniform") and spent_on(budget.resource, taken) <= budget.available:
            size_bits = max(size_bits, sum(c.size_bits for c in taken))
    found = dict(uniform_mixes(setup.table, size_bits))
    found |= mixes_with_full_precision(setup, size_bits)
    for name, choice in baseline_choices(setup.table).items():
        size = sum(c.size_bits for c in setup.table.decode(choice))
        if name.startswith("uniform") and size <= size_bits:
            found["uniform"] = choice
    return found


def mixes_with_full_precision(setup: Setup, size_bits: int) -> dict[str, Choice]:
    """Return mixes of the smallest format and full precision, if that is on offer beside two."""
    widths = sorted({c.weight_bits for row in setup.table.rows for c in row.candidates})
    if widths[-1] != FULL_PRECISION_BITS or len(widths) < 3:
        return {}
    ends = (widths[0], widths[-1])
    rows = [row for row in setup.table.rows if row.candidates[0].weight_bits in ends]
    table = CandidateTable(rows=tuple(rows))
    return {
        name: choice_with(setup, set(table.decode(choice)).__contains__)
        for name, choice in uniform_mixes(table, size_bits).items()
    }


def export_and_run(model: LoadedModel, plan: Plan, target: str, test: CalibrationSet) -> None:
    """Export a plan, and print what ran the folder and how far its outputs are off."""
    with tempfile.TemporaryDirectory() as place:
        report = export_plan(
            model, plan, Path(place) / "out", target=target, samples=test.first(16)
        )
    assert report.difference is not None  # samples are given
    runtime = f"{report.runtime['name']} {report.runtime['version']}"
    print(
        f"        {runtime}: outputs {report.difference.relative:.1e} of the norm from the plan's"
    )


def in_bfloat16(folder: str, place: str) -> str:
    """Write a copy of a model's folder with weights in bfloat16, and return where."""
    for file in Path(folder).iterdir():
        if file.suffix == ".safetensors":
            weights = {name: w.bfloat16() for name, w in load(file.read_bytes()).items()}
            save_file(weights, Path(place) / file.name, metadata={"format": "pt"})
        elif file.name == "config.json":
            config = json.loads(file.read_text()) | {"dtype": "bfloat16"}
            (Path(place) / file.name).write_text(json.dumps(config))
        elif file.is_file():
            shutil.copy(file, place)
    return place


def run_peer(
    options: argparse.Namespace, script: str, folder: str, setup: Setup, *more: str
) -> bytes | None:
    """Run a tool on the calibration windows; returns what it wrote, or says why it wrote nothing.

    ``more`` begins with the tool's name; folder and windows follow it.
    """
    tool, *rest = more
    path = Path(__file__).with_name(script)
    with tempfile.TemporaryDirectory() as place:
        windows, out = Path(place) / "windows", Path(options.keep or place) / "-".join(more)
        if out.exists():
            return out.read_bytes()
        save_file({"tokens": setup.fit.inputs[0].long().contiguous()}, windows)
        command = [options.peers, path, tool, folder, windows, *rest, "64", out]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=options.peers_limit
            )
        except subprocess.TimeoutExpired:
            print(f"        {tool}: stopped after {options.peers_limit} s")
            return None
        if done.returncode:
            print(f"        {tool}: {done.stderr.strip().splitlines()[-1]}")
            return None
        return out.read_bytes()


def chosen_by_peers(
    options: argparse.Namespace, folder: str, setup: Setup, bits: str, size: int
) -> dict[str, Choice]:
    """Return what other tools choose, as choices, and say how large that is."""
    found: dict[str, Choice] = {}
    for tool in ("auto-round", "modelopt"):
        out = run_peer(options, "assignment_peers.py", folder, setup, tool, bits, options.bits)
        if out is None:
            continue
        about = json.loads(out)
        # Names differ by what wraps the model.
        widths = {
            layer.name: width
            for layer in setup.inventory.layers
            for name, width in about["bits"].items()
            if layer.name.endswith(name)
        }
        choice = choice_with(
            setup, lambda c, widths=widths: c.weight_bits == widths.get(c.layer, 32)
        )
        own = sum(c.size_bits for c in setup.table.decode(choice))
        print(f"        {about['tool']}: {about['seconds']} CPU s, {own / size:.4f} of the bytes")
        found[f"widths of {about['tool']}"] = choice
    return found


def choice_with(setup: Setup, wanted: Callable[[Candidate], bool]) -> Choice:
    """Return the choice all of whose candidates are wanted."""
    return tuple(
        next(k for k, row in enumerate(setup.table.rows[a:b]) if all(map(wanted, row.candidates)))
        for a, b in itertools.pairwise(setup.table.offsets)
    )


def compare(
    model: LoadedModel,
    calibration: CalibrationSet,
    request: PlanRequest,
    found: Allocation,
    test: CalibrationSet,
    options: argparse.Namespace,
    folder: str,
) -> None:
    """Print what a plan, the uniform mixes of its size, and peers lose on unseen windows."""
    setup = build_setup(model, calibration, request, context=Context(ledger=MemoryLedger()))
    (plan,), (weights,) = found.plans, found.weights
    chosen = {a.candidate.layer: a.candidate for a in plan.assignments}
    size = sum(candidate.size_bits for candidate in chosen.values())
    choices = {"plan": choice_with(setup, lambda c: chosen[c.layer] == c), **rivals(setup, size)}
    bits = request.budgets[0].split()[0]
    if options.peers:
        choices |= chosen_by_peers(options, folder, setup, bits, size)
    modules: dict[str, Callable[[], torch.nn.Module]] = {
        name: (lambda choice=choice: rounded(setup, choice)) for name, choice in choices.items()
    }
    if weights is not None:  # as it ships
        shipped = QuantizedModel.load(weights)
        modules["plan"] = lambda: shipped.put_into(copy.deepcopy(setup.module), setup.inventory)
    if options.peers and bits.isdigit():
        out = run_peer(options, "rounding_peers.py", folder, setup, options.preset, bits)
        if out is not None:
            modules[f"{options.preset}'s own file"] = lambda: with_weights(setup, load(out))
    for name, text in unseen_losses(setup.module, modules, test):
        print(f"        unseen: {name:34s} {text}", flush=True)


def unseen_losses(
    module: torch.nn.Module,
    modules: Mapping[str, Callable[[], torch.nn.Module]],
    test: CalibrationSet,
    digits: int = 4,
) -> Iterator[tuple[str, str]]:
    """Yield KL per token of each module, and the paired difference to the first, with errors."""
    made = {name: module() for name, module in modules.items()}
    losses: dict[str, list[torch.Tensor]] = {name: [] for name in made}
    with torch.no_grad():
        for part in test.batches(1):
            reference = module(*part.inputs)
            for name, quantized in made.items():
                losses[name].append(divergence(quantized(*part.inputs), reference).mean())
    first = torch.stack(next(iter(losses.values())))
    for name, found in losses.items():
        loss = torch.stack(found)
        gap, n = loss - first, len(loss) ** 0.5
        own = f"{float(loss.mean()):.{digits}f} +- {float(loss.std()) / n:.{digits}f}"
        more = f"{float(gap.mean()):+.{digits}f} +- {float(gap.std()) / n:.{digits}f}"
        yield name, f"{own}  {more}"


def rounded(setup: Setup, choice: Choice) -> torch.nn.Module:
    """Return a copy of the model as a choice ships."""
    made = setup.quantized_model(choice)
    assert made is not None
    return made.put_into(copy.deepcopy(setup.module), setup.inventory)


def with_weights(setup: Setup, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """Return a copy of the model with other weights for the layers that plans change."""
    module = copy.deepcopy(setup.module)
    open_layers = {c.layer for row in setup.table.rows for c in row.candidates}
    for layer in setup.inventory.layers:
        if layer.name in open_layers:
            # Names differ by what wraps the model.
            (name,) = (name for name in weights if layer.weight_name.endswith(name))
            module.get_parameter(layer.weight_name).data = weights[name]
    return module


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a Hugging Face folder; the tiny Llama if left out")
    parser.add_argument("--budgets", default="3 bits,3.5 bits")
    parser.add_argument("--efforts", default="quick,normal")
    parser.add_argument("--bits", default="2,3,4,5,6,8")
    parser.add_argument("--target", help="whose formats are on offer")
    parser.add_argument("--rounding", default="auto")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--test-windows", type=int, default=120)
    parser.add_argument("--memory", default="1GiB")
    parser.add_argument("--processes", type=int, default=1, help="that share the batches")
    parser.add_argument("--peers", metavar="PYTHON", help="of an environment with other tools")
    parser.add_argument("--peers-limit", type=int, default=3600, help="seconds for each of them")
    parser.add_argument("--preset", default="auto-round", help="whose own file is compared")
    parser.add_argument("--keep", help="folder for what they wrote, read when given again")
    parser.add_argument("--no-test", action="store_true", help="measure no unseen windows")
    return parser.parse_args()


def shakespeare(
    options: argparse.Namespace, tokenizer: str
) -> tuple[CalibrationSet, CalibrationSet]:
    """Return windows to calibrate on, thrice ``--samples``, and others of the text's last tenth."""
    file = data_folder() / "tinyshakespeare.txt"
    if not file.is_file():
        sys.exit(f"{file} is missing: set BITQUOTA_DATA")
    text = file.read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    calibration, test = (
        text_windows(part, file, tokenizer=tokenizer, length=options.length, n=n)
        for part, n in ((text[:cut], 3 * options.samples), (text[cut:], options.test_windows))
    )
    return calibration, test


def main() -> None:
    """Plan with each effort and budget and print a row for each."""
    options = arguments()
    folder = options.model or str(data_folder() / "llama_shakespeare")
    tokenizer = "bytes" if options.model is None else folder
    if options.model and not (Path(folder) / "tokenizer.json").exists():
        tokenizer = "bytes"
    calibration, test = shakespeare(options, tokenizer)
    memory = parse_bytes(options.memory)
    before = resident()
    if options.target:
        copied = tempfile.TemporaryDirectory()
        folder = in_bfloat16(folder, copied.name)
    model = load_within(folder, memory)
    names = [layer.name for layer in inventory_of(model.module, model, calibration).layers]
    print(f"{Path(folder).name}: {options.samples} windows of {options.length} tokens")
    for effort in options.efforts.split(","):
        for budget in options.budgets.split(","):
            request = PlanRequest(
                budgets=(budget,),
                weight_bits=tuple(int(bits) for bits in options.bits.split(",")),
                scheme=Scheme() if options.target else GROUPS,
                target=options.target,
                exclude=tuple(name for name in names if "embed" in name),
                samples=options.samples,
                holdout_samples=options.samples,
                rounding=options.rounding,
                effort=effort,
            )
            context = Context(
                ledger=MemoryLedger(), memory_bytes=memory, processes=options.processes
            )
            read = 0 if model.pages is None else model.pages.bytes_read
            started, own = processor_seconds(), time.process_time()
            found = allocate(model, calibration, request, context=context)
            seconds, own = processor_seconds() - started, time.process_time() - own
            (plan,) = found.plans
            print(
                f"{effort:7s} {budget:9s} {found.passes:5.1f} passes {seconds:7.0f} CPU s "
                f"({own:.0f} of them here) "
                f"{resident() - before:5.2f} GB  hold-out {plan.measured.mean:.4f} "
                f"+- {plan.measured.standard_error:.4f}",
                flush=True,
            )
            for baseline in plan.baselines:
                print(
                    f"        {baseline.name}: {baseline.paired_difference:+.4f} "
                    f"+- {baseline.paired_error:.4f} on the hold-out"
                )
            if model.pages is not None:
                size = sum(t.numel() * t.element_size() for t in model.pages.tensors.values())
                print(f"        weights read {(model.pages.bytes_read - read) / size:.1f} times")
            if not options.no_test:
                compare(model, calibration, request, found, test, options, folder)
            if options.target:
                export_and_run(found.with_weights(model), plan, options.target, test)


if __name__ == "__main__":
    main()

"""Commands that look before anything is measured: ``inspect`` and ``targets``."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from bitquota.candidates.caches import own_scheme
from bitquota.candidates.storage import FULL_PRECISION_BITS
from bitquota.candidates.table import Candidate
from bitquota.candidates.targets import TARGETS, target_by_name
from bitquota.candidates.targets.format_names import menu
from bitquota.candidates.targets.storage_format import ALL_KINDS, CONVOLUTIONS, EMBEDDINGS, LINEAR
from bitquota.cli import options as opt
from bitquota.cli import output
from bitquota.cli.loading import check_sources, load_samples
from bitquota.models.sources import ModelSource, model_source
from bitquota.report import text as report

if TYPE_CHECKING:
    from bitquota.candidates.targets import Target
    from bitquota.models.inspection import LayerSummary, ModelSummary


_SPARE = ("kind", "weights", "MACs", "tie", "least bpw")
"""Columns that a narrow terminal does without, the first one first."""


def inspect(
    model: opt.Model,
    target: opt.TargetName = None,
    samples: Annotated[
        str | None,
        typer.Option(
            "--samples", help="Calibration set, of which two samples are run to count operations."
        ),
    ] = None,
    tie: opt.Tie = None,
    exclude: opt.Exclude = None,
    tokenizer: opt.Tokenizer = None,
    length: opt.Length = opt.DEFAULT_LENGTH,
    digest: Annotated[
        bool,
        typer.Option(
            "--digest",
            help="Read the weights of a folder too: check that they are finite, and show the "
            "model's digest.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the layers of MODEL and the formats each may take, before anything is measured.

    Of a Hugging Face folder only config and headers are read, unless --digest or --samples is
    given.
    """
    chosen = None if target is None else target_by_name(target)
    check_sources(model, samples, tokenizer=tokenizer)
    from bitquota.models.inspection import inspect_model
    from bitquota.models.lean_transformers import lean_transformers
    from bitquota.models.load import load_model, load_outline

    if samples is not None or digest:
        loaded = load_model(model)
    else:
        # A factory is the user's code, which may need what transformers is imported without.
        is_folder = model_source(model) is ModelSource.FOLDER
        with lean_transformers() if is_folder else nullcontext():
            loaded = load_outline(model)
    data = None
    if samples is not None:
        data = load_samples(samples, model=model, tokenizer=tokenizer, length=length)
    found = inspect_model(
        loaded,
        target=chosen,
        samples=data,
        exclude=tuple(exclude or ()),
        ties=opt.parse_ties(tie),
    )
    if as_json:
        output.print_json(found.to_json())
        return
    counts = Counter(entry.layer.group for entry in found.layers if not entry.kept)
    shared = [group for group, n in counts.items() if n > 1]
    numbers = {group: str(k) for k, group in enumerate(shared, 1)}
    for line in report.quantizable_sentences(found.inventory):
        output.console.print(line, markup=False, highlight=False)
    output.print_rows(
        [_row(found, entry, numbers) for entry in found.layers],
        title=f"{found.architecture} of {found.source}",
        spare=_SPARE,
    )
    for line in _sentences(found, numbers):
        output.console.print(line, markup=False, highlight=False)
    if digest:
        output.console.print(f"Digest: {found.digest}", markup=False, highlight=False)


def targets(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the deployment targets and how their rules were checked: run, read or documented.

    --json has every format with its real bits per weight, shapes, ties and runtime options.
    """
    if as_json:
        output.print_json([target.to_json() for target in TARGETS.values()])
        return
    output.print_rows(
        [
            {
                "target": target.name,
                "bits": ",".join(map(str, sorted({f.weight_bits for f in target.formats} - {32}))),
                "formats (--bits)": ",".join(menu(target)),
                "layers": _kinds(target),
                "inputs": target.inputs,
                "on request": ", ".join(target.on_request),
                "export": target.exporter,
                "rules": target.verified,
                "what": target.summary,
            }
            for target in TARGETS.values()
        ],
        spare=("on request", "inputs", "formats (--bits)", "layers"),
    )
    not_run: dict[str, list[str]] = {}
    for target in TARGETS.values():
        if target.not_run:
            not_run.setdefault(target.not_run, []).append(target.name)
    rules = "run in the runtime, read in its code, or documented by it"
    output.console.print(f"Rules of a target were {rules}.", markup=False, highlight=False)
    for why, names in not_run.items():
        line = f"Not run in their runtimes: {', '.join(names)} ({why})."
        output.console.print(line, markup=False, highlight=False)


def _kinds(target: Target) -> str:
    """Return which kinds of layer a target quantizes, in a word each."""
    kinds = frozenset().union(
        *(f.kinds for f in target.formats if f.weight_bits != FULL_PRECISION_BITS)
    )
    kinds -= target.excluded_kinds
    if kinds == ALL_KINDS:
        return "all"
    families = {"conv": CONVOLUTIONS, "linear": LINEAR, "embedding": EMBEDDINGS}
    names = [name for name, family in families.items() if family <= kinds]
    rest = sorted(kinds - frozenset().union(*(families[name] for name in names)))
    return ", ".join([*names, *map(str, rest)])


def _row(found: ModelSummary, entry: LayerSummary, numbers: dict[str, str]) -> dict[str, str]:
    layer = entry.layer
    row = {
        "layer": layer.name,
        "kind": str(layer.kind),
        "shape": "×".join(map(str, layer.weight_shape)),
        "weights": f"{layer.n_weights:,}",
    }
    if found.counted:
        row["MACs"] = f"{layer.n_macs:,}"
    if numbers:
        row["tie"] = "" if entry.kept else numbers.get(layer.group, "")
    if found.target is not None or any(e.kept for e in found.layers):
        row["formats"] = "as it is" if entry.kept else ",".join(f.name for f in entry.formats)
    if found.target is not None:
        smallest = min((f.size_bits for f in entry.formats), default=0) / layer.n_weights
        row["least bpw"] = "" if entry.kept else f"{smallest:.3g}"
    return row


def _formats(found: ModelSummary) -> list[str]:
    """Return one line for each set of formats, with the range of real bits per weight."""
    ranges: dict[str, list[float]] = {}
    for entry in found.layers:
        for legal in entry.formats:
            ranges.setdefault(legal.name, []).append(legal.size_bits / entry.layer.n_weights)
    texts = []
    for name, sizes in ranges.items():
        low, high = f"{min(sizes):.4g}", f"{max(sizes):.4g}"
        texts.append(f"{name} {low}" if low == high else f"{name} {low} to {high}")
    return [f"Formats and real bits per weight: {', '.join(texts)}."] if texts else []


def _cache_sentences(found: ModelSummary) -> list[str]:
    """Return what the KV cache takes for a token, if the model has one."""
    if not found.caches:
        return []
    size = sum(cache.full_precision_bits for cache in found.caches) // 8
    quantized = {
        bits: sum(
            Candidate.of(cache, bits, own_scheme(cache, "head")).size_bits for cache in found.caches
        )
        for bits in (8, 4)
    }
    lines = [
        f"KV cache: keys and values of {len(found.caches) // 2} layers, {size:,} B for each token "
        "in half precision; "
        + ", ".join(f"{-(-bits // 8):,} B at {width} bits" for width, bits in quantized.items())
        + " with a scale and an offset for each head (--kv-bits)."
    ]
    windows = sorted({cache.window for cache in found.caches if cache.window is not None})
    for window in windows:
        n = sum(cache.window == window for cache in found.caches) // 2
        lines.append(f"  {n} of these layers keep the last {window:,} tokens at most.")
    if found.latent is not None:
        lines.append(
            f"  This is what transformers keeps. It is made of a latent of {found.latent} numbers "
            "for each token, which is what some runtimes keep instead."
        )
    return lines


def _sentences(found: ModelSummary, numbers: dict[str, str]) -> list[str]:
    inventory = found.inventory
    size = report.format_size(inventory.full_precision_bits)
    other = report.format_size(inventory.unquantized_bits)
    n_other = len(inventory.unquantized)
    lines = [
        (
            f"{len(found.layers)} layers, {inventory.n_weights:,} weights; whole model {size}, of "
            f"which {other} in {n_other} other tensors that ship as they are."
        )
    ]
    aliased = [entry.layer for entry in found.layers if entry.layer.aliases]
    lines += [
        f"{layer.weight_name} is also {', '.join(layer.aliases)}: counted once."
        for layer in aliased
    ]
    kept: dict[str, list[str]] = {}
    for entry in found.layers:
        if entry.kept:
            kept.setdefault(entry.kept, []).append(entry.layer.name)
    lines += [f"As they are: {', '.join(names)}: {reason}." for reason, names in kept.items()]
    if found.target is not None:
        assert found.smallest_bits is not None  # noqa: S101  # there is a target
        smallest = report.format_size(found.smallest_bits)
        ties = f"; layers of one tie share a format ({len(numbers)} ties)" if numbers else ""
        lines.append(f"Target {found.target.name}: smallest whole model {smallest}{ties}.")
        lines += _formats(found)
        lines.append(f"Its runtime takes the inputs of these layers: {found.target.inputs}.")
        if found.target.on_request:
            lines.append(
                f"Also possible, as options of plan: {', '.join(found.target.on_request)}."
            )
        notes = {f.note for entry in found.layers for f in entry.formats if f.note}
        lines += [f"Note: {note}." for note in sorted(notes)]
    elif found.suggestion.ties or found.suggestion.exclude:
        advice = [f"--tie {','.join(tie)}" for tie in found.suggestion.ties]
        advice += [f"--exclude {name}" for name in found.suggestion.exclude]
        lines.append(f"Usual here (a --target applies them): {' '.join(advice)}")
        lines += [f"  {reason}" for reason in found.suggestion.reasons]
    lines += _cache_sentences(found)
    if not found.counted:
        lines.append("Operations were not counted: give --samples, of which two are run.")
    return lines

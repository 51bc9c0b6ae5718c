"""Command-line options that several commands share, and how they become a ``PlanRequest``.

Design: docs/design/client.md
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from bitquota.candidates.budget import check_budgets
from bitquota.candidates.caches import CACHE_SCALES
from bitquota.candidates.cost_table import CostTable
from bitquota.candidates.storage import Granularity, Grid, ScaleFormat, ScaleRule, Scheme
from bitquota.candidates.targets import TARGETS, target_by_name
from bitquota.candidates.targets.format_names import agreed_bits
from bitquota.cli.bundles import Bundle, with_bundles
from bitquota.cli.here import Here
from bitquota.codec import OneOrMore
from bitquota.corrections import Correction
from bitquota.errors import InvalidInput
from bitquota.report.tracking import TRACKERS
from bitquota.request import (
    AUTO_LOSS,
    DEFAULT_WEIGHT_BITS,
    EFFORTS,
    FORMER_ROUNDINGS,
    ITERATIONS,
    LOSSES,
    MEASURES,
    PRECISIONS,
    ROUNDINGS,
    SOLVERS,
    PlanRequest,
)


def among(names: Iterable[str]) -> Callable[[str], list[str]]:
    """Return what completes the value of an option in a shell: those of ``names`` that fit."""
    known = tuple(names)
    return lambda incomplete: [name for name in known if name.startswith(incomplete)]


Model = Annotated[
    str,
    typer.Argument(
        help="Hugging Face folder, .gguf, .onnx or .pt2 file, or factory 'package.module:function'."
    ),
]
Calibration = Annotated[
    str,
    typer.Argument(help=".npz (no pickle), .safetensors, .jsonl, .parquet, .txt, or factory."),
]
Budgets = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        "-b",
        help="'3 bits', '3.6 bpw', '12 MiB', '0.25x', '2 GBitOps', 'act peak 96 KiB', with --table "
        "also '5 ms', '120 tok/s', '2 mJ'; use + for several that must hold together; repeat for "
        "several plans.",
    ),
]
Tables = Annotated[
    list[Path] | None,
    typer.Option(
        "--table",
        help="Cost table of 'bitquota profile', for budgets of time or energy. Repeatable.",
    ),
]
Bits = Annotated[
    str | None,
    typer.Option(
        "--bits",
        help=f"Permitted bit-widths, comma-separated ({','.join(map(str, DEFAULT_WEIGHT_BITS))}; "
        "with --target all that it stores). Also by name: int4, w8a8, or the target's formats "
        "(nvfp4,fp8; see 'targets').",
    ),
]
TargetName = Annotated[
    str | None,
    typer.Option(
        "--target",
        "-t",
        help="Deployment target: sets formats, shapes, ties and exclusions. See 'targets'.",
        autocompletion=among(TARGETS),
    ),
]
Activations = Annotated[
    str | None,
    typer.Option(
        "--activations",
        help="Also quantize layers' inputs: a bit-width, or several to choose from (4,8,16).",
    ),
]
ActivationFit = Annotated[
    str,
    typer.Option(
        "--activation-fit",
        help="Fit of input grids: mse (per tensor), or joint, chan, irls (weigh channels); token "
        "and token_float give each token of a linear layer its own range, of integers or FP8.",
    ),
]
KvBits = Annotated[
    str | None,
    typer.Option(
        "--kv-bits",
        help="Also plan the KV cache: bit-widths for the keys and the values of each attention "
        "layer, such as 4,8,16. Budgets in bytes then hold it, too; needs --context.",
    ),
]
KvScales = Annotated[
    str,
    typer.Option(
        "--kv-scales",
        help="One scale in the KV cache for each head of a token, or for a whole token "
        "(head, token); a target brings its own.",
    ),
]
ContextLength = Annotated[
    int, typer.Option("--context", help="Tokens of a sequence that the KV cache is counted for.")
]
Sequences = Annotated[
    int, typer.Option("--sequences", help="Sequences at a time that the KV cache is counted for.")
]
Fix = Annotated[
    list[str] | None,
    typer.Option(
        "--fix",
        help="LAYER=BITS, fixes a bit-width; patterns may match several layers. Repeatable.",
    ),
]
Tie = Annotated[
    list[str] | None,
    typer.Option("--tie", help="Comma-separated layers that must share a bit-width. Repeatable."),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option("--exclude", help="Layers to leave in full precision. Repeatable."),
]
Corrections = Annotated[
    list[Correction] | None,
    typer.Option("--correction", help="Correction to apply and ship with the plan. Repeatable."),
]
Samples = Annotated[
    int, typer.Option("--samples", help="Number of calibration samples to measure on.")
]
Holdout = Annotated[
    int,
    typer.Option(
        "--holdout", help="Number of further samples on which plans and baselines are compared."
    ),
]
LossName = Annotated[
    str,
    typer.Option(
        "--loss",
        help=f"auto (follows what the output is) or one of {', '.join(LOSSES)}; for several "
        "outputs also NAME=LOSS,NAME=LOSS.",
        autocompletion=among((AUTO_LOSS, *LOSSES)),
    ),
]
Outputs = Annotated[
    list[str] | None,
    typer.Option(
        "--output",
        help="An output that counts, NAME or NAME=WEIGHT (all with weight 1 if left out). "
        "Repeatable.",
    ),
]
MeasureName = Annotated[
    str,
    typer.Option(
        "--measure",
        help=f"One of {', '.join(MEASURES)}; see 'bitquota compare'.",
        autocompletion=among(MEASURES),
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        "--precision",
        help=f"Precision of measured passes: {' or '.join(PRECISIONS)} (GPU).",
        autocompletion=among(PRECISIONS),
    ),
]
Imatrix = Annotated[
    Path | None,
    typer.Option("--imatrix", help="llama.cpp importance matrix (.dat) to fit scales with."),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        help="What a measurement may keep in memory, such as '4 GiB' (default: 1 GiB). Weights "
        "of a folder that would take more stay in their files.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Measure nothing: say how many passes, how long and how much memory it would take.",
    ),
]
Effort = Annotated[
    str,
    typer.Option(
        "--effort",
        help=f"How much work: {', '.join(EFFORTS)}. quick takes a tenth of the time of normal.",
        autocompletion=among(EFFORTS),
    ),
]
Refine = Annotated[
    bool,
    typer.Option(
        "--refine/--no-refine", help="Measure again around the plan found, and solve again."
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed for samples and solver.")]
GridName = Annotated[Grid, typer.Option("--grid", help="Quantization grid of the weights.")]
GranularityName = Annotated[
    Granularity, typer.Option("--granularity", help="Which weights share one scale.")
]
GroupSize = Annotated[
    int | None, typer.Option("--group-size", help="Weights per group, with --granularity group.")
]
ScaleRuleName = Annotated[ScaleRule, typer.Option("--scale-rule", help="How scales are fitted.")]
ScaleFormatName = Annotated[
    ScaleFormat, typer.Option("--scale-format", help="How scales are stored.")
]
RoundingName = Annotated[
    str,
    typer.Option(
        "--rounding",
        help="How weights are rounded: nearest; gptq or gpfq: with error feedback, layer after "
        "layer; qep: gptq that also makes up for the error of earlier layers; auto: qep, or "
        "nearest where that measures better (compare: nearest); learned: qep, then --iterations "
        "steps of gradients for each block. All but nearest write the quantized weights beside "
        "the plan.",
        autocompletion=among(ROUNDINGS),
    ),
]
Iterations = Annotated[
    int, typer.Option("--iterations", help="Steps of learned rounding for each block.")
]
Allow = Annotated[
    str | None,
    typer.Option(
        "--allow",
        help="What layers may become beside bit-widths, comma-separated: prune (zeros, their mean "
        "output folded into the bias, with --row-widths single rows too; for ref-int and ONNX) and "
        "2:4 (two of every four weights, with their places; for ref-int). Off by default.",
    ),
]
RowWidths = Annotated[
    int,
    typer.Option(
        "--row-widths",
        help="Bit-widths that the output channels (rows) of one layer may have at most: with 2 or "
        "more, channels that matter less get fewer bits. For ref-int and ONNX.",
    ),
]
SolverName = Annotated[
    str, typer.Option("--solver", help="Solver backend.", autocompletion=among(SOLVERS))
]
Gap = Annotated[float, typer.Option("--gap", help="Stop at this relative optimality gap.")]
Robust = Annotated[
    float,
    typer.Option(
        "--robust",
        help="Add this many standard errors to every term of the matrix, so that noise is not "
        "taken for gain; 0 solves the means.",
    ),
]
TimeLimit = Annotated[
    float | None,
    typer.Option("--time-limit", help="Time limit of one solve in seconds; none by default."),
]
LogTo = Annotated[
    str | None,
    typer.Option(
        "--log-to",
        help="Experiment tracker to log to: mlflow or wandb (needs the extra of that name).",
        autocompletion=among(TRACKERS),
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, …")]
ProcessCount = Annotated[
    int,
    typer.Option(
        "--processes",
        min=1,
        max=4,
        help="Processes of one thread that share the batches of a language model on the CPU; the "
        "plan is that of one such process.",
    ),
]
LedgerPath = Annotated[
    Path | None,
    typer.Option(
        "--ledger", help="Measurement cache to reuse and extend (default: in your cache folder)."
    ),
]


Tokenizer = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        help="For texts: folder with tokenizer.json or .gguf (default: the model's), or 'bytes'.",
    ),
]
Length = Annotated[int, typer.Option("--length", help="For texts: tokens per sample.")]
Mix = Annotated[
    list[str] | None,
    typer.Option("--mix", help="Another calibration set, mixed into CALIBRATION (repeatable)."),
]
Shares = Annotated[
    str | None,
    typer.Option(
        "--shares",
        help="Shares of CALIBRATION and of each --mix among the samples, such as 2,1 (default: "
        "equal).",
    ),
]

DEFAULT_LENGTH = 128

Server = Annotated[
    str | None,
    typer.Option(
        "--server", envvar="BITQUOTA_SERVER", help="Run on this server instead of locally."
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", envvar="BITQUOTA_API_KEY", help="API key for --server."),
]


def parse_bits(text: str | None, option: str = "--bits") -> tuple[int, ...]:
    """Return ``2,3,4`` as numbers, nothing as none; raises ``InvalidInput``."""
    if text is None:
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as err:
        msg = f"{option} must be whole numbers separated by commas, such as 2,4,8; got '{text}'"
        raise InvalidInput(msg, bits=text) from err


def _named_bits(options: Mapping[str, Any]) -> tuple[tuple[int, ...], OneOrMore | None]:
    """Return the bit-widths of weights and of inputs that --bits and --activations ask for."""
    text, inputs = options["bits"], parse_bits(options["activations"], "--activations")
    asked = inputs[0] if len(inputs) == 1 else inputs or None
    if text is None:
        return (), asked
    target = None if options["target"] is None else target_by_name(options["target"])
    return agreed_bits(text.split(","), target, asked, "--bits", "--activations")


def parse_fixed(items: list[str] | None) -> dict[str, int]:
    """Return ``LAYER=BITS`` items as a mapping; raises ``InvalidInput``."""
    fixed: dict[str, int] = {}
    for item in items or []:
        pattern, separator, bits = item.rpartition("=")
        if not separator or not pattern or not bits.isdigit():
            msg = f"--fix must read LAYER=BITS, such as 'head=8'; got '{item}'"
            raise InvalidInput(msg, fix=item)
        fixed[pattern] = int(bits)
    return fixed


def parse_ties(items: list[str] | None) -> tuple[tuple[str, ...], ...]:
    """Return comma-separated patterns as tuples."""
    return tuple(tuple(part.strip() for part in item.split(",")) for item in items or [])


_REQUEST: dict[str, tuple[Any, Any]] = {
    "budgets": (Budgets, None),
    "tables": (Tables, None),
    "target": (TargetName, None),
    "bits": (Bits, None),
    "activations": (Activations, None),
    "activation_fit": (ActivationFit, "mse"),
    "kv_bits": (KvBits, None),
    "kv_scales": (KvScales, CACHE_SCALES[0]),
    "context": (ContextLength, 0),
    "sequences": (Sequences, 1),
    "fix": (Fix, None),
    "tie": (Tie, None),
    "exclude": (Exclude, None),
    "corrections": (Corrections, None),
    "samples": (Samples, 512),
    "holdout": (Holdout, 512),
    "loss": (LossName, AUTO_LOSS),
    "outputs": (Outputs, None),
    "measure_name": (MeasureName, "auto"),
    "effort": (Effort, "normal"),
    "refine": (Refine, True),
    "seed": (Seed, 0),
    "grid": (GridName, Grid.SYMMETRIC),
    "granularity": (GranularityName, Granularity.CHANNEL),
    "group_size": (GroupSize, None),
    "scale_rule": (ScaleRuleName, ScaleRule.LEAST_SQUARES),
    "scale_format": (ScaleFormatName, ScaleFormat.FP32),
    "rounding": (RoundingName, "auto"),
    "iterations": (Iterations, ITERATIONS),
    "allow": (Allow, None),
    "row_widths": (RowWidths, 1),
    "precision": (Precision, "fp32"),
    "solver": (SolverName, "auto"),
    "gap": (Gap, 1e-4),
    "time_limit": (TimeLimit, None),
    "robust": (Robust, 0.0),
}
_HERE: dict[str, tuple[Any, Any]] = {
    "tokenizer": (Tokenizer, None),
    "length": (Length, DEFAULT_LENGTH),
    "mix": (Mix, None),
    "shares": (Shares, None),
    "device": (Device, "auto"),
    "ledger": (LedgerPath, None),
    "imatrix": (Imatrix, None),
    "memory": (Memory, None),
    "processes": (ProcessCount, 1),
    "server": (Server, None),
    "api_key": (ApiKey, None),
}


def with_options(**without: object) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options that make its ``request`` and ``here``.

    Each of the two parameters becomes its options, in one order and with one set of defaults for
    all commands; the command is called with the ``PlanRequest`` and the ``Here`` that they make.

    Args:
        **without: Options of a request that the command does not offer, and their values.
    """
    request = {name: option for name, option in _REQUEST.items() if name not in without}
    bundled = with_bundles(
        request=Bundle(options=request, make=lambda chosen: plan_request(without | chosen)),
        here=Bundle(options=_HERE, make=lambda chosen: Here(**chosen)),
    )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def checked(**values: Any) -> None:  # noqa: ANN401  # whatever the options hold
            here: Here | None = values.get("here")
            if "request" in values:
                is_here = here is None or here.server is None
                _check(values["request"], budgets="budgets" in request, here=is_here)
            if here is not None:
                here.check(values["model"], values["calibration"])
            command(**values)

        return bundled(checked)

    return decorate


def _check(request: PlanRequest, *, budgets: bool, here: bool) -> None:
    """Raise what would be told only after the model was loaded, or after the measurement."""
    if budgets:
        check_budgets(request.budgets, request.tables)
    if request.target is not None:
        target = target_by_name(request.target)
        if request.kv_bits:
            target.require_cache()
        if request.row_widths > 1:
            target.require_rows()
        target.require_zero_bits(request.allow)
    if here and request.solver not in {"auto", "bitquota"}:
        from bitquota.solver.backends import installed_backend

        installed_backend(request.solver)


def plan_request(options: Mapping[str, Any]) -> PlanRequest:
    """Return the request that the options of ``with_options`` describe.

    Raises:
        InvalidInput: Values that do not hold.
    """
    weight_bits, activation_bits = _named_bits(options)
    return PlanRequest(
        budgets=tuple(options["budgets"] or ()),
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        activation_fit=options["activation_fit"],
        kv_bits=parse_bits(options["kv_bits"], "--kv-bits"),
        kv_scales=options["kv_scales"],
        context=options["context"],
        sequences=options["sequences"],
        scheme=Scheme(
            grid=options["grid"],
            granularity=options["granularity"],
            group_size=options["group_size"],
            scale_rule=options["scale_rule"],
            scale_format=options["scale_format"],
        ),
        rounding=FORMER_ROUNDINGS.get(options["rounding"], options["rounding"]),
        iterations=options["iterations"],
        allow=tuple(part.strip() for part in (options["allow"] or "").split(",") if part.strip()),
        row_widths=options["row_widths"],
        fixed=parse_fixed(options["fix"]),
        ties=parse_ties(options["tie"]),
        exclude=tuple(options["exclude"] or ()),
        corrections=tuple(options["corrections"] or ()),
        loss=options["loss"],
        outputs=tuple(options["outputs"]) if options["outputs"] else None,
        measure=options["measure_name"],
        effort=options["effort"],
        refine=options["refine"],
        samples=options["samples"],
        holdout_samples=options["holdout"],
        seed=options["seed"],
        precision=options["precision"],
        solver=options["solver"],
        gap=options["gap"],
        time_limit_s=options["time_limit"],
        robust=options["robust"],
        tables=tuple(CostTable.load(path) for path in options["tables"] or ()),
        target=options["target"],
    )

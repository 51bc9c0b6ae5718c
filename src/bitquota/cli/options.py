"""Command-line options that several commands share, and how they become a ``PlanRequest``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from bitquota.corrections import Correction
from bitquota.errors import InvalidInput
from bitquota.request import DEFAULT_WEIGHT_BITS, PlanRequest
from bitquota.storage import Granularity, Grid, Rounding, ScaleFormat, ScaleRule, Scheme

Model = Annotated[
    str,
    typer.Argument(
        help="Hugging Face folder, .onnx or .pt2 file, or factory 'package.module:function'."
    ),
]
Calibration = Annotated[
    str,
    typer.Argument(help=".npz (no pickle), .safetensors, .txt, .jsonl, .parquet, or factory."),
]
Budgets = Annotated[
    list[str] | None,
    typer.Option(
        "--budget",
        "-b",
        help="'3 bits', '3.6 bpw', '12 MiB', '0.25x', '2 GBitOps'; join with + what must hold "
        "together; repeat for several plans.",
    ),
]
Bits = Annotated[
    str | None,
    typer.Option(
        "--bits",
        help=f"Bit-widths on offer, comma-separated [{','.join(map(str, DEFAULT_WEIGHT_BITS))}; "
        "with --target all that it stores].",
    ),
]
TargetName = Annotated[
    str | None,
    typer.Option(
        "--target",
        "-t",
        help="Deployment target: its formats, legal shapes, ties and exclusions. See 'targets'.",
    ),
]
Activations = Annotated[
    int | None, typer.Option("--activations", help="Bit-width of every layer's input.")
]
Fix = Annotated[
    list[str] | None,
    typer.Option("--fix", help="LAYER=BITS; the pattern may match several layers. Repeatable."),
]
Tie = Annotated[
    list[str] | None,
    typer.Option("--tie", help="Comma-separated layers that must share a bit-width. Repeatable."),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option("--exclude", help="Layers that stay in full precision. Repeatable."),
]
Corrections = Annotated[
    list[Correction] | None,
    typer.Option("--correction", help="Correction that ships with the plan. Repeatable."),
]
Samples = Annotated[int, typer.Option("--samples", help="Calibration samples to measure on.")]
Holdout = Annotated[
    int, typer.Option("--holdout", help="Further samples to compare plan and baselines on.")
]
LossName = Annotated[str, typer.Option("--loss", help="kl, cross_entropy, mse or cosine.")]
MeasureName = Annotated[
    str, typer.Option("--measure", help="auto, gram, pairs, diagonal or tangent.")
]
Refine = Annotated[
    bool,
    typer.Option(
        "--refine/--no-refine", help="Measure anew around the plan found, and solve again."
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Of samples and solver.")]
GridName = Annotated[Grid, typer.Option("--grid", help="Integer grid of the weights.")]
GranularityName = Annotated[
    Granularity, typer.Option("--granularity", help="Weights that share one scale.")
]
GroupSize = Annotated[int | None, typer.Option("--group-size", help="With --granularity group.")]
ScaleRuleName = Annotated[ScaleRule, typer.Option("--scale-rule", help="How scales are fitted.")]
ScaleFormatName = Annotated[
    ScaleFormat, typer.Option("--scale-format", help="How scales are stored.")
]
RoundingName = Annotated[Rounding, typer.Option("--rounding", help="How weights are rounded.")]
SolverName = Annotated[str, typer.Option("--solver", help="Solver backend.")]
Gap = Annotated[float, typer.Option("--gap", help="Relative optimality gap to stop at.")]
TimeLimit = Annotated[
    float | None, typer.Option("--time-limit", help="Seconds for one solve; none by default.")
]
LogTo = Annotated[
    str | None,
    typer.Option("--log-to", help="Experiment tracker to log to: mlflow (bitquota[mlflow])."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, …")]
LedgerPath = Annotated[
    Path | None,
    typer.Option("--ledger", help="Where measurements are kept and reused [the cache folder]."),
]


Tokenizer = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        help="For texts: folder with tokenizer.json [the model's], or 'bytes'.",
    ),
]
Length = Annotated[int, typer.Option("--length", help="For texts: tokens per sample.")]
DEFAULT_LENGTH = 128

Server = Annotated[
    str | None,
    typer.Option("--server", envvar="BITQUOTA_SERVER", help="Run on this server, not here."),
]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", envvar="BITQUOTA_API_KEY", help="Key for --server."),
]


def default_ledger() -> Path:
    """Return the ledger in the user's cache folder (``XDG_CACHE_HOME``, or ``~/.cache``)."""
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(base) if base else Path.home() / ".cache") / "bitquota"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "ledger.sqlite"


def parse_bits(text: str | None) -> tuple[int, ...]:
    """Return ``2,3,4`` as numbers, nothing as none; raises ``InvalidInput``."""
    if text is None:
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as err:
        msg = f"--bits must be whole numbers separated by commas, such as 2,4,8; got '{text}'"
        raise InvalidInput(msg, bits=text) from err


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


def plan_request(
    *,
    budgets: list[str] | None,
    bits: str | None,
    activations: int | None,
    fix: list[str] | None,
    tie: list[str] | None,
    exclude: list[str] | None,
    corrections: list[Correction] | None,
    samples: int,
    holdout: int,
    loss: str,
    measure: str,
    seed: int,
    scheme: Scheme,
    refine: bool = True,
    solver: str = "auto",
    gap: float = 1e-4,
    time_limit: float | None = None,
    target: str | None = None,
) -> PlanRequest:
    """Return the request that the options describe; raises ``InvalidInput``."""
    return PlanRequest(
        budgets=tuple(budgets or ()),
        weight_bits=parse_bits(bits),
        activation_bits=activations,
        scheme=scheme,
        fixed=parse_fixed(fix),
        ties=parse_ties(tie),
        exclude=tuple(exclude or ()),
        corrections=tuple(corrections or ()),
        loss=loss,
        measure=measure,
        refine=refine,
        samples=samples,
        holdout_samples=holdout,
        seed=seed,
        solver=solver,
        gap=gap,
        time_limit_s=time_limit,
        target=target,
    )

"""Plans out: ``export``."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitquota.candidates.targets import TARGETS
from bitquota.cli import options as opt
from bitquota.cli import output, remote
from bitquota.cli.here import memory_limit
from bitquota.cli.loading import check_sources, load_samples
from bitquota.cli.written import require_folder
from bitquota.errors import InvalidInput
from bitquota.exports.names import EXPORT_FORMATS, check_folder, format_for
from bitquota.plan import Plan, weights_near
from bitquota.report.model_card import export_sentences, write_card

if TYPE_CHECKING:
    from bitquota.exports.export import ExportReport


def export(
    model: opt.Model,
    plan_file: Annotated[
        Path, typer.Argument(metavar="PLAN", help="Plan written by 'bitquota plan'.")
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder to write; it must be new or empty.")
    ],
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "-t",
            help="Deployment target whose rules apply (default: the plan's own).",
            autocompletion=opt.among(TARGETS),
        ),
    ] = None,
    format_name: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="onnx-qdq, onnx-matmulnbits, openvino, compressed-tensors, gguf, mlx, "
            "ref-int, or a configuration for another tool (the target's).",
            autocompletion=opt.among(EXPORT_FORMATS),
        ),
    ] = None,
    samples: Annotated[
        str | None,
        typer.Option(
            "--samples",
            help="Calibration set; a few samples are run to compare the files with the plan.",
        ),
    ] = None,
    correction_data: Annotated[
        str | None,
        typer.Option(
            "--correction-data",
            help="Unlabelled samples to compute the plan's corrections from (default: --samples).",
        ),
    ] = None,
    imatrix: opt.Imatrix = None,
    tokenizer: opt.Tokenizer = None,
    length: opt.Length = opt.DEFAULT_LENGTH,
    memory: opt.Memory = None,
    server: opt.Server = None,
    api_key: opt.ApiKey = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the export report as JSON.")
    ] = False,
) -> None:
    """Write PLAN as files that a runtime loads, read them back, run them, and print a report.

    The folder is created whole, with plan.json, receipt.json (the report) and README.md (a model
    card), or not at all: if it is a byte larger than planned or its output differs from fake
    quantization, the command fails.
    """
    limit = memory_limit(memory)
    plan = Plan.load(plan_file)
    if target is None and format_name is None and plan.target is not None:
        target = plan.target.name
    format_for(format_name, target)
    check_folder(out)
    require_folder(out.parent, "--out")
    check_sources(
        model, samples, correction_data, tokenizer=tokenizer, imatrix=imatrix, server=server
    )

    # Export, on a server or here.
    if server is not None:
        if memory is not None:
            msg = "--memory is used on this machine only; leave --server out, or --memory"
            raise InvalidInput(msg)
        if imatrix is not None or tokenizer is not None:
            msg = (
                "--imatrix and --tokenizer are used on this machine only; leave --server out, or "
                "them"
            )
            raise InvalidInput(msg)
        made = remote.export(
            server,
            api_key,
            {"format": format_name, "target": target},
            model,
            plan_file,
            out,
            samples=samples,
            correction_data=correction_data,
        )
    else:
        from bitquota.exports.export import export_plan
        from bitquota.models.load import load_within

        loaded = load_within(model, limit)
        loaded = replace(loaded, imatrix=imatrix, weights=weights_near([plan_file]))
        data = correcting = None
        if samples is not None:
            data = load_samples(samples, model=model, tokenizer=tokenizer, length=length)
        if correction_data is not None:
            correcting = load_samples(
                correction_data, model=model, tokenizer=tokenizer, length=length
            )
        made = export_plan(
            loaded,
            plan,
            out,
            format_name=format_name,
            target=target,
            samples=data,
            correction_data=correcting,
        )
        write_card(out, plan, made)
    output.messages.print(f"wrote {out}", highlight=False)
    if as_json:
        output.print_json(made.to_json())
        return
    print_report(made)


def print_report(made: ExportReport) -> None:
    """Print what was written, read back and compared, in a few lines."""
    output.print_rows(
        [
            {"file": f.name, "bytes": f"{f.size_bytes:,}", "sha256": f.digest[7:19]}
            for f in made.files
        ]
    )
    kinds: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for tensor in made.tensors:
        key = tensor.planned, re.sub(r" \d+(x\d+)*$", "", tensor.stored)
        kinds.setdefault(key, []).append((tensor.planned_bits, tensor.actual_bits))
    output.print_rows(
        [
            {
                "planned": planned,
                "read back as": stored,
                "layers": str(len(sizes)),
                "planned bits": f"{sum(a for a, _ in sizes):,}",
                "stored bits": f"{sum(b for _, b in sizes):,}",
            }
            for (planned, stored), sizes in kinds.items()
        ]
    )
    for line in export_sentences(made):
        output.console.print(line, markup=False, highlight=False)

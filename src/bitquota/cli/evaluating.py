"""Models, plans and exported files on one set: ``evaluate``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitquota.cli import options as opt
from bitquota.cli import output, remote
from bitquota.cli.loading import check_sources, load_samples
from bitquota.context import Context
from bitquota.errors import InvalidInput
from bitquota.exports.export_report import ExportReport
from bitquota.plan import Plan, weights_near
from bitquota.report import text as report

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bitquota.evaluate.scores import Score


def evaluate(
    model: opt.Model,
    data: Annotated[
        str,
        typer.Argument(
            help="Labelled samples or text not used to make a plan; same formats as CALIBRATION."
        ),
    ],
    plans: Annotated[
        list[Path] | None,
        typer.Option("--plan", help="Plan to run fake-quantized. Repeatable."),
    ] = None,
    exported: Annotated[
        list[Path] | None,
        typer.Option("--exported", help="Exported folder to run. Repeatable."),
    ] = None,
    original: Annotated[
        str | None,
        typer.Option(
            help="Model that MODEL was trained from; full precision and uniform plans are then "
            "those of this one."
        ),
    ] = None,
    correction_data: Annotated[
        str | None,
        typer.Option("--correction-data", help="Unlabelled samples to compute corrections from."),
    ] = None,
    uniform: Annotated[
        bool,
        typer.Option(
            "--uniform/--no-uniform", help="Also run the uniform plan of at most each plan's size."
        ),
    ] = True,
    with_baselines: Annotated[
        bool, typer.Option("--baselines", help="Also run each plan's other baselines.")
    ] = False,
    embedding: Annotated[
        bool, typer.Option("--embedding", help="The output is an embedding, not logits.")
    ] = False,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            help="Own metric 'package.module:function' of (output, labels), one number for each "
            "sample. Repeatable.",
        ),
    ] = None,
    imatrix: opt.Imatrix = None,
    tokenizer: opt.Tokenizer = None,
    length: opt.Length = opt.DEFAULT_LENGTH,
    device: opt.Device = "auto",
    server: opt.Server = None,
    api_key: opt.ApiKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run MODEL on DATA in full precision, under each plan, and as each exported file.

    Metrics come with standard errors. Differences to full precision and to the widest uniform plan
    of at most the same size are paired by sample.
    """
    check_sources(model, data, correction_data, tokenizer=tokenizer, imatrix=imatrix, server=server)
    if original is not None:
        check_sources(original, server=server)
    loaded_plans = {str(path): Plan.load(path) for path in plans or []}
    for folder in exported or []:
        ExportReport.load(folder)  # raises where nothing was exported

    # Measure, on a server or here.
    if server is not None:
        if exported or metrics or imatrix:
            msg = (
                "exported files, own metrics and importance matrices are read where they lie: "
                "leave --exported, --metric and --imatrix out, or --server"
            )
            raise InvalidInput(msg)
        n_samples, scores = remote.scores(
            server,
            api_key,
            {"uniform": uniform, "baselines": with_baselines, "embedding": embedding},
            model,
            data,
            plan_files=plans or [],
            original=original,
            correction_data=correction_data,
        )
    else:
        from bitquota.evaluate.scoring import score_plans
        from bitquota.models.factory import find_function
        from bitquota.models.load import load_model
        from bitquota.models.loaded import check_model

        custom = {
            spec.partition(":")[2]: find_function(spec, InvalidInput) for spec in metrics or []
        }
        loaded = replace(load_model(model), imatrix=imatrix, weights=weights_near(plans or ()))
        for path, plan in loaded_plans.items():
            if note := check_model(plan, loaded):
                output.say(f"{path}: {note}")
        samples = load_samples(data, model=model, tokenizer=tokenizer, length=length)
        correcting = None
        if correction_data is not None:
            correcting = load_samples(
                correction_data, model=model, tokenizer=tokenizer, length=length
            )
        scores = score_plans(
            loaded,
            samples,
            plans=loaded_plans,
            exported=tuple(exported or ()),
            original=None if original is None else load_model(original),
            correction_data=correcting,
            with_uniform=uniform,
            with_baselines=with_baselines,
            kind="embedding" if embedding else "logits",
            custom=custom,
            context=Context(device=device),
        )
        n_samples = len(samples)
        fed = any(plan.rounding != "nearest" for plan in loaded_plans.values())
        if uniform and fed and correcting is None:
            output.say(
                "no uniform plan is shown beside plans whose weights are rounded with feedback: "
                "give the calibration set with --correction-data"
            )
    if as_json:
        output.print_json([score.to_json() for score in scores])
        return
    print_scores(scores, title=f"{n_samples} samples of {data}")


def print_scores(scores: Sequence[Score], title: str = "") -> None:
    """Print one column for each model, one row for each metric, and the paired differences."""
    output.print_rows(report.score_rows(scores), title=title)
    for line in report.score_sentences(scores):
        output.console.print(line, markup=False, highlight=False)

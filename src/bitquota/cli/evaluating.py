"""Models, plans and exported files on one set: ``evaluate``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitquota.cli import options as opt
from bitquota.cli import output, remote
from bitquota.cli.here import memory_limit
from bitquota.cli.loading import check_sources, load_samples
from bitquota.context import Context
from bitquota.errors import InvalidInput
from bitquota.exports.export_report import ExportReport
from bitquota.plan import Plan, weights_near
from bitquota.report import text as report

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from bitquota.evaluate.scores import Score
    from bitquota.models.loaded import LoadedModel


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
    memory: opt.Memory = None,
    server: opt.Server = None,
    api_key: opt.ApiKey = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run MODEL on DATA in full precision, under each plan, and as each exported file.

    Metrics come with standard errors. Differences to full precision and to the widest uniform plan
    of at most the same size are paired by sample.
    """
    limit = memory_limit(memory)
    check_sources(model, data, correction_data, tokenizer=tokenizer, imatrix=imatrix, server=server)
    if original is not None:
        check_sources(original, server=server)
    plans, exported, metrics = plans or [], exported or [], metrics or []
    loaded_plans = {str(path): Plan.load(path) for path in plans}
    for folder in exported:
        ExportReport.load(folder)  # raises where nothing was exported

    # Measure, on a server or here.
    if server is not None:
        if memory is not None:
            msg = "--memory is used on this machine only; leave --server out, or --memory"
            raise InvalidInput(msg)
        _require_nothing_local(exported, metrics, imatrix)
        n_samples, scores = remote.scores(
            server,
            api_key,
            {"uniform": uniform, "baselines": with_baselines, "embedding": embedding},
            model,
            data,
            plan_files=plans,
            original=original,
            correction_data=correction_data,
        )
    else:
        from bitquota.evaluate.scoring import score_plans
        from bitquota.models.factory import find_function
        from bitquota.models.load import load_model, load_within

        custom = {spec.partition(":")[2]: find_function(spec, InvalidInput) for spec in metrics}
        loaded = replace(load_within(model, limit), imatrix=imatrix, weights=weights_near(plans))
        _say_notes(loaded, loaded_plans)
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
            exported=tuple(exported),
            original=None if original is None else load_model(original),
            correction_data=correcting,
            with_uniform=uniform,
            with_baselines=with_baselines,
            kind="embedding" if embedding else "logits",
            custom=custom,
            context=Context(device=device, memory_bytes=limit),
        )
        n_samples = len(samples)
        if uniform and correcting is None:
            _say_no_uniform(loaded_plans.values())

    if as_json:
        output.print_json([score.to_json() for score in scores])
        return
    print_scores(scores, title=f"{n_samples} samples of {data}")


def _require_nothing_local(
    exported: Sequence[Path], metrics: Sequence[str], imatrix: Path | None
) -> None:
    """Raise ``InvalidInput`` where something is named that a server cannot read."""
    if exported or metrics or imatrix:
        msg = (
            "exported files, own metrics and importance matrices are read where they lie: "
            "leave --exported, --metric and --imatrix out, or --server"
        )
        raise InvalidInput(msg)


def _say_notes(model: LoadedModel, plans: Mapping[str, Plan]) -> None:
    """Say what there is to know of a plan and the model; raises where it is of another one."""
    from bitquota.models.loaded import check_model

    for path, plan in plans.items():
        if note := check_model(plan, model):
            output.say(f"{path}: {note}")


def _say_no_uniform(plans: Iterable[Plan]) -> None:
    """Say that a uniform plan is missing, where one cannot be rounded as the plan was."""
    if any(plan.rounding != "nearest" for plan in plans):
        output.say(
            "no uniform plan is shown beside plans whose weights are rounded with feedback: "
            "give the calibration set with --correction-data"
        )


def print_scores(scores: Sequence[Score], title: str = "") -> None:
    """Print one column for each model, one row for each metric, and the paired differences."""
    output.print_rows(report.score_rows(scores), title=title)
    for line in report.score_sentences(scores):
        output.console.print(line, markup=False, highlight=False)

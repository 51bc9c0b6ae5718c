"""Commands of the gate: ``lock``, ``check``, ``diff``."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

import bitquota
from bitquota.candidates.budget import parse_bytes, parse_time
from bitquota.candidates.cost_table import CostTable
from bitquota.canonical import read_json
from bitquota.ci.check import (
    Quality,
    append_step_summary,
    check_lock,
    require_limits,
    to_junit,
    worst_exit_code,
)
from bitquota.ci.diff import diff_plans
from bitquota.ci.lock import SCHEMA, Limits, Lock, make_lock
from bitquota.cli import options as opt
from bitquota.cli import output
from bitquota.cli.loading import check_sources
from bitquota.cli.written import Written
from bitquota.context import Context
from bitquota.errors import InvalidInput, InvalidPlan
from bitquota.exports.export_report import ExportReport
from bitquota.plan import Plan, weights_near
from bitquota.report import tracking

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bitquota.ci.check import CheckReport
    from bitquota.models.loaded import LoadedModel

LOCK_FILE = Path("bitquota.lock.json")
_STYLES = {"passed": "green", "failed": "bold red", "stale": "yellow", "skipped": "dim"}

MaxKl = Annotated[
    float | None,
    typer.Option("--max-kl", help="Maximum mean loss increase, in the unit of the plan's loss."),
]
MaxDrop = Annotated[
    float | None,
    typer.Option("--max-drop", help="Maximum drop of top-1 accuracy in points, such as 0.5."),
]
MaxSize = Annotated[
    str | None, typer.Option("--max-size", help="Maximum stored size of the model: '12 MiB'.")
]
MaxFileSize = Annotated[
    str | None,
    typer.Option("--max-file-size", help="Maximum total size of the exported files."),
]
NotWorseThan = Annotated[
    str | None,
    typer.Option(
        "--not-worse-than",
        help="Baselines that must not measure better within the same budget: 'uniform'.",
    ),
]
MaxLatency = Annotated[
    str | None,
    typer.Option(
        "--max-latency",
        help="Maximum time of one run, predicted by the plan's cost table and timed at its "
        "exports: '5 ms'.",
    ),
]
LatencyTolerance = Annotated[
    float | None,
    typer.Option(
        "--latency-tolerance",
        help="Share of --max-latency by which a timed run may exceed it (0.1).",
    ),
]
Exported = Annotated[
    list[Path] | None,
    typer.Option("--exported", help="Folder written by 'bitquota export'. Repeatable."),
]


def lock(
    plan_file: Annotated[
        Path, typer.Argument(metavar="PLAN", help="Plan written by 'bitquota plan'.")
    ],
    target: Annotated[
        str | None,
        typer.Option("--target", help="Deployment target whose rules the plan must follow."),
    ] = None,
    exported: Exported = None,
    max_kl: MaxKl = None,
    max_drop: MaxDrop = None,
    max_size: MaxSize = None,
    max_file_size: MaxFileSize = None,
    not_worse_than: NotWorseThan = None,
    max_latency: MaxLatency = None,
    latency_tolerance: LatencyTolerance = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Lock file to write.")] = LOCK_FILE,
) -> None:
    """Write the lock file of PLAN for git, keeping target and limits of the file it replaces."""
    limits = _limits(
        max_kl, max_drop, max_size, max_file_size, not_worse_than, max_latency, latency_tolerance
    )
    Written.at(out, "--out")
    former = Lock.load(out) if out.exists() else None
    if former is not None:
        limits = former.limits.override(limits)
        target = former.target if target is None else target
    made = make_lock(
        Plan.load(plan_file),
        target=target,
        limits=limits,
        reports=tuple(ExportReport.load(folder) for folder in exported or ()),
        folders=tuple(
            Path(os.path.relpath(folder, out.parent)).as_posix() for folder in exported or ()
        ),
        volatile={
            "bitquota": bitquota.__version__,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    )
    require_limits(made)
    out.parent.mkdir(parents=True, exist_ok=True)
    made.save(out)
    note = _short(made)
    if former is not None and former.digest() == made.digest():
        note += ", as it was"
    elif former is not None:
        note += f"; replaced {_short(former)}, whose target and limits hold unless given anew"
    output.say(f"wrote {out} ({note})")


def _short(lock: Lock) -> str:
    return f"{lock.digest()[:19]}…"


def check(
    lock_files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[LOCK]...", help=f"Lock files in git ({LOCK_FILE})."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="The current model: its fingerprint must match the plan's."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Measure the plan again on these samples (needs --model)."),
    ] = None,
    correction_data: Annotated[
        str | None,
        typer.Option(
            "--correction-data", help="Unlabelled samples to compute the plan's corrections from."
        ),
    ] = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="A new plan: the lock file must contain it.")
    ] = None,
    exported: Exported = None,
    base: Annotated[
        Path | None,
        typer.Option("--base", help="Lock file of the base branch: the model must not be larger."),
    ] = None,
    max_kl: MaxKl = None,
    max_drop: MaxDrop = None,
    max_size: MaxSize = None,
    max_file_size: MaxFileSize = None,
    not_worse_than: NotWorseThan = None,
    max_latency: MaxLatency = None,
    latency_tolerance: LatencyTolerance = None,
    table: Annotated[
        Path | None,
        typer.Option("--table", help="Cost table: the plan must have been made with it."),
    ] = None,
    junit: Annotated[
        Path | None, typer.Option("--junit", help="JUnit XML file to write, for CI systems.")
    ] = None,
    summary: Annotated[
        Path | None, typer.Option("--summary", help="Markdown file to write, for a job summary.")
    ] = None,
    device: opt.Device = "auto",
    log_to: opt.LogTo = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check each LOCK against model, target, size and limits; exit 0, 1 (failed) or 4 (stale).

    Limits given here replace those in the lock file. Without --data, the losses recorded in the
    plan are checked. The table is also appended to the file that GITHUB_STEP_SUMMARY names.
    """
    files = lock_files or [LOCK_FILE]
    if len(files) > 1 and (plan_file or exported or base):
        msg = f"--plan, --exported and --base apply to a single lock file; got {len(files)}"
        raise InvalidInput(msg, locks=[str(path) for path in files])
    if log_to is not None:
        tracking.require_tracker(log_to)

    # Everything that is given, read before anything is measured.
    limits = _limits(
        max_kl, max_drop, max_size, max_file_size, not_worse_than, max_latency, latency_tolerance
    )
    locks = {path: Lock.load(path) for path in files}
    plan = None if plan_file is None else Plan.load(plan_file)
    base_lock = None if base is None else Lock.load(base)
    written = {
        option: Written.at(path, option)
        for option, path in (("--junit", junit), ("--summary", summary))
        if path is not None
    }
    loaded = _loaded(model, data, correction_data, files)

    # Each lock file by itself, measured where there are samples and the model is the plan's.
    reports: dict[str, CheckReport] = {}
    for path, held in locks.items():
        same, weights = (False, None) if loaded is None else _recognised(held, loaded)
        wanted = held.limits.override(limits)
        measurable = loaded if same else None
        quality = _measure(measurable, data, correction_data, held, wanted, device)
        reports[str(path)] = check_lock(
            held,
            model_digest=None if loaded is None else loaded.digest,
            weights_digest=weights,
            plan=plan,
            folders=tuple(exported or ()),
            quality=quality,
            limits=limits,
            base=base_lock,
            root=path.parent,
            table=None if table is None else CostTable.load(table),
        )
        if log_to is not None:
            _log(path, reports[str(path)], quality, log_to)

    _write_and_print(reports, written, as_json=as_json)
    code = worst_exit_code(reports.values())
    if code:
        raise typer.Exit(code)


def _write_and_print(
    reports: Mapping[str, CheckReport], written: Mapping[str, Written], *, as_json: bool
) -> None:
    """Write the files for CI systems, and print the outcome."""
    markdown = "\n".join(report.to_markdown(name) for name, report in reports.items())
    for option, text in (("--junit", to_junit(reports)), ("--summary", markdown)):
        if option in written:
            written[option].save(partial(_write_text, text=text))
    append_step_summary(markdown, os.environ)
    if as_json:
        output.print_json({name: report.to_json() for name, report in reports.items()})
    else:
        for name, report in reports.items():
            _print_report(report, name)


def _loaded(
    model: str | None, data: str | None, correction_data: str | None, locks: Sequence[Path]
) -> LoadedModel | None:
    """Return the model if one is named, once it is known that the samples are there too.

    Quantized weights are those that lie beside ``locks``.
    """
    if model is None:
        if data is not None:
            msg = "--data measures the plan on a model: name it with --model"
            raise InvalidInput(msg, data=data)
        return None
    check_sources(model, data, correction_data)
    from bitquota.models.load import load_model

    return replace(load_model(model), weights=weights_near(locks))


def _log(path: Path, report: CheckReport, quality: Quality | None, log_to: str) -> None:
    """Hand one report to an experiment tracker."""
    tracking.log_check(
        path.name,
        tracker=log_to,
        outcomes={o.check: str(o.status) for o in report.outcomes},
        measured=None if quality is None else quality.measured,
        exit_code=report.exit_code,
        summary=report.to_markdown(str(path)),
    )


def diff(
    old: Annotated[Path, typer.Argument(help="Plan or lock file.")],
    new: Annotated[Path, typer.Argument(help="Plan or lock file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 1 if anything differs.")
    ] = False,
) -> None:
    """Print what changed from OLD to NEW as Markdown; print nothing if they are equal."""
    found = diff_plans(_plan_of(old), _plan_of(new))
    if as_json:
        output.print_json(found.to_json())
    else:
        typer.echo(found.to_markdown(), nl=False)
    if exit_code and not found.empty:
        raise typer.Exit(1)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _limits(
    max_kl: float | None,
    max_drop: float | None,
    max_size: str | None,
    max_file_size: str | None,
    not_worse_than: str | None,
    max_latency: str | None,
    latency_tolerance: float | None,
) -> Limits:
    return Limits(
        max_kl=max_kl,
        max_drop=max_drop,
        max_bytes=None if max_size is None else parse_bytes(max_size),
        max_file_bytes=None if max_file_size is None else parse_bytes(max_file_size),
        not_worse_than=not_worse_than,
        max_latency_ns=None if max_latency is None else parse_time(max_latency),
        latency_tolerance=latency_tolerance,
    )


def _recognised(held: Lock, model: LoadedModel) -> tuple[bool, str | None]:
    """Return whether the plan is of ``model``, and the digest of its weights if it names these."""
    from bitquota.models.loaded import Recognised, recognise

    planned = held.plan.model_digest
    found = recognise(planned, model)
    return found is not Recognised.OTHER, planned if found is Recognised.SAME_WEIGHTS else None


def _measure(
    model: LoadedModel | None,
    data: str | None,
    correction_data: str | None,
    held: Lock,
    limits: Limits,
    device: str,
) -> Quality | None:
    """Run the locked plan, and the baselines it must not lose to, on ``data``.

    ``None`` without samples, or where the model is not the one that the plan was made for.
    """
    if model is None or data is None:
        return None
    from bitquota.evaluate.scoring import evaluate_plans
    from bitquota.models.samples import load_calibration

    prefix = limits.not_worse_than
    named = tuple(
        b for b in held.plan.baselines if prefix is not None and b.name.startswith(prefix)
    )
    full, measured, *rest = evaluate_plans(
        model,
        load_calibration(data),
        [replace(held.plan, baselines=named)],
        correction_data=None if correction_data is None else load_calibration(correction_data),
        with_baselines=True,
        loss=held.plan.loss,
        context=Context(device=device),
    )
    return Quality(
        measured=measured.measured,
        full_precision=full.measured,
        baselines={e.name: e.measured for e in rest} if named else None,
    )


def _print_report(report: CheckReport, name: str) -> None:
    for o in report.outcomes:
        line = Text.assemble((f"{o.status:>8}", _STYLES[o.status]), "  ", (o.check, "bold"), "  ")
        output.console.print(line.append(o.message), soft_wrap=True)
    verdict = {
        0: "passed",
        1: "FAILED: a limit is broken",
        4: "STALE: the lock file must be written anew",
    }
    output.console.print(f"{name}: {verdict[report.exit_code]}", highlight=False)


def _plan_of(path: Path) -> Plan:
    """Return the plan that a plan file or a lock file holds."""
    advice = "name a file that 'bitquota plan' or 'bitquota lock' wrote"
    data = read_json(path, "a plan or lock file", advice, InvalidPlan)
    if isinstance(data, dict) and data.get("schema") == SCHEMA:
        return Lock.from_json(data).plan
    return Plan.from_json(data)

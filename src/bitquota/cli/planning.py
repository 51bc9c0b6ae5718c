"""Commands that measure and plan: ``plan``, ``measure``, ``show``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitquota import report, tracking
from bitquota.cli import options as opt
from bitquota.cli import output
from bitquota.cli.loading import load_samples
from bitquota.errors import InvalidInput
from bitquota.plan import Plan
from bitquota.storage import Granularity, Grid, Rounding, ScaleFormat, ScaleRule, Scheme

if TYPE_CHECKING:
    from collections.abc import Callable

    from bitquota.request import PlanRequest
    from bitquota.sensitivity.calibration import CalibrationSet


def plan(
    model: opt.Model,
    calibration: opt.Calibration,
    budgets: opt.Budgets = None,
    target: opt.TargetName = None,
    bits: opt.Bits = None,
    activations: opt.Activations = None,
    fix: opt.Fix = None,
    tie: opt.Tie = None,
    exclude: opt.Exclude = None,
    corrections: opt.Corrections = None,
    samples: opt.Samples = 512,
    holdout: opt.Holdout = 512,
    loss: opt.LossName = "kl",
    measure_name: opt.MeasureName = "auto",
    refine: opt.Refine = True,
    seed: opt.Seed = 0,
    grid: opt.GridName = Grid.SYMMETRIC,
    granularity: opt.GranularityName = Granularity.CHANNEL,
    group_size: opt.GroupSize = None,
    scale_rule: opt.ScaleRuleName = ScaleRule.LEAST_SQUARES,
    scale_format: opt.ScaleFormatName = ScaleFormat.FP32,
    rounding: opt.RoundingName = Rounding.NEAREST,
    solver: opt.SolverName = "auto",
    gap: opt.Gap = 1e-4,
    time_limit: opt.TimeLimit = None,
    tokenizer: opt.Tokenizer = None,
    length: opt.Length = opt.DEFAULT_LENGTH,
    device: opt.Device = "auto",
    ledger: opt.LedgerPath = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Plan file; with several budgets, plan-1.json, …")
    ] = Path("plan.json"),
    report_file: Annotated[
        Path | None, typer.Option("--report", help="Markdown report to write.")
    ] = None,
    matrix_file: Annotated[
        Path | None, typer.Option("--matrix", help="Also write the sensitivity matrix (.npz).")
    ] = None,
    server: Annotated[
        str | None, typer.Option("--server", help="Run on this server instead of here.")
    ] = None,
    log_to: opt.LogTo = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the plans as JSON instead of tables.")
    ] = False,
) -> None:
    """Measure MODEL on CALIBRATION and write the best plan for each budget."""
    if log_to is not None:
        tracking.require_tracker(log_to)
    request = opt.plan_request(
        budgets=budgets,
        bits=bits,
        activations=activations,
        fix=fix,
        tie=tie,
        exclude=exclude,
        corrections=corrections,
        samples=samples,
        holdout=holdout,
        loss=loss,
        measure=measure_name,
        refine=refine,
        seed=seed,
        scheme=Scheme(
            grid=grid,
            granularity=granularity,
            group_size=group_size,
            scale_rule=scale_rule,
            scale_format=scale_format,
            rounding=rounding,
        ),
        solver=solver,
        gap=gap,
        time_limit=time_limit,
        target=target,
    )
    if server is not None:
        plans = _plan_remotely(server, model, calibration, request, matrix_file)
    else:
        read = partial(load_samples, calibration, model=model, tokenizer=tokenizer, length=length)
        plans = _plan_here(model, read, request, device, ledger, matrix_file)
    for path, made in zip(_numbered(out, len(plans)), plans, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        made.save(path)
        output.messages.print(f"wrote {path}", highlight=False)
    if report_file is not None:
        report_file.parent.mkdir(parents=True, exist_ok=True)
        report_file.write_text(report.render_markdown(plans, title=f"Bit allocation of {model}"))
        output.messages.print(f"wrote {report_file}", highlight=False)
    if log_to is not None:
        runs = tracking.log_plans(plans, tracker=log_to, source=model)
        output.messages.print(f"logged to {log_to}: {', '.join(runs)}", highlight=False)
    if as_json:
        output.print_json([made.to_json() for made in plans])
        return
    for made in plans:
        output.print_plan(made)


def _numbered(path: Path, n: int) -> list[Path]:
    if n == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{k}{path.suffix}") for k in range(1, n + 1)]


def _plan_here(
    model: str,
    read: Callable[[], CalibrationSet],
    request: PlanRequest,
    device: str,
    ledger: Path | None,
    matrix_file: Path | None,
) -> tuple[Plan, ...]:
    from bitquota.allocate import allocate
    from bitquota.formats import load_model
    from bitquota.sensitivity.ledger import SqliteLedger

    loaded = load_model(model)
    samples = read()
    with (
        SqliteLedger(ledger or opt.default_ledger()) as kept,
        output.progress_bars() as on_progress,
    ):
        result = allocate(
            loaded, samples, request, ledger=kept, on_progress=on_progress, device=device
        )
    if matrix_file is not None:
        result.matrix.save(matrix_file)
    return result.plans


def _plan_remotely(
    server: str, model: str, calibration: str, request: PlanRequest, matrix_file: Path | None
) -> tuple[Plan, ...]:
    from bitquota.client import Client

    for path in (model, calibration):
        if not Path(path).is_file():
            msg = (
                "a server takes files: a .pt2 model and a .npz or .safetensors calibration set; "
                f"'{path}' is not a file; leave --server out for factories and folders"
            )
            raise InvalidInput(msg, path=path)
    with Client(server) as client, output.progress_bars() as on_progress:
        job = client.submit(model=Path(model), calibration=Path(calibration), request=request)
        output.messages.print(f"job {job.id}", highlight=False)
        job.wait(on_progress=on_progress)
        if matrix_file is not None:
            matrix_file.write_bytes(job.sensitivity())
        return tuple(job.plans())


def measure(
    model: opt.Model,
    calibration: opt.Calibration,
    target: opt.TargetName = None,
    bits: opt.Bits = None,
    activations: opt.Activations = None,
    fix: opt.Fix = None,
    tie: opt.Tie = None,
    exclude: opt.Exclude = None,
    corrections: opt.Corrections = None,
    samples: opt.Samples = 512,
    loss: opt.LossName = "kl",
    measure_name: opt.MeasureName = "auto",
    seed: opt.Seed = 0,
    grid: opt.GridName = Grid.SYMMETRIC,
    granularity: opt.GranularityName = Granularity.CHANNEL,
    group_size: opt.GroupSize = None,
    scale_rule: opt.ScaleRuleName = ScaleRule.LEAST_SQUARES,
    scale_format: opt.ScaleFormatName = ScaleFormat.FP32,
    rounding: opt.RoundingName = Rounding.NEAREST,
    tokenizer: opt.Tokenizer = None,
    length: opt.Length = opt.DEFAULT_LENGTH,
    device: opt.Device = "auto",
    ledger: opt.LedgerPath = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Sensitivity matrix to write (.npz).")
    ] = Path("sensitivity.npz"),
) -> None:
    """Measure the sensitivity matrix of MODEL on CALIBRATION and write it."""
    from bitquota.allocate import measure_matrix
    from bitquota.formats import load_model
    from bitquota.sensitivity.ledger import SqliteLedger

    request = opt.plan_request(
        budgets=None,
        bits=bits,
        activations=activations,
        fix=fix,
        tie=tie,
        exclude=exclude,
        corrections=corrections,
        samples=samples,
        holdout=1,
        loss=loss,
        measure=measure_name,
        seed=seed,
        scheme=Scheme(
            grid=grid,
            granularity=granularity,
            group_size=group_size,
            scale_rule=scale_rule,
            scale_format=scale_format,
            rounding=rounding,
        ),
        target=target,
    )
    loaded = load_model(model)
    data = load_samples(calibration, model=model, tokenizer=tokenizer, length=length)
    with (
        SqliteLedger(ledger or opt.default_ledger()) as kept,
        output.progress_bars() as on_progress,
    ):
        matrix = measure_matrix(
            loaded, data, request, ledger=kept, on_progress=on_progress, device=device
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    matrix.save(out)
    rows = []
    errors = matrix.diagonal_error
    for k, row in enumerate(matrix.table.rows):
        error = "" if errors is None else f"{errors[k]:.2g}"
        rows.append(
            {
                "group": row.group,
                "candidate": row.label,
                f"loss increase ({matrix.unit})": f"{matrix.diagonal[k]:.4g}",
                "standard error": error,
            }
        )
    output.print_rows(rows, title="Each candidate alone")
    output.messages.print(f"wrote {out}", highlight=False)


def show(
    file: Annotated[Path, typer.Argument(help="A plan that 'bitquota plan' wrote.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Show a plan: its layers, its proof, and what was measured beside it."""
    made = Plan.load(file)
    if markdown:
        output.console.print(
            report.render_markdown([made], title=file.name), markup=False, highlight=False
        )
        return
    output.print_plan(made)

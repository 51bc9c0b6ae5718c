"""Commands that compare ways to choose: ``compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bitquota.cli import options as opt
from bitquota.cli import output
from bitquota.cli.loading import load_samples
from bitquota.storage import Granularity, Grid, Rounding, ScaleFormat, ScaleRule, Scheme

if TYPE_CHECKING:
    from bitquota.comparison import Comparison

_PLANS, _AFFORDABLE = 12, 500.0


def compare(
    model: opt.Model,
    calibration: opt.Calibration,
    budgets: opt.Budgets = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            help="Only this: refine, gram, pairs, diagonal, empirical_fisher, … Repeatable.",
        ),
    ] = None,
    plans: Annotated[
        int,
        typer.Option(
            "--plans", help="Random and near-good plans to rank at each budget; 0 for none."
        ),
    ] = _PLANS,
    affordable: Annotated[
        float,
        typer.Option(
            "--max-passes", help="Leave out measures that cost more passes, unless named."
        ),
    ] = _AFFORDABLE,
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
        Path | None, typer.Option("--out", "-o", help="JSON file to write everything to.")
    ] = None,
    report_file: Annotated[
        Path | None, typer.Option("--report", help="Markdown report to write.")
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Plot to write: .png, .svg or .pdf.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measure MODEL with every metric, solve every budget with each, and measure all the plans."""
    from bitquota.compare import compare as run
    from bitquota.formats import load_model
    from bitquota.sensitivity.ledger import SqliteLedger

    if plot_file is not None:
        from bitquota.comparison_plot import check_plot

        check_plot(plot_file)  # before the work, not after it
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
        measure="auto",
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
    loaded = load_model(model)
    data = load_samples(calibration, model=model, tokenizer=tokenizer, length=length)
    with (
        SqliteLedger(ledger or opt.default_ledger()) as kept,
        output.progress_bars() as on_progress,
    ):
        found = run(
            loaded,
            data,
            request,
            metrics,
            ledger=kept,
            plans=plans,
            affordable_passes=affordable,
            on_progress=on_progress,
            device=device,
        )
    _write(found, f"Comparison on {model}", out, report_file, plot_file)
    if as_json:
        output.print_json(found.to_json())
        return
    output.print_rows(found.overview_rows(), title="What each costs")
    for name, reason in found.skipped.items():
        output.messages.print(f"{name} is missing: {reason}", markup=False, highlight=False)
    for k in range(len(found.budgets)):
        output.print_rows(found.budget_rows(k), title=f"Budget {found.budget_text(k)}")
        output.console.print(found.verdict(k), markup=False, highlight=False)


def _write(
    found: Comparison,
    title: str,
    out: Path | None,
    report_file: Path | None,
    plot_file: Path | None,
) -> None:
    for path in (out, report_file, plot_file):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    if out is not None:
        out.write_text(found.to_text())
    if report_file is not None:
        report_file.write_text(found.render_markdown(title))
    if plot_file is not None:
        from bitquota.comparison_plot import plot_comparison

        plot_comparison(found, plot_file)
    for path in (out, report_file, plot_file):
        if path is not None:
            output.messages.print(f"wrote {path}", highlight=False)

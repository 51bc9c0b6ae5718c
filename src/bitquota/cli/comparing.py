"""Commands that compare ways to choose: ``compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitquota.candidates.caches import CACHE_SCALES
from bitquota.cli import estimating, output, remote
from bitquota.cli import options as opt
from bitquota.cli.here import Here
from bitquota.cli.written import Written
from bitquota.report.comparison_plot import check_plot, plot_comparison
from bitquota.request import PlanRequest

if TYPE_CHECKING:
    from bitquota.report.comparison import Comparison

_PLANS, _AFFORDABLE = 12, 500.0
_WIDE = 140
"""Columns from which tables say everything."""


@opt.with_options(
    measure_name="auto",
    effort="normal",
    refine=True,
    kv_bits=None,
    kv_scales=CACHE_SCALES[0],
    context=0,
    sequences=1,
    robust=0.0,
    row_widths=1,
    allow=None,
)
def compare(
    model: opt.Model,
    calibration: opt.Calibration,
    request: PlanRequest,
    here: Here,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            help="Run only: refine, gram, pairs, diagonal, empirical_fisher, … Repeatable.",
        ),
    ] = None,
    plans: Annotated[
        int,
        typer.Option(
            "--plans",
            help="Number of random and near-optimal plans to rank at each budget; 0 for none.",
        ),
    ] = _PLANS,
    affordable: Annotated[
        float,
        typer.Option("--max-passes", help="Skip measures that cost more passes, unless named."),
    ] = _AFFORDABLE,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="JSON file to write everything to.")
    ] = None,
    report_file: Annotated[
        Path | None, typer.Option("--report", help="Markdown report to write.")
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", help="Plot to write: .png, .svg or .pdf.")
    ] = None,
    dry_run: opt.DryRun = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Measure MODEL with every metric, solve every budget with each, and measure all the plans."""
    options = {"metrics": metrics, "plans": plans, "max_passes": affordable}
    if dry_run:
        estimating.dry_run("compare", model, calibration, request, here, as_json=as_json, **options)
        return
    if plot_file is not None:
        check_plot(plot_file)  # before the work, not after it
    files = [
        None if path is None else Written.at(path, option)
        for path, option in ((out, "--out"), (report_file, "--report"), (plot_file, "--plot"))
    ]
    if here.server is not None:
        body = options | {"plan": request.to_json()}
        found = remote.comparison(here.server, here.api_key, body, model, calibration)
    else:
        found = _compare_here(model, calibration, request, here, options)
    _write(found, f"Comparison on {model}", *files)
    if as_json:
        output.print_json(found.to_json())
        return
    print_comparison(found)


def print_comparison(found: Comparison) -> None:
    """Print what each method costs and what its plans are worth."""
    wide = output.console.width >= _WIDE
    output.print_rows(found.overview_rows(wide=wide), title="What each costs, how well it ranks")
    for sentence in found.missing():
        output.messages.print(sentence, markup=False, highlight=False)
    for k in range(len(found.budgets)):
        rows = found.budget_rows(k, wide=wide)
        output.print_rows(rows, title=f"Budget {found.budget_text(k)}")
        output.console.print(found.verdict(k), markup=False, highlight=False)
    for sentence in found.explanations():
        output.messages.print(f"* {sentence}", markup=False, highlight=False, style="dim")


def _compare_here(
    model: str, calibration: str, request: PlanRequest, here: Here, options: dict[str, Any]
) -> Comparison:
    with here.measuring() as context:
        from bitquota.search.compare import compare as run

        loaded, data = here.load(model, calibration)
        return run(
            loaded,
            data,
            request,
            options["metrics"],
            plans=options["plans"],
            affordable_passes=options["max_passes"],
            context=context,
        )


def _write(
    found: Comparison,
    title: str,
    out: Written | None,
    report_file: Written | None,
    plot_file: Written | None,
) -> None:
    if out is not None:
        out.save(lambda path: path.write_text(found.to_text()))
    if report_file is not None:
        report_file.save(lambda path: path.write_text(found.render_markdown(title)))
    if plot_file is not None:
        plot_file.save(lambda path: plot_comparison(found, path))

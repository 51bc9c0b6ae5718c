"""Commands that measure and plan: ``plan``, ``measure``, ``show``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import typer

from bitquota.canonical import JsonObject, write_whole
from bitquota.cli import estimating, output, remote
from bitquota.cli import options as opt
from bitquota.cli.here import Here
from bitquota.cli.written import (
    Written,
    former_certificate,
    former_matrix,
    former_plan,
    former_weights,
)
from bitquota.matrix import SensitivityMatrix
from bitquota.plan import WEIGHTS_SUFFIX, Plan
from bitquota.report import text as report
from bitquota.report import tracking
from bitquota.report.charts import frontier_of
from bitquota.request import PlanRequest

if TYPE_CHECKING:
    from collections.abc import Sequence


@opt.with_options()
def plan(
    model: opt.Model,
    calibration: opt.Calibration,
    request: PlanRequest,
    here: Here,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Plan file; several budgets: plan-1.json, … Each has its certificate beside it.",
        ),
    ] = Path("plan.json"),
    report_file: Annotated[
        Path | None, typer.Option("--report", help="Markdown report to write.")
    ] = None,
    matrix_file: Annotated[
        Path | None, typer.Option("--matrix", help="Also write the sensitivity matrix (.npz).")
    ] = None,
    log_to: opt.LogTo = None,
    dry_run: opt.DryRun = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the plans as JSON instead of tables.")
    ] = False,
) -> None:
    """Measure MODEL on CALIBRATION and write the best plan for each budget.

    The certificate beside a plan (plan.certificate.npz) proves its bound: see 'bitquota verify'.
    The quantized weights stand there too (plan.weights.safetensors), unless they are only rounded
    to nearest: 'evaluate', 'check', 'export' and 'finetune' take them from there, so the files
    belong together.
    """
    if dry_run:
        estimating.dry_run("plan", model, calibration, request, here, as_json=as_json)
        return
    # Where everything goes, looked at before anything is measured.
    files = _Files.at(out, request)
    reported = None if report_file is None else Written.at(report_file, "--report")
    matrix_out = None
    if matrix_file is not None:
        matrix_out = Written.at(matrix_file, "--matrix", former=former_matrix)
    if log_to is not None:
        tracking.require_tracker(log_to)

    # Measure, on a server or here.
    if here.server is not None:
        plans, certificates, weights = remote.plans(
            here.server, here.api_key, request, model, calibration, matrix_out
        )
    else:
        plans, certificates, weights = _plan_here(model, calibration, request, here, matrix_out)

    # Files first, then the screen.
    files.save(plans, certificates, weights)
    if reported is not None:
        text = report.render_markdown(plans, title=f"Bit allocation of {model}")
        reported.save(lambda path: path.write_text(text, encoding="utf-8"))
    if log_to is not None:
        runs = tracking.log_plans(plans, tracker=log_to, source=model)
        output.messages.print(f"logged to {log_to}: {', '.join(runs)}", highlight=False)
    if as_json:
        output.print_json([made.to_json() for made in plans])
        return
    for made in plans:
        output.print_plan(made)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Files:
    """The files of all budgets.

    Attributes:
        plans: One for each budget.
        certificates: Likewise, or none at all.
        weights: Likewise, or none at all.
    """

    plans: list[Written]
    certificates: list[Written]
    weights: list[Written]

    @classmethod
    def at(cls, out: Path, request: PlanRequest) -> Self:
        """Return the files that go to ``out`` and beside it; raises where one cannot be written."""
        paths = _numbered(out, len(request.budgets))
        plans = [Written.at(path, "--out", former=former_plan) for path in paths]
        certificates: list[Written] = []
        weights: list[Written] = []
        # What is no file, such as a pipe, has nothing beside it.
        if out.is_file() or not out.exists():
            certificates = [
                Written.at(path.with_suffix(".certificate.npz"), "--out", former=former_certificate)
                for path in paths
            ]
            if request.ships_weights:
                weights = [
                    Written.at(path.with_suffix(WEIGHTS_SUFFIX), "--out", former=former_weights)
                    for path in paths
                ]
        return cls(plans=plans, certificates=certificates, weights=weights)

    def save(
        self,
        plans: Sequence[Plan],
        certificates: Sequence[bytes | None],
        weights: Sequence[bytes | None],
    ) -> None:
        """Write what there is: plans last, when what belongs to them is there."""
        for files, contents in ((self.certificates, certificates), (self.weights, weights)):
            for file, content in zip(files, contents, strict=False):
                if content is not None:
                    file.save(partial(write_whole, data=content))
        for file, plan in zip(self.plans, plans, strict=True):
            file.save(plan.save)


def _numbered(path: Path, n: int) -> list[Path]:
    if n == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{k}{path.suffix}") for k in range(1, n + 1)]


def _plan_here(
    model: str,
    calibration: str,
    request: PlanRequest,
    here: Here,
    matrix_out: Written | None,
) -> tuple[tuple[Plan, ...], tuple[bytes | None, ...], tuple[bytes | None, ...]]:
    with here.measuring() as context:
        from bitquota.search.allocate import allocate

        loaded, samples = here.load(model, calibration)
        result = allocate(loaded, samples, request, context=context)
    if matrix_out is not None:
        matrix_out.save(result.matrix.save)
    return result.plans, result.certificates, result.weights


@opt.with_options(
    budgets=None, tables=None, holdout=1, effort="normal", refine=False, solver="auto", gap=1e-4,
    time_limit=None, robust=0.0,
)  # fmt: skip
def measure(
    model: opt.Model,
    calibration: opt.Calibration,
    request: PlanRequest,
    here: Here,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Sensitivity matrix to write (.npz).")
    ] = Path("sensitivity.npz"),
    dry_run: opt.DryRun = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --dry-run: print the estimate as JSON.")
    ] = False,
) -> None:
    """Measure the sensitivity matrix of MODEL on CALIBRATION and write it."""
    if dry_run:
        estimating.dry_run("measure", model, calibration, request, here, as_json=as_json)
        return
    file = Written.at(out, "--out", former=former_matrix)
    if here.server is not None:
        matrix = remote.matrix(here.server, here.api_key, request, model, calibration)
    else:
        matrix = _measure_here(model, calibration, request, here)
    file.save(matrix.save)
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


def _measure_here(
    model: str, calibration: str, request: PlanRequest, here: Here
) -> SensitivityMatrix:
    with here.measuring() as context:
        from bitquota.search.allocate import measure_matrix

        loaded, data = here.load(model, calibration)
        return measure_matrix(loaded, data, request, context=context)


def show(
    file: Annotated[Path, typer.Argument(help="Plan written by 'bitquota plan'.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    matrix_file: Annotated[
        Path | None,
        typer.Option(
            "--matrix", help="Sensitivity matrix, to also draw the frontier (terminals only)."
        ),
    ] = None,
    no_color: Annotated[
        bool, typer.Option("--no-color", help="Draw without colors (also set by NO_COLOR).")
    ] = False,
) -> None:
    """Show a plan: its layers, its proof, and the measured losses of its baselines.

    Bars and the frontier are drawn in a terminal; a pipe gets plain tables.
    """
    made = Plan.load(file)
    output.console.no_color = output.console.no_color or no_color
    if markdown:
        output.console.print(
            report.render_markdown([made], title=file.name), markup=False, highlight=False
        )
        return
    frontier: list[JsonObject] = []
    if matrix_file is not None and output.console.is_terminal:
        frontier = frontier_of(SensitivityMatrix.load(matrix_file), points=33, time_limit_s=5.0)
    output.print_plan(made, frontier=frontier)

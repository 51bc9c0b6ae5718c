"""The command that makes a report of files: ``report``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitquota.canonical import read_json
from bitquota.cli.written import Written
from bitquota.errors import InvalidInput
from bitquota.matrix import SensitivityMatrix
from bitquota.plan import SCHEMA as PLAN_SCHEMA
from bitquota.plan import Plan
from bitquota.report import charts
from bitquota.report.comparison_plot import check_plot
from bitquota.report.image import draw_report
from bitquota.report.page import render_html

if TYPE_CHECKING:
    from bitquota.canonical import JsonObject

_COMPARISON = "bitquota/comparison/1"


def report(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Plans (several budgets of one model), a comparison (compare --out), a frontier "
            "(frontier --json), or a sensitivity matrix (.npz)."
        ),
    ],
    matrix_file: Annotated[
        Path | None,
        typer.Option("--matrix", help="Sensitivity matrix, for heat maps and the frontier."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Self-contained HTML file to write.")
    ] = None,
    image: Annotated[
        Path | None, typer.Option("--image", help="Write the main charts as .png, .svg or .pdf.")
    ] = None,
    title: Annotated[str | None, typer.Option("--title", help="Heading.")] = None,
    points: Annotated[
        int, typer.Option("--points", min=2, help="Number of points of the frontier.")
    ] = 17,
    time_limit: Annotated[
        float, typer.Option("--time-limit", help="Time limit for the whole frontier, in seconds.")
    ] = 30.0,
) -> None:
    """Make a report of FILES: one HTML file that needs no network, or a picture."""
    if out is None and image is None:
        out = Path("report.html")
    if image is not None:
        check_plot(image)
    page = None if out is None else Written.at(out, "--out")
    picture = None if image is None else Written.at(image, "--image")
    document, maps = read_document(
        files, matrix_file, title=title, points=points, time_limit_s=time_limit
    )
    if page is not None:
        text = render_html(document, maps)
        page.save(lambda path: path.write_text(text, encoding="utf-8"))
    if picture is not None:
        picture.save(lambda path: draw_report(document, path))


def read_document(
    files: list[Path],
    matrix_file: Path | None,
    *,
    title: str | None,
    points: int,
    time_limit_s: float,
) -> tuple[JsonObject, dict[str, JsonObject]]:
    """Return what the charts show of ``files``, and the maps of cross-layer terms.

    Raises:
        InvalidInput: A file is none of what ``bitquota`` writes, or they do not belong together.
    """
    plans: list[Plan] = []
    comparison: JsonObject | None = None
    rows: list[JsonObject] | None = None
    for file in files:
        if file.suffix == ".npz":
            matrix_file = matrix_file or file
            continue
        data = _read(file)
        if isinstance(data, list):
            rows = data
        elif data.get("schema_version") == _COMPARISON:
            comparison = data
        else:
            plans.append(Plan.from_json(data))
    names = [[a.layer.name for a in plan.assignments] for plan in plans]
    if any(other != names[0] for other in names[1:]):
        msg = "the plans of one report must be of the same layers; make one report for each model"
        raise InvalidInput(msg)
    matrix = None if matrix_file is None else SensitivityMatrix.load(matrix_file)
    found = charts.frontier_of(matrix, points=points, time_limit_s=time_limit_s) if matrix else []
    document = charts.document(
        title=title or f"Bit allocation of {files[0].stem}",
        plans=plans,
        matrix=matrix,
        frontier=found,
        comparison=comparison,
    )
    if rows is not None and not plans and matrix is None:
        document |= {k: v for k, v in charts.frontier_rows(rows).items() if k != "title"}
    maps = {} if matrix is None else charts.maps_of(matrix, plans[0] if plans else None)
    return document, maps


def _read(file: Path) -> Any:  # noqa: ANN401  # any JSON
    advice = "name plans, comparisons, frontiers, or a matrix (.npz)"
    data = read_json(file, "a file of a report", advice, InvalidInput)
    rows = isinstance(data, list) and all(isinstance(r, dict) and "objective" in r for r in data)
    known = isinstance(data, dict) and (
        data.get("schema") == PLAN_SCHEMA or data.get("schema_version") == _COMPARISON
    )
    if not (rows or known):
        msg = (
            f"'{file}' must be a plan, a comparison, or what 'bitquota frontier --json' prints; "
            "it is other JSON"
        )
        raise InvalidInput(msg, path=str(file))
    return data

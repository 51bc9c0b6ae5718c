"""``--dry-run``: what a command would take, before anything is measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from bitquota.cli import output, remote
from bitquota.report import estimate as report

if TYPE_CHECKING:
    from bitquota.cli.here import Here
    from bitquota.estimate import JobEstimate
    from bitquota.request import PlanRequest


def dry_run(
    job: str,
    model: str,
    calibration: str,
    request: PlanRequest,
    here: Here,
    *,
    as_json: bool = False,
    **compared: Any,  # noqa: ANN401  # what ``compare`` takes besides
) -> None:
    """Print the estimate of ``job``, made here or on a server; writes nothing."""
    if here.server is not None:
        body = {"job": job, "plan": request.to_json()} | compared
        found = remote.estimate(here.server, here.api_key, body, model, calibration)
    else:
        found = _estimate_here(job, model, calibration, request, here, compared)
    if as_json:
        output.print_json(found.to_json())
        return
    output.print_rows(report.estimate_rows(found), title=f"What '{job}' would take")
    output.print_rows(report.stage_rows(found), title="In its parts")
    for sentence in report.estimate_sentences(found):
        output.console.print(Text(sentence))


def _estimate_here(
    job: str,
    model: str,
    calibration: str,
    request: PlanRequest,
    here: Here,
    compared: dict[str, Any],
) -> JobEstimate:
    with here.measuring() as context:
        from bitquota.search import estimating

        loaded, samples = here.load(model, calibration)
        given = loaded, samples, request
        if job == "compare":
            return estimating.estimate_compare(
                *given,
                compared["metrics"],
                context=context,
                plans=compared["plans"],
                affordable_passes=compared["max_passes"],
            )
        if job == "measure":
            return estimating.estimate_measure(*given, context=context)
        return estimating.estimate_plan(*given, context=context)

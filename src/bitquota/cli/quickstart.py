"""``quickstart``: proposes target, budget, samples and loss in words, then plans and exports.

Every step is one of the other commands, called by its own arguments, which are printed.

Design: docs/design/client.md
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitquota.candidates.budget import check_budgets
from bitquota.candidates.targets import target_by_name
from bitquota.cli import options as opt
from bitquota.cli import output
from bitquota.cli.loading import check_sources
from bitquota.cli.sandboxed import OUTSIDE
from bitquota.errors import InvalidCalibration
from bitquota.estimate import JobEstimate
from bitquota.exports.names import HOW_TO_RUN, check_folder, usual_target
from bitquota.models.sources import SAMPLE_WAYS
from bitquota.progress import lasting
from bitquota.report.text import format_size
from bitquota.request import AUTO_LOSS, LOSS_WORDS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bitquota.canonical import JsonObject
    from bitquota.exports.export_report import ExportReport

USUAL_BITS = 4.0
"""Average bits that are proposed: few models lose much at this."""

LONG_S = 600.0
"""A job that is expected to take longer than this is made smaller, if that is possible."""

WORK = (("normal", 512, 1.0), ("quick", 512, 10.0), ("quick", 64, 80.0))
"""Effort, samples, and how many times less that takes than the first, about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """One thing that a plan needs to be told.

    Attributes:
        what: Of what kind it is.
        value: What is proposed.
        reason: Why.
        arguments: For ``plan``.
    """

    what: str
    value: str
    reason: str
    arguments: tuple[str, ...]


def quickstart(
    context: typer.Context,
    model: opt.Model,
    calibration: Annotated[
        str | None,
        typer.Argument(
            help=".npz (no pickle), .safetensors, .jsonl, .parquet, .txt, or factory. Without it "
            "the proposal is all."
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder to write, new or empty; its plan lies beside it."),
    ] = Path("quantized"),
    target: opt.TargetName = None,
    budget: Annotated[
        str | None, typer.Option("--budget", "-b", help="As 'plan' takes it, such as '3 bits'.")
    ] = None,
    loss: opt.LossName = AUTO_LOSS,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Ask nothing: run the proposal.")
    ] = False,
) -> None:
    """Look at MODEL, propose how to quantize it and why, then plan and export it.

    Target, budget, samples and loss are proposed in words; what is given as an option stays. Then
    it asks (--yes: does not ask; without a terminal and --yes nothing is run) and runs 'plan' and
    'export' with the arguments that it prints, to be given again with others.
    """
    check_folder(out)
    if calibration is None and yes:
        msg = f"--yes runs the plan, which is measured on samples: give CALIBRATION, {SAMPLE_WAYS}"
        raise InvalidCalibration(msg)
    check_sources(model, calibration)
    if budget is not None:
        check_budgets([budget])

    # Look at the model, then at what a plan would take.
    proposals = [_target(model, target)]
    run = _Commands(context)
    found = run.read("inspect", model, *proposals[0].arguments)
    output.say(_summary(found))
    proposals.append(_budget(found, budget))
    plan_file = out.with_name(f"{out.name}-plan.json")
    order = ["plan", model, calibration or "CALIBRATION"]
    order += [a for p in proposals for a in p.arguments]
    if loss != AUTO_LOSS:
        order += ["--loss", loss]
    if calibration is not None:
        estimate = JobEstimate.from_json(run.read(*order, "--dry-run"))
        proposals += [_loss(estimate), *_work(estimate)]
        order += [a for p in proposals[2:] for a in p.arguments]
    order += ["--out", str(plan_file)]
    export = ["export", model, str(plan_file), "--samples", calibration or "CALIBRATION"]
    export += ["--out", str(out)]

    # Say it, and ask.
    output.print_rows([{"": p.what, "proposed": p.value, "because": p.reason} for p in proposals])
    for arguments in (order, export):
        output.say(shlex.join(["bitquota", *arguments]))
    if calibration is None:
        output.say(f"nothing was measured: a plan needs CALIBRATION, {SAMPLE_WAYS}")
        return
    if not yes and not (sys.stdin.isatty() and typer.confirm("Run both?", default=True, err=True)):
        output.say("nothing was run: give the two commands, or this one with --yes")
        return

    run(*order)
    run(*export)
    _say_next(model, plan_file, out)


class _Commands:
    """Other commands of the same application, run as they are from a shell.

    Args:
        context: Of the command that runs them.
    """

    def __init__(self, context: typer.Context) -> None:
        self._root = context.find_root().command
        outside = OUTSIDE.get()
        self._mode = "off" if outside is None else outside.mode

    def __call__(self, *arguments: str) -> None:
        """Run a command; raises what it raises, and ``typer.Exit`` where it only ends so."""
        given = ["--sandbox", self._mode, *arguments]
        code = self._root.main(given, prog_name="bitquota", obj=given, standalone_mode=False)
        if code:
            raise typer.Exit(code)

    def read(self, *arguments: str) -> JsonObject:
        """Run a command with ``--json`` and return what it prints."""
        with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
            with contextlib.redirect_stdout(file):
                self(*arguments, "--json")
            file.seek(0)
            found: JsonObject = json.load(file)
        return found


def _summary(found: JsonObject) -> str:
    totals = found["totals"]
    kept = sum(layer["kept_in_full_precision"] is not None for layer in found["layers"])
    stays = f", {kept:,} of which stay as they are" if kept else ""
    return (
        f"{found['architecture']}: {len(found['layers']):,} layers{stays}, "
        f"{totals['n_weights']:,} weights, {format_size(totals['full_precision_bits'])}"
    )


def _target(model: str, given: str | None) -> Proposal:
    if given is not None:
        name, reason = target_by_name(given).name, "as you asked"
    else:
        name, reason = usual_target(model)
    return Proposal(what="target", value=name, reason=reason, arguments=("--target", name))


def _budget(found: JsonObject, given: str | None) -> Proposal:
    if given is not None:
        return Proposal(
            what="budget", value=given, reason="as you asked", arguments=("--budget", given)
        )
    least = _least_bits(found)
    if least <= USUAL_BITS:
        text = f"{USUAL_BITS:g} bits"
        reason = (
            "on average over the weights, which rarely loses much; mixing helps more below, such "
            "as '3 bits'"
        )
    else:
        text = f"{least + 0.5:.3g} bits"
        reason = f"on average over the weights: this target needs {least:.3g} at least"
    return Proposal(what="budget", value=text, reason=reason, arguments=("--budget", text))


def _least_bits(found: JsonObject) -> float:
    """Return the average bits of the codes with every layer in its narrowest format."""
    free = [layer for layer in found["layers"] if layer["kept_in_full_precision"] is None]
    narrow = [min(f["weight_bits"] for f in layer["formats"]) for layer in free]
    weights = [layer["n_weights"] for layer in free]
    total = sum(b * n for b, n in zip(narrow, weights, strict=True))
    return float(total / max(1, sum(weights)))


def _loss(found: JobEstimate) -> Proposal:
    kinds = ", ".join(dict.fromkeys(o.kind for o in found.outputs)) or "one tensor"
    names = tuple(dict.fromkeys(o.loss for o in found.outputs))
    reason = f"the output is {kinds}: {'; '.join(LOSS_WORDS[name] for name in names)}"
    return Proposal(what="loss", value=", ".join(names), reason=reason, arguments=())


def _work(found: JobEstimate) -> list[Proposal]:
    """Return samples and effort: the most that is expected to take ten minutes, or the least."""
    fitting = [work for work in WORK if found.seconds / work[2] <= LONG_S]
    effort, n, less = (fitting or WORK[-1:])[0]
    whole = "less than a second" if found.seconds < 1 else f"about {lasting(found.seconds)}"
    takes = f"it takes {whole} on this machine"
    if less > 1:
        takes = f"{WORK[0][0]} with {WORK[0][1]} samples would take {whole} on this machine"
    measured, compared = min(n, found.samples), min(n, found.holdout_samples)
    arguments: tuple[str, ...] = ()
    if n != WORK[0][1]:
        arguments = ("--samples", str(n), "--holdout", str(n))
    return [
        Proposal(
            what="samples",
            value=f"{measured:,} + {compared:,}",
            reason="to measure layers on, and others to compare whole plans on",
            arguments=arguments,
        ),
        Proposal(
            what="effort",
            value=effort,
            reason=takes,
            arguments=() if effort == WORK[0][0] else ("--effort", effort),
        ),
    ]


def _say_next(model: str, plan_file: Path, out: Path) -> None:
    from bitquota.exports.export_report import ExportReport

    made: ExportReport = ExportReport.load(out)
    arguments: Sequence[Any] = ("evaluate", model, "TEST", "--plan", plan_file, "--exported", out)
    output.say(
        f"measure it on samples that were not used: bitquota {' '.join(map(str, arguments))}"
    )
    if how := HOW_TO_RUN.get(made.exporter):
        output.say(f"run it: {how.format(out=out)}")

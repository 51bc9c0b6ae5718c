"""The Typer application: every command, and how errors leave the process."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from typing import Annotated

import typer

import bitquota
from bitquota.cli import (
    comparing,
    evaluating,
    exporting,
    gating,
    inspecting,
    keeping,
    planning,
    profiling,
    quickstart,
    reporting,
    serving,
    solving,
    training,
)
from bitquota.cli.examples import add_examples
from bitquota.cli.sandboxed import OUTSIDE, Outside, sandboxed
from bitquota.errors import BitquotaError, InvalidInput
from bitquota.service import admin_commands

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells expect."""

app = typer.Typer(
    name="bitquota",
    help="Certified mixed-precision bit allocation: which bit-width for which layer.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=(
        "Exit codes: 0 done; 1 measurement, solver or gate failed; 2 bad input or usage; "
        "3 service failed, timed out or cancelled; 4 plan of another model; "
        "5 no plan fits the budget."
    ),
)
app.command("quickstart")(quickstart.quickstart)
app.command("inspect")(sandboxed()(inspecting.inspect))
app.command("targets")(inspecting.targets)
app.command("plan")(sandboxed(files=("out", "report_file", "matrix_file"))(planning.plan))
app.command("measure")(sandboxed(files=("out",))(planning.measure))
app.command("profile")(sandboxed(files=("out", "files"))(profiling.profile))
app.command("compare")(sandboxed(files=("out", "report_file", "plot_file"))(comparing.compare))
app.command("export")(sandboxed(files=("out",))(exporting.export))
app.command("finetune")(sandboxed(folders=("out", "checkpoints"))(training.finetune))
app.command("learn")(sandboxed(folders=("out", "checkpoints"))(training.learn))
app.command("evaluate")(sandboxed()(evaluating.evaluate))
app.command("show")(planning.show)
app.command("report")(reporting.report)
app.command("solve")(solving.solve_file)
app.command("frontier")(solving.frontier)
app.command("verify")(solving.verify)
app.command("lock")(gating.lock)
app.command("check")(sandboxed(files=("junit", "summary"), reads=(gating.LOCK_FILE,))(gating.check))
app.command("diff")(gating.diff)
app.command("serve")(serving.serve)
app.command("demo")(serving.demo)
app.add_typer(keeping.app, name="ledger")
app.add_typer(admin_commands.app, name="admin")
add_examples(app)


def _print_version(wanted: bool) -> None:  # Typer calls it with the flag
    if wanted:
        typer.echo(f"bitquota {bitquota.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    sandbox: Annotated[
        str,
        typer.Option(
            envvar="BITQUOTA_SANDBOX",
            help="For commands that open a .pt2 or .onnx file: auto (where bubblewrap works), "
            "require, or off (a model of your own).",
        ),
    ] = "auto",
    version: Annotated[  # noqa: ARG001  # Typer needs the parameter; the callback acts on it
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    if context.obj is not None:
        token = OUTSIDE.set(Outside(arguments=tuple(context.obj), mode=sandbox))
        context.call_on_close(lambda: OUTSIDE.reset(token))


def _sentence(err: OSError) -> str:
    reason = (err.strerror or type(err).__name__).lower()
    return (
        "files and folders of a command must be there, and writable where it writes; "
        f"'{err.filename}': {reason}: name another path, or fix its permissions"
    )


def main(*, in_sandbox: bool = False) -> None:
    """Run the command line; an expected error becomes one sentence and its exit code."""
    # Most of a short command is imports, and Python would look through them for garbage again and
    # again: at its own threshold of 700 new objects a tenth of the processor time of a small plan.
    gc.set_threshold(5000)
    try:
        app(obj=None if in_sandbox else sys.argv[1:])
    except BitquotaError as err:
        typer.secho(f"error: {err}", err=True, fg=typer.colors.RED)
        sys.exit(err.exit_code)
    except OSError as err:
        # Only what concerns a file that somebody named; anything else is a fault of ours.
        if err.filename is None:
            raise
        typer.secho(f"error: {_sentence(err)}", err=True, fg=typer.colors.RED)
        sys.exit(InvalidInput.exit_code)
    except SystemExit as stop:
        # Typer turns Ctrl-C into this exit code and says nothing.
        if stop.code == INTERRUPTED:
            typer.echo("interrupted", err=True)
        raise
    except KeyboardInterrupt:  # outside of any command
        typer.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)


def inside() -> None:
    """Run the command line; called in the sandbox, by ``_run_inside``."""
    order = json.loads(sys.argv[1])
    os.environ.update(order["environment"])
    with contextlib.suppress(OSError):  # a folder of which nothing is shown is not there
        os.chdir(order["folder"])
    sys.argv = ["bitquota", *order["arguments"]]
    main(in_sandbox=True)

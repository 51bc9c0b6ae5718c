"""Commands on the ledger of measurements: ``ledger show``, ``ledger export``, ``ledger import``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bitquota.cli import options as opt
from bitquota.cli import output
from bitquota.cli.here import default_ledger
from bitquota.cli.written import Written
from bitquota.errors import InvalidInput
from bitquota.models.sources import require_existing
from bitquota.sensitivity.cache import SqliteLedger, export_entries, import_entries

app = typer.Typer(
    help="The measurement cache: show it, or move measurements between machines.",
    no_args_is_help=True,
)
Archive = Annotated[Path, typer.Argument(help="Archive of measurements.")]


def _existing(path: Path | None) -> Path:
    found = path or default_ledger()
    if not found.is_file():
        msg = (
            f"the measurement cache must exist to be read; '{found}' does not: measure "
            "something first"
        )
        raise InvalidInput(msg, path=str(found))
    return found


@app.command("show")
def show(
    ledger: opt.LedgerPath = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show where the measurement cache is and how much it contains."""
    path = _existing(ledger)
    with SqliteLedger(path) as kept:
        entries, size = len(kept), path.stat().st_size
    if as_json:
        output.print_json({"path": str(path), "entries": entries, "bytes": size})
        return
    output.console.print(
        f"{path}: {entries:,} entries, {size / 2**20:,.1f} MiB", markup=False, highlight=False
    )


@app.command("export")
def export(archive: Archive, ledger: opt.LedgerPath = None) -> None:
    """Write every measurement to ARCHIVE; equal caches give equal bytes."""
    source = _existing(ledger)
    file = Written.at(archive, "ARCHIVE")
    with SqliteLedger(source) as kept:
        n = len(kept)
        file.save(lambda path: export_entries(kept, path))
    output.messages.print(f"{n:,} entries", markup=False, highlight=False)


@app.command("import")
def import_(archive: Archive, ledger: opt.LedgerPath = None) -> None:
    """Add the measurements of ARCHIVE; existing ones stay as they are."""
    require_existing(archive, "what 'bitquota ledger export' wrote", "ARCHIVE")
    path = ledger or default_ledger()
    with SqliteLedger(path) as kept:
        before = len(kept)
        n = import_entries(kept, archive)
        new = len(kept) - before
    output.messages.print(
        f"read {n:,} entries, {new:,} of them new to {path}", markup=False, highlight=False
    )

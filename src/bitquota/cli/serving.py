"""Commands around the service: ``serve`` and ``demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def serve(
    host: Annotated[
        str, typer.Option("--host", envvar="BITQUOTA_HOST", help="Address to listen on.")
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            "--port",
            envvar="BITQUOTA_PORT",
            min=0,
            max=65535,
            help="Port to listen on; 0 picks a free one.",
        ),
    ] = 8000,
    data_dir: Annotated[
        Path,
        typer.Option(
            "--data-dir",
            envvar="BITQUOTA_DATA_DIR",
            help="Folder for the database, uploads, measurement caches and results.",
        ),
    ] = Path("bitquota-data"),
) -> None:
    """Serve the REST API: upload a model and a calibration set, POST a job, GET the plan."""
    from bitquota.service import serve as run

    run(host=host, port=port, data_dir=data_dir)


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the plans and the report.")] = Path(
        "demo"
    ),
    seed: Annotated[int, typer.Option("--seed", help="Seed for training and samples.")] = 0,
) -> None:
    """Train a small network, start the service, plan two budgets over HTTP, and compare them."""
    from bitquota.cli.demo import run

    run(out, seed=seed)

"""Commands on a server instead of here: upload what it lacks, order, wait, fetch."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitquota.cli import output
from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bitquota.canonical import JsonObject
    from bitquota.client import Client, Job


@contextmanager
def opened(server: str, api_key: str | None) -> Iterator[Client]:
    """Yield a client of ``server``."""
    from bitquota.client import Client

    with Client(server, api_key) as client:
        yield client


def file_of(text: str) -> Path:
    """Return a file to upload; raises ``InvalidInput`` for factories and folders."""
    path = Path(text)
    if not path.is_file():
        msg = (
            "a server takes files: a .pt2 or .onnx model, a zip of a Hugging Face folder, a .npz "
            f"or .safetensors set; '{text}' is not a file; leave --server out for factories and "
            "folders"
        )
        raise InvalidInput(msg, path=text)
    return path


def done(job: Job) -> Job:
    """Show a job's id and progress until it has succeeded, and return it."""
    output.messages.print(f"job {job.id}", highlight=False)
    with output.progress_bars() as on_progress:
        job.wait(on_progress=on_progress)
    return job


def solution(file: Path, order: JsonObject, server: str, api_key: str | None) -> JsonObject:
    """Run ``bitquota solve`` there."""
    with opened(server, api_key) as client:
        job = done(client.order("solve", order, matrix=file_of(str(file))))
        found: JsonObject = job.result("solution")
        return found


def frontier(file: Path, order: JsonObject, server: str, api_key: str | None) -> list[Any]:
    """Run ``bitquota frontier`` there."""
    with opened(server, api_key) as client:
        job = done(client.order("frontier", order, matrix=file_of(str(file))))
        found: list[Any] = job.result("frontier")
        return found

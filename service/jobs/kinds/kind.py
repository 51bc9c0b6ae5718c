"""What a kind of job is: what a client submits, the work, and the results that are kept.

A kind is one value of ``JobKind``, made in a file of its own beside this one and listed once in
``bitquota.service.jobs.kinds.KINDS``. Submissions, OpenAPI, storage, the way into the sandbox and
back, the endpoints of results and their collection follow from it.

Design: docs/design/jobs.md
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bitquota.errors import InvalidInput
from bitquota.service.store.formats import ArtifactKind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from bitquota.canonical import JsonObject
    from bitquota.service.jobs.work import Work

JSON = "application/json"
MARKDOWN = "text/markdown; charset=utf-8"
BINARY = "application/octet-stream"
ZIP = "application/zip"


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """An upload that a submission names by its digest.

    Attributes:
        role: Member of the submission.
        artifact: What kind of upload it must be.
        text: One sentence for OpenAPI.
        many: Whether the submission names a list of them.
        optional: Whether the submission may leave it out.
    """

    role: str
    artifact: ArtifactKind
    text: str
    many: bool = False
    optional: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Something that a job leaves, kept as a file of the blob store.

    Attributes:
        name: Its name in ``Work.give`` and in the job's ``results``.
        text: One sentence for OpenAPI.
        check: Raises unless the file holds what it must: the worker that wrote it ran a
            stranger's model. Imports no torch. ``ValueError``, ``KeyError`` and ``TypeError`` are
            understood too.
        path: Last part of the endpoint that returns it, or ``None`` where there is none.
        media_type: Of that endpoint.
        suffix: Of the file name under which it is downloaded; empty shows it instead.
        many: Whether there may be several, in order.
        optional: Whether a job may succeed without it.
        max_bytes: Largest size of one.
        keep_as: The upload that it becomes, so that another submission can name it.
    """

    name: str
    text: str
    check: Callable[[Path], object]
    path: str | None = None
    media_type: str = JSON
    suffix: str = ""
    many: bool = False
    optional: bool = False
    max_bytes: int = 512 * 2**20
    keep_as: ArtifactKind | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobKind:
    """A kind of job.

    Attributes:
        name: What the submission's ``kind`` says.
        summary: One sentence.
        inputs: Uploads that the submission names.
        request: The order's ``request`` as a type that pydantic knows.
        example: A submission, without its ``kind``, for OpenAPI.
        results: What it leaves.
        run: The work; it runs in the sandbox, loads torch only there, and ends by returning.
        accept: Returns the request as it is stored, or raises what is wrong with it as far as
            that can be told without the uploads.
        derive_from: Results whose files ``derive`` wants.
        derive: Returns further results by name, made from them outside of the sandbox; raises
            where they do not agree.
        checkpoints: Names of the files from which another attempt of a training goes on; see
            ``bitquota.service.worker.checkpoints``.
    """

    name: str
    summary: str
    inputs: tuple[Input, ...]
    request: Any
    example: JsonObject
    results: tuple[Result, ...]
    run: Callable[[Work], None]
    accept: Callable[[Any], JsonObject]
    derive_from: tuple[str, ...] = ()
    derive: Callable[[Mapping[str, Sequence[Path]]], Mapping[str, bytes]] = lambda _given: {}
    checkpoints: tuple[str, ...] = ()

    @property
    def runs_model(self) -> bool:
        """Whether the work runs a model, for which its process loads torch."""
        return any(entry.artifact is ArtifactKind.MODEL for entry in self.inputs)

    def result(self, name: str) -> Result:
        """Return a result by name; raises ``InvalidInput``."""
        for result in self.results:
            if result.name == name:
                return result
        known = ", ".join(r.name for r in self.results)
        msg = f"a {self.name} job leaves {known}; got '{name}'"
        raise InvalidInput(msg, kind=self.name)


MODEL = Input(role="model", artifact=ArtifactKind.MODEL, text="Digest of an uploaded model.")
DATASET = Input(
    role="dataset", artifact=ArtifactKind.DATASET, text="Digest of an uploaded calibration set."
)
CORRECTION_DATA = Input(
    role="correction_data",
    artifact=ArtifactKind.DATASET,
    text="Digest of an unlabelled set that the plans' corrections are fitted on.",
    optional=True,
)
QUANTIZED = Input(
    role="quantized",
    artifact=ArtifactKind.QUANTIZED,
    text="Digests of the quantized weights that the plans name under `weights`: uploaded, or left "
    "by jobs. Those that are there are found without being named.",
    many=True,
    optional=True,
)
MATRIX = Input(
    role="matrix",
    artifact=ArtifactKind.MATRIX,
    text="Digest of a sensitivity matrix: uploaded, or left by a job.",
)

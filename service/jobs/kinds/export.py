"""``export``: a plan as files that a runtime loads, verified by an export report."""

from __future__ import annotations

import hashlib
import zipfile
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, Field

from bitquota.canonical import canonical_json
from bitquota.errors import InvalidInput
from bitquota.exports.export_report import ExportReport
from bitquota.exports.names import format_for
from bitquota.report.model_card import write_card
from bitquota.service.jobs.kinds.kind import (
    CORRECTION_DATA,
    MODEL,
    QUANTIZED,
    Input,
    JobKind,
    Result,
)
from bitquota.service.jobs.kinds.results import ARCHIVE, read_json
from bitquota.service.store.formats import ArtifactKind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from bitquota.canonical import JsonObject
    from bitquota.service.jobs.work import Work

_EPOCH = (1980, 1, 1, 0, 0, 0)
"""Time of every member: equal exports are equal archives."""


class ExportRequest(BaseModel):
    """Where the plan goes."""

    model_config = ConfigDict(extra="forbid")

    format: str | None = Field(
        default=None, max_length=60, description="Exporter; by default the target's."
    )
    target: str | None = Field(
        default=None, max_length=60, description="Deployment target, whose rules are checked."
    )


def run(work: Work) -> None:
    """Hand over a zip of the exported folder, and its export report."""
    from bitquota.exports.export import export_plan

    (plan,) = work.plans("plan")
    model = work.measured_model()
    work.say("export")
    folder = work.scratch / "export"
    report = export_plan(
        model,
        plan,
        folder,
        format_name=work.request["format"],
        target=work.request["target"],
        samples=work.samples_if_any("dataset"),
        correction_data=work.samples_if_any("correction_data"),
    )
    write_card(folder, plan, report)
    packed = work.scratch / "export.zip"
    pack(folder, packed)
    work.give("archive", packed)
    work.give("receipt", canonical_json(report.to_json()).encode())


def pack(folder: Path, target: Path) -> None:
    """Write every file below ``folder`` into a zip, uncompressed, in order of name."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = zipfile.ZipInfo(path.relative_to(folder).as_posix(), _EPOCH)
            name.external_attr = 0o644 << 16
            name.file_size = path.stat().st_size  # large ones need another form of entry
            with path.open("rb") as file, archive.open(name, "w") as member:
                while piece := file.read(2**20):
                    member.write(piece)


def accept(request: JsonObject) -> JsonObject:
    """Return the request; raises ``InvalidInput`` unless it says where the plan goes."""
    format_for(request["format"], request["target"])
    return request


def agree(given: Mapping[str, Sequence[Path]]) -> dict[str, bytes]:
    """Hold every file of the archive to the export report; raises ``InvalidInput``."""
    report = ExportReport.from_json(read_json(given["receipt"][0]))
    with zipfile.ZipFile(given["archive"][0]) as archive:
        for file in report.files:
            state = hashlib.sha256()
            with archive.open(file.name) as member:
                while piece := member.read(2**20):
                    state.update(piece)
            if f"sha256:{state.hexdigest()}" != file.digest:
                msg = f"'{file.name}' must be the file that the export report names; it differs"
                raise InvalidInput(msg, file=file.name)
    return {}


KIND = JobKind(
    name="export",
    summary="Write a plan as files that a runtime loads, verified by an export report.",
    inputs=(
        MODEL,
        Input(
            role="plan",
            artifact=ArtifactKind.PLAN,
            text="Digest of a plan of this model: uploaded, or left by a job.",
        ),
        QUANTIZED,
        Input(
            role="dataset",
            artifact=ArtifactKind.DATASET,
            text="Samples on which the files are compared with the plan, where they can be run.",
            optional=True,
        ),
        CORRECTION_DATA,
    ),
    request=ExportRequest,
    example={
        "model": "sha256:" + "0" * 64,
        "plan": "sha256:" + "3" * 64,
        "dataset": "sha256:" + "1" * 64,
        "request": {"target": "ort-cpu"},
    },
    results=(
        ARCHIVE,
        Result(
            name="receipt",
            text="Files, sizes and differences, as read back from what was written.",
            check=lambda path: ExportReport.from_json(read_json(path)),
            path="receipt",
        ),
    ),
    run=run,
    accept=accept,
    derive_from=("archive", "receipt"),
    derive=agree,
)

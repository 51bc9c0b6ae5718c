"""Results that several kinds of job leave, and how each is checked from first principles."""

from __future__ import annotations

import json
import zipfile
from typing import TYPE_CHECKING, Any

from bitquota.candidates.layers import Inventory
from bitquota.errors import InvalidInput
from bitquota.matrix import SensitivityMatrix
from bitquota.plan import Plan
from bitquota.report.text import render_markdown
from bitquota.service.jobs.kinds.kind import BINARY, MARKDOWN, ZIP, Result
from bitquota.service.security.archives import check_zip
from bitquota.service.security.upload_inspection import MAX_PLAN_BYTES, check_safetensors
from bitquota.service.store.formats import ArtifactKind
from bitquota.solver.archive import CertificateFile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


def read_json(path: Path) -> Any:  # noqa: ANN401  # any JSON
    """Return the JSON in a file; raises ``ValueError``."""
    return json.loads(path.read_bytes())


def check_plan(path: Path) -> None:
    """Raise unless the file is a whole plan whose sums hold."""
    Plan.from_json(read_json(path))


def check_rows(path: Path) -> None:
    """Raise unless the file is a JSON list of objects."""
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        msg = "a list of objects must be returned"
        raise InvalidInput(msg)


def check_object(path: Path) -> None:
    """Raise unless the file is a JSON object."""
    if not isinstance(read_json(path), dict):
        msg = "a JSON object must be returned"
        raise InvalidInput(msg)


def check_text(path: Path) -> None:
    """Raise unless the file is UTF-8 text."""
    path.read_text(encoding="utf-8")


def check_archive(path: Path) -> None:
    """Raise unless the file is a zip of plain, uncompressed files that stay in their folder."""
    check_zip(path, max_ratio=1, error=InvalidInput)
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            msg = "the files of an archive must be stored uncompressed"
            raise InvalidInput(msg)


PLANS = Result(
    name="plans",
    text="The plans, one for each budget.",
    check=check_plan,
    path="plan",
    many=True,
    keep_as=ArtifactKind.PLAN,
    max_bytes=MAX_PLAN_BYTES,
)
MATRIX = Result(
    name="matrix",
    text="The sensitivity matrix as the `.npz` that `bitquota solve` reads.",
    check=lambda path: SensitivityMatrix.from_bytes(path.read_bytes()),
    path="sensitivity",
    media_type=BINARY,
    suffix=".npz",
    keep_as=ArtifactKind.MATRIX,
)
INVENTORY = Result(
    name="inventory",
    text="All tensors of the model.",
    check=lambda path: Inventory.from_json(read_json(path)),
)
CERTIFICATES = Result(
    name="certificates",
    text="For each plan the certificate of its bound, which `bitquota verify` checks.",
    check=lambda path: CertificateFile.from_bytes(path.read_bytes()),
    path="certificate",
    media_type=BINARY,
    suffix=".npz",
    many=True,
    optional=True,
)
QUANTIZED_WEIGHTS = Result(
    name="quantized",
    text="For each plan the file of its quantized weights, if weights are not rounded to nearest.",
    check=lambda path: check_safetensors(path, InvalidInput),
    path="quantized",
    media_type=BINARY,
    suffix=".safetensors",
    many=True,
    optional=True,
    keep_as=ArtifactKind.QUANTIZED,
    max_bytes=16 * 2**30,
)
REPORT = Result(
    name="report",
    text="A report for people, as Markdown.",
    check=check_text,
    path="report",
    media_type=MARKDOWN,
    optional=True,
)
ARCHIVE = Result(
    name="archive",
    text="A zip of the exported files, their export report and the plan.",
    check=check_archive,
    path="archive",
    media_type=ZIP,
    suffix=".zip",
    max_bytes=16 * 2**30,
)


def report_of_plans(given: Mapping[str, Sequence[Path]]) -> dict[str, bytes]:
    """Return the report of the plans that were handed over, if there are any."""
    plans = [Plan.from_json(read_json(path)) for path in given["plans"]]
    return {"report": render_markdown(plans).encode()} if plans else {}

"""Plans out: exporters by name, each with an export report.

``export_plan`` writes files, reads every quantized tensor back, compares sizes with the plan, and
runs what can be run here against the fake-quantized model.

Design: docs/design/targets.md
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bitquota.candidates.targets import target_by_name
from bitquota.errors import ExportFailed, InvalidInput
from bitquota.exports.compressed_tensors_folder import CompressedTensorsFolder
from bitquota.exports.config_files import CONFIG_FILES
from bitquota.exports.export_report import (
    Difference,
    ExportedFile,
    ExportReport,
    describe_files,
)
from bitquota.exports.genai_folder import GenaiFolder
from bitquota.exports.gguf_file import GgufFile
from bitquota.exports.gptq_folder import GptqFolder
from bitquota.exports.hugging_face_folder import source_folder
from bitquota.exports.kv_cache import OPTIONS_FILE, cache_options
from bitquota.exports.mlx_folder import MlxFolder
from bitquota.exports.modelopt_folder import ModelOptFolder
from bitquota.exports.names import FOLDER_FORMATS, check_folder, check_format, format_for
from bitquota.exports.onnx_qdq import OnnxMatMulNBits, OnnxQdq
from bitquota.exports.openvino_genai import OpenvinoGenai
from bitquota.exports.openvino_ir import OpenvinoIr
from bitquota.exports.prepared import PreparedExport, prepare_export
from bitquota.exports.ref_int import RefInt
from bitquota.exports.storage_rules import require_storable
from bitquota.exports.timed import timed_budget, with_time
from bitquota.models.loaded import in_memory
from bitquota.plan import Plan

if TYPE_CHECKING:
    from torch import nn

    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.loaded import LoadedModel

__all__ = [
    "EXPORTERS",
    "Difference",
    "ExportReport",
    "ExportedFile",
    "Exporter",
    "PreparedExport",
    "export_plan",
    "exporter_by_name",
    "load_export",
    "open_export",
    "prepare_export",
]


class Exporter(Protocol):
    """Writes a prepared plan in one format.

    Attributes:
        name: What ``--format`` takes.
        summary: One sentence.
        runs_here: Whether its files can be run by a package that installs from a wheel; then
            ``load`` returns them as a module, and the export report holds the difference.
    """

    name: str
    summary: str

    @property
    def runs_here(self) -> bool:
        """See above."""
        ...

    def export(self, prepared: PreparedExport, folder: Path) -> ExportReport:
        """Write the files into the empty ``folder``, read them back, and say what they hold."""
        ...

    def load(self, prepared: PreparedExport, folder: Path) -> nn.Module:
        """Return the written files as a module that takes what the model takes."""
        ...


EXPORTERS: dict[str, Exporter] = {
    exporter.name: exporter
    for exporter in (
        RefInt(),
        CompressedTensorsFolder(),
        OnnxQdq(),
        OnnxMatMulNBits(),
        GenaiFolder(),
        OpenvinoIr(),
        OpenvinoGenai(),
        GgufFile(),
        MlxFolder(),
        GptqFolder(),
        ModelOptFolder(),
        *CONFIG_FILES,
    )
}
"""In order of preference."""


BY_TENSOR = frozenset(
    {exporter.name for exporter in (GgufFile, CompressedTensorsFolder, MlxFolder, GptqFolder)}
    | {exporter.name for exporter in CONFIG_FILES}
)
"""Formats that are written tensor by tensor, so that weights may stay in their files."""


def exporter_by_name(name: str) -> Exporter:
    """Return the exporter called ``name``; raises ``InvalidInput`` that lists them."""
    check_format(name)
    return EXPORTERS[name]


def export_plan(
    model: LoadedModel,
    plan: Plan,
    folder: Path,
    *,
    format_name: str | None = None,
    target: str | None = None,
    samples: CalibrationSet | None = None,
    correction_data: CalibrationSet | None = None,
) -> ExportReport:
    """Write ``plan`` as files that a runtime loads, verify them, and return the export report.

    The folder appears whole or not at all: files are written beside it and moved at the end.

    Args:
        model: The model that the plan was made for.
        plan: What to export.
        folder: Where to; must not exist, or be empty.
        format_name: Name of an exporter; by default the target's.
        target: Name of a target, whose rules the plan must keep.
        samples: A few are run to compare the files with fake-quantization; by default the
            model's own example, if its source has one.
        correction_data: Unlabelled samples for the plan's corrections, if it has any.

    Raises:
        StalePlan: The plan is of another model.
        InvalidPlan: The plan breaks the rules of the target or the format; layers are named.
        ExportFailed: A tensor does not read back as planned, or a runtime refuses the files.
        InvalidInput: The folder is not empty, or neither a format nor a target is named.
        MissingDependency: A package for this format is not installed.
    """
    exporter = exporter_by_name(format_for(format_name, target))
    chosen = None if target is None else target_by_name(target)
    check_folder(folder)
    if exporter.name in FOLDER_FORMATS:
        source_folder(model, exporter.name)
    require_storable(plan, exporter.name, chosen)
    options = cache_options(plan, exporter.name)
    if exporter.name not in BY_TENSOR:
        model = in_memory(model)
    prepared = prepare_export(
        model,
        plan,
        target=chosen,
        samples=samples,
        correction_data=correction_data,
        holds_inputs=getattr(exporter, "holds_inputs", None),
    )
    if timed_budget(plan) is not None:
        prepared = replace(prepared, traced={})  # the graph is written twice
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        report = exporter.export(prepared, building)
        if exporter.runs_here and report.difference is None:
            note = "nothing was run: provide samples to compare with fake-quantization"
            report = replace(report, notes=(*report.notes, note))
        if prepared.identity_note:
            report = replace(report, notes=(*report.notes, prepared.identity_note))
        if any(a.candidate.activation_bits is not None for a in plan.assignments):
            note = "activations are quantized by the runtime, with ranges of its own calibration"
            if prepared.activations:
                note = "inputs of layers are quantized on the grids of the plan"
            report = replace(report, notes=(*report.notes, note))
        if options:
            place = building / OPTIONS_FILE
            place.write_text(" ".join(options) + "\n")
            note = f"the runtime quantizes the KV cache: start it with the options in {place.name}"
            files = describe_files(building, [place])
            report = replace(report, files=(*report.files, *files), notes=(*report.notes, note))
        report.require()
        report = with_time(report, exporter.export, prepared, building)
        plan.save(building / "plan.json")
        report.save(building)
        building.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        building.rename(folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return report


def load_export(
    model: LoadedModel,
    plan: Plan,
    folder: Path,
    *,
    format_name: str,
    correction_data: CalibrationSet | None = None,
) -> nn.Module:
    """Return exported files as a module that takes what the model takes.

    Raises:
        InvalidInput: The format cannot be run here.
        ExportFailed: The files do not load.
    """
    exporter = exporter_by_name(format_name)
    if not exporter.runs_here:
        msg = f"files of format '{format_name}' cannot be run on this machine"
        raise InvalidInput(msg, format=format_name)
    if exporter.name not in BY_TENSOR:
        model = in_memory(model)
    prepared = prepare_export(model, plan, correction_data=correction_data)
    return exporter.load(prepared, folder)


def open_export(
    model: LoadedModel, folder: Path, *, correction_data: CalibrationSet | None = None
) -> tuple[nn.Module, Plan, ExportReport]:
    """Return what lies in an export's folder: a module that runs it, its plan, its report.

    Args:
        model: The model that was exported.
        folder: What ``export_plan`` wrote.
        correction_data: As at the export, for formats that torch puts together.

    Raises:
        InvalidInput: No such folder, or a format that cannot be run here.
        StalePlan: The export is of another model.
        ExportFailed: The files are not those of the export report, or do not load.
    """
    report = ExportReport.load(folder)
    for expected in report.files:
        path = folder / expected.name
        if not path.is_file() or ExportedFile.of(path, folder) != expected:
            msg = (
                f"an export's files must be those of its report; '{expected.name}' in '{folder}' "
                "is missing or was changed: export again"
            )
            raise ExportFailed(msg, file=expected.name)
    plan = Plan.load(folder / "plan.json")
    module = load_export(
        model, plan, folder, format_name=report.exporter, correction_data=correction_data
    )
    return module, plan, report

"""The tasks behind charts, maps and the model page: they read the files that a job left.

Files are named by their content, so one that was read stays good. Answers are JSON or HTML as the
browser gets it; the API process passes the bytes on.
"""

from __future__ import annotations

import json
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitquota.candidates.targets import TARGETS
from bitquota.errors import NotFound
from bitquota.exports.names import FOLDER_FORMATS, unknown_architecture
from bitquota.exports.storage_rules import refusal
from bitquota.matrix import SensitivityMatrix
from bitquota.plan import Plan
from bitquota.report.charts import (
    cross_map,
    document,
    frontier_of,
    frontier_rows,
    maps_of,
    plan_json,
)
from bitquota.report.page import render_html

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bitquota.canonical import JsonObject

_KEPT = 8
_REPORT_S = 5.0
_recent: OrderedDict[str, Any] = OrderedDict()


def charts_task(arguments: JsonObject, _ask: object) -> tuple[JsonObject, bytes]:
    """Return what the model page draws, without the cross-layer maps."""
    return {}, _json(_document(arguments))


def cross_task(arguments: JsonObject, _ask: object) -> tuple[JsonObject, bytes]:
    """Return one map of cross-layer terms; raises ``NotFound``."""
    matrix = _matrix(arguments)
    if matrix is None:
        msg = "a map needs a sensitivity matrix; this job left none"
        raise NotFound(msg, job=arguments["job"])
    plans = _plans(arguments)
    return {}, _json(cross_map(matrix, arguments["at"], plans[0][0] if plans else None))


def report_task(arguments: JsonObject, _ask: object) -> tuple[JsonObject, bytes]:
    """Return the model page as one file that needs no network."""
    found = _document(arguments)
    matrix = _matrix(arguments)
    maps = {}
    if matrix is not None:
        found |= {"frontier": frontier_of(matrix, time_limit_s=_REPORT_S)}
        plans = _plans(arguments)
        maps = maps_of(matrix, plans[0][0] if plans else None)
    return {}, render_html(found, maps).encode()


def model_page_task(arguments: JsonObject, _ask: object) -> tuple[JsonObject, bytes]:
    """Return what the model page says of its plans, and what can be exported."""
    plans = _plans(arguments)
    kind = _model_type(arguments["folder"])
    exports = export_choices([plan for plan, _ in plans], arguments["model_format"], kind)
    return {"plans": [shown for _, shown in plans], "exports": exports}, b""


def runs_task(arguments: JsonObject, _ask: object) -> tuple[JsonObject, bytes]:
    """Return what the comparison of several jobs shows of each plan of this one."""
    rows, _ = plan_rows_task(arguments, _ask)
    matrix = _matrix(arguments)
    found = {"plans": rows["rows"], "range": None if matrix is None else _average_range(matrix)}
    return found, b""


def plan_rows_task(arguments: JsonObject, _ask: object) -> tuple[JsonObject, bytes]:
    """Return what tables of plans show of each plan of a job."""
    shown = []
    for plan, said in _plans(arguments):
        wanted = ("budget", "selected", "size_bits", "average_bits", "predicted", "measured")
        unit = None if plan.measured is None else plan.measured.unit
        target = None if plan.target is None else plan.target.name
        more = {"loss": plan.loss, "unit": unit, "target": target}
        shown.append({name: said[name] for name in wanted} | more)
    return {"rows": shown}, b""


def _average_range(matrix: SensitivityMatrix) -> tuple[float, float]:
    """Return the average bit-widths of the smallest and the largest choice."""
    codes: dict[str, list[int]] = {}
    weights: dict[str, int] = {}
    for row in matrix.table.rows:
        codes.setdefault(row.group, []).append(sum(c.size.codes for c in row.candidates))
        weights[row.group] = sum(c.size.codes // c.stored_bits for c in row.candidates)
    total = sum(weights.values())
    return sum(map(min, codes.values())) / total, sum(map(max, codes.values())) / total


def export_choices(
    plans: Sequence[Plan], model_format: str, model_type: str | None = None
) -> list[JsonObject]:
    """Return what an export job can make: targets, then formats that write a plan as it is.

    Each says of every plan why it is refused, or nothing. Targets that no plan is fit for are left
    out, and so is what needs a Hugging Face folder for a model that is known to be none.

    Args:
        plans: The plans of the job.
        model_format: That of the upload, or nothing where it is not known.
        model_type: Of a Hugging Face folder, from its config.
    """
    unfit = FOLDER_FORMATS if model_format in {"pt2", "onnx"} else frozenset()
    formats = dict.fromkeys(target.exporter for target in TARGETS.values())
    offered = [(f"{name} (target)", {"target": name}, t) for name, t in TARGETS.items()]
    kept = []
    for shown, request, target in [*offered, *((f, {"format": f}, None) for f in formats)]:
        format_name = request["format"] if target is None else target.exporter
        if format_name in unfit:
            continue
        always = None
        if format_name == "gguf" and model_type is not None:
            always = unknown_architecture(model_type)
        refused = [always or refusal(plan, format_name, target) for plan in plans]
        if target is None or None in refused:
            kept.append({"name": shown, "request": request, "refused": refused})
    return kept


def _model_type(path: str | None) -> str | None:
    """Return the kind of model that a zipped Hugging Face folder holds, by its config."""
    if path is None:
        return None
    with zipfile.ZipFile(path) as folder:
        found = json.loads(folder.read("config.json")).get("model_type")
    return found if isinstance(found, str) else None


def _document(arguments: JsonObject) -> JsonObject:
    plans = _plans(arguments)
    comparison = arguments["comparison"]
    found = document(
        title=arguments["title"],
        plans=[plan for plan, _ in plans],
        plan_documents=[shown for _, shown in plans],
        matrix=_matrix(arguments),
        comparison=None if comparison is None else json.loads(Path(comparison).read_bytes()),
    )
    if not plans and arguments["frontier"] is not None:
        rows = frontier_rows(json.loads(Path(arguments["frontier"]).read_bytes()))
        found |= {name: rows[name] for name in ("layers", "frontier")}
    return found


def _matrix(arguments: JsonObject) -> SensitivityMatrix | None:
    path = arguments["matrix"]
    return None if path is None else _read(path, SensitivityMatrix.from_bytes)


def _plans(arguments: JsonObject) -> list[tuple[Plan, JsonObject]]:
    """Return the plans, one for each budget, and what charts show of each."""
    return [_read(path, _plan) for path in arguments["plans"]]


def _plan(data: bytes) -> tuple[Plan, JsonObject]:
    """Return a stored plan and what charts show of it; its digest was checked when it came."""
    text = json.loads(data)
    digest = str(text.pop("digest"))
    plan = Plan.from_json(text)
    return plan, plan_json(plan, digest=digest)


def _read(path: str, make: Callable[[bytes], Any]) -> Any:  # noqa: ANN401  # what ``make`` makes
    if path not in _recent:
        _recent[path] = make(Path(path).read_bytes())
    _recent.move_to_end(path)
    while len(_recent) > _KEPT:
        _recent.popitem(last=False)
    return _recent[path]


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()

"""Commands on a server instead of here: upload what it lacks, submit, wait, fetch."""

from __future__ import annotations

import base64
import tempfile
import zipfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitquota.canonical import write_whole
from bitquota.cli import output
from bitquota.errors import InvalidInput, NotFound
from bitquota.evaluate.scores import Score
from bitquota.exports.export_report import ExportReport
from bitquota.matrix import SensitivityMatrix
from bitquota.plan import WEIGHTS_SUFFIX

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from bitquota.canonical import JsonObject
    from bitquota.cli.written import Written
    from bitquota.client import Client, Job
    from bitquota.estimate import JobEstimate
    from bitquota.plan import Plan
    from bitquota.report.comparison import Comparison
    from bitquota.request import PlanRequest

_FIRST_CONTACT_S = 3.0
"""How long a server that was never reached is tried: a wrong address should be said at once."""


@contextmanager
def opened(server: str, api_key: str | None) -> Iterator[Client]:
    """Yield a client of ``server``, which must answer soon the first time."""
    from bitquota.client import Client

    with Client(server, api_key, retry_s=_FIRST_CONTACT_S) as first:
        first.reach()
    with Client(server, api_key) as client:
        yield client


def file_of(text: str) -> Path:
    """Return a file to upload; raises ``InvalidInput`` for factories and folders."""
    path = Path(text)
    if not path.is_file():
        msg = (
            "a server takes files: a .pt2, .onnx or .gguf model, a Hugging Face folder, a .npz or "
            f".safetensors set; '{text}' is none; leave --server out for factories"
        )
        raise InvalidInput(msg, path=text)
    return path


def _quantized(plan_files: Sequence[Path]) -> list[Path]:
    """Return the quantized weights that stand beside plans."""
    beside = [path.with_suffix(WEIGHTS_SUFFIX) for path in plan_files]
    return [path for path in beside if path.is_file()]


def check_files(model: str, *samples: str) -> None:
    """Raise ``InvalidInput`` unless a server can be handed the model and the sets."""
    from bitquota.client.sources import is_model_folder

    if not is_model_folder(Path(model)):
        file_of(model)
    for spec in samples:
        file_of(spec)


def model_of(text: str) -> Path:
    """Return a model to upload; a ``.gguf`` is unpacked into a Hugging Face folder here."""
    from bitquota.client.sources import is_model_folder

    folder = Path(text)
    if is_model_folder(folder):
        return folder
    if folder.suffix == ".gguf":
        from bitquota.models.gguf_folder import unpacked_gguf

        return unpacked_gguf(file_of(text))
    return file_of(text)


def done(job: Job) -> Job:
    """Show a job's page and progress until it has succeeded, and return it; Ctrl-C cancels it."""
    output.say(f"job {job.id}: {job.page}")
    try:
        with output.shown_progress() as on_progress:
            job.wait(on_progress=on_progress)
    except KeyboardInterrupt:
        job.cancel()
        output.say(f"cancelled {job.id}")
        raise
    return job


@contextmanager
def measured(
    server: str,
    api_key: str | None,
    kind: str,
    request: JsonObject | PlanRequest,
    model: str,
    data: str,
) -> Iterator[Job]:
    """Yield a job of ``kind`` on a model and a set, when it has succeeded."""
    with opened(server, api_key) as client:
        yield done(client.order(kind, request, model=model_of(model), dataset=file_of(data)))


def plans(
    server: str,
    api_key: str | None,
    request: PlanRequest,
    model: str,
    data: str,
    matrix_file: Written | None,
) -> tuple[tuple[Plan, ...], tuple[bytes | None, ...], tuple[bytes | None, ...]]:
    """Run ``bitquota plan`` there; returns certificates and quantized weights too, if any."""
    with measured(server, api_key, "plan", request, model, data) as job:
        if matrix_file is not None:
            matrix_file.save(lambda path: write_whole(path, job.sensitivity()))
        made = job.plans()
        weights = tuple(
            None if plan.weights is None else job.quantized(budget)
            for budget, plan in enumerate(made)
        )
        try:
            certificates = tuple(job.certificate(budget) for budget in range(len(made)))
        except NotFound:  # solvers other than ours give none
            certificates = ()
        return made, certificates, weights


def matrix(
    server: str, api_key: str | None, request: PlanRequest, model: str, data: str
) -> SensitivityMatrix:
    """Run ``bitquota measure`` there."""
    with measured(server, api_key, "measure", request, model, data) as job:
        return SensitivityMatrix.from_bytes(job.sensitivity())


def comparison(
    server: str, api_key: str | None, request: JsonObject, model: str, data: str
) -> Comparison:
    """Run ``bitquota compare`` there."""
    with measured(server, api_key, "compare", request, model, data) as job:
        return job.comparison()


def estimate(
    server: str, api_key: str | None, request: JsonObject, model: str, data: str
) -> JobEstimate:
    """Run ``--dry-run`` there."""
    with measured(server, api_key, "estimate", request, model, data) as job:
        return job.estimate()


def scores(
    server: str,
    api_key: str | None,
    request: JsonObject,
    model: str,
    data: str,
    *,
    plan_files: Sequence[Path],
    original: str | None,
    correction_data: str | None,
) -> tuple[int, list[Score]]:
    """Run ``bitquota evaluate`` there; returns the number of samples too."""
    with opened(server, api_key) as client:
        job = client.order(
            "evaluate",
            request | {"names": [str(file) for file in plan_files]},
            model=model_of(model),
            dataset=file_of(data),
            plans=[file_of(str(file)) for file in plan_files],
            quantized=_quantized(plan_files),
            original=None if original is None else model_of(original),
            correction_data=None if correction_data is None else file_of(correction_data),
        )
        found = done(job).result("evaluation")
    return int(found["n_samples"]), [Score.from_json(score) for score in found["scores"]]


def export(
    server: str,
    api_key: str | None,
    request: JsonObject,
    model: str,
    plan_file: Path,
    folder: Path,
    *,
    samples: str | None,
    correction_data: str | None,
) -> ExportReport:
    """Run ``bitquota export`` there; the files come into ``folder``, which is new or empty."""
    with (
        opened(server, api_key) as client,
        tempfile.TemporaryDirectory(prefix="bitquota-") as scratch,
    ):
        job = client.order(
            "export",
            request,
            model=model_of(model),
            plan=file_of(str(plan_file)),
            quantized=_quantized([plan_file]),
            dataset=None if samples is None else file_of(samples),
            correction_data=None if correction_data is None else file_of(correction_data),
        )
        archive = done(job).save("archive", Path(scratch) / "export.zip")
        folder.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(folder)
    return ExportReport.load(folder)


def solution(
    file: Path, request: JsonObject, server: str, api_key: str | None, *, certified: bool
) -> tuple[JsonObject, bytes | None]:
    """Run ``bitquota solve`` there; returns the certificate too if ``certified``."""
    from bitquota.solver.files import document_of

    if file.suffix == ".json" and (stated := document_of(file)) is not None:
        return _problem(file, stated, request, server, api_key, certified=certified), None
    with opened(server, api_key) as client:
        job = done(client.order("solve", request, matrix=file_of(str(file))))
        found: JsonObject = job.result("solution")
        return found, job.certificate() if certified and found["choice"] is not None else None


def _problem(
    file: Path,
    stated: JsonObject,
    request: JsonObject,
    server: str,
    api_key: str | None,
    *,
    certified: bool,
) -> JsonObject:
    """Solve a problem document there, at once."""
    here_only = {
        "--budget": request["budget"] is not None,
        "--budget-index": request["budget_index"] is not None,
        "--robust": "robust" in request, "--tolerance": "tolerance" in request,
        "--solver": request.get("solver", "auto") != "auto",
        "--node-limit": request.get("node_limit") is not None,
        "--cross-check": request.get("cross_check", False), "--certificate": certified,
    }  # fmt: skip
    if any(here_only.values()):
        names = ", ".join(name for name, given in here_only.items() if given)
        msg = f"a server solves a problem file without {names}: leave them out, or solve it here"
        raise InvalidInput(msg, options=names)
    if request["top"] > 1:
        stated = stated | {"top": request["top"]}
    if isinstance(name := stated.get("matrix"), str):
        data = file_of(str(file.parent / name)).read_bytes()
        stated = stated | {"matrix": base64.b64encode(data).decode()}
    options = {"gap": request["gap"], "seed": request["seed"], "explain": request["explain"]}
    if request["time_limit_s"] is not None:
        options["time_limit_s"] = request["time_limit_s"]
    with opened(server, api_key) as client:
        return client.solve_problem(stated, **options)


def frontier(file: Path, request: JsonObject, server: str, api_key: str | None) -> list[Any]:
    """Run ``bitquota frontier`` there."""
    with opened(server, api_key) as client:
        job = done(client.order("frontier", request, matrix=file_of(str(file))))
        found: list[Any] = job.result("frontier")
        return found

"""Bytes that earlier releases wrote are read, written again the same, and made again the same."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import golden_values
from bitquota.candidates.budget import Budget
from bitquota.candidates.layers import Inventory
from bitquota.candidates.table import CandidateTable
from bitquota.canonical import canonical_json
from bitquota.ci.lock import Lock
from bitquota.evaluate.scores import Score
from bitquota.exports.export_report import ExportReport
from bitquota.matrix import SensitivityMatrix
from bitquota.plan import Plan
from bitquota.report.comparison import Comparison
from bitquota.request import PlanRequest
from bitquota.sensitivity.cache import SqliteLedger, export_entries, import_entries
from bitquota.sensitivity.tasks import Task
from bitquota.solver.archive import (
    certificate_from_bytes,
    certificate_to_bytes,
    problem_from_bytes,
    problem_to_bytes,
)
from bitquota.solver.backends.answer import Answer

GOLDEN = Path(__file__).parent
MEASURED = (
    "plan-measured-0.json", "plan-measured-1.json", "comparison.json", "solver.json"
)  # fmt: skip
"""Hold numbers that torch or the solver computed."""
FAMILIES = {
    "candidates": CandidateTable,
    "requests": PlanRequest,
    "scores": Score,
    "errands": Task,
    "answers": Answer,
}


def read(name: str) -> str:
    return (GOLDEN / name).read_text(encoding="utf-8")


def names(pattern: str) -> list[str]:
    found = sorted(path.name for path in GOLDEN.glob(pattern))
    assert found, f"no golden file '{pattern}'"
    return found


def same(old: Any, new: Any, path: str = "$") -> None:
    """Hold two JSON values equal, floats up to what another processor's rounding can change."""
    assert type(old) is type(new), path
    if isinstance(old, dict):
        assert old.keys() == new.keys(), path
        for key in old:
            if not (key == "versions" or key.endswith("digest")):  # of packages; of floats
                same(old[key], new[key], f"{path}.{key}")
    elif isinstance(old, list):
        assert len(old) == len(new), path
        for k, pair in enumerate(zip(old, new, strict=True)):
            same(*pair, f"{path}[{k}]")
    elif isinstance(old, float):
        assert old == pytest.approx(new, rel=1e-3, abs=1e-6), path
    else:
        assert old == new, path


class TestReadAndWritten:
    @pytest.mark.parametrize("name", names("*plan-*.json"))
    def test_plan(self, name):
        """Also of rules of a target before they spoke of recurrent layers and contractions."""
        assert Plan.from_json(json.loads(read(name))).dumps() == read(name)

    @pytest.mark.parametrize("name", names("lock-*.json"))
    def test_lock(self, name):
        assert Lock.load(GOLDEN / name).dumps() == read(name)

    @pytest.mark.parametrize("name", names("matrix-*.npz"))
    def test_matrix(self, name):
        data = (GOLDEN / name).read_bytes()
        assert SensitivityMatrix.from_bytes(data).to_bytes() == data

    @pytest.mark.parametrize("family", FAMILIES)
    def test_family(self, family):
        text = read(f"{family}.json")
        made = {k: FAMILIES[family].from_json(v) for k, v in json.loads(text).items()}
        assert canonical_json({k: v.to_json() for k, v in made.items()}) + "\n" == text

    @pytest.mark.parametrize(
        ("name", "kind"),
        [("receipt", ExportReport), ("inventory", Inventory), ("comparison", Comparison)],
    )
    def test_document(self, name, kind):
        text = read(f"{name}.json")
        assert canonical_json(kind.from_json(json.loads(text)).to_json()) + "\n" == text

    def test_budgets(self):
        """Alone, as a list of limits holds them."""
        data = json.loads(read("plan-activations.json"))["budgets"]
        assert [Budget.from_json(b).to_json() for b in data] == data

    def test_solver_archives(self):
        problem = (GOLDEN / "problem.npz").read_bytes()
        certificate = (GOLDEN / "certificate.npz").read_bytes()
        assert problem_to_bytes(problem_from_bytes(problem)) == problem
        assert certificate_to_bytes(certificate_from_bytes(certificate)) == certificate

    def test_ledger(self, tmp_path):
        """An archive of measurements goes into a ledger and out of it as it was."""
        with SqliteLedger(tmp_path / "l.sqlite") as ledger:
            import_entries(ledger, GOLDEN / "ledger.zip")
            export_entries(ledger, tmp_path / "again.zip")
        assert (tmp_path / "again.zip").read_bytes() == (GOLDEN / "ledger.zip").read_bytes()

    def test_older_plans_have_fewer_members(self):
        """What a plan may leave out takes its default; the digest covers it where it stands."""
        data = json.loads(read("plan-corrections.json"))
        del data["digest"], data["totals"], data["proof"]["certified"]
        del data["baselines"][0]["paired_error"], data["measured"]["unit"]
        del data["assignments"][0]["layer"]["weight_format_bits"], data["budgets"][:]
        assert Plan.from_json(data).measured.unit == "nats/sample"


class TestMadeAgain:
    @pytest.mark.parametrize(
        "name",
        [
            n
            for n in names("*.json")
            if n not in (*MEASURED, "ledger-keys.json") and not n.startswith("earlier-")
        ],
    )
    def test_text(self, name):
        """From the same values, to the byte."""
        assert golden_values.texts()[name] == read(name)

    @pytest.mark.parametrize("name", ["problem.npz", "matrix-diagonal.npz"])
    def test_archive(self, name):
        assert golden_values.archives()[name] == (GOLDEN / name).read_bytes()

    def test_archive_of_products(self):
        """Cross terms are sums whose last digit differs from processor to processor."""
        made, kept = golden_values.archives()["matrix-cross.npz"], GOLDEN / "matrix-cross.npz"
        with np.load(io.BytesIO(made)) as new, np.load(kept) as old:
            assert new.files == old.files
            for name in old.files:
                assert new[name].dtype == old[name].dtype
                assert np.allclose(new[name], old[name], rtol=1e-12, atol=1e-18)

    @pytest.mark.slow
    def test_ledger_keys(self):
        """The same measurement asks for the same entries: an old ledger still serves."""
        texts = golden_values.measured_texts()
        assert texts["ledger-keys.json"] == read("ledger-keys.json")

    @pytest.mark.slow
    @pytest.mark.parametrize("name", MEASURED)
    def test_measured_text(self, name):
        same(json.loads(read(name)), json.loads(golden_values.measured_texts()[name]))

    @pytest.mark.slow
    def test_ledger_contents(self):
        """Every entry has the numbers that it had."""
        archives = [(GOLDEN / "ledger.zip").read_bytes()]
        archives.append(golden_values.measured_archives()["ledger.zip"])
        old, new = (np.load(io.BytesIO(data)) for data in map(without_head, archives))
        assert old.files == new.files
        for key in old.files:
            assert old[key] == pytest.approx(new[key], rel=1e-3, abs=1e-6)


def without_head(archive: bytes) -> bytes:
    """Return an exported ledger as an ``.npz``: without the member that names its format."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(archive)) as old,
        zipfile.ZipFile(buffer, "w") as new,
    ):
        for name in old.namelist():
            if name.endswith(".npy"):
                new.writestr(name, old.read(name))
    return buffer.getvalue()

from __future__ import annotations

import hashlib
import io
import json
import zipfile

import httpx
import numpy as np
import pytest
from pydantic import TypeAdapter

from bitquota.errors import InvalidBudget, InvalidInput, MeasurementFailed, NotFound
from bitquota.exports.export_report import ExportReport
from bitquota.matrix import SensitivityMatrix
from bitquota.plan import Plan
from bitquota.request import PlanRequest
from bitquota.service.api.submissions import JobSubmission, new_job
from bitquota.service.jobs.kinds import KINDS, kind_by_name
from bitquota.service.store.blobs import BlobStore
from bitquota.service.worker.result_receiver import ResultReceiver
from refusals import refused
from waiting import PATIENTLY

REQUEST = PlanRequest(
    budgets=("4 bits",), weight_bits=(2, 4, 8), samples=32, holdout_samples=32, refine=False
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An ONNX file that torch never saw, and labelled samples for it."""
    pytest.importorskip("onnxruntime", reason="the extra 'onnx' is not installed")
    from onnx_graphs import image_graph

    folder = tmp_path_factory.mktemp("onnx")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 3, 8, 8)).astype(np.float32)
    np.savez(folder / "samples.npz", x=x, y=rng.integers(0, 10, size=64))
    return image_graph(folder / "net.onnx"), folder / "samples.npz"


@pytest.fixture(scope="module")
def client(server):
    with server.client() as made:
        yield made


@pytest.fixture(scope="module")
def planned(client, files):
    job = client.submit(model=files[0], calibration=files[1], request=REQUEST)
    return job.wait(**PATIENTLY)


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
class TestKinds:
    def test_example_is_an_order(self, kind):
        order = TypeAdapter(JobSubmission).validate_python({"kind": kind.name} | kind.example)
        new = new_job(order, "ann")
        assert new.kind == kind.name
        assert len(new.uploads()) >= 1

    def test_what_is_derived_comes_from_its_results(self, kind):
        assert set(kind.derive_from) <= {result.name for result in kind.results}

    def test_order_with_a_member_too_many(self, kind):
        body = {"kind": kind.name} | kind.example | {"surprise": 1}
        with pytest.raises(ValueError, match="surprise"):
            TypeAdapter(JobSubmission).validate_python(body)


class TestKindByName:
    def test_unknown_one_lists_them(self):
        with refused(InvalidInput, kind="dance"):
            kind_by_name("dance")


class TestPlanRequests:
    @pytest.mark.parametrize(
        "request_", [{"samples": "3"}, {"samples": 1.5}, {"colour": 1}, {"scheme": {"gird": 1}}, []]
    )
    def test_types_are_held_to(self, request_):
        body = {"kind": "plan"} | kind_by_name("plan").example | {"request": request_}
        with pytest.raises(ValueError, match="request"):
            TypeAdapter(JobSubmission).validate_python(body)


class TestMeasure:
    def test_leaves_the_matrix_of_the_plan(self, client, planned):
        job = client.submit(
            model=planned.body["model"],
            calibration=planned.body["dataset"],
            request=REQUEST,
            kind="measure",
        ).wait(**PATIENTLY)
        assert job.sensitivity() == planned.sensitivity()
        assert job.body["measured"] == 0
        assert 2**25 < job.body["peak_bytes"] < 2**36
        with refused(NotFound, kind="measure"):
            job.report()
        with pytest.raises(NotFound, match="produce plans"):
            job.plans()


class TestUploadsOfResults:
    def test_plan_and_matrix_become_uploads(self, client, planned):
        digest = planned.results["plans"][0]
        text = client.download("plan", digest)
        assert Plan.from_json(json.loads(text)) == planned.plan()
        assert digest == "sha256:" + hashlib.sha256(text).hexdigest()
        matrix = client.download("matrix", planned.results["matrix"])
        assert matrix == planned.sensitivity()

    def test_plan_that_is_none(self, client):
        with pytest.raises(InvalidInput, match="plan"):
            client.upload("plan", b"{}")

    def test_matrix_that_is_none(self, client):
        with pytest.raises(InvalidInput):
            client.upload("matrix", b"PK nothing")


class TestSolve:
    def test_best_choice_by_hand(self, client, planned):
        job = client.order(
            "solve",
            {"budget": "4 bits", "explain": True, "top": 2},
            matrix=planned.results["matrix"],
        ).wait(**PATIENTLY)
        found = job.result("solution")
        matrix = SensitivityMatrix.from_bytes(planned.sensitivity())
        assert found["objective"] == pytest.approx(matrix.predict(found["choice"]))
        assert found["bound"] <= found["objective"] + 1e-12
        assert found["explanation"]["groups"]
        with pytest.raises(NotFound, match="produced a matrix"):
            client.solve(job=job.id, budgets=["4 bits"])
        assert found["top"][0]["objective"] == pytest.approx(found["objective"])

    def test_smallest_for_a_tolerance(self, client, planned):
        matrix = planned.results["matrix"]
        order = {"budget": "8 bits", "tolerance": 1e6}
        found = client.order("solve", order, matrix=matrix).wait(**PATIENTLY).result("solution")
        assert set(found["labels"]) == {"W2"}

    def test_order_without_a_budget(self, client, planned):
        with pytest.raises(InvalidBudget):
            client.order("solve", {}, matrix=planned.results["matrix"])

    def test_result_of_another_kind(self, client, planned):
        with refused(NotFound, kind="plan"):
            planned.result("solution")


class TestFrontier:
    def test_larger_budgets_never_lose(self, client, planned):
        job = client.order("frontier", {"points": 6}, matrix=planned.results["matrix"])
        rows = job.wait(**PATIENTLY).result("frontier")
        objectives = [row["objective"] for row in rows]
        assert objectives == sorted(objectives, reverse=True)
        assert len(rows) > 2


class TestEvaluate:
    def test_plan_beside_full_precision(self, client, planned, files):
        job = client.order(
            "evaluate",
            {},
            model=planned.body["model"],
            dataset=files[1],
            plans=[planned.plan()],
        ).wait(**PATIENTLY)
        found = job.result("evaluation")
        assert found["n_samples"] == 64
        names = [score["name"] for score in found["scores"]]
        assert names[:2] == ["full precision", "plan 1"]
        assert "plan 1" in job.report()


class TestCompare:
    def test_two_metrics(self, client, planned):
        request = {"plan": REQUEST.to_json(), "metrics": ["gram", "diagonal"], "plans": 0}
        job = client.order(
            "compare", request, model=planned.body["model"], dataset=planned.body["dataset"]
        ).wait(**PATIENTLY)
        found = job.comparison()
        assert {"gram", "diagonal"} <= {entry.name for entry in found.entries}
        assert job.report() == found.render_markdown()


class TestExport:
    def test_onnx_in_and_quantized_onnx_out(self, client, planned, files, tmp_path):
        """By REST alone, and the file that comes back runs in onnxruntime."""
        import onnxruntime

        job = client.order(
            "export",
            {"format": "onnx-qdq"},
            model=planned.body["model"],
            plan=planned.results["plans"][0],
            dataset=files[1],
        ).wait(**PATIENTLY)
        report = ExportReport.from_json(job.result("receipt"))
        archive = job.save("archive", tmp_path / "export.zip")
        with zipfile.ZipFile(archive) as packed:
            assert {f.name for f in report.files} <= set(packed.namelist())
            data = packed.read("model.onnx")
        assert report.difference is not None
        assert report.difference.relative < 1e-3
        session = onnxruntime.InferenceSession(data)
        x = np.load(files[1])["x"][:4]
        plain = onnxruntime.InferenceSession(files[0])
        assert session.run(None, {"x": x})[0].shape == plain.run(None, {"x": x})[0].shape
        assert len(data) < files[0].stat().st_size

    def test_download_has_a_name_and_a_tag(self, server, client, planned):
        where = f"{server.url}/v1/jobs/{planned.id}/sensitivity"
        first = httpx.get(where)
        assert f"{planned.id}-sensitivity.npz" in first.headers["content-disposition"]
        again = httpx.get(where, headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")

    def test_order_that_says_nothing(self, client, planned):
        plan = planned.results["plans"][0]
        with pytest.raises(InvalidInput, match="format or a target"):
            client.order("export", {}, model=planned.body["model"], plan=plan)

    def test_upload_that_a_job_needs_stays(self, client, planned, server):
        plan = planned.results["plans"][0]
        assert httpx.get(f"{server.url}/v1/plans/{plan}").json()["object"] == "plan"


def packed(entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


class TestResultReceiver:
    """What a worker that a model took over might send."""

    @pytest.fixture
    def blobs(self, tmp_path):
        return BlobStore(tmp_path / "blobs")

    def give(self, receiver, name, data):
        receiver.piece([data])
        receiver.result(name)

    def test_name_that_the_kind_does_not_have(self, blobs):
        with pytest.raises(MeasurementFailed, match="leaves matrix"):
            self.give(ResultReceiver(kind_by_name("measure"), blobs), "plans", b"{}")

    def test_bytes_that_are_no_such_result(self, blobs):
        with pytest.raises(MeasurementFailed, match="whole matrix"):
            self.give(ResultReceiver(kind_by_name("measure"), blobs), "matrix", b"PK")

    def test_missing_result(self, blobs):
        with pytest.raises(MeasurementFailed, match="without"):
            ResultReceiver(kind_by_name("measure"), blobs).complete()

    def test_second_one_where_there_is_one(self, blobs):
        receiver = ResultReceiver(kind_by_name("solve"), blobs)
        self.give(receiver, "solution", b"{}")
        with pytest.raises(MeasurementFailed, match="another"):
            self.give(receiver, "solution", b"{}")

    def test_archive_that_leaves_its_folder(self, blobs):
        receiver = ResultReceiver(kind_by_name("export"), blobs)
        with pytest.raises(MeasurementFailed, match="inside its folder"):
            self.give(receiver, "archive", packed({"../x": b"1"}))

    def test_archive_with_another_file_than_its_report_names(self, blobs):
        receiver = ResultReceiver(kind_by_name("export"), blobs)
        digest = "sha256:" + hashlib.sha256(b"honest").hexdigest()
        report = {
            "schema": "bitquota/receipt/1", "exporter": "x", "target": None, "plan_digest": "",
            "model_digest": "", "tensors": [], "unquantized_bits": 0,
            "planned_unquantized_bits": 0, "container_bytes": 0, "difference": None,
            "runtime": {}, "notes": [],
            "files": [{"name": "w.bin", "size_bytes": 6, "digest": digest}],
        }  # fmt: skip
        self.give(receiver, "archive", packed({"w.bin": b"forged"}))
        self.give(receiver, "receipt", json.dumps(report).encode())
        with pytest.raises(MeasurementFailed, match="file that the export report names"):
            receiver.complete()

    def test_what_was_refused_leaves_no_file(self, blobs):
        receiver = ResultReceiver(kind_by_name("measure"), blobs)
        with pytest.raises(MeasurementFailed):
            self.give(receiver, "matrix", b"PK")
        receiver.piece([b"half"])
        receiver.close()
        assert list((blobs.root / "incoming").iterdir()) == []

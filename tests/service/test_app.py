from __future__ import annotations

import hashlib
import pickle
import socket
import subprocess
import sys
import threading

import httpx
import pytest

from live_server import LiveServer, folder_zip, npz
from waiting import PATIENCE_S, wait_for

SHA = "sha256:"


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """A server that starts no jobs, so that they stay queued."""
    with LiveServer(tmp_path_factory.mktemp("quiet") / "data", slots=0) as running:
        yield running


@pytest.fixture
def http(quiet):
    with httpx.Client(base_url=quiet.url, timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture
def uploads(http):
    model = http.put("/v1/models", content=folder_zip()).json()["id"]
    return {"model": model, "dataset": http.put("/v1/datasets", content=npz()).json()["id"]}


def order(uploads, **changes):
    return uploads | {"kind": "plan", "request": {"budgets": ["3 bits"]}} | changes


def assert_problem(answer, status, slug):
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["type"] == f"urn:bitquota:problem:{slug}"
    assert body["status"] == status
    assert body["detail"]
    return body


def test_no_torch_in_the_server_the_driver_or_the_client():
    program = (
        "import sys, bitquota.client, bitquota.service.app, bitquota.service.run, "
        "bitquota.service.worker.driver, bitquota.service.worker.supervisor, "
        "bitquota.service.worker.evaluator, bitquota.solver.document; "
        "bitquota.service.app.create_app; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


class TestUploads:
    def test_id_is_the_digest_of_the_content(self, http):
        data = npz(9)
        answer = http.put("/v1/datasets?name=nine.npz", content=data)
        assert answer.status_code == 201
        assert answer.json()["id"] == SHA + hashlib.sha256(data).hexdigest()
        assert answer.json()["name"] == "nine.npz"

    def test_the_same_bytes_again_are_harmless(self, http):
        data = npz(10)
        first = http.put("/v1/datasets", content=data)
        second = http.put("/v1/datasets", content=data)
        assert (first.status_code, second.status_code) == (201, 200)
        assert first.json() == second.json()

    def test_location_leads_to_the_upload(self, http):
        made = http.put("/v1/models", content=folder_zip())
        assert http.get(made.headers["location"]).json() == made.json()

    def test_announced_digest_must_arrive(self, http):
        answer = http.put("/v1/datasets?sha256=" + "0" * 64, content=npz(11))
        assert_problem(answer, 422, "invalid-input")
        missing = http.get("/v1/datasets/" + SHA + hashlib.sha256(npz(11)).hexdigest())
        assert_problem(missing, 404, "not-found")

    def test_pickle_is_refused_with_the_safe_way(self, http):
        answer = http.put("/v1/models", content=pickle.dumps({"w": 1}))
        body = assert_problem(answer, 422, "unsafe-model")
        assert "torch.export.save" in body["detail"]

    def test_dataset_that_is_no_dataset(self, http):
        assert_problem(http.put("/v1/datasets", content=b"text"), 422, "invalid-calibration")

    def test_what_is_refused_leaves_nothing(self, http, quiet):
        http.put("/v1/models", content=pickle.dumps({"w": 2}))
        assert list((quiet.data_dir / "blobs" / "incoming").iterdir()) == []

    def test_body_that_breaks_off_leaves_nothing(self, http, quiet):
        with socket.create_connection(("127.0.0.1", int(quiet.url.rsplit(":", 1)[1]))) as raw:
            head = b"PUT /v1/models HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
            raw.sendall(head + b"x" * 500_000)
        incoming = quiet.data_dir / "blobs" / "incoming"
        wait_for(lambda: not list(incoming.iterdir()), "the end of the broken upload")

    def test_list_pages_through_everything(self, http):
        ids = {http.put("/v1/datasets", content=npz(n)).json()["id"] for n in (20, 21, 22)}
        seen, cursor = [], None
        while True:
            params = {"limit": 2} | ({"cursor": cursor} if cursor else {})
            page = http.get("/v1/datasets", params=params).json()
            seen += [entry["id"] for entry in page["data"]]
            cursor = page["next_cursor"]
            if not page["has_more"]:
                break
        assert len(seen) == len(set(seen))
        assert ids <= set(seen)

    def test_broken_upload_goes_on_where_it_broke(self, http, quiet):
        data = npz(600_000)
        sha = hashlib.sha256(data).hexdigest()
        where = f"/v1/datasets/{SHA}{sha}/upload"
        sent = len(data) // 2
        port = int(quiet.url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as raw:
            line = f"PUT /v1/datasets?sha256={sha}&total={len(data)} HTTP/1.1\r\n"
            head = f"{line}Host: 127.0.0.1\r\nContent-Length: {len(data)}\r\n\r\n"
            raw.sendall(head.encode() + data[:sent])
            wait_for(lambda: http.get(where).json()["received"], "the first bytes")
        query = f"sha256={sha}&total={len(data)}"
        tries = []

        def goes_on():  # the server may still be busy with the connection that broke
            received = http.get(where).json()["received"]
            answer = http.put(f"/v1/datasets?{query}&offset={received}", content=data[received:])
            tries.append((received, answer))
            return answer.status_code != 409

        wait_for(goes_on, "the end of the broken connection")
        received, answer = tries[-1]
        assert 0 < received <= sent
        assert (answer.status_code, answer.json()["id"]) == (201, SHA + sha)
        assert http.get(where).json()["received"] == 0

    def test_piece_that_does_not_follow_is_refused(self, http):
        query = "sha256=" + "2" * 64 + "&total=10&offset=5"
        body = assert_problem(http.put(f"/v1/models?{query}", content=b"56789"), 409, "conflict")
        assert body["details"] == {"received": 0}

    def test_pieces_that_do_not_make_the_digest_are_thrown_away(self, http):
        query = "sha256=" + "1" * 64 + "&total=10"
        assert_problem(http.put(f"/v1/models?{query}", content=b"0123456789"), 422, "invalid-input")
        assert http.get(f"/v1/models/{SHA}{'1' * 64}/upload").json()["received"] == 0

    def test_cap(self, tmp_path):
        with (
            LiveServer(tmp_path / "data", slots=0, max_upload_bytes=1000) as small,
            httpx.Client(base_url=small.url) as http,
        ):
            announced = http.put("/v1/models", content=b"x" * 1001)
            assert_problem(announced, 413, "too-large")
            streamed = http.put("/v1/models", content=(b"x" * 500 for _ in range(3)))
            assert_problem(streamed, 413, "too-large")


class TestOrders:
    def test_is_accepted_with_a_place_to_look(self, http, uploads):
        answer = http.post("/v1/jobs", json=order(uploads))
        assert answer.status_code == 202
        assert answer.headers["location"] == f"/v1/jobs/{answer.json()['id']}"
        assert answer.headers["retry-after"] == "1"
        assert http.get(answer.headers["location"]).json()["status"] == "queued"

    @pytest.mark.parametrize(
        ("changes", "slug"),
        [
            ({"request": {"budgets": ["3 apples"]}}, "invalid-budget"),
            ({"request": {"budgets": ["3 bits + nonsense"]}}, "invalid-budget"),
            ({"request": {"budgets": []}}, "invalid-input"),
            ({"request": {"budgets": ["3 bits"], "colour": "red"}}, "invalid-input"),
            ({"request": {"budgets": ["3 bits"], "weight_bits": [99]}}, "invalid-input"),
            ({"kind": "dance"}, "invalid-input"),
            ({"priority": 1000}, "invalid-input"),
            ({"model": "m"}, "invalid-input"),
            ({"surprise": 1}, "invalid-input"),
        ],
    )
    def test_what_cannot_be_done_is_refused_at_once(self, http, uploads, changes, slug):
        assert_problem(http.post("/v1/jobs", json=order(uploads, **changes)), 422, slug)

    def test_model_that_was_never_uploaded(self, http, uploads):
        answer = http.post("/v1/jobs", json=order(uploads, model=SHA + "0" * 64))
        assert_problem(answer, 404, "not-found")

    def test_idempotency_key_repeats_the_answer(self, http, uploads):
        headers = {"Idempotency-Key": "once"}
        first = http.post("/v1/jobs", json=order(uploads), headers=headers)
        second = http.post("/v1/jobs", json=order(uploads), headers=headers)
        assert first.json()["id"] == second.json()["id"]
        assert second.headers["idempotency-replayed"] == "true"
        other = http.post("/v1/jobs", json=order(uploads, priority=1), headers=headers)
        assert_problem(other, 422, "invalid-input")

    def test_wait_that_is_too_short_says_so(self, http, uploads):
        answer = http.post("/v1/jobs", json=order(uploads), headers={"Prefer": "wait=1"})
        assert answer.status_code == 202
        assert answer.headers["preference-applied"] == "wait=1"
        assert answer.json()["status"] == "queued"

    def test_wait_ends_with_the_job(self, quiet, http, uploads):
        def end():
            with quiet.client() as other:
                next(other.jobs(labels={"wait": "for me"})).cancel()

        cancel = threading.Timer(0.3, end)
        cancel.start()
        body = order(uploads, labels={"wait": "for me"})
        answer = http.post("/v1/jobs", json=body, headers={"Prefer": "respond-async, wait=60"})
        cancel.join()
        assert answer.json()["status"] == "cancelled"

    @pytest.mark.parametrize(
        ("kind", "named", "request_", "text"),
        [
            ("export", "plan", {"format": "onnx-qqq"}, "onnx-qdq, onnx-matmulnbits"),
            ("export", "plan", {"target": "gpu"}, "ort-cpu"),
            ("export", "plan", {}, "a format or a target"),
            ("solve", "matrix", {"budget": "3 bits", "solver": "cplex"}, "cp_sat, brute_force"),
        ],
    )
    def test_names_are_told_before_anything_runs(self, http, kind, named, request_, text):
        """The order is refused for its request, though no upload that it names is there."""
        body = {"kind": kind, named: SHA + "0" * 64, "request": request_}
        if kind == "export":
            body["model"] = SHA + "1" * 64
        found = assert_problem(http.post("/v1/jobs", json=body), 422, "invalid-input")
        assert text in found["detail"]

    def test_solver_of_a_plan(self, http, uploads):
        wrong = order(uploads, request={"budgets": ["3 bits"], "solver": "cplex"})
        assert_problem(http.post("/v1/jobs", json=wrong), 422, "invalid-input")

    @pytest.mark.parametrize("name", ["plan", "measure", "solve", "frontier", "evaluate", "export"])
    def test_every_kind_must_name_its_inputs(self, http, name):
        assert_problem(
            http.post("/v1/jobs", json={"kind": name, "request": {}}), 422, "invalid-input"
        )

    def test_not_json(self, http):
        answer = http.post("/v1/jobs", content=b"{", headers={"Content-Type": "application/json"})
        assert_problem(answer, 422, "invalid-input")

    def test_body_beyond_the_limit(self, http):
        assert_problem(http.post("/v1/jobs", content=b" " * (5 * 2**20)), 413, "too-large")


class TestJobs:
    def test_poll_with_the_tag_is_not_modified(self, http, uploads):
        made = http.post("/v1/jobs", json=order(uploads)).headers["location"]
        first = http.get(made)
        again = http.get(made, headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        http.post(made + "/cancel")
        changed = http.get(made, headers={"If-None-Match": first.headers["etag"]})
        assert changed.json()["status"] == "cancelled"

    def test_unknown_job(self, http):
        assert_problem(http.get("/v1/jobs/job_" + "0" * 32), 404, "not-found")

    def test_id_that_can_be_none(self, http):
        assert_problem(http.get("/v1/jobs/x"), 422, "invalid-input")

    def test_plan_before_the_end(self, http, uploads):
        made = http.post("/v1/jobs", json=order(uploads)).headers["location"]
        assert_problem(http.get(made + "/plan"), 409, "conflict")

    def test_list_by_status(self, http, uploads):
        made = http.post("/v1/jobs", json=order(uploads)).json()["id"]
        http.post(f"/v1/jobs/{made}/cancel")
        found = http.get("/v1/jobs", params={"status": "cancelled", "limit": 200}).json()["data"]
        assert made in [job["id"] for job in found]
        assert {job["status"] for job in found} == {"cancelled"}

    def test_list_by_label_and_kind(self, http, uploads):
        labels = {"team": 'vi"sion', "100%": "_"}
        made = http.post("/v1/jobs", json=order(uploads, labels=labels)).json()["id"]
        http.post("/v1/jobs", json=order(uploads, labels={"team": "vision", "100%": "x"}))
        for label in ('team=vi"sion', "100%=_"):
            found = http.get("/v1/jobs", params={"label": label}).json()["data"]
            assert [job["id"] for job in found] == [made]
        both = http.get("/v1/jobs", params={"label": ["100%=_", "team=other"]}).json()
        assert both["data"] == []
        assert http.get("/v1/jobs", params={"kind": "export"}).json()["data"] == []
        assert_problem(http.get("/v1/jobs", params={"label": "team"}), 422, "invalid-input")

    def test_pages_of_jobs_lead_through_all_of_them(self, http, uploads):
        labels = {"walk": "this"}
        made = [
            http.post("/v1/jobs", json=order(uploads, labels=labels)).json()["id"] for _ in range(5)
        ]
        seen, cursor = [], {}
        while True:
            params = {"limit": 2, "label": "walk=this"} | cursor
            page = http.get("/v1/jobs", params=params).json()
            seen += [job["id"] for job in page["data"]]
            if not page["has_more"]:
                break
            cursor = {"cursor": page["next_cursor"]}
        assert seen == made[::-1]

    def test_events_of_an_ended_job_resume_and_end(self, http, uploads):
        made = http.post("/v1/jobs", json=order(uploads)).headers["location"]
        http.post(made + "/cancel")
        whole = http.get(made + "/events").text
        assert [line for line in whole.splitlines() if line.startswith("id:")] == ["id: 1", "id: 2"]
        rest = http.get(made + "/events", headers={"Last-Event-ID": "1"}).text
        assert rest.startswith("id: 2\n")
        assert http.get(made + "/events", headers={"Last-Event-ID": "2"}).text == ""


class TestProblems:
    def test_unknown_path(self, http):
        assert_problem(http.get("/v1/nothing"), 404, "not-found")

    def test_method_that_is_not_allowed_names_those_that_are(self, http):
        answer = http.delete("/v1/jobs")
        assert_problem(answer, 405, "invalid-input")
        assert "POST" in answer.headers["allow"]

    def test_every_answer_has_an_id_and_safe_headers(self, http):
        answer = http.get("/v1/nothing", headers={"X-Request-ID": "mine-1"})
        assert answer.headers["x-request-id"] == "mine-1"
        assert answer.json()["instance"] == "urn:bitquota:request:mine-1"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "content-security-policy" in answer.headers

    def test_request_id_with_a_line_break_is_replaced(self, http):
        answer = http.get("/healthz", headers={"X-Request-ID": "a b{}"})
        assert answer.headers["x-request-id"] != "a b{}"

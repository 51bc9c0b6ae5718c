"""The pages without a browser: who is let in, what leaves the server, and under which policy."""

from __future__ import annotations

import re
import time
from contextlib import contextmanager

import httpx
import pytest
import sqlalchemy as sa

from bitquota.errors import Forbidden, Unauthorized
from bitquota.service.security.keys import MEMORY_S, KeyStore, Scope
from bitquota.service.security.sessions import LIFETIME_S, Sessions
from bitquota.service.store.database import Database, ended_sessions
from bitquota.service.web.pages import _inside
from live_server import LiveServer, npz
from seeded_jobs import seed_model
from waiting import PATIENCE_S


class Clock:
    """Seconds that only a test moves."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def database(migrated, tmp_path):
    path = tmp_path / "keys.db"
    path.write_bytes(migrated.read_bytes())
    made = Database(f"sqlite:///{path}")
    yield made
    made.close()


@pytest.fixture
def keys(database, clock):
    return KeyStore(database, clock)


@pytest.fixture
def sessions(keys, database, tmp_path, clock):
    return Sessions(tmp_path / "secret", keys, database, clock)


class TestSessions:
    def test_cookie_stands_for_the_key(self, keys, sessions):
        key, text = keys.create("acme", scopes=[Scope.READ])
        caller = sessions.read(sessions.open(text)).caller
        assert (caller.tenant, caller.actor) == ("acme", f"key:{key.id}")
        assert caller.scopes == {Scope.READ}

    def test_wrong_key_opens_none(self, sessions):
        with pytest.raises(Unauthorized):
            sessions.open("bq_wrong")

    @pytest.mark.parametrize("at", [0, 5, -1])
    def test_changed_cookie_is_refused(self, keys, sessions, at):
        cookie = list(sessions.open(keys.create("acme")[1]))
        cookie[at] = "A" if cookie[at] != "A" else "B"
        with pytest.raises(Unauthorized):
            sessions.read("".join(cookie))

    @pytest.mark.parametrize("cookie", ["", ".", "x", "\udcff.\udcff", "eyJ9.00"])
    def test_nonsense_is_refused(self, sessions, cookie):
        with pytest.raises(Unauthorized):
            sessions.read(cookie)

    def test_ends_by_itself(self, keys, sessions, clock):
        cookie = sessions.open(keys.create("acme")[1])
        clock.now += LIFETIME_S - 1
        sessions.read(cookie)
        clock.now += 1
        with pytest.raises(Unauthorized):
            sessions.read(cookie)

    def test_ends_with_its_key(self, keys, sessions, clock):
        key, text = keys.create("acme")
        cookie = sessions.open(text)
        sessions.read(cookie)
        keys.revoke(key.id)
        clock.now += MEMORY_S
        with pytest.raises(Unauthorized):
            sessions.read(cookie)

    def test_another_server_over_the_folder_accepts_it(
        self, keys, database, sessions, tmp_path, clock
    ):
        cookie = sessions.open(keys.create("acme")[1])
        again = Sessions(tmp_path / "secret", keys, database, clock)
        assert sessions.read(cookie) == again.read(cookie)
        assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600

    def test_signed_out_is_over_on_every_server(self, keys, database, sessions, tmp_path, clock):
        """At once, and no other session of the key ends with it."""
        text = keys.create("acme")[1]
        cookie, other = sessions.open(text), sessions.open(text)
        again = Sessions(tmp_path / "secret", keys, database, clock)
        again.read(cookie)
        sessions.end(cookie)
        for server in (sessions, again):
            with pytest.raises(Unauthorized):
                server.read(cookie)
            server.read(other)

    def test_notes_of_ended_sessions_are_dropped(self, keys, database, sessions, clock):
        """A note is needed as long as the cookie would have been valid, and no longer."""
        text = keys.create("acme")[1]
        sessions.end(sessions.open(text))
        clock.now += LIFETIME_S
        sessions.end(sessions.open(text))
        query = sa.select(sa.func.count()).select_from(ended_sessions)
        assert database.read(lambda connection: connection.execute(query).scalar()) == 1

    def test_another_folder_does_not(self, keys, database, sessions, tmp_path, clock):
        cookie = sessions.open(keys.create("acme")[1])
        with pytest.raises(Unauthorized):
            Sessions(tmp_path / "other", keys, database, clock).read(cookie)

    def test_token_belongs_to_one_session(self, keys, sessions):
        text = keys.create("acme")[1]
        first, second = (sessions.read(sessions.open(text)) for _ in range(2))
        sessions.check_csrf(first, first.csrf_token)
        for wrong in (second.csrf_token, "", None):
            with pytest.raises(Forbidden):
                sessions.check_csrf(first, wrong)


class TestInside:
    @pytest.mark.parametrize("target", ["/", "/jobs/job_1", "/jobs/job_1/model?x=1"])
    def test_own_paths_are_kept(self, target):
        assert target == _inside(target)

    @pytest.mark.parametrize(
        "target", ["//evil.example", "https://evil.example", "/\\evil.example", "javascript:x", ""]
    )
    def test_others_lead_home(self, target):
        assert _inside(target) == "/"


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    """A server with a key, and a finished job of its tenant: ``(server, key, read key, job)``."""
    data_dir = tmp_path_factory.mktemp("locked") / "data"
    job = seed_model(data_dir, 6, tenant="acme")
    database = Database(f"sqlite:///{data_dir / 'bitquota.db'}")
    store = KeyStore(database, time.time)
    _, key = store.create("acme")
    _, reading = store.create("acme", scopes=[Scope.READ])
    database.close()
    with LiveServer(data_dir, slots=0) as server:
        yield server, key, reading, job


@contextmanager
def signed_in(server, key):
    """Give a client that went through the form like a browser."""
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http:
        form = http.get("/sign-in")
        token = re.search(r'name="token" value="(\w+)"', form.text)[1]
        answer = http.post("/sign-in", data={"key": key, "token": token, "next": "/"})
        assert answer.status_code == 303, answer.text
        yield http


def token_of(http):
    return re.search(r'name="csrf-token" content="(\w+)"', http.get("/").text)[1]


class TestSignIn:
    def test_pages_ask_for_it_and_lead_back(self, locked):
        server, _, _, job = locked
        answer = httpx.get(f"{server.url}/jobs/{job}/model")
        assert answer.status_code == 303
        assert answer.headers["location"] == f"/sign-in?next=/jobs/{job}/model"

    def test_form_of_another_site_is_refused(self, locked):
        server, key, _, _ = locked
        answer = httpx.post(f"{server.url}/sign-in", data={"key": key, "token": "0" * 64})
        assert answer.status_code == 403
        assert "bitquota_session" not in answer.headers.get("set-cookie", "")

    def test_wrong_key_is_said_without_an_echo(self, locked):
        server, *_ = locked
        with httpx.Client(base_url=server.url) as http:
            token = re.search(r'name="token" value="(\w+)"', http.get("/sign-in").text)[1]
            answer = http.post("/sign-in", data={"key": "bq_<b>wrong", "token": token})
        assert answer.status_code == 401
        assert "not a valid API key" in answer.text
        assert "wrong" not in answer.text

    def test_cookie_is_out_of_reach_of_scripts(self, locked):
        server, key, _, _ = locked
        with httpx.Client(base_url=server.url) as http:
            token = re.search(r'name="token" value="(\w+)"', http.get("/sign-in").text)[1]
            cookie = http.post("/sign-in", data={"key": key, "token": token}).headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "samesite=lax" in cookie.lower()

    def test_signing_out_needs_the_token(self, locked):
        server, key, _, _ = locked
        with signed_in(server, key) as http:
            assert http.post("/sign-out", data={"token": "no"}).status_code == 403
            assert http.get("/").status_code == 200
            assert http.post("/sign-out", data={"token": token_of(http)}).status_code == 303
            assert http.get("/").status_code == 303

    def test_a_copy_of_the_cookie_is_worth_nothing_after_signing_out(self, locked):
        server, key, _, job = locked
        with signed_in(server, key) as http, signed_in(server, key) as elsewhere:
            stolen = dict(http.cookies)
            token = token_of(http)
            http.post("/sign-out", data={"token": token})
            copy = httpx.Client(base_url=server.url, cookies=stolen)
            with copy:
                assert copy.get(f"/v1/jobs/{job}").status_code == 401
                assert copy.get("/").status_code == 303
                # Signing out once more leads to the sign-in page, too.
                assert copy.post("/sign-out", data={"token": token}).status_code == 303
            assert elsewhere.get("/").status_code == 200


class TestPlansOfAllJobs:
    def test_are_those_of_the_keys_tenant(self, locked):
        server, key, _, job = locked
        database = Database(f"sqlite:///{server.data_dir / 'bitquota.db'}")
        _, stranger = KeyStore(database, time.time).create("other")
        database.close()
        for bearer, jobs in ((key, {job}), (stranger, set())):
            found = httpx.get(
                f"{server.url}/v1/jobs/plans", headers={"Authorization": f"Bearer {bearer}"},
                timeout=PATIENCE_S,
            ).json()["data"]  # fmt: skip
            assert {row["job"] for row in found} == jobs


class TestCookieOnTheApi:
    def test_reads_without_a_token(self, locked):
        server, key, _, job = locked
        with signed_in(server, key) as http:
            assert http.get(f"/v1/jobs/{job}").json()["id"] == job

    def test_changes_nothing_without_the_token(self, locked):
        server, key, _, _ = locked
        with signed_in(server, key) as http:
            answer = http.put("/v1/datasets", content=npz(12))
            assert answer.status_code == 403
            assert "x-csrf-token" in answer.json()["detail"]
            headers = {"X-CSRF-Token": token_of(http)}
            assert http.put("/v1/datasets", content=npz(12), headers=headers).status_code == 201

    def test_scopes_of_the_key_hold(self, locked):
        server, _, reading, _ = locked
        with signed_in(server, reading) as http:
            assert 'id="order"' not in http.get("/").text
            headers = {"X-CSRF-Token": token_of(http)}
            answer = http.put("/v1/datasets", content=npz(13), headers=headers)
            assert answer.status_code == 403

    def test_a_changed_cookie_is_no_cookie(self, locked):
        server, *_ = locked
        answer = httpx.get(f"{server.url}/v1/jobs", cookies={"bitquota_session": "x.y"})
        assert answer.status_code == 401


@pytest.fixture(scope="module")
def open_server(tmp_path_factory):
    """A server without keys and a finished job: ``(client, job)``."""
    data_dir = tmp_path_factory.mktemp("open") / "data"
    job = seed_model(data_dir, 6)
    with (
        LiveServer(data_dir, slots=0) as server,
        httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http,
    ):
        yield http, job


class TestOpenServer:
    @pytest.mark.parametrize("path", ["/", "/plans", "/jobs/{}", "/jobs/{}/model"])
    def test_pages_open_by_themselves(self, open_server, path):
        http, job = open_server
        answer = http.get(path.format(job))
        assert answer.status_code == 200
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy

    @pytest.mark.parametrize("site", ["cross-site", "same-site"])
    def test_not_for_pages_of_others(self, open_server, site):
        """Another port of this machine is the same site to a browser."""
        http, _ = open_server
        assert http.get("/", headers={"Sec-Fetch-Site": site}).status_code == 401
        assert http.get("/v1/jobs", headers={"Sec-Fetch-Site": site}).status_code == 401

    def test_nothing_inline(self, open_server):
        http, job = open_server
        for path in ("/", f"/jobs/{job}", f"/jobs/{job}/model", "/jobs/job_0"):
            text = http.get(path).text
            assert not re.search(r"<style|\sstyle=|\son\w+=", text), path
            for script in re.findall(r"<script([^>]*)>", text):
                assert "src=" in script or 'type="application/json"' in script, path

    def test_files_are_kept_for_ever_under_their_version(self, open_server):
        http, job = open_server
        urls = re.findall(r'"(/static/[^"]+)"', http.get(f"/jobs/{job}/model").text)
        assert len(urls) >= 6
        for url in urls:
            answer = http.get(url)
            assert answer.status_code == 200
            assert "immutable" in answer.headers["cache-control"]
        assert http.get("/static/0/style.css").status_code == 404
        assert http.get("/static/0/..%2f..%2fsettings.py").status_code == 404

    def test_unknown_job_is_a_page_too(self, open_server):
        http, _ = open_server
        answer = http.get("/jobs/job_<b>x")
        assert answer.status_code == 404
        assert answer.headers["content-type"].startswith("text/html")
        assert "<b>x" not in answer.text

    def test_charts(self, open_server):
        http, job = open_server
        found = http.get(f"/jobs/{job}/charts.json").json()
        assert len(found["layers"]["names"]) == 6
        assert [p["budget"] for p in found["plans"]] == ["3 bits", "4 bits"]
        stored = http.get(f"/v1/jobs/{job}/plan?budget=0").json()
        assert found["plans"][0]["digest"] == stored["digest"]

    def test_map(self, open_server):
        http, job = open_server
        assert http.get(f"/jobs/{job}/cross.json?at=W2").json()["at"] == "W2"
        answer = http.get(f"/jobs/{job}/cross.json?at=W9")
        assert answer.status_code == 404
        assert answer.headers["content-type"] == "application/problem+json"

    def test_plans_of_all_jobs(self, open_server):
        """Each row says what the plan says; filters and cursor leave others out."""
        http, job = open_server
        page = http.get("/v1/jobs/plans").json()
        assert [(r["job"], r["budget"]) for r in page["data"]] == [(job, "3 bits"), (job, "4 bits")]
        assert not page["has_more"]
        plan = http.get(f"/v1/jobs/{job}/plan?budget=1").json()
        row = page["data"][1]
        assert row["digest"] == http.get(f"/v1/jobs/{job}").json()["results"]["plans"][1]
        assert row["measured"]["mean"] == plan["measured"]["mean"]
        assert row["model_name"] == "synthetic.onnx"
        other = "sha256:" + "0" * 64
        for query in ({"model": other}, {"label": "a=b"}, {"kind": "learn"}, {"cursor": job}):
            assert http.get("/v1/jobs/plans", params=query).json()["data"] == []
        assert http.get("/v1/jobs/plans", params={"model": row["model"]}).json() == page
        assert http.get("/v1/jobs/plans?cursor=x").status_code == 422

    def test_report_file(self, open_server):
        http, job = open_server
        answer = http.get(f"/jobs/{job}/report.html")
        assert answer.status_code == 200
        assert "attachment" in answer.headers["content-disposition"]
        assert "Plan for 3 bits" in answer.text

    def test_stream_of_a_finished_job_ends(self, open_server):
        http, job = open_server
        text = http.get(f"/jobs/{job}/live?after=0").text
        assert '"status":"succeeded"' in text
        assert text.count("event: entry") == 3
        assert "event: entry" not in http.get(f"/jobs/{job}/live?after=3").text

    def test_list_follows_new_jobs(self, open_server):
        http, job = open_server
        order = http.get(f"/v1/jobs/{job}").json()
        with http.stream("GET", "/live/jobs") as stream:
            lines = (line for line in stream.iter_lines() if line.startswith("data: "))
            assert job in next(lines)
            made = http.post("/v1/jobs", json={
                "kind": "plan", "model": order["model"], "dataset": order["dataset"],
                "request": {"budgets": ["3 bits"]},
            }).json()["id"]  # fmt: skip
            assert made in next(lines)

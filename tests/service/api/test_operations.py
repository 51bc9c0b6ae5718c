from __future__ import annotations

import re
import time

import httpx
import pytest

from bitquota.errors import InvalidInput
from bitquota.service import serve
from bitquota.service.security.keys import KeyStore
from bitquota.service.settings import Settings, documentation
from bitquota.service.store.database import Database
from live_server import LiveServer


@pytest.fixture(scope="module")
def http(tmp_path_factory):
    with (
        LiveServer(tmp_path_factory.mktemp("operated") / "data", slots=0) as running,
        httpx.Client(base_url=running.url) as client,
    ):
        yield client


class TestReadyz:
    def test_names_what_it_looked_at(self, http):
        answer = http.get("/readyz")
        assert (answer.status_code, answer.json()["status"]) == (200, "ready")
        assert answer.json()["checks"] == {"database": True, "data_dir": True, "supervisor": True}


class TestMetrics:
    def test_requests_are_counted_by_route_template(self, http):
        for digit in "01":
            http.get("/v1/jobs/job_" + digit * 32)
        text = http.get("/metrics").text
        line = 'bitquota_requests_total{method="GET",route="/v1/jobs/{job_id}",status="404"} 2.0'
        assert line in text
        assert "job_000" not in text

    def test_unknown_paths_share_one_label(self, http):
        http.get("/nothing/1")
        http.get("/nothing/2")
        assert "nothing" not in http.get("/metrics").text

    def test_jobs_by_status(self, http):
        assert 'bitquota_jobs{status="queued"} 0.0' in http.get("/metrics").text


@pytest.fixture(scope="module")
def behind(tmp_path_factory):
    """A server with a key, which believes a proxy on this machine."""
    folder = tmp_path_factory.mktemp("behind") / "data"
    folder.mkdir()
    database = Database(Settings(data_dir=folder).url)
    database.create()
    key = KeyStore(database, time.time).create("ann")[1]
    database.close()
    proxies = "127.0.0.1, 10.0.0.0/8"
    with LiveServer(folder, slots=0, trusted_proxies=proxies) as running:
        yield running, key


def cookies(url, key, **headers):
    """Return the cookies of the form and of the session after signing in."""
    with httpx.Client(base_url=url, headers=headers) as http:
        page = http.get("/sign-in")
        token = re.search(r'name="token" value="(\w+)"', page.text)[1]
        nonce = {"cookie": page.headers["set-cookie"].partition(";")[0]}
        answer = http.post("/sign-in", data={"key": key, "token": token}, headers=nonce)
        assert 303 == answer.status_code
        return page.headers["set-cookie"], answer.headers["set-cookie"]


class TestProxy:
    def test_cookies_are_secure_behind_tls(self, behind):
        """By what the trusted proxy says; without it the connection is plain."""
        server, key = behind
        said = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "203.0.113.7"}
        assert all("Secure" in cookie for cookie in cookies(server.url, key, **said))
        assert not any("Secure" in cookie for cookie in cookies(server.url, key))

    def test_nobody_is_believed_by_default(self, http, behind):
        """Not even a program of this machine, which uvicorn alone would believe."""
        said = {"X-Forwarded-Proto": "https"}
        led = [
            httpx.get(f"{url}/healthz/", headers=said).headers["location"].partition(":")[0]
            for url in (str(http.base_url).rstrip("/"), behind[0].url)
        ]
        assert ["http", "https"] == led

    def test_without_keys_it_does_not_start(self, tmp_path):
        with pytest.raises(InvalidInput, match="or a proxy is trusted"):
            serve(settings=Settings(data_dir=tmp_path / "d", trusted_proxies="127.0.0.1"))

    def test_what_is_no_network(self):
        with pytest.raises(InvalidInput, match="such as 127.0.0.1,10.1.0.0/16"):
            Settings(trusted_proxies="proxy.internal")


class TestSettings:
    def test_environment_round_trip(self):
        chosen = Settings(
            port=9, lease_s=30.0, sandbox="off", dangerously_run_code_of_strangers=True
        )
        assert Settings.from_environment(chosen.to_environment()) == chosen

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("PORT", "many"),
            ("PORT", "-1"),
            ("LEASE_S", "0"),
            ("DANGEROUSLY_RUN_CODE_OF_STRANGERS", "perhaps"),
        ],
    )
    def test_value_that_cannot_be(self, name, value):
        with pytest.raises(InvalidInput, match=name):
            Settings.from_environment({f"BITQUOTA_{name}": value})

    @pytest.mark.parametrize("value", ["0", "1"])
    def test_old_name_of_a_dangerous_setting_is_refused(self, value):
        """Whoever sets it has read what it does."""
        with pytest.raises(InvalidInput, match="BITQUOTA_DANGEROUSLY_RUN_CODE_OF_STRANGERS"):
            Settings.from_environment({"BITQUOTA_ALLOW_UNSANDBOXED_PT2": value})

    def test_lease_must_outlast_heartbeats(self):
        with pytest.raises(InvalidInput, match="three heartbeats"):
            Settings(lease_s=1, heartbeat_s=1)

    def test_every_setting_is_documented(self):
        text = documentation()
        for name in Settings().to_environment():
            assert f"`{name}`" in text

    @pytest.mark.parametrize(
        ("host", "loopback"),
        [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False),  # noqa: S104
         ("192.168.1.1", False), ("example.org", False)],
    )  # fmt: skip
    def test_loopback(self, host, loopback):
        assert Settings(host=host).loopback is loopback

from __future__ import annotations

import shutil

import httpx
import pytest

from bitquota.errors import Forbidden, InvalidInput, NotFound, Unauthorized
from bitquota.service.security.keys import KeyStore, Scope
from bitquota.service.settings import Settings
from bitquota.service.store.database import Database, api_keys
from live_server import LiveServer, folder_zip, npz

NOW = 1_800_000_000.0


@pytest.fixture
def database(tmp_path, migrated):
    shutil.copy(migrated, tmp_path / "keys.db")
    opened = Database(f"sqlite:///{tmp_path}/keys.db")
    yield opened
    opened.close()


@pytest.fixture
def clock():
    return [NOW]


@pytest.fixture
def keys(database, clock):
    return KeyStore(database, lambda: clock[0])


class TestCreate:
    def test_text_is_verified_as_its_tenant(self, keys):
        key, text = keys.create("ann", name="laptop")
        caller = keys.verify(text)
        assert (caller.tenant, caller.actor) == ("ann", f"key:{key.id}")

    def test_secret_is_not_stored(self, keys, database):
        _, text = keys.create("ann")
        secret = text.rpartition("_")[2]
        with database.engine.connect() as connection:
            stored = connection.execute(api_keys.select()).one()
        assert not any(secret in str(value) for value in stored)

    def test_secret_has_256_bits(self, keys):
        secrets = {keys.create("ann")[1].split("_", 2)[2] for _ in range(20)}
        assert len(secrets) == 20
        assert {len(secret) for secret in secrets} == {43}

    @pytest.mark.parametrize("tenant", ["", "../x", "Ann", "a b", "x" * 64, "-a"])
    def test_tenant_must_be_able_to_name_a_folder(self, keys, tenant):
        with pytest.raises(InvalidInput, match="tenant"):
            keys.create(tenant)


class TestCheckPriority:
    def test_a_key_orders_up_to_its_own(self, keys):
        _, text = keys.create("ann", max_priority=5)
        caller = keys.verify(text)
        caller.check_priority(5)
        with pytest.raises(Forbidden, match="at most 5; got 6"):
            caller.check_priority(6)

    def test_zero_unless_it_is_said(self, keys):
        _, text = keys.create("ann")
        with pytest.raises(Forbidden, match="at most 0"):
            keys.verify(text).check_priority(1)

    def test_outlives_a_rotation(self, keys):
        key, _ = keys.create("ann", max_priority=7)
        assert keys.rotate(key.id)[0].max_priority == 7

    def test_must_be_a_priority(self, keys):
        with pytest.raises(InvalidInput, match="from -100 to 100"):
            keys.create("ann", max_priority=101)


class TestVerify:
    @pytest.mark.parametrize(
        "change",
        [
            lambda text: text[:-1] + ("A" if text[-1] != "A" else "B"),
            lambda text: text[:-1],
            lambda text: text.replace("bq_", "", 1),
            lambda text: "bq_" + "0" * 16 + text[19:],
            lambda _text: "",
        ],
    )
    def test_wrong_key(self, keys, change):
        _, text = keys.create("ann")
        with pytest.raises(Unauthorized):
            keys.verify(change(text))

    def test_revoked(self, keys):
        key, text = keys.create("ann")
        keys.revoke(key.id)
        with pytest.raises(Unauthorized):
            keys.verify(text)

    def test_expired(self, keys, clock):
        _, text = keys.create("ann", lifetime_s=10)
        keys.verify(text)
        clock[0] += 10
        with pytest.raises(Unauthorized):
            keys.verify(text)

    def test_scopes(self, keys):
        caller = keys.verify(keys.create("ann", scopes=[Scope.READ])[1])
        caller.require(Scope.READ)
        with pytest.raises(Forbidden, match="write"):
            caller.require(Scope.WRITE)


class TestRotate:
    def test_old_key_works_during_the_overlap_only(self, keys, clock):
        key, old = keys.create("ann", scopes=[Scope.READ])
        made, new = keys.rotate(key.id, overlap_s=60)
        assert made.scopes == key.scopes
        keys.verify(old)
        clock[0] += 60
        keys.verify(new)
        with pytest.raises(Unauthorized):
            keys.verify(old)

    def test_without_overlap_the_old_one_ends_now(self, keys):
        key, old = keys.create("ann")
        keys.rotate(key.id)
        with pytest.raises(Unauthorized):
            keys.verify(old)

    def test_revoked_key_cannot_be_rotated(self, keys):
        key, _ = keys.create("ann")
        keys.revoke(key.id)
        with pytest.raises(NotFound):
            keys.rotate(key.id)

    def test_unknown_key(self, keys):
        with pytest.raises(NotFound):
            keys.revoke("0" * 16)


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("keyed") / "data"
    data_dir.mkdir()
    database = Database(Settings(data_dir=data_dir).url)
    database.create()
    store = KeyStore(database, lambda: NOW)
    texts = {
        "ann": store.create("ann")[1],
        "bob": store.create("bob")[1],
        "reader": store.create("ann", scopes=[Scope.READ])[1],
    }
    database.close()
    with LiveServer(data_dir, slots=0, max_queued=2, max_stored_bytes=100_000) as running:
        yield running, texts


class TestServerWithKeys:
    @pytest.fixture
    def call(self, keyed):
        server, texts = keyed
        clients = {
            name: httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {text}"})
            for name, text in texts.items()
        }
        clients["nobody"] = httpx.Client(base_url=server.url)
        yield clients
        for client in clients.values():
            client.close()

    @pytest.fixture
    def ordered(self, call):
        model = call["ann"].put("/v1/models", content=folder_zip()).json()["id"]
        dataset = call["ann"].put("/v1/datasets", content=npz()).json()["id"]
        body = {"kind": "plan", "model": model, "dataset": dataset}
        body["request"] = {"budgets": ["3 bits"]}
        headers = {"Idempotency-Key": "fixture"}
        job = call["ann"].post("/v1/jobs", json=body, headers=headers)
        return body, job.json()["id"]

    def test_no_key_is_401_with_the_way_to_authenticate(self, call):
        answer = call["nobody"].get("/v1/jobs")
        assert (answer.status_code, answer.json()["type"]) == (
            401,
            "urn:bitquota:problem:unauthorized",
        )
        assert answer.headers["www-authenticate"].startswith("Bearer")

    def test_health_needs_no_key(self, call):
        assert call["nobody"].get("/healthz").status_code == 200

    def test_another_tenants_ids_do_not_exist(self, call, ordered):
        body, job = ordered
        for path in ("", "/plan", "/events", "/report", "/sensitivity"):
            assert call["bob"].get(f"/v1/jobs/{job}{path}").status_code == 404
        assert call["bob"].post(f"/v1/jobs/{job}/cancel").status_code == 404
        assert call["bob"].get(f"/v1/models/{body['model']}").status_code == 404
        assert call["bob"].post("/v1/jobs", json=body).status_code == 404
        assert call["bob"].get("/v1/jobs").json()["data"] == []

    def test_reader_may_look_and_not_touch(self, call, ordered):
        _, job = ordered
        assert call["reader"].get(f"/v1/jobs/{job}").status_code == 200
        refused = call["reader"].post(f"/v1/jobs/{job}/cancel")
        assert (refused.status_code, refused.json()["type"]) == (
            403,
            "urn:bitquota:problem:forbidden",
        )

    def test_queue_quota_is_429_with_a_wait(self, call, ordered):
        body, _ = ordered
        answers = [call["ann"].post("/v1/jobs", json=body) for _ in range(3)]
        assert answers[-1].status_code == 429
        assert answers[-1].json()["type"] == "urn:bitquota:problem:quota-exceeded"
        assert int(answers[-1].headers["retry-after"]) > 0

    def test_storage_quota(self, call):
        answer = call["bob"].put("/v1/datasets", content=npz(10_000))
        assert (answer.status_code, answer.json()["type"]) == (
            429,
            "urn:bitquota:problem:quota-exceeded",
        )


class TestBinding:
    def test_other_addresses_need_keys(self, tmp_path):
        from bitquota.service import serve

        with pytest.raises(InvalidInput, match="must have API keys"):
            serve(host="0.0.0.0", port=0, data_dir=tmp_path)  # noqa: S104  # it is refused

    def test_local_server_answers_to_local_names_only(self, tmp_path):
        """A web page can make a browser call this machine under a name of its own."""
        with LiveServer(tmp_path / "data", slots=0) as server:
            port = server.url.rpartition(":")[2]
            rebound = httpx.get(server.url + "/v1/jobs", headers={"Host": f"evil.example:{port}"})
            crossed = httpx.get(server.url + "/v1/jobs", headers={"Sec-Fetch-Site": "cross-site"})
        assert (rebound.status_code, crossed.status_code) == (401, 401)

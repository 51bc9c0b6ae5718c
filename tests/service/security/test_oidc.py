"""Bearer tokens of a real issuer on loopback: who is let in, as whom, and who is not."""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bitquota.errors import Forbidden, InvalidInput, Unauthorized, Unavailable
from bitquota.service.app import create_app
from bitquota.service.logs import configure
from bitquota.service.security.keys import Scope
from bitquota.service.security.oidc import TokenVerifier
from bitquota.service.settings import Settings

jwt = pytest.importorskip("jwt")
rsa = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.rsa")


class Issuer:
    """Publishes one key; ``sign`` makes tokens with it, or with another one of the same name."""

    def __init__(self) -> None:
        self.key, self.other = (rsa.generate_private_key(65537, 2048) for _ in range(2))
        self.fetched: list[str] = []
        public = jwt.algorithms.RSAAlgorithm.to_jwk(self.key.public_key(), as_dict=True)
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                issuer.fetched.append(self.path)
                told = {"issuer": issuer.url, "jwks_uri": f"{issuer.url}/keys"}
                keys = {"keys": [public | {"kid": "one", "use": "sig", "alg": "RS256"}]}
                body = json.dumps(keys if self.path == "/keys" else told).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def sign(self, key=None, algorithm="RS256", **changes):
        claims = {
            "iss": self.url, "aud": "bitquota", "sub": "ann", "exp": time.time() + 300,
            "tenant": "vision", "scope": "openid bitquota:read",
        } | changes  # fmt: skip
        claims = {name: value for name, value in claims.items() if value is not None}
        if algorithm == "none":
            key = None
        elif key is None:
            key = self.key
        return jwt.encode(claims, key, algorithm, headers={"kid": "one"})


@pytest.fixture(scope="module")
def issuer():
    made = Issuer()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def verifier(issuer):
    return TokenVerifier(Settings(oidc_issuer=issuer.url, oidc_audience="bitquota"))


def test_holder_and_scopes(issuer, verifier):
    """The issuer is asked once for its document and its keys."""
    issuer.fetched.clear()
    caller = verifier.verify(issuer.sign())
    assert ("vision", "oidc:ann", {Scope.READ}) == (caller.tenant, caller.actor, caller.scopes)
    both = verifier.verify(issuer.sign(scope="bitquota:write bitquota:read"))
    assert set(Scope) == both.scopes
    assert issuer.fetched == ["/.well-known/openid-configuration", "/keys"]


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": time.time() - 3600},
        {"exp": None},
        {"sub": None},
        {"aud": "another"},
        {"iss": "https://elsewhere.example"},
        {"nbf": time.time() + 3600},
        {"key": "0" * 64, "algorithm": "HS256"},
        {"algorithm": "none"},
    ],
    ids="-".join,
)
def test_refused(issuer, verifier, changes):
    with pytest.raises(Unauthorized, match="valid API key or token"):
        verifier.verify(issuer.sign(**changes))


def test_signed_by_another_key_or_none_at_all(issuer, verifier):
    for text in (issuer.sign(key=issuer.other), "a.b.c", "bq_nothing", ""):
        with pytest.raises(Unauthorized):
            verifier.verify(text)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"tenant": None}, "claim 'tenant' must name a tenant; it has None"),
        ({"tenant": "../etc"}, "must name a tenant"),
        ({"tenant": ["a"]}, "must name a tenant"),
        ({"scope": "openid"}, "must name one of bitquota:read, bitquota:write"),
    ],
)
def test_valid_and_not_for_us(issuer, verifier, changes, text):
    with pytest.raises(Forbidden, match=text):
        verifier.verify(issuer.sign(**changes))


def test_issuer_that_cannot_be_reached(issuer):
    """An outage is not the caller's fault, and the next request tries again."""
    settings = Settings(oidc_issuer="http://127.0.0.1:1", oidc_audience="bitquota")
    with pytest.raises(Unavailable, match="try again, or send an API key"):
        TokenVerifier(settings).verify(issuer.sign())


def test_issuer_that_calls_itself_otherwise(issuer):
    settings = Settings(oidc_issuer=issuer.url + "/", oidc_audience="bitquota")
    with pytest.raises(Unavailable, match="does not call itself"):
        TokenVerifier(settings).verify(issuer.sign())


def test_needs_an_audience(issuer):
    with pytest.raises(InvalidInput, match="BITQUOTA_OIDC_AUDIENCE"):
        TokenVerifier(Settings(oidc_issuer=issuer.url))


def test_api_takes_tokens_and_nobody_without(issuer, tmp_path):
    """Where tokens are asked for, loopback alone lets nobody in."""
    from fastapi.testclient import TestClient

    configure("ERROR")
    settings = Settings(
        data_dir=tmp_path, oidc_issuer=issuer.url, oidc_audience="bitquota", reserve=False, slots=0
    )
    with TestClient(create_app(settings), base_url="http://127.0.0.1") as http:
        bearer = {"Authorization": f"Bearer {issuer.sign()}"}
        assert http.get("/v1/jobs", headers=bearer).json()["data"] == []
        assert http.get("/v1/jobs").status_code == 401
        refused = http.post("/v1/solve", json={}, headers=bearer)
        assert refused.status_code == 403
        assert "scope 'write'" in refused.json()["detail"]

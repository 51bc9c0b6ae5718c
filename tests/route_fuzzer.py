"""Hostile requests to every route, made from the OpenAPI document and a seed.

Schemathesis asks whether the server keeps to its document. This asks what becomes of values that
no client library would send: numbers of 100,000 digits, NULs, half surrogates, bytes that are no
UTF-8, in every path, query, header and member of a body. Requests are written to a socket, since
libraries refuse to send most of them.
"""

from __future__ import annotations

import copy
import http.client
import json
import random
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import Iterator

JOB = "job_" + "0" * 32
DIGEST = "sha256:" + "0" * 64
NUMBERS = (
    "0", "-1", "1.5", "2147483647", "2147483648", "9223372036854775807", "9223372036854775808",
    "-9223372036854775809", "1e308", "1e309", "-1e999", "NaN", "Infinity", "-Infinity", "0x10",
    "9" * 41, "9" * 5000, "1" * 100_000, "1_000", "٣", "", " 1", "true", "null", "+1", "1e-400",
)  # fmt: skip
TEXTS = (
    "", " ", "\0", "a\0b", "\ud800", "\uffff", "é", "💣" * 50, "x" * 300, "x" * 5000, "../../etc",
    "..%2f..", "'; DROP TABLE jobs; --", "%s%n%d", "{{7*7}}", "<script>", "a=b", "=", "a\r\nb: c",
    "re:(a*)*b", "re:(", "re:(?=a)", "re:" + "(" * 500, "3 bits", "3 bits" + "+3 bits" * 40,
    "9" * 400 + " bits", "1e5 bits", "NaN bits", "-3 bits", "0x", "12 MiB of weights", "١ bits",
    "9" * 30 + " TBitOps", JOB, DIGEST, "sha256:" + "g" * 64, "http://127.0.0.1:1/", "file:///etc",
    "https://[::1]:99999999/", "https://exa mple/", "http://" + "a" * 3000, "wait=99999999999",
    "null", "[]", "{}", "\u202e", "a" * 70_000,
)  # fmt: skip
BYTES = (b"%00", b"%ff%fe", b"%F0%28%8C%28", b"%", b"%zz", b"%2e%2e%2f", b"%0d%0aX:%20y", b"+")
MENUS = (
    "[4]", "[4,4]", "[4,4,8]", "[]", "[8,4,2]", "[1]", "[0]", "[-2]", "[1e9]", "[4.0]", '["4"]',
    "[" + ",".join(["4"] * 5000) + "]", "[[4]]", "[null]", "[true]", "[NaN]",
)  # fmt: skip
BODIES = (
    b"", b"{", b"[]", b"null", b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}", b"[" * 5000, b'{"a":' * 5000,
    b'"\\ud800"', b'{"kind":"\\u0000"}', b"9" * 100_000, b"[" + b"[]," * 200_000 + b"1]", b"\0",
    b'{"kind":"plan","kind":"solve"}', b"-", b'{"": {"": {}}}', b"\x80abc", b"x" * (2**20 + 1),
)  # fmt: skip
HEADERS = (
    "Last-Event-ID", "If-None-Match", "Idempotency-Key", "Prefer", "Authorization", "Cookie",
    "X-Request-Id", "traceparent", "Content-Type", "Accept", "Range", "If-Range", "X-CSRF-Token",
    "Sec-Fetch-Site", "Expect", "Accept-Encoding", "Transfer-Encoding", "Content-Length", "Host",
)  # fmt: skip
PAGES = (
    "/", "/jobs/{job_id}", "/jobs/{job_id}/model", "/jobs/{job_id}/charts.json?after={n}",
    "/jobs/{job_id}/cross.json?at={text}", "/jobs/{job_id}/report.html",
    "/jobs/{job_id}/live?after={n}", "/live/jobs", "/sign-in?next={text}", "/static/{text}/{text}",
)  # fmt: skip
MOST_READ = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class HostileRequest:
    """One request as bytes on the wire."""

    method: str
    target: bytes
    headers: tuple[tuple[str, bytes], ...] = ()
    body: bytes = b""


@dataclass(slots=True)
class RouteFuzzer:
    """Makes requests to all routes of a document.

    Args:
        document: OpenAPI.
        seed: Equal seeds make equal requests.
        known: Ids that exist, by the name of their path parameter.
    """

    document: dict
    seed: int
    known: dict[str, list[str]]
    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)  # noqa: S311  # no secret

    def requests(self, count: int) -> Iterator[HostileRequest]:
        """Yield ``count`` requests, of every operation in turn."""
        operations = [
            (method.upper(), path, operation)
            for path, methods in sorted(self.document["paths"].items())
            for method, operation in sorted(methods.items())
        ]
        operations += [("GET", path, {}) for path in PAGES]
        operations += [("POST", "/sign-in", {}), ("POST", "/sign-out", {})]
        for k in range(count):
            yield self._request(*operations[k % len(operations)])

    def _request(self, method: str, path: str, operation: dict) -> HostileRequest:
        pick = self._random
        query = [
            (entry["name"], self._value(entry.get("schema", {})))
            for entry in operation.get("parameters", ())
            if entry["in"] == "query" and pick.random() < 0.5
        ]
        named = [e["name"] for e in operation.get("parameters", ()) if e["in"] == "header"]
        headers = [
            (name, self._header(name))
            for name in {*named, *pick.sample(HEADERS, 2)}
            if pick.random() < 0.3
        ]
        while "{" in path:
            before, _, rest = path.partition("{")
            name, _, after = rest.partition("}")
            path = before + self._path_part(name) + after
        target = path.encode("utf-8", "surrogatepass")
        if query:
            target += b"?" + b"&".join(f"{quote(n)}=".encode() + v for n, v in query)
        body = self._body(operation) if method in {"POST", "PUT"} or pick.random() < 0.05 else b""
        if body and not any(name == "Content-Type" for name, _ in headers):
            headers.append(("Content-Type", b"application/json"))
        if pick.random() < 0.03:
            method = pick.choice(("HEAD", "OPTIONS", "PATCH", "TRACE", "PUT", "DELETE"))
        return HostileRequest(method=method, target=target, headers=tuple(headers), body=body)

    def _path_part(self, name: str) -> str:
        pick = self._random
        if name in self.known and pick.random() < 0.7:
            return pick.choice(self.known[name])
        return self._quoted(pick.choice(TEXTS)[:2000] or "x").decode()

    def _value(self, schema: dict) -> bytes:
        pick = self._random
        roll = pick.random()
        if roll < 0.2:
            return pick.choice(BYTES)
        if roll < 0.6:
            return self._quoted(pick.choice(NUMBERS)[:20_000])
        if schema.get("enum"):
            return str(pick.choice(schema["enum"])).encode()
        return self._quoted(pick.choice(TEXTS)[:20_000])

    @staticmethod
    def _quoted(text: str) -> bytes:
        return quote(text.encode("utf-8", "surrogatepass"), safe="").encode()

    def _header(self, name: str) -> bytes:
        pick = self._random
        if name == "Content-Length":
            return pick.choice((b"-1", b"1e3", b"9" * 40, b"5"))
        if name == "Transfer-Encoding":
            return pick.choice((b"chunked", b"gzip, chunked", b"identity"))
        if name == "Authorization":
            return pick.choice(
                (b"Bearer", b"Bearer ", b"Bearer bq_" + b"0" * 16 + b"_" + b"a" * 43, b"Basic eA==",
                 b"Bearer \xff\xfe", b"Bearer " + b"x" * 9000)
            )  # fmt: skip
        chosen = pick.choice(NUMBERS if pick.random() < 0.5 else TEXTS)[:8000]
        cleaned = chosen.replace("\r", "").replace("\n", "").replace("\0", "")
        return cleaned.encode("utf-8", "surrogatepass")

    def _body(self, operation: dict) -> bytes:
        pick = self._random
        content = operation.get("requestBody", {}).get("content", {})
        example = self._example(content.get("application/json", {}))
        if example is None or pick.random() < 0.15:
            return pick.choice(BODIES)
        return self._mutated(example)

    def _example(self, described: dict) -> object:
        pick = self._random
        examples = [e["value"] for e in described.get("examples", {}).values()]
        examples += described.get("schema", {}).get("examples", [])
        return copy.deepcopy(pick.choice(examples)) if examples else None

    def _mutated(self, example: object) -> bytes:
        """Return JSON text with hostile text in one to three places, also where none belongs."""
        pick = self._random
        places: list[tuple[object, object]] = []

        def walk(value: object) -> None:
            found = value.items() if isinstance(value, dict) else enumerate(value)
            for key, inner in list(found):
                places.append((value, key))
                if isinstance(inner, dict | list):
                    walk(inner)

        walk(example)
        marks: dict[str, str] = {}
        for k in range(pick.randint(1, 3)):
            mark = f"@@{k}@@"
            holder, key = pick.choice(places)
            roll = pick.random()
            if "bits" in str(key) and roll < 0.6:
                marks[f'"{mark}"'] = pick.choice(MENUS)
            elif roll < 0.45:
                marks[f'"{mark}"'] = pick.choice(NUMBERS) or "0"
            elif roll < 0.9:
                marks[f'"{mark}"'] = json.dumps(pick.choice(TEXTS))
            else:
                marks[f'"{mark}"'] = pick.choice(("{}", "[]", "[[[[]]]]", '{"a":{"b":{}}}', "true"))
            if isinstance(holder, dict) and pick.random() < 0.2:
                holder[pick.choice(TEXTS)[:3000]] = mark
            else:
                holder[key] = mark
        self._use_known(example)
        text = json.dumps(example)
        for mark, hostile in marks.items():
            text = text.replace(mark, hostile)
        return text.encode("utf-8", "surrogatepass")

    def _use_known(self, example: object) -> None:
        """Name uploads that exist, so that a request is not refused for want of them."""
        for role in ("model", "dataset", "matrix", "job"):
            found = self.known.get({"job": "job_id"}.get(role, role))
            named = example.get(role) if isinstance(example, dict) else None
            if found and isinstance(named, str) and not named.startswith("@@"):
                example[role] = self._random.choice(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What came back; ``status`` is 0 where the server closed the connection instead."""

    status: int
    media_type: str
    body: bytes


def send(
    port: int, request: HostileRequest, key: str | None = None, timeout_s: float = 60
) -> Reply:
    """Return the answer; of a stream only its beginning is read."""
    names = {name.lower() for name, _ in request.headers}
    lines = [request.method.encode() + b" " + request.target + b" HTTP/1.1"]
    lines += [f"{name}: ".encode() + value for name, value in request.headers]
    if "host" not in names:
        lines.append(b"Host: 127.0.0.1")
    if key is not None and "authorization" not in names:
        lines.append(f"Authorization: Bearer {key}".encode())
    if request.body and not names & {"content-length", "transfer-encoding"}:
        lines.append(b"Content-Length: %d" % len(request.body))
    lines.append(b"Connection: close")
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        try:
            connection.sendall(b"\r\n".join(lines) + b"\r\n\r\n" + request.body)
            if names & {"content-length", "transfer-encoding", "expect"}:
                connection.shutdown(socket.SHUT_WR)  # it may wait for bytes that do not come
            answer = http.client.HTTPResponse(connection, method=request.method)
            answer.begin()
            media_type = answer.headers.get_content_type()
            body = b"" if media_type == "text/event-stream" else answer.read(MOST_READ)
            return Reply(status=answer.status, media_type=media_type, body=body)
        except (OSError, http.client.HTTPException):
            return Reply(status=0, media_type="", body=b"")

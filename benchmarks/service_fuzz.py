"""Hostile uploads and requests against a live server, beside a tenant that only wants to read.

``python benchmarks/service_fuzz.py`` sends 20,000 mutated ``.pt2``, ONNX, safetensors and ``.npz``
files and 5,000 requests of ``route_fuzzer`` (``--files``, ``--requests``, ``--seed``). Nothing may
execute, nothing may be answered with a 5xx, the other tenant's slowest GET must stay below 1 s and
the server below 300 MiB.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import random
import sys
import tempfile
import threading
import time
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import httpx
import numpy as np

from bitquota.service.security.keys import KeyStore
from bitquota.service.settings import Settings
from bitquota.service.store.database import Database
from live_server import LiveServer, folder_zip, npz, safetensors, train_and_export
from route_fuzzer import NUMBERS, TEXTS, RouteFuzzer, send
from seeded_jobs import seed_model

SENDERS = 4
LIMIT_S = 1.0
LIMIT_BYTES = 300 * 2**20


def onnx_bytes() -> bytes:
    """Return a small ONNX file."""
    from onnx import TensorProto, helper, numpy_helper

    weight = np.ones((4, 3), np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "g",
        [value("x", TensorProto.FLOAT, ["n", 4])],
        [value("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(weight, "w")],
    )
    made: bytes = helper.make_model(graph).SerializeToString()
    return made


def flipped(data: bytes, rng: random.Random) -> bytes:
    """Return ``data`` with some bytes, a number or a piece changed, repeated, or cut off."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(len(changed))
        match rng.randrange(6):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at] = rng.choice((0, 0x7F, 0x80, 0xFF))
            case 2:
                number = rng.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1))
                changed[at : at + 8] = number.to_bytes(8, "little")
            case 3:
                end = at + rng.randint(1, 64)
                changed[at:at] = changed[at:end] * rng.randint(1, 4)
            case 4:
                del changed[at : at + rng.randint(1, 64)]
            case _:
                if rng.random() < 0.2:
                    del changed[at:]
        if not changed:
            return b""
    return bytes(changed)


def edited_json(text: bytes, rng: random.Random, payload: str) -> bytes:
    """Return JSON with some of its texts and numbers replaced by hostile ones."""
    places: list[tuple[object, object]] = []

    def walk(value: object) -> None:
        found = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in list(found):
            places.append((value, key))
            if isinstance(inner, dict | list):
                walk(inner)

    value = json.loads(text)
    walk(value)
    marks = {}
    for k in range(rng.randint(1, 3)):
        holder, key = rng.choice(places)
        mark = f"@@{k}@@"
        holder[key] = mark
        hostile = (
            rng.choice(NUMBERS) or "0"
            if rng.random() < 0.4
            else json.dumps(rng.choice((payload, *TEXTS)))
        )
        marks[f'"{mark}"'] = hostile
    made = json.dumps(value)
    for mark, hostile in marks.items():
        made = made.replace(mark, hostile)
    return made.encode("utf-8", "surrogatepass")


def edited_zip(data: bytes, rng: random.Random, payload: str) -> bytes:
    """Return a zip with one member changed, renamed, compressed, doubled, or left out."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    chosen = rng.randrange(len(members))
    graphs = [k for k, (name, _) in enumerate(members) if name.endswith(".json")]
    if graphs and rng.random() < 0.7:
        chosen = rng.choice(graphs)
    name, content = members[chosen]
    roll = rng.random()
    if name.endswith(".json") and roll < 0.8:
        members[chosen] = (name, edited_json(content, rng, payload))
    elif roll < 0.6 and content:
        members[chosen] = (name, flipped(content, rng))
    elif roll < 0.8:
        renamed = rng.choice(TEXTS).replace("\ud800", "?").replace("\0", "%00")
        members[chosen] = (renamed[:60_000] or "x", content)
    elif roll < 0.9:
        members.append((name + ".x", content))
    else:
        del members[chosen]
    buffer = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def mutated(data: bytes, rng: random.Random, payload: str) -> bytes:
    """Return a file that is nearly ``data``."""
    if data.startswith(b"PK") and rng.random() < 0.7:
        data = edited_zip(data, rng, payload)
        return data if rng.random() < 0.8 else flipped(data, rng)
    if data[8:9] == b"{" and rng.random() < 0.6:
        length = int.from_bytes(data[:8], "little")
        header = edited_json(data[8 : 8 + length], rng, payload)
        return len(header).to_bytes(8, "little") + header + data[8 + length :]
    return flipped(data, rng)


def resident(pid: int) -> int:
    """Return the resident bytes of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) * 1024


class Watcher:
    """Another tenant's GETs, and the server's memory, while the rest goes on."""

    def __init__(self, url: str, key: str, pid: int) -> None:
        self.seconds: list[float] = []
        self.peak = 0
        self._done = threading.Event()
        self._http = httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=120
        )
        self._pid = pid
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.05):
            began = time.perf_counter()
            assert self._http.get("/v1/jobs").status_code == 200
            self.seconds.append(time.perf_counter() - began)
            self.peak = max(self.peak, resident(self._pid))

    def end(self) -> str:
        """Return what was seen."""
        self._done.set()
        self._thread.join()
        self._http.close()
        n = len(self.seconds)
        ms = sorted(1000 * seconds for seconds in self.seconds)
        return (
            f"{n} GETs of another tenant: median {ms[n // 2]:.0f} ms, p99 {ms[int(0.99 * n)]:.0f} "
            f"ms, worst {ms[-1]:.0f} ms; server at most {self.peak / 2**20:.0f} MiB; load "
            f"{os.getloadavg()[0]:.1f}"
        )


def upload_all(
    server: LiveServer,
    keys: list[str],
    seeds: dict[str, tuple[str, bytes]],
    options: argparse.Namespace,
    marker: Path,
) -> dict[tuple[str, int], int]:
    """Send mutated files from several threads; return how often each status came."""
    payload = f"__import__('os').mkdir({str(marker)!r})"
    counted: collections.Counter[tuple[str, int]] = collections.Counter()
    failures: list[str] = []
    numbers = iter(range(options.files))
    lock = threading.Lock()

    def work(key: str) -> None:
        headers = {"Authorization": f"Bearer {key}"}
        with httpx.Client(base_url=server.url, headers=headers, timeout=120) as http:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                rng = random.Random(options.seed * 10**9 + number)  # noqa: S311  # no secret
                name = rng.choice(sorted(seeds))
                kind, data = seeds[name]
                answer = http.put(f"/v1/{kind}", content=mutated(data, rng, payload))
                with lock:
                    counted[name, answer.status_code] += 1
                    if answer.status_code >= 500:
                        failures.append(f"{name} {number}: {answer.text[:300]}")

    threads = [threading.Thread(target=work, args=(key,)) for key in keys]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for failure in failures[:10]:
        print(failure)
    return dict(sorted(counted.items()))


def main() -> None:
    """Fuzz uploads, then routes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--requests", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bq-fuzz-"))
    model, _ = train_and_export(folder)
    entry = {"x": {"dtype": "F32", "shape": [8, 4], "data_offsets": [0, 128]}}
    seeds = {
        "pt2": ("models", model.read_bytes()),
        "onnx": ("models", onnx_bytes()),
        "npz": ("datasets", npz()),
        "safetensors": ("datasets", safetensors(entry, bytes(128))),
    }
    data_dir = folder / "data"
    data_dir.mkdir()
    database = Database(Settings(data_dir=data_dir).url)
    database.create()
    made = KeyStore(database, time.time)
    keys = [made.create(f"fuzzer-{k}")[1] for k in range(SENDERS)]
    other = made.create("other")[1]
    database.close()
    job = seed_model(data_dir, 12, tenant="fuzzer-0")
    good = True
    with LiveServer(data_dir, slots=0, max_queued=10**6) as server:
        pid, port = server.process.pid, int(server.url.rpartition(":")[2])
        # Uploads: nothing may run, in the server or below it.
        marker = folder / "ran"
        watcher = Watcher(server.url, other, pid)
        began = time.perf_counter()
        counted = upload_all(server, keys, seeds, options, marker)
        seconds = time.perf_counter() - began
        print(f"{options.files} mutated files in {seconds:.0f} s: {counted}")
        print(watcher.end())
        good &= not marker.exists() and all(status < 500 for _, status in counted)
        good &= max(watcher.seconds) < LIMIT_S and watcher.peak < LIMIT_BYTES
        # Routes.
        document = httpx.get(server.url + "/v1/openapi.json").json()
        headers = {"Authorization": f"Bearer {keys[0]}"}
        known = {"job_id": [job], "digest": []}
        with httpx.Client(base_url=server.url + "/v1", headers=headers) as http:
            http.put("/datasets", content=npz())
            http.put("/models", content=folder_zip())
            for kind in ("models", "datasets", "plans", "matrices"):
                found = [entry["id"] for entry in http.get(f"/{kind}").json()["data"]]
                known[{"matrices": "matrix"}.get(kind, kind.removesuffix("s"))] = found
                known["digest"] += found[:5]
        watcher = Watcher(server.url, other, pid)
        statuses: collections.Counter[int] = collections.Counter()
        for request in RouteFuzzer(document, options.seed, known).requests(options.requests):
            reply = send(port, request, keys[0])
            statuses[reply.status] += 1
            if reply.status >= 500:
                print(reply.status, request.method, request.target[:200], request.headers,
                      request.body[:300], reply.body[:300])  # fmt: skip
        print(f"{options.requests} requests to all routes: {dict(sorted(statuses.items()))}")
        print(watcher.end())
        good &= all(status < 500 for status in statuses)
        good &= max(watcher.seconds) < LIMIT_S and watcher.peak < LIMIT_BYTES
        errors = [x for x in server.log.read_text().splitlines() if '"level": "error"' in x]
        print(f"{len(errors)} errors in the log", *errors[:5], sep="\n")
    print("every bar is met" if good else "a bar is not met")
    sys.exit(not good)


if __name__ == "__main__":
    main()

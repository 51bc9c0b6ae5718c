"""Many clients poll, order and listen at once: latencies, errors, lost or doubled jobs.

``python benchmarks/service_load.py --seconds 60``; ``--postgres`` for PostgreSQL. Jobs wait
(``slots=0``), so that what is measured is the API and its database. The clients speak HTTP/1.1
over kept connections with a few lines of their own: httpx would take more processor time than the
server, on the same cores. ``--profile FILE`` writes a py-spy flame graph of the server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import httpx

from live_postgres import LivePostgres
from live_server import LiveServer, folder_zip, npz


def quantile(values: list[float], share: float) -> float:
    """Return a quantile by the nearest rank."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


class Connection:
    """One kept HTTP/1.1 connection; answers must have a Content-Length."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Send a whole request and return status and body."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        status = int(head[9:12])
        at = head.find(b"content-length: ")
        length = int(head[at + 16 : head.index(b"\r\n", at)]) if at >= 0 else 0
        return status, await reader.readexactly(length) if length else b""

    def close(self) -> None:
        """Hang up."""
        if self._streams is not None:
            self._streams[1].close()


def get(path: str) -> bytes:
    """Return the bytes of a GET."""
    return f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()


def post(path: str, body: bytes, key: str) -> bytes:
    """Return the bytes of a POST of JSON."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        f"Idempotency-Key: {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Seen:
    """What all clients saw."""

    def __init__(self) -> None:
        self.polls: list[float] = []
        self.orders: list[float] = []
        self.statuses: Counter[int] = Counter()
        self.made: list[str] = []
        self.streamed = 0


async def load(port: int, order: bytes, options: argparse.Namespace) -> Seen:
    """Run all clients to the end."""
    seen = Seen()
    until = time.monotonic() + options.seconds

    async def poll(number: int) -> None:
        connection = Connection(port)
        await asyncio.sleep(options.think * number / options.pollers)
        while time.monotonic() < until:
            path = f"/v1/jobs/{seen.made[-1 - number % len(seen.made)]}"
            began = time.perf_counter()
            status, _ = await connection.ask(get(path))
            seen.polls.append(time.perf_counter() - began)
            seen.statuses[status] += 1
            await asyncio.sleep(max(0.0, options.think - seen.polls[-1]))
        connection.close()

    async def submit(number: int) -> None:
        connection = Connection(port)
        await asyncio.sleep(options.think * number / options.submitters)
        count = 0
        while time.monotonic() < until:
            count += 1
            began = time.perf_counter()
            status, body = await connection.ask(post("/v1/jobs", order, f"{number}-{count}"))
            seen.orders.append(time.perf_counter() - began)
            seen.statuses[status] += 1
            if status == 202:
                seen.made.append(json.loads(body)["id"])
            await asyncio.sleep(max(0.0, options.think - seen.orders[-1]))
        connection.close()

    async def listen(number: int) -> None:
        """Follow the events of a job, which waits, so that the stream is silent but open."""
        path = f"/v1/jobs/{seen.made[number % len(seen.made)]}/events"
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(get(path))
        head = await reader.readuntil(b"\r\n\r\n")
        seen.statuses[int(head[9:12])] += 1
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + options.seconds):
                while piece := await reader.read(2**16):
                    seen.streamed += len(piece)
        writer.close()

    first = Connection(port)
    _, body = await first.ask(post("/v1/jobs", order, "first"))
    first.close()
    seen.made.append(json.loads(body)["id"])
    await asyncio.gather(
        *(poll(k) for k in range(options.pollers)),
        *(submit(k) for k in range(options.submitters)),
        *(listen(k) for k in range(options.streams)),
    )
    return seen


def stored_jobs(url: str) -> list[str]:
    """Return the ids of all jobs."""
    stored: list[str] = []
    cursor: dict[str, str] = {}
    with httpx.Client(base_url=url, timeout=60) as http:
        while True:
            page = http.get("/v1/jobs", params={"limit": 200} | cursor).json()
            stored += [job["id"] for job in page["data"]]
            if not page["has_more"]:
                return stored
            cursor = {"cursor": page["next_cursor"]}


def cpu_seconds(pid: int) -> float:
    """Return the processor seconds of a process."""
    spent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(spent[11]) + int(spent[12])) / os.sysconf("SC_CLK_TCK")


def profile(pid: int, target: Path, seconds: float) -> subprocess.Popen[bytes]:
    """Start py-spy beside the load."""
    line = ["py-spy", "record", "-p", str(pid), "-d", str(int(seconds)), "-r", "200"]
    return subprocess.Popen([*line, "-f", "raw", "-o", str(target)], stdout=subprocess.DEVNULL)


def run(server: LiveServer, options: argparse.Namespace) -> bool:
    """Load one server, print what was seen, and say whether all was well."""
    with httpx.Client(base_url=server.url, timeout=60) as http:
        model = http.put("/v1/models", content=folder_zip()).json()["id"]
        dataset = http.put("/v1/datasets", content=npz()).json()["id"]
    order = {
        "kind": "plan", "model": model, "dataset": dataset, "request": {"budgets": ["3 bits"]},
    }  # fmt: skip
    assert server.process is not None
    pid = server.process.pid
    spy = profile(pid, options.profile, options.seconds) if options.profile else None
    before, own = cpu_seconds(pid), time.process_time()
    port = int(server.url.rpartition(":")[2])
    seen = asyncio.run(load(port, json.dumps(order).encode(), options))
    server_s, own_s = cpu_seconds(pid) - before, time.process_time() - own
    for name, values in (("polls", seen.polls), ("orders", seen.orders)):
        print(
            f"{name}: {len(values)} in {options.seconds:.0f} s, "
            f"p50 {1000 * quantile(values, 0.5):.1f} ms, "
            f"p99 {1000 * quantile(values, 0.99):.0f} ms, max {1000 * max(values):.0f} ms"
        )
    print(f"event streams: {options.streams} open, {seen.streamed:,} bytes")
    stored = stored_jobs(server.url)
    expected = set(seen.made)
    lost, doubled = len(expected - set(stored)), len(stored) - len(set(stored))
    strange = len(set(stored) - expected)
    print(f"statuses {dict(seen.statuses)}; jobs lost {lost}, doubled {doubled}, strange {strange}")
    print(
        f"processor: server {server_s:.1f} s, these clients {own_s:.1f} s, "
        f"{100 * own_s / options.seconds:.0f} % of one core"
    )
    if spy is not None:
        spy.wait()
    return not lost and not doubled and not strange and max(seen.statuses) < 500


def main() -> None:
    """Start a server and load it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pollers", type=int, default=200)
    parser.add_argument("--submitters", type=int, default=50)
    parser.add_argument("--streams", type=int, default=30, help="Event streams held open.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--think", type=float, default=1.0, help="Seconds between requests.")
    parser.add_argument("--postgres", action="store_true")
    parser.add_argument("--profile", type=Path)
    options = parser.parse_args()
    settings: dict[str, object] = {"slots": 0, "max_queued": 10**6}
    cluster = None
    if options.postgres:
        cluster = LivePostgres()
        assert not cluster.reason, cluster.reason
        cluster.start()
        settings["database_url"] = cluster.new_database()
    with (
        tempfile.TemporaryDirectory(prefix="bq-load-") as folder,
        LiveServer(Path(folder) / "data", **settings) as server,
    ):
        good = run(server, options)
    if cluster is not None:
        cluster.stop()
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()

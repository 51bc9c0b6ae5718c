"""Many clients poll and order at once: latencies, errors, lost or doubled jobs.

``python benchmarks/service_load.py --seconds 60``; ``--postgres`` for PostgreSQL. Jobs wait
(``slots=0``), so that what is measured is the API and its database.
"""

from __future__ import annotations

import argparse
import asyncio
import os
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


async def load(url: str, pollers: int, submitters: int, seconds: float, think_s: float) -> bool:
    """Run all clients and print what they saw."""
    limits = httpx.Limits(max_connections=pollers + submitters)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
        model = (await http.put("/v1/models", content=folder_zip())).json()["id"]
        dataset = (await http.put("/v1/datasets", content=npz())).json()["id"]
        order = {
            "kind": "plan",
            "model": model,
            "dataset": dataset,
            "request": {"budgets": ["3 bits"]},
        }
        first = (await http.post("/v1/jobs", json=order)).json()["id"]
        until = time.monotonic() + seconds
        polls: list[float] = []
        posts: list[float] = []
        statuses: Counter[int] = Counter()
        made: list[str] = []

        async def poll(number: int) -> None:
            await asyncio.sleep(think_s * number / pollers)
            while time.monotonic() < until:
                known = made[-1 - number % len(made)] if made else first
                began = time.perf_counter()
                answer = await http.get(f"/v1/jobs/{known}")
                polls.append(time.perf_counter() - began)
                statuses[answer.status_code] += 1
                await asyncio.sleep(max(0.0, think_s - polls[-1]))

        async def submit(number: int) -> None:
            await asyncio.sleep(think_s * number / submitters)
            count = 0
            while time.monotonic() < until:
                count += 1
                began = time.perf_counter()
                headers = {"Idempotency-Key": f"{number}-{count}"}
                answer = await http.post("/v1/jobs", json=order, headers=headers)
                posts.append(time.perf_counter() - began)
                statuses[answer.status_code] += 1
                if answer.status_code == 202:
                    made.append(answer.json()["id"])
                await asyncio.sleep(max(0.0, think_s - posts[-1]))

        await asyncio.gather(
            *(poll(k) for k in range(pollers)), *(submit(k) for k in range(submitters))
        )
        stored: list[str] = []
        cursor = {}
        while True:
            page = (await http.get("/v1/jobs", params={"limit": 200} | cursor)).json()
            stored += [job["id"] for job in page["data"]]
            if not page["has_more"]:
                break
            cursor = {"cursor": page["next_cursor"]}
    for name, values in (("polls", polls), ("orders", posts)):
        print(
            f"{name}: {len(values)} in {seconds:.0f} s, p50 {1000 * quantile(values, 0.5):.0f} ms, "
            f"p99 {1000 * quantile(values, 0.99):.0f} ms, max {1000 * max(values):.0f} ms"
        )
    expected = {first, *made}
    lost, doubled = len(expected - set(stored)), len(stored) - len(set(stored))
    strange = len(set(stored) - expected)
    print(f"statuses {dict(statuses)}; jobs lost {lost}, doubled {doubled}, strange {strange}")
    return not lost and not doubled and not strange and max(statuses) < 500


def main() -> None:
    """Start a server and load it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pollers", type=int, default=200)
    parser.add_argument("--submitters", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--think", type=float, default=1.0, help="Seconds between requests.")
    parser.add_argument("--postgres", action="store_true")
    options = parser.parse_args()
    settings: dict[str, object] = {"slots": 0, "max_queued": 10**6}
    cluster = None
    if options.postgres:
        cluster = LivePostgres()
        assert not cluster.reason, cluster.reason
        cluster.start()
        settings["database_url"] = cluster.new_database()
    folder = Path(tempfile.mkdtemp(prefix="bq-load-"))
    with LiveServer(folder / "data", **settings) as server:
        good = asyncio.run(
            load(server.url, options.pollers, options.submitters, options.seconds, options.think)
        )
        assert server.process is not None
        spent = Path(f"/proc/{server.process.pid}/stat").read_text().rpartition(")")[2].split()
        cpu_s = (int(spent[11]) + int(spent[12])) / os.sysconf("SC_CLK_TCK")
        own_s = time.process_time()
        print(f"processor seconds: server {cpu_s:.1f}, these clients {own_s:.1f}")
        for line in httpx.get(server.url + "/metrics").text.splitlines():
            if "request_seconds_bucket" in line and "/jobs" in line:
                print("  " + line.removeprefix("bitquota_request_seconds_bucket"))
    if cluster is not None:
        cluster.stop()
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()

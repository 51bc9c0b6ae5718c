"""One tenant does its worst; how long does another wait?

``python benchmarks/service_fairness.py`` queues 500 jobs of one tenant and orders one of another,
has webhooks go to a receiver that drips its answer, cancels models that never end, and holds 1,500
half requests open; then it times claims with 10,000 jobs in the queue (``--postgres``: there, too).
Each line says what was allowed and what was seen.  ``--small`` only shows that it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import http.server
import multiprocessing
import os
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import httpx
import sqlalchemy as sa

from bitquota.errors import Cancelled
from bitquota.request import PlanRequest
from bitquota.service.jobs.job_store import JobStore
from bitquota.service.jobs.webhooks import Webhooks
from bitquota.service.security.keys import KeyStore
from bitquota.service.settings import Settings
from bitquota.service.store.database import Database, jobs
from live_postgres import LivePostgres
from live_server import LiveServer, npz, train_and_export
from onnx_graphs import endless_graph

if TYPE_CHECKING:
    from collections.abc import Callable

    from bitquota.client import Client

GREEDY, OTHER = "greedy", "other"
TENANTS = 50


class Report:
    """Prints each figure beside what is allowed."""

    def __init__(self) -> None:
        self.good = True

    def say(self, what: str, seen_s: float, allowed_s: float) -> None:
        """Print one line."""
        self.good &= seen_s <= allowed_s
        load = os.getloadavg()[0]
        verdict = "ok  " if seen_s <= allowed_s else "LATE"
        print(
            f"{verdict} {what}: {seen_s:.3f} s, at most {allowed_s:.3f} s; load average {load:.1f}"
        )
        sys.stdout.flush()


def make_tenants(data_dir: Path) -> dict[str, str]:
    """Return a key for each of two tenants; both have a webhook secret, too."""
    settings = Settings(data_dir=data_dir)
    data_dir.mkdir(parents=True)
    database = Database(settings.url)
    database.create()
    keys = {name: KeyStore(database, time.time).create(name)[1] for name in (GREEDY, OTHER)}
    for name in keys:
        Webhooks(settings, database, time.time).new_secret(name)
    database.close()
    return keys


def until(condition: Callable[[], object], seconds: float = 600.0) -> float:
    """Wait for a state and return the seconds that took."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > seconds:
            raise TimeoutError
        time.sleep(0.01)
    return time.monotonic() - began


def turns(
    report: Report, clients: dict[str, Client], files: tuple[Path, Path], queued: int
) -> None:
    """Order many jobs of one tenant, then one of another."""

    def order(name: str, seed: int) -> Any:  # noqa: ANN401  # the client's job
        request = PlanRequest(budgets=("3 bits",), samples=64, holdout_samples=64, seed=seed)
        return clients[name].submit(model=files[0], calibration=files[1], request=request)

    greedy = [order(GREEDY, seed) for seed in range(queued)]
    for job in greedy[:2]:
        job.wait(timeout_s=600)
    until(lambda: any(job.refresh().status == "running" for job in greedy[2:6]))
    other = order(OTHER, 0)
    waited = until(lambda: other.refresh().status != "queued")
    other.wait(timeout_s=600)
    bodies = [job.body for job in clients[GREEDY].jobs() if job.status == "succeeded"]
    lengths = [
        (
            datetime.fromisoformat(body["finished_at"]) - datetime.fromisoformat(body["started_at"])
        ).total_seconds()
        for body in bodies
    ]
    for job in greedy:
        if not job.refresh().ended:
            job.cancel()
    what = f"job of another tenant begins, {queued} of the first ordered"
    report.say(what, waited, max(lengths) + 1.0)  # and the ticks of a supervisor


def webhooks(
    report: Report, clients: dict[str, Client], files: tuple[Path, Path], dripping: int
) -> None:
    """End jobs whose receiver drips, then one of another tenant."""
    arrived: list[float] = []

    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            arrived.append(time.monotonic())
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    came: list[socket.socket] = []
    drip = socket.create_server(("127.0.0.1", 0), backlog=100)

    def answer(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            while True:
                connection.sendall(b"x: y\r\n")
                time.sleep(0.5)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                came.append(drip.accept()[0])
                threading.Thread(target=answer, args=(came[-1],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    receiver = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=receiver.serve_forever, daemon=True).start()

    def end_a_job(name: str, port: int) -> None:
        request = PlanRequest(budgets=("3 bits",), samples=64, holdout_samples=64)
        job = clients[name].submit(
            model=files[0], calibration=files[1], request=request,
            webhook=f"http://127.0.0.1:{port}/", priority=-1,
        )  # fmt: skip
        job.cancel()

    for _ in range(dripping):
        end_a_job(GREEDY, drip.getsockname()[1])
    until(lambda: came)
    waits = []
    for count in range(5):
        end_a_job(OTHER, receiver.server_port)
        waits.append(until(lambda: len(arrived) > count))  # noqa: B023  # called before it changes
    receiver.shutdown()
    drip.close()
    report.say(f"webhook of another tenant, {dripping} of the first drip", max(waits), 2.0)


def cancels(
    report: Report, server: LiveServer, client: Client, files: tuple[Path, Path], times: int
) -> None:
    """Cancel models that never end, with their processes stopped, too."""
    for stopped in (None, "driver", "evaluator"):
        took = []
        for _ in range(times):
            request = PlanRequest(budgets=("4 bits",), samples=8, holdout_samples=8)
            job = client.submit(model=files[0], calibration=files[1], request=request)
            until(lambda: (job.refresh().body["progress"] or {}).get("stage") == "load")  # noqa: B023
            time.sleep(1.0)  # inside of the loop by now
            working = server.working("evaluator")
            assert working is not None
            if stopped is not None:
                stuck = server.working(stopped)
                assert stuck is not None
                os.kill(stuck, signal.SIGSTOP)
            began = time.monotonic()
            job.cancel()
            with contextlib.suppress(Cancelled):
                until(lambda: job.refresh().ended)  # noqa: B023
            until(lambda: not Path(f"/proc/{working}").exists())  # noqa: B023
            assert job.status == "cancelled"
            took.append(time.monotonic() - began)
        report.say(f"cancel, evaluator gone ({stopped or 'nothing'} stopped)", max(took), 2.0)


def hold_half_requests(port: int, count: int) -> None:
    """Hold requests open that never get their last line, and open others as they end; for ever.

    They come from four addresses, so that no limit on one address helps.
    """

    def begin(number: int) -> socket.socket:
        connection = socket.create_connection(
            ("127.0.0.1", port), timeout=5, source_address=(f"127.0.0.{2 + number % 4}", 0)
        )
        connection.send(b"GET / HTTP/1.1\r\nhost: x\r\n")
        connection.settimeout(0.0)
        return connection

    held = [begin(k) for k in range(count)]
    while True:
        time.sleep(1.0)
        for k, connection in enumerate(held):
            try:
                connection.send(b"x: y\r\n")
            except OSError:
                connection.close()
                with contextlib.suppress(OSError):
                    held[k] = begin(k)


def looks(url: str, key: str) -> float:
    """Return the longest of 100 looks at the jobs, each over a connection of its own, in s."""
    took = []
    with httpx.Client(
        base_url=url,
        headers={"Authorization": f"Bearer {key}"},
        limits=httpx.Limits(max_keepalive_connections=0),
        timeout=60,
    ) as http:
        for _ in range(100):
            began = time.monotonic()
            assert http.get("/v1/jobs?limit=1").status_code == 200
            took.append(time.monotonic() - began)
            time.sleep(0.1)
    return max(took)


def half_requests_wait(report: Report, server: LiveServer, key: str, count: int) -> None:
    """Look at jobs while half requests are held open."""
    alone = looks(server.url, key)
    port = int(server.url.rpartition(":")[2])
    holder = multiprocessing.get_context("spawn").Process(
        target=hold_half_requests, args=(port, count), daemon=True
    )
    holder.start()
    assert server.process is not None
    descriptors = Path(f"/proc/{server.process.pid}/fd")
    until(lambda: len(list(descriptors.iterdir())) >= count)
    beside = looks(server.url, key)
    holder.kill()
    holder.join()
    report.say(f"GET beside {count} half requests (alone {alone:.3f} s)", beside, 1.0)


def claims(url: str, queued: int) -> None:
    """Time claims with many jobs in the queue, and as many that have ended."""
    database = Database(url)
    database.create()
    rows = [
        {
            "id": f"job_{k:032x}", "tenant": f"t{k % TENANTS}", "kind": "plan", "request": "{}",
            "status": "queued" if k < queued else "succeeded", "priority": k % 3, "created_at": 0.0,
        }
        for k in range(2 * queued)
    ]  # fmt: skip
    database.write(lambda connection: connection.execute(jobs.insert(), rows))
    if database.postgres:
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as opened:
            opened.execute(sa.text("VACUUM ANALYZE"))
    store = JobStore(database, time.time)
    took = []
    for _ in range(200):
        began = time.perf_counter()
        assert store.claim("benchmark", 15.0, max_running=1000) is not None
        took.append(time.perf_counter() - began)
    database.close()
    print(
        f"claim of {queued:,} queued jobs of {TENANTS} tenants, {database.engine.dialect.name}: "
        f"p50 {1000 * statistics.median(took):.1f} ms, max {1000 * max(took):.1f} ms; "
        f"load average {os.getloadavg()[0]:.1f}"
    )


PARTS = ("claims", "webhooks", "halves", "turns", "cancels")


def main() -> None:
    """Run all parts, or some, on one server."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true", help="Only show that it runs.")
    parser.add_argument("--postgres", action="store_true")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    small, parts = options.small, options.only
    report = Report()
    with (
        tempfile.TemporaryDirectory(prefix="bq-fairness-") as made,
        contextlib.ExitStack() as stack,
    ):
        folder = Path(made)
        if "claims" in parts:
            claims(f"sqlite:///{folder}/claims.db", 500 if small else 10_000)
        if "claims" in parts and options.postgres:
            cluster = LivePostgres()
            assert not cluster.reason, cluster.reason
            cluster.start()
            stack.callback(cluster.stop)
            claims(cluster.new_database(), 500 if small else 10_000)
        (folder / "data.npz").write_bytes(npz(16))
        endless = endless_graph(folder / "endless.onnx"), folder / "data.npz"
        keys = make_tenants(folder / "data")
        slots = int("turns" in parts or "cancels" in parts)
        server = stack.enter_context(
            LiveServer(folder / "data", webhook_allow_private=True, lease_s=60, slots=slots)
        )
        clients = {name: stack.enter_context(server.client(key)) for name, key in keys.items()}
        if "webhooks" in parts:
            webhooks(report, clients, endless, 10 if small else 100)
        if "halves" in parts:
            half_requests_wait(report, server, keys[OTHER], 100 if small else 1500)
        if "turns" in parts:
            turns(report, clients, train_and_export(folder), 20 if small else 500)
        if "cancels" in parts:
            cancels(report, server, clients[OTHER], endless, 1 if small else 3)
    sys.exit(0 if report.good else 1)


if __name__ == "__main__":
    main()

"""Kill servers, drivers and evaluators at random while jobs run; count what was lost (nothing).

``python benchmarks/service_chaos.py --jobs 50 --kills 40``; add ``--postgres`` to use a
throwaway PostgreSQL and crash that too.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from bitquota.request import PlanRequest
from live_postgres import LivePostgres
from live_server import LiveServer, train_and_export


def orders(count: int, variants: int) -> list[PlanRequest]:
    """Return ``count`` requests of ``variants`` kinds, each with measurements of its own."""
    return [
        PlanRequest(
            budgets=("3 bits",), weight_bits=(2, 4, 8), samples=64, holdout_samples=64,
            measure="pairs", seed=k % variants,
        )
        for k in range(count)
    ]  # fmt: skip


_COUNT_REPEATS = """
CREATE TABLE IF NOT EXISTS repeats (key);
CREATE TRIGGER IF NOT EXISTS repeated BEFORE INSERT ON entries
WHEN EXISTS (SELECT 1 FROM entries WHERE key = NEW.key)
BEGIN INSERT INTO repeats VALUES (NEW.key); END;
"""
"""Every measurement that is handed in although it was kept already leaves a row."""


def ledger(data_dir: Path) -> sqlite3.Connection:
    """Open the measurements of the one tenant."""
    return sqlite3.connect(data_dir / "ledgers" / "local" / "ledger.sqlite", timeout=60)


def count(data_dir: Path, table: str) -> int:
    """Return the rows of a table of the ledger."""
    with contextlib.closing(ledger(data_dir)) as connection:
        return int(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0])  # noqa: S608  # ours


def count_repeats(data_dir: Path) -> None:
    """Have the ledger count what is measured twice, from its making on."""
    while not (data_dir / "ledgers" / "local" / "ledger.sqlite").exists():
        time.sleep(0.05)
    for _ in range(100):
        try:
            with contextlib.closing(ledger(data_dir)) as connection:
                connection.executescript(_COUNT_REPEATS)
        except sqlite3.OperationalError:  # its maker has not come to the table yet
            time.sleep(0.05)
        else:
            return


def run(server: LiveServer, files: tuple[Path, Path], requests: list[PlanRequest]) -> list[str]:
    """Submit every request and return the ids."""
    with server.client(retry_s=300) as client:
        made = [
            client.submit(model=files[0], calibration=files[1], request=r, idempotency_key=f"k{k}")
            for k, r in enumerate(requests)
        ]
    return [job.id for job in made]


def main() -> None:
    """Run the undisturbed twins, then the disturbed jobs, then compare."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--jobs", type=int, default=50)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--variants", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--postgres", action="store_true")
    options = parser.parse_args()
    dice = random.Random(options.seed)  # noqa: S311  # repeatable on purpose
    folder = Path(tempfile.mkdtemp(prefix="bq-chaos-"))
    files = train_and_export(folder)
    requests = orders(options.jobs, options.variants)

    with LiveServer(folder / "calm", slots=options.slots) as calm, calm.client() as client:
        ids = run(calm, files, requests[: options.variants])
        twins = [client.job(i).wait(timeout_s=3600).plan_text() for i in ids]
    print(f"{len(twins)} undisturbed plans, {count(folder / 'calm', 'entries')} measurements")

    settings: dict[str, object] = {
        "slots": options.slots, "heartbeat_s": 0.2, "lease_s": 30, "max_attempts": 100,
    }  # fmt: skip
    cluster = None
    if options.postgres:
        cluster = LivePostgres()
        assert not cluster.reason, cluster.reason
        cluster.start()
        settings["database_url"] = cluster.new_database()
    server = LiveServer(folder / "storm", **settings).start()
    ids = run(server, files, requests)
    count_repeats(folder / "storm")
    victims = ["server", "driver", "evaluator"] + (["database"] if cluster else [])
    killed = dict.fromkeys(victims, 0)
    while sum(killed.values()) < options.kills:
        time.sleep(dice.uniform(0.2, 4.0))
        victim = dice.choice(victims)
        if victim == "server":
            server.kill()
            server.start()
        elif victim == "database":
            assert cluster is not None
            cluster.crash()
            cluster.resume()
        else:
            pids = [pid for pid, module in server.children() if module == victim]
            if not pids:
                continue
            try:
                os.kill(dice.choice(pids), signal.SIGKILL)
            except ProcessLookupError:
                continue
        killed[victim] += 1
    with server.client(retry_s=300) as client:
        jobs = [client.job(i).wait(timeout_s=3600) for i in ids]
        plans = [job.plan_text() for job in jobs]
        ends = [
            sum(e.data.get("status") == "succeeded" for e in job.events() if e.kind == "status")
            for job in jobs
        ]
        stored = sum(1 for _ in client.jobs())
        written = sum(job.body["measured"] for job in jobs)
        attempts = sum(job.body["attempts"] for job in jobs)
    server.stop()
    if cluster is not None:
        cluster.stop()
    same = sum(plan == twins[k % options.variants] for k, plan in enumerate(plans))
    kept = count(folder / "storm", "entries")
    print(f"kills: {killed}; jobs ordered {options.jobs}, stored {stored}, attempts {attempts}")
    print(f"jobs that succeeded exactly once: {sum(end == 1 for end in ends)} of {len(ends)}")
    print(f"plans equal to their undisturbed twin, byte for byte: {same} of {len(plans)}")
    repeats, bound = count(folder / "storm", "repeats"), options.kills * options.slots
    print(f"measurements handed in twice: {repeats}, at most {bound} (kills times slots) may be")
    print(f"measurements kept {kept}, counted as written {written} (a kill loses the last count)")
    shutil.rmtree(folder, ignore_errors=True)
    good = same == len(plans) == stored and all(end == 1 for end in ends) and repeats <= bound
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()

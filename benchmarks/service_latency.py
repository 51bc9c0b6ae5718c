"""What a job costs beyond its measurement, and how quickly a stored matrix is solved.

``python benchmarks/service_latency.py``. The same order is run again and again, on a server and
in this process, with every measurement in the ledger: the difference is the service.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import numpy as np

from bitquota.candidates.layers import Inventory, Layer, LayerKind
from bitquota.candidates.table import enumerate_candidates
from bitquota.context import Context
from bitquota.matrix import SensitivityMatrix
from bitquota.request import PlanRequest
from bitquota.service.security.watch import descendants
from bitquota.solver.loading import load_kernels
from live_server import LiveServer, train_and_export

_WIDTHS = ((2, 4, 8), (2, 3, 4, 5, 6, 8))
REQUEST = PlanRequest(budgets=("3 bits",), weight_bits=(2, 4, 8), samples=64, holdout_samples=64)


def matrix_of(layers: int, bits: tuple[int, ...], seed: int = 0) -> SensitivityMatrix:
    """Return a positive semidefinite matrix over ``layers`` layers."""
    rng = np.random.default_rng(seed)
    inventory = Inventory(
        model_digest="sha256:x",
        layers=tuple(
            Layer(
                name=f"l{k}", kind=LayerKind.LINEAR, weight_name=f"l{k}.weight",
                weight_shape=(16, n := int(rng.integers(8, 64))), rows=16, columns=n,
                n_weights=16 * n,
            )
            for k in range(layers)
        ),
    )  # fmt: skip
    table = enumerate_candidates(inventory, bits)
    widths = np.array([row.candidates[0].weight_bits for row in table.rows])
    factors = rng.normal(size=(len(widths), 40)) * (4.0**-widths)[:, None]
    gram = factors @ factors.T
    cross = gram.copy()
    for begin, end in zip(table.offsets, table.offsets[1:], strict=False):
        cross[begin:end, begin:end] = 0.0
    return SensitivityMatrix(table=table, diagonal=np.diag(gram) / 2, cross=cross)


def cpu_seconds(pids: list[int]) -> float:
    """Return the processor seconds of processes that are still there."""
    total = 0.0
    for pid in pids:
        try:
            spent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += (int(spent[11]) + int(spent[12])) / os.sysconf("SC_CLK_TCK")
    return total


def settle(server: LiveServer) -> None:
    """Return once the driver in reserve has nothing left to get ready."""
    quiet = 0
    while quiet < 3:
        pids = [pid for pid, _ in server.children()]
        before = cpu_seconds(pids)
        time.sleep(0.5)
        quiet = quiet + 1 if cpu_seconds(pids) - before < 0.03 and len(pids) >= 2 else 0


def served(server: LiveServer, files: tuple[Path, Path], repeats: int) -> list[float]:
    """Return seconds from order to end of jobs that measure nothing."""
    seconds = []
    with server.client() as client:
        for _ in range(repeats + 1):
            settle(server)
            began = time.perf_counter()
            job = client.submit(model=files[0], calibration=files[1], request=REQUEST)
            job.wait(poll_s=0.02)
            seconds.append(time.perf_counter() - began)
    return seconds[1:]


def solves(
    server: LiveServer, bits: tuple[int, ...], repeats: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return seconds of solves of an uploaded matrix and of one that is sent along.

    Also the processor seconds of a request: of the server, its processes, and the client.
    """
    data = matrix_of(53, bits).to_bytes()
    found: dict[str, list[float]] = {"stored": [], "inline": []}
    spent = dict.fromkeys(found, 0.0)
    assert server.process is not None
    with server.client() as client:
        digest = client.upload("matrix", data)
        for k in range(repeats + 1):
            budget = f"{2.5 + 4 * k / repeats:.3f} bits"
            for how, matrix in (("stored", digest), ("inline", data)):
                pids = [os.getpid(), server.process.pid, *descendants(server.process.pid)]
                before, began = cpu_seconds(pids), time.perf_counter()
                client.solve(matrix=matrix, budgets=[budget])
                found[how].append(time.perf_counter() - began)
                spent[how] += (cpu_seconds(pids) - before) / repeats if k else 0.0
    return {how: seconds[1:] for how, seconds in found.items()}, spent


def embedded(files: tuple[Path, Path], folder: Path, repeats: int) -> list[float]:
    """Return seconds of the same work in this process."""
    from bitquota.models.load import load_model
    from bitquota.models.samples import load_calibration
    from bitquota.search.allocate import allocate
    from bitquota.sensitivity.cache import SqliteLedger

    seconds = []
    with SqliteLedger(folder / "ledger.sqlite") as ledger:
        for _ in range(repeats + 1):
            began = time.perf_counter()
            model, samples = load_model(str(files[0])), load_calibration(str(files[1]))
            allocate(model, samples, REQUEST, context=Context(ledger=ledger))
            seconds.append(time.perf_counter() - began)
    return seconds[1:]


def main() -> None:
    """Measure both, and the solver's endpoint."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--solves", type=int, default=60)
    options = parser.parse_args()
    load_kernels()  # a new checkout compiles for a minute, longer than a request may wait
    with tempfile.TemporaryDirectory(prefix="bq-latency-") as name:
        folder = Path(name)
        files = train_and_export(folder)
        with LiveServer(folder / "data") as server:
            jobs = served(server, files, options.repeats) if options.repeats else []
            times = {bits: solves(server, bits, options.solves) for bits in _WIDTHS}
        here = embedded(files, folder, options.repeats) if options.repeats else []
    good = True
    if jobs:
        job_s, here_s = statistics.median(jobs), statistics.median(here)
        overhead_s = job_s - here_s
        good = overhead_s < 1.0
        print(
            f"job whose measurements are all in the ledger: {job_s:.2f} s (slowest "
            f"{max(jobs):.2f}); the same work in one process: {here_s:.2f} s; overhead "
            f"{overhead_s:.2f} s"
        )
    for bits, (found, spent) in times.items():
        for how, seconds in found.items():
            ordered = sorted(seconds)
            p50 = ordered[len(ordered) // 2]
            print(
                f"POST /v1/solve, 53 layers, {53 * len(bits)} rows, {how}: "
                f"p50 {1000 * p50:.0f} ms, p95 {1000 * ordered[int(0.95 * len(ordered))]:.0f} ms, "
                f"processor {1000 * spent[how]:.0f} ms"
            )
            good &= p50 <= 0.12
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()

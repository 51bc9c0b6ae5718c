"""Upload a large file and watch the server's memory: ``python benchmarks/service_upload.py``."""

from __future__ import annotations

import argparse
import json
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import httpx

from live_server import LiveServer

if TYPE_CHECKING:
    from collections.abc import Iterator

PIECE = 2**20


def resident(pid: int) -> int:
    """Return the resident bytes of a process."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) * 1024


def main() -> None:
    """Stream a safetensors file that is never on the client's disk."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--gib", type=float, default=2.0)
    options = parser.parse_args()
    n = int(options.gib * 2**30) // PIECE * PIECE
    header = json.dumps({"x": {"dtype": "U8", "shape": [n], "data_offsets": [0, n]}}).encode()
    start = struct.pack("<Q", len(header)) + header

    def body() -> Iterator[bytes]:
        yield start
        piece = bytes(PIECE)
        for _ in range(n // PIECE):
            yield piece

    folder = Path(tempfile.mkdtemp(prefix="bq-upload-"))
    with LiveServer(folder / "data", slots=0) as server:
        pid = server.process.pid
        httpx.get(server.url + "/v1/jobs")
        before, peak, done = resident(pid), [0], threading.Event()

        def watch() -> None:
            while not done.wait(0.05):
                peak[0] = max(peak[0], resident(pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        began = time.perf_counter()
        answer = httpx.put(server.url + "/v1/datasets", content=body(), timeout=600)
        seconds = time.perf_counter() - began
        done.set()
        watcher.join()
        assert answer.status_code == 201, answer.text
    grown = peak[0] - before
    print(
        f"{n / 2**30:.1f} GiB in {seconds:.1f} s; server {before / 2**20:.0f} MiB before, "
        f"at most {grown / 2**20:.0f} MiB more"
    )
    sys.exit(0 if grown < 64 * 2**20 else 1)


if __name__ == "__main__":
    main()

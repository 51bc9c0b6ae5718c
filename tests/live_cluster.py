"""A real Ray cluster on loopback: every node is a raylet of its own with an address of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Self

from bitquota.service.security.watch import descendants
from waiting import PATIENCE_S

_STORE_BYTES = 100_000_000


class LiveCluster:
    """A head, and nodes that are added; all is killed at the end, whatever happened."""

    def __init__(self) -> None:
        # Ray puts sockets below it, whose paths must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="bq-ray-"))
        self.token = self.folder / "token"
        self.token.write_text(secrets.token_hex(32))
        self.token.chmod(0o600)
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.nodes: list[subprocess.Popen[bytes]] = []
        self.environment = os.environ | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # on a busy machine nice workers never start
            # Death of a node is noticed within a second or two rather than a quarter of a minute.
            "RAY_health_check_initial_delay_ms": "0",
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_timeout_ms": "2000",
            "RAY_health_check_failure_threshold": "2",
        }

    def start_head(self) -> None:
        self._start(
            "--head", "--node-ip-address=127.0.0.1", f"--port={self.port}",
            "--include-dashboard=false", f"--temp-dir={self.folder / 'ray'}",
        )  # fmt: skip

    def add_node(self) -> subprocess.Popen[bytes]:
        return self._start(
            f"--address={self.address}", f"--node-ip-address=127.0.0.{len(self.nodes) + 1}"
        )

    def _start(self, *options: str) -> subprocess.Popen[bytes]:
        log = self.folder / f"node-{len(self.nodes)}.log"
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1",
            f"--object-store-memory={_STORE_BYTES}", "--disable-usage-stats", *options,
        ]  # fmt: skip
        with log.open("wb") as file:
            node = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=self.environment,
                start_new_session=True,
            )
        self.nodes.append(node)
        until = time.monotonic() + PATIENCE_S
        while b"Ray runtime started" not in log.read_bytes():
            assert node.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < until, log.read_text()[-2000:]
            time.sleep(0.1)
        return node

    def kill(self, node: subprocess.Popen[bytes]) -> None:
        """Kill a node as a power cut would: raylet, workers and what they started."""
        for pid in [node.pid, *descendants(node.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        node.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            self.kill(node)
        shutil.rmtree(self.folder, ignore_errors=True)


def evaluators(pid: int) -> list[int]:
    """Return the fork servers of evaluators and their forks below a process."""
    found = []
    for child in descendants(pid):
        with contextlib.suppress(OSError):
            line = Path(f"/proc/{child}/cmdline").read_bytes()
            python = "python" in Path(f"/proc/{child}/exe").readlink().name
            if python and b"bitquota.service.worker.evaluator" in line:
                found.append(child)
    return found


def free_port() -> int:
    """Return a port that Ray's workers, which take 10002 to 19999, do not want."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port > 20000:
            return port

"""A real Bitquota server in a process of its own, and a real model to hand it."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Self

import numpy as np

from bitquota.client import Client
from bitquota.service.security.watch import descendants
from waiting import PATIENCE_S

# One thread, as everywhere in the suite: several processes share the cores. Not nice: on a busy
# machine nobody would ever measure anything. No reserve: five seconds of a processor for nobody.
DEFAULTS = {"BITQUOTA_THREADS": "1", "BITQUOTA_NICE": "0", "BITQUOTA_RESERVE": "false"}


class LiveServer:
    """``bitquota.service.serve`` on a free loopback port, over a data folder that outlives it."""

    def __init__(self, data_dir: Path, **settings: object) -> None:
        self.data_dir = data_dir
        self.settings = {f"BITQUOTA_{name.upper()}": str(v) for name, v in settings.items()}
        self.log = data_dir.with_name(data_dir.name + ".log")
        self.process: subprocess.Popen[str] | None = None
        self.url = ""
        self.port = 0

    def start(self) -> LiveServer:
        program = (
            "import sys, pathlib; from bitquota.service import serve; "
            "serve(port=int(sys.argv[2]), data_dir=pathlib.Path(sys.argv[1]))"
        )
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program, str(self.data_dir), str(self.port)],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | DEFAULTS | self.settings,
            )
        line = self.process.stdout.readline()
        found = re.search(r"https?://[\w.:\[\]]+", line)
        assert found, f"the server said {line!r}; log: {self.log.read_text()[-2000:]}"
        self.url = found[0]
        return self

    def client(self, api_key: str | None = None, **options) -> Client:
        return Client(self.url, api_key, **options)

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()

    def stop(self) -> int:
        """End it as an operator would; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(PATIENCE_S)
        self.process.stdout.close()
        return status

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.stop()

    def children(self) -> list[tuple[int, str]]:
        """Return pid and module of every driver and evaluator below this server."""
        found = []
        for pid in descendants(self.process.pid):
            try:
                command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            if named := re.search(r"python\S* -m bitquota\.service\.(?:\w+\.)?(\w+)", command):
                found.append((pid, named[1]))
        return found

    def forks(self) -> list[int]:
        """Return the pids of the evaluators that have work, in order of their start.

        They are forks of the process that was started as an evaluator. That one and its sandbox
        have the same command line, but compute nothing.
        """
        evaluators = {pid for pid, named in self.children() if named == "evaluator"}
        found = []
        for pid in sorted(evaluators, key=started):  # pids begin again from the front
            try:
                parent = int(status(pid)[1])
                line = Path(f"/proc/{parent}/cmdline").read_bytes()
            except OSError:
                continue
            if parent in evaluators and b"python" in line.split(b"\0")[0]:
                found.append(pid)
        return found

    def working(self, module: str) -> int | None:
        """Return the pid of the oldest driver, or evaluator with work: others are in reserve."""
        if module == "evaluator":
            return next(iter(self.forks()), None)
        pids = [pid for pid, named in self.children() if named == module]
        return min(pids, key=started, default=None)


def status(pid: int) -> list[str]:
    """Return the fields of ``/proc/PID/stat`` after the name: state, parent, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def started(pid: int) -> int:
    """Return when a process started, in clock ticks since boot."""
    try:
        return int(status(pid)[19])
    except OSError:
        return 2**63


def npz(n: int = 8) -> bytes:
    """Return a calibration set of ``n`` samples."""
    buffer = io.BytesIO()
    np.savez(buffer, x=np.zeros((n, 4), np.float32))
    return buffer.getvalue()


def safetensors(entries: dict[str, object], data: bytes = b"") -> bytes:
    """Return a safetensors file with this header and these bytes."""
    header = json.dumps(entries).encode()
    return struct.pack("<Q", len(header)) + header + data


def folder_zip(config: str = "{}") -> bytes:
    """Return a zipped model folder that is accepted; its config names no known model."""
    weight = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("config.json"), config)
        archive.writestr(zipfile.ZipInfo("model.safetensors"), safetensors(weight, bytes(8)))
    return buffer.getvalue()


def train_and_export(folder: Path) -> tuple[Path, Path]:
    """Train a small convolutional network on digits; return its .pt2 and a calibration .npz."""
    import torch
    from sklearn.datasets import load_digits
    from torch import nn

    images, labels = load_digits(return_X_y=True)
    x = (images.reshape(-1, 1, 8, 8) / 8.0 - 1.0).astype(np.float32)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    inputs, targets = torch.from_numpy(x), torch.from_numpy(labels.astype(np.int64))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    for _ in range(6):
        for rows in torch.randperm(1500).split(64):
            loss = nn.functional.cross_entropy(model(inputs[rows]), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    batch = {0: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (inputs[:2],), dynamic_shapes=(batch,))
    torch.export.save(program, folder / "digits.pt2")
    np.savez(folder / "calibration.npz", x=x[:1500], y=labels[:1500].astype(np.int64))
    return folder / "digits.pt2", folder / "calibration.npz"

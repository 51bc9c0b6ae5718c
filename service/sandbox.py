"""Where an evaluator runs: a bubblewrap sandbox where there is one, else a plain process.

Inside there is no network, no other process, no file but Python's own (read-only), the job's
inputs (read-only) and a scratch folder. Limits on memory, file size and core dumps hold in both.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import bitquota
from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bitquota.service.settings import Settings

MODES = ("auto", "require", "off")
_SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/sbin", "/opt/cuda")
_ETC = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives")
_DEVICES = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/nvidia-modeset")
_PROBE_S = 10.0
_PASSED_ON = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
_PLAIN_TOO = ("PATH", "PYTHONPATH", "VIRTUAL_ENV", "HOME")
_MEMORY_SHARE = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """The folders of one evaluator, below one scratch folder that is removed with it.

    Attributes:
        scratch: All of it.
        inbox: The driver puts the job's files here; inside it is read-only.
        work: The evaluator may write here.
    """

    scratch: Path

    @property
    def inbox(self) -> Path:
        """The job's files."""
        return self.scratch / "in"

    @property
    def work(self) -> Path:
        """Scratch space and home folder."""
        return self.scratch / "work"

    def create(self) -> None:
        """Make the folders."""
        for folder in (self.inbox, self.work):
            folder.mkdir(mode=0o700)


@cache
def bubblewrap() -> str | None:
    """Return the path of a bubblewrap that works here (namespaces may be forbidden), if any."""
    program = shutil.which("bwrap")
    if program is None:
        return None
    probe = [
        program, "--unshare-all", "--die-with-parent", "--ro-bind", "/", "/", "--proc", "/proc",
        "--dev", "/dev", "true",
    ]  # fmt: skip
    try:
        done = subprocess.run(probe, capture_output=True, timeout=_PROBE_S, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return None
    return program if done.returncode == 0 else None


def sandbox_of(settings: Settings) -> str | None:
    """Return the bubblewrap to use, or ``None`` for plain processes.

    Raises:
        InvalidInput: The settings require a sandbox and there is none.
    """
    if settings.sandbox not in MODES:
        msg = f"BITQUOTA_SANDBOX must be one of {', '.join(MODES)}; got {settings.sandbox!r}"
        raise InvalidInput(msg)
    if settings.sandbox == "off":
        return None
    found = bubblewrap()
    if found is None and settings.sandbox == "require":
        msg = (
            "a sandbox is required and none can be had: bubblewrap is missing, or this system "
            "forbids user namespaces; install it, or set BITQUOTA_SANDBOX=off and accept only "
            "models that you trust"
        )
        raise InvalidInput(msg)
    return found


def command(
    program: str | None, cell: Cell, data_dir: Path, arguments: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Return command line and environment of ``python arguments`` inside ``cell``.

    Args:
        program: The bubblewrap, or ``None`` for a plain process.
        cell: Its folders.
        data_dir: The server's folder, which must never be visible inside.
        arguments: For Python.
    """
    python = [sys.executable, *arguments]
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    environment |= {"TMPDIR": str(cell.work), "USER": "evaluator", "PYTHONDONTWRITEBYTECODE": "1"}
    # Waiting threads sleep instead of spinning: on a busy machine spinning took ten times the
    # processor time of the work itself.
    environment |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    if program is None:
        plain = {name: os.environ[name] for name in _PLAIN_TOO if name in os.environ}
        return python, environment | plain | {"BITQUOTA_PARENT_PID": str(os.getpid())}
    environment |= {"HOME": str(cell.work), "PATH": "/usr/bin:/bin"}
    line = [
        program, "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL",
        "--hostname", "evaluator", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp",  # noqa: S108  # a private one
    ]  # fmt: skip
    shown = [Path(p) for p in _SYSTEM] + python_folders()
    for path in shown:
        line += ["--ro-bind-try", str(path), str(path)]
    for name in (*_ETC, "/sys/devices/system"):
        line += ["--ro-bind-try", name, name]
    if environment.get("CUDA_VISIBLE_DEVICES", "all") not in {"", "-1"}:
        numbered = sorted(str(p) for p in Path("/dev").glob("nvidia[0-9]*"))
        for name in (*_DEVICES, *numbered):
            line += ["--dev-bind-try", name, name]
    # The data folder may lie below a folder that is shown, such as a home with Python in it.
    hidden = data_dir.resolve()
    if any(hidden.is_relative_to(path) for path in shown):
        line += ["--tmpfs", str(hidden)]
    line += ["--ro-bind", str(cell.inbox), str(cell.inbox)]
    line += ["--bind", str(cell.work), str(cell.work), "--chdir", str(cell.work)]
    for number, folder in enumerate(kernel_folders()):
        # numba uses compiled kernels only from a folder that it may write to. What is written
        # there is thrown away with the cell: a kernel is code, and nobody else may run it.
        own = cell.work / f"kernels-{number}"
        shutil.copytree(folder, own, dirs_exist_ok=True)
        line += ["--bind", str(own), str(folder)]
    return [*line, "--", *python], environment


@cache
def python_folders() -> list[Path]:
    """Return the folders that Python and Bitquota are imported from, and nothing else."""
    found = {Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).parent}
    found |= {Path(sysconfig.get_path(name)) for name in ("stdlib", "platlib", "purelib")}
    found.add(Path(sys.executable).resolve().parent)
    for place in bitquota.__path__:
        # An editable install shows the parts of the package through links.
        found.add(Path(place))
        found |= {p.resolve() for p in Path(place).iterdir() if p.is_dir()}
    return sorted(p for p in found | {p.resolve() for p in found} if p.is_dir())


def kernel_folders() -> list[Path]:
    """Return the folders of the package that hold compiled solver kernels."""
    found = set()
    for place in bitquota.__path__:
        for cached in Path(place).glob("*/__pycache__/*.nbi"):
            found.add(cached.parent.resolve())
    return sorted(found)


def memory_limit(settings: Settings) -> int:
    """Return the bytes of private memory that one evaluator may have."""
    if settings.max_memory_bytes:
        return settings.max_memory_bytes
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    here = settings.workers if settings.engine == "local" else 1
    return int(total * _MEMORY_SHARE / (max(1, settings.slots) * here))


def limit_resources(memory_bytes: int, file_bytes: int) -> None:
    """Limit this process, for good: private memory, file size, no core dumps.

    ``RLIMIT_DATA`` rather than ``RLIMIT_AS``, because model files are memory-mapped and GPU
    drivers reserve address space by the terabyte.
    """
    import resource

    for name, value in (
        (resource.RLIMIT_DATA, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(name)
        limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (limit, limit))

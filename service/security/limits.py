"""What one job may use, all its processes together, and the control group that holds it to that.

A control group (version 2) counts everything that the kernel spends on a job and is used where the
operator hands over a delegated one (``BITQUOTA_CGROUP``). Everywhere ``watch`` looks at the same
figures from outside, several times a second.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

from bitquota.errors import InvalidInput, LimitExceeded

if TYPE_CHECKING:
    from bitquota.service.settings import Settings

_MEMORY_SHARE = 0.8
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
_OVERHEAD_BYTES = 2**30
"""What a control group counts beside a job's own memory: page cache, page tables, sockets."""

_REMOVAL_S = 2.0


class Resource(StrEnum):
    """What a job may use up."""

    MEMORY = "memory"
    PROCESSES = "processes"
    TMP = "tmp"
    DISK = "disk"
    FILES = "files"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The largest permitted use of each resource by one job.

    Attributes:
        memory_bytes: Private and shared memory of all processes, and files that lie in memory.
        processes: Processes and threads.
        tmp_bytes: Each of ``/tmp`` and ``/dev/shm`` inside a sandbox.
        disk_bytes: In the work folder.
        files: In the work folder.
        file_bytes: One file.
    """

    memory_bytes: int
    processes: int
    tmp_bytes: int
    disk_bytes: int
    files: int
    file_bytes: int


_TEXTS = {
    Resource.MEMORY: (
        "{} bytes of memory, all its processes together",
        "use fewer samples or a smaller model",
        "BITQUOTA_MAX_MEMORY_BYTES",
    ),
    Resource.PROCESSES: ("{} processes and threads", "start fewer", "BITQUOTA_MAX_PROCESSES"),
    Resource.TMP: (
        "{} bytes in each of /tmp and /dev/shm",
        "write to the work folder instead",
        "BITQUOTA_MAX_TMP_BYTES",
    ),
    Resource.DISK: (
        "{} bytes on disk", "use a smaller model or ask for less", "BITQUOTA_MAX_SCRATCH_BYTES"
    ),
    Resource.FILES: ("{} files on disk", "write fewer", "BITQUOTA_MAX_SCRATCH_FILES"),
}  # fmt: skip


def exceeded(resource: Resource, limit: int, used: int | None = None) -> LimitExceeded:
    """Return the verdict on a job that used ``used`` of a resource, or more than ``limit``."""
    what, advice, setting = _TEXTS[resource]
    got = "it asked for more" if used is None else f"it used {used:,}"
    msg = (
        f"a job may use {what.format(f'{limit:,}')}; {got} and was ended: {advice}, "
        f"or have the operator raise {setting}"
    )
    details = {"resource": resource.value, "limit": limit, "setting": setting}
    return LimitExceeded(msg, **details if used is None else details | {"used": used})


def limits_of(settings: Settings) -> Limits:
    """Return the limits of one job."""
    return Limits(
        memory_bytes=memory_limit(settings),
        processes=settings.max_processes,
        tmp_bytes=settings.max_tmp_bytes,
        disk_bytes=settings.max_scratch_bytes,
        files=settings.max_scratch_files,
        file_bytes=settings.max_upload_bytes,
    )


def memory_limit(settings: Settings) -> int:
    """Return the bytes of memory that one job may have."""
    if settings.max_memory_bytes:
        return settings.max_memory_bytes
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # a container may have less than its machine
        total = min(total, int(_CONTAINER_LIMIT.read_text()))
    return int(total * _MEMORY_SHARE / max(1, settings.slots))


class Group:
    """One control group of one job, removed with it.

    Args:
        parent: A delegated group with the controllers ``memory`` and ``pids``.
        limits: On everything in the group together.

    Raises:
        InvalidInput: ``parent`` is no such group, or not ours.

    Attributes:
        path: Its folder.
        holds: What the kernel holds it to; a controller that is not delegated is missing.
    """

    def __init__(self, parent: Path, limits: Limits) -> None:
        for old in parent.glob("evaluator-*"):
            with contextlib.suppress(OSError):  # in use
                old.rmdir()
        self.path = parent / f"evaluator-{os.getpid()}-{secrets.token_hex(4)}"
        self._limits = limits
        wanted = {
            "memory.max": str(limits.memory_bytes + _OVERHEAD_BYTES),
            "memory.swap.max": "0",
            "memory.oom.group": "1",
            "pids.max": str(limits.processes),
        }
        try:
            self.path.mkdir()
            there = {name: value for name, value in wanted.items() if (self.path / name).exists()}
            for name, value in there.items():
                (self.path / name).write_text(value)
        except OSError as err:
            raise _unusable(parent, str(err.strerror)) from err
        self.holds = tuple(there)
        if not there:
            self.remove()
            raise _unusable(parent, "it has neither controller")

    @property
    def enter(self) -> tuple[str, ...]:
        """A command that joins the group and becomes the command in its further arguments."""
        script = 'echo 0 > "$0" && exec "$@"'
        return ("/bin/sh", "-c", script, str(self.path / "cgroup.procs"))

    def verdict(self) -> LimitExceeded | None:
        """Return which limit the kernel has enforced, if any."""
        if self._events("memory.events").get("oom_kill"):
            return exceeded(Resource.MEMORY, self._limits.memory_bytes + _OVERHEAD_BYTES)
        if self._events("pids.events").get("max"):
            return exceeded(Resource.PROCESSES, self._limits.processes)
        return None

    def _events(self, name: str) -> dict[str, int]:
        try:
            lines = (self.path / name).read_text().splitlines()
        except OSError:
            return {}
        return {key: int(count) for key, count in (line.split() for line in lines)}

    def remove(self) -> None:
        """Kill what is left inside and remove the group."""
        kill = self.path / "cgroup.kill"
        if kill.exists():
            with contextlib.suppress(OSError):
                kill.write_text("1")
        until = time.monotonic() + _REMOVAL_S
        while self.path.exists() and time.monotonic() < until:
            with contextlib.suppress(OSError):
                self.path.rmdir()
            time.sleep(0.01)


def _unusable(parent: Path, why: str) -> InvalidInput:
    msg = (
        "BITQUOTA_CGROUP must be a delegated control group with the controllers memory and pids; "
        f"'{parent}' is not: {why}"
    )
    return InvalidInput(msg, path=str(parent))


def group_of(settings: Settings) -> Group | None:
    """Return a new group as the settings say, or ``None`` where they name none."""
    if not settings.cgroup:
        return None
    return Group(Path(settings.cgroup), limits_of(settings))

"""Watches from outside what all processes of one job use together, and ends the job over a limit.

Limits of the kernel for single processes (``setrlimit``) do not add up, and a control group is not
to be had everywhere. So a thread looks several times a second at every process of the job's tree,
at the files in its work folder and at those that lie in memory.

What it cannot see is what belongs to no process: files whose only descriptor travels in a socket,
and the kernel's own buffers, which descriptors limit. A control group counts those too.

Design: docs/design/sandbox.md
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bitquota.service.security.limits import Resource, exceeded
from bitquota.service.security.sandbox import TMP_FOLDERS, kernel_folders

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bitquota.errors import LimitExceeded
    from bitquota.service.security.limits import Limits

_TICK_S = 0.15
_LOOKS_BETWEEN_MAPS = 8
"""Looks at processes without one at the files that they have mapped, which costs more."""
_FULL = 0.98
"""Share of a file system in memory from which it counts as full."""
_ROUNDS = 20
"""Looks for processes that were forked while others were being stopped, without a sandbox."""
_BLOCK = 512
"""What ``st_blocks`` counts in."""


@dataclass(slots=True)
class ResourceUse:
    """What a job uses at one moment.

    Attributes:
        memory_bytes: Pages that only processes of the job hold, and files that lie in memory.
        processes: Processes and threads.
        tmp_bytes: The fuller of ``/tmp`` and ``/dev/shm`` inside.
        disk_bytes: In the work folder, removed files that are still open included. The copies of
            kernels that a sandbox begins with are not the job's.
        files: In the work folder, without those copies.
    """

    memory_bytes: int = 0
    processes: int = 0
    tmp_bytes: int = 0
    disk_bytes: int = 0
    files: int = 0


class Watch:
    """Ends the processes below one when they use more than they may together.

    Args:
        root: A process that was started for the job: bubblewrap, or Python itself.
        work: Folder that they may write to.
        limits: What they may use.
        sandboxed: Whether they have file systems in memory of their own.
        verdict: Tells what somebody else found they used too much of, such as a control group.
    """

    def __init__(
        self,
        root: int,
        work: Path,
        limits: Limits,
        *,
        sandboxed: bool = True,
        verdict: Callable[[], LimitExceeded | None] = lambda: None,
    ) -> None:
        self._root, self._work, self._limits = root, work, limits
        self._sandboxed = sandboxed
        self._other_verdict = verdict
        self._over = threading.Event()
        self._looks = 0
        self._first: int | None = None
        self._mapped: dict[tuple[int, int], int] = {}
        copied = kernel_folders() if sandboxed else []
        kernels = [size for folder in copied for size in (0, *_sizes(folder))]
        self._given = ResourceUse(disk_bytes=sum(kernels), files=len(kernels))
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self.verdict: LimitExceeded | None = None
        """Why the job was ended, if it was."""

    def start(self) -> None:
        """Begin to watch."""
        self._thread.start()

    def stop(self) -> None:
        """Watch no longer."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(_TICK_S):
            with contextlib.suppress(OSError):  # a process ended while it was looked at
                self.verdict = self.look()
            if self.verdict is not None:
                self.end()
                return

    def look(self) -> LimitExceeded | None:
        """Return which limit is exceeded at this moment, if any.

        Cost: about a millisecond for a process with some dozen threads and descriptors.
        """
        limits, used = self._limits, self.usage()
        for resource, got, limit in (
            (Resource.PROCESSES, used.processes, limits.processes),
            (Resource.TMP, used.tmp_bytes, int(limits.tmp_bytes * _FULL)),
            (Resource.MEMORY, used.memory_bytes, limits.memory_bytes),
            (Resource.DISK, used.disk_bytes, limits.disk_bytes),
            (Resource.FILES, used.files, limits.files),
        ):
            if got > limit:
                return exceeded(resource, limit, got)
        return self._other_verdict()

    def end(self) -> None:
        """Kill every process of the job.

        In a sandbox the child of bubblewrap is the first of its process namespace: the kernel
        kills all others with it, however fast they fork.
        """
        found: list[int] = []
        for _ in range(1 if self._sandboxed else _ROUNDS):
            tree = [self._root, *descendants(self._root)]
            new = [pid for pid in tree if pid not in found]
            found += new
            if not new:
                break
            for pid in () if self._sandboxed else new:  # what is stopped forks no more
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGSTOP)
        for pid in found:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def usage(self) -> ResourceUse:
        """Return what is used now."""
        used = ResourceUse()
        places = self._processes()
        held: dict[tuple[int, int], int] = {}
        device = self._work.stat().st_dev
        for place in places:
            with contextlib.suppress(OSError):
                memory, threads = _memory_and_threads(place)
                used.memory_bytes += memory
                used.processes += threads
                held.update(_removed_but_open(place, device))
        if self._looks % _LOOKS_BETWEEN_MAPS == 0:
            self._mapped = {}
            for place in places:
                with contextlib.suppress(OSError):
                    self._mapped.update(_removed_but_mapped(place, device))
        self._looks += 1
        in_memory = self._files_in_memory()
        used.tmp_bytes = max(in_memory, default=0)
        used.memory_bytes += sum(in_memory)
        # Forks share pages, which the sum counts for each. The exact share costs a walk through
        # all page tables, so it is asked for only where the sum says that something may be wrong.
        if used.memory_bytes > self._limits.memory_bytes:
            used.memory_bytes = sum(map(_exact_memory, places)) + sum(in_memory)
        sizes = list(_sizes(self._work, self._limits.files + self._given.files))
        used.files = max(0, len(sizes) - self._given.files)
        on_disk = sum(sizes) + sum((self._mapped | held).values())
        used.disk_bytes = max(0, on_disk - self._given.disk_bytes)
        return used

    def _processes(self) -> list[str]:
        """Return the folder in ``/proc`` of every process of the job."""
        if not self._sandboxed:
            return [f"/proc/{pid}" for pid in (self._root, *descendants(self._root))]
        inside = self._inside()
        return [] if inside is None else [f"{inside}/proc/{pid}" for pid in _numbers(inside)]

    def _inside(self) -> str | None:
        """Return the root folder of the sandbox, once it has been set up.

        Its ``/proc`` lists the processes of its namespace, all of them and no others, whoever
        their parents are.
        """
        if self._first is None:
            self._first = next(iter(_children_by_parent().get(self._root, ())), None)
        if self._first is None:
            return None
        inside = f"/proc/{self._first}/root"
        ready = Path(inside, "proc").stat().st_dev != Path("/proc").stat().st_dev
        return inside if ready else None

    def _files_in_memory(self) -> list[int]:
        """Return the bytes in each file system in memory."""
        inside = self._inside() if self._sandboxed else None
        if inside is None:
            return []
        found = [os.statvfs(inside + folder) for folder in TMP_FOLDERS]
        return [(f.f_blocks - f.f_bfree) * f.f_frsize for f in found]


def descendants(root: int) -> list[int]:
    """Return the processes below ``root``, parents before children."""
    below = _children_by_parent()
    found = list(below.get(root, ()))
    for pid in found:
        found += below.get(pid, ())
    return found


def _children_by_parent() -> dict[int, list[int]]:
    children: dict[int, list[int]] = {}
    for pid in _numbers(""):
        with contextlib.suppress(OSError):
            fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
            children.setdefault(int(fields[1]), []).append(pid)
    return children


def _numbers(root: str) -> list[int]:
    return [int(name) for name in os.listdir(f"{root}/proc") if name.isdigit()]  # noqa: PTH208


def _memory_and_threads(place: str) -> tuple[int, int]:
    """Return the bytes that a process holds and no file backs, and its threads."""
    memory = threads = 0
    for line in _read(f"{place}/status").splitlines():
        name, _, value = line.partition(b":")
        if name in {b"RssAnon", b"RssShmem", b"VmSwap"}:
            memory += int(value.split()[0]) * 1024
        elif name == b"Threads":
            threads = int(value)
    return memory, threads


def _exact_memory(place: str) -> int:
    """Return the bytes of a process, each page divided by the number of those that share it."""
    memory = 0
    with contextlib.suppress(OSError):
        for line in _read(f"{place}/smaps_rollup").splitlines():
            name, _, value = line.partition(b":")
            if name in {b"Pss_Anon", b"Pss_Shmem", b"SwapPss"}:
                memory += int(value.split()[0]) * 1024
    return memory


def _removed_but_open(place: str, device: int) -> Iterator[tuple[tuple[int, int], int]]:
    for name in os.listdir(f"{place}/fd"):  # noqa: PTH208
        with contextlib.suppress(OSError):
            found = os.stat(f"{place}/fd/{name}")  # noqa: PTH116
            if found.st_nlink == 0 and found.st_dev == device and stat.S_ISREG(found.st_mode):
                yield (found.st_dev, found.st_ino), found.st_blocks * _BLOCK


def _removed_but_mapped(place: str, device: int) -> Iterator[tuple[tuple[int, int], int]]:
    """Yield what a process has mapped of removed files, as much as there may be of each."""
    for line in _read(f"{place}/maps").splitlines():
        if line.endswith(b" (deleted)"):
            span, _, offset, numbers, inode, *_ = line.split(None, 5)
            major, minor = (int(n, 16) for n in numbers.split(b":"))
            if os.makedev(major, minor) == device:
                start, end = (int(n, 16) for n in span.split(b"-"))
                yield (device, int(inode)), int(offset, 16) + end - start


def _sizes(folder: Path, most: float = math.inf) -> Iterator[int]:
    """Yield the bytes on disk of everything below a folder, until one more than ``most``."""
    waiting = [str(folder)]
    seen: set[int] = set()
    count = 0
    while waiting:
        place = waiting.pop()
        with contextlib.suppress(FileNotFoundError), _opened(place) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    found = entry.stat(follow_symlinks=False)
                    if found.st_ino not in seen:
                        seen.add(found.st_ino)
                        yield found.st_blocks * _BLOCK
                    if stat.S_ISDIR(found.st_mode):
                        waiting.append(entry.path)
                    count += 1
                    if count > most:
                        return


@contextlib.contextmanager
def _opened(folder: str) -> Iterator[Iterator[os.DirEntry[str]]]:
    """Open a folder, also one that its owner, who is our user, has locked."""
    try:
        entries = os.scandir(folder)
    except PermissionError:
        Path(folder).chmod(0o700)
        entries = os.scandir(folder)
    with entries:
        yield entries


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123  # called very often
        return b"".join(iter(lambda: file.read(2**16), b""))

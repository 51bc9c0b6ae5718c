"""Names for processes that no later process of the same host can have, and what they left."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

OWNER_FILE = "owner"
"""File in a scratch folder that names the process it belongs to."""


def owner_name(pid: int) -> str:
    """Return host, boot, pid and start time of a process as one text."""
    return f"{socket.gethostname()}|{_boot()}|{pid}|{_started(pid)}"


def owner_is_gone(owner: str) -> bool:
    """Return whether ``owner`` ran on this host and has ended; false when that is not known."""
    host, boot, pid, started = owner.rsplit("|", 3)
    if host != socket.gethostname() or not Path("/proc/self").exists():
        return False
    return boot != _boot() or _started(int(pid)) != started


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    except OSError:
        return "0"


def _started(pid: int) -> str:
    """Return the start time of a process in clock ticks, or ``0`` if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "0"
    fields = stat.rpartition(")")[2].split()
    return "0" if fields[0] in {"Z", "X"} else fields[19]


def remove_abandoned(scratches: Path) -> int:
    """Remove the sandbox directories of processes that are gone and return how many there were."""
    removed = 0
    for folder in sorted(scratches.glob("job-*")):
        try:
            owner = (folder / OWNER_FILE).read_text()
        except OSError:
            owner = ""
        # Without a name its driver has only just made it, or was killed doing so.
        if owner and owner_is_gone(owner):
            shutil.rmtree(folder, ignore_errors=True)
            removed += 1
    return removed

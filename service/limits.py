"""Control groups: limits that the kernel holds an evaluator and all its children to together.

``RLIMIT_DATA`` limits each process alone and knows nothing of memory that CUDA maps; a control
group counts everything, page cache included, and also how many processes there are. It is used
where the operator hands over a delegated group (``BITQUOTA_CGROUP``, version 2).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bitquota.errors import InvalidInput
from bitquota.service.sandbox import memory_limit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bitquota.service.settings import Settings

MAX_PROCESSES = 1024
"""Processes and threads of one job; torch alone may start a few per core."""

_OVERHEAD_BYTES = 2**30
"""What the interpreter, torch and the page cache of the model take beside private memory."""

_REMOVAL_S = 2.0


class Group:
    """One control group of one job, removed with it.

    Args:
        parent: A delegated group with the controllers ``memory`` and ``pids``.
        memory_bytes: Limit on everything in the group together.

    Raises:
        InvalidInput: ``parent`` is no such group, or not ours.

    Attributes:
        path: Its folder.
        limits: What the kernel holds it to; a controller that is not delegated is missing.
    """

    def __init__(self, parent: Path, memory_bytes: int) -> None:
        for old in parent.glob("evaluator-*"):
            with contextlib.suppress(OSError):  # in use
                old.rmdir()
        self.path = parent / f"evaluator-{os.getpid()}-{secrets.token_hex(4)}"
        wanted = {
            "memory.max": str(memory_bytes),
            "memory.swap.max": "0",
            "pids.max": str(MAX_PROCESSES),
        }
        try:
            self.path.mkdir()
            there = {name: value for name, value in wanted.items() if (self.path / name).exists()}
            for name, value in there.items():
                (self.path / name).write_text(value)
        except OSError as err:
            raise _unusable(parent, str(err.strerror)) from err
        self.limits = tuple(there)
        if not there:
            self.remove()
            raise _unusable(parent, "it has neither controller")

    def enter(self, line: Sequence[str]) -> list[str]:
        """Return a command that enters the group and then becomes ``line``."""
        script = 'echo 0 > "$0" && exec "$@"'
        return ["/bin/sh", "-c", script, str(self.path / "cgroup.procs"), *line]

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
    return Group(Path(settings.cgroup), memory_limit(settings) + _OVERHEAD_BYTES)

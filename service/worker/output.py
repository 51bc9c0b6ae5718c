"""What an evaluator prints: read from a pipe, cut, and logged line by line under our own name.

A stranger's model may print what it likes, so nothing of it reaches the log as it came: a line is
one value of a JSON object, control characters are escaped, and there is an end to it.
"""

from __future__ import annotations

import threading
from typing import IO, TYPE_CHECKING, Any

from bitquota.service.logs import logger

if TYPE_CHECKING:
    import subprocess

MAX_LINE_BYTES = 2_000
MAX_LINES = 200

_log = logger("evaluator")


def log_output(process: subprocess.Popen[Any]) -> None:
    """Log what ``process`` prints to its standard output until it ends, in a thread of its own."""
    assert process.stdout is not None  # noqa: S101  # PIPE
    threading.Thread(
        target=_drain, args=(process.stdout, process.pid), name="output", daemon=True
    ).start()


def _drain(stream: IO[bytes], pid: int) -> None:
    lines = 0
    with stream:
        # A line longer than that comes in pieces; nothing is read into memory as a whole.
        while piece := stream.readline(MAX_LINE_BYTES):
            lines += 1
            if lines <= MAX_LINES:
                _log.info("printed", pid=pid, text=printable(piece))
            elif lines == MAX_LINES + 1:
                _log.warning("printed more", pid=pid, kept=MAX_LINES)


def printable(data: bytes) -> str:
    """Return bytes as text of one line in which nothing controls a terminal."""
    text = data.decode("utf-8", "backslashreplace").rstrip()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

"""What unfinished work has done so far, in files: killed at any point, it goes on from there.

Measurements that are worth keeping for good are in the ledger; this holds what is needed until then
and is much larger, such as gradients between two blocks. It is deleted when the work is done.

Design: docs/design/language-models.md
"""

from __future__ import annotations

import os
import re
import shutil
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bitquota.canonical import digest_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bitquota.canonical import JsonObject

KEPT_DAYS = 7
"""How long the files of work stay that nobody goes on with."""


_DIGITS = 32
_NAME = re.compile(r"[a-z][a-z0-9-]{0,59}")


def short_name(about: object) -> str:
    """Return the beginning of the digest of a JSON value, as a part of a name in a journal."""
    return digest_json(about).removeprefix("sha256:")[:_DIGITS]


@dataclass(slots=True, eq=False)
class Journal:
    """Named pieces of content in a folder.

    Whatever keeps content from being written, the work goes on: it is told once, and nothing more
    is written.

    Attributes:
        folder: Where they are; without one nothing is kept.
        tell: Is told, in a sentence, that nothing more is written and why.
        written: Is told of each file that was written.
        failed: Whether it was.
    """

    folder: Path | None = None
    tell: Callable[[str], object] = warnings.warn
    written: Callable[[Path], object] = lambda _path: None
    failed: bool = False

    def of(self, about: JsonObject) -> Journal:
        """Return the journal of one piece of work, told from all others by ``about``."""
        if self.folder is None:
            return self
        return replace(self, folder=self.folder / short_name(about), failed=False)

    def read(self, name: str) -> bytes | None:
        """Return what was written under a name, or ``None``."""
        try:
            return None if self.folder is None else (self.folder / name).read_bytes()
        except OSError:
            return None

    def write(self, name: str, make: Callable[[], bytes]) -> None:
        """Write something under a name, whole or not at all, in place of what was there.

        ``make`` returns it, and is called only where there is a folder that can be written to.
        A name has at most 60 small letters, digits and hyphens: a service passes it on.
        """
        assert _NAME.fullmatch(name), name  # noqa: S101  # names are ours
        if self.folder is None or self.failed:
            return
        own = self.folder / f"{name}.{os.getpid()}.part"
        content = make()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with own.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            own.replace(self.folder / name)
        except OSError as err:
            # A full disk, or another process with the same work that has just ended.
            self.failed = True
            with suppress(OSError):
                own.unlink()
            self.tell(
                f"what is done can no longer be kept in {self.folder} ({err.strerror or err}); the "
                "work goes on, but if it is interrupted it goes on from what was kept until now: "
                "make room there, and let one process work on it at a time"
            )
        else:
            self.written(self.folder / name)

    def finish(self) -> None:
        """Delete everything."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def clear_abandoned(self) -> None:
        """Delete the journals in this folder that nobody wrote to for ``KEPT_DAYS``."""
        # Another process may delete any of them meanwhile.
        with suppress(OSError):
            for one in () if self.folder is None else self.folder.iterdir():
                with suppress(OSError):
                    if time.time() - one.stat().st_mtime > KEPT_DAYS * 86400:
                        shutil.rmtree(one, ignore_errors=True)

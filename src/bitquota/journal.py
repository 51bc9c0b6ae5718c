"""What unfinished work has done so far, in files: killed at any point, it goes on from there.

Measurements that are worth keeping for good are in the ledger; this holds what is needed until then
and is much larger, such as gradients between two blocks. It is deleted when the work is done.

Design: docs/design/language-models.md
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitquota.canonical import digest_json

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bitquota.canonical import JsonObject

KEPT_DAYS = 7
"""How long the files of work stay that nobody goes on with."""


@dataclass(frozen=True, slots=True)
class Journal:
    """Named pieces of content in a folder.

    Attributes:
        folder: Where they are; without one nothing is kept.
    """

    folder: Path | None = None

    def of(self, about: JsonObject) -> Journal:
        """Return the journal of one piece of work, told from all others by ``about``."""
        if self.folder is None:
            return self
        return Journal(self.folder / digest_json(about).removeprefix("sha256:"))

    def read(self, name: str) -> bytes | None:
        """Return what was written under a name, or ``None``."""
        try:
            return None if self.folder is None else (self.folder / name).read_bytes()
        except OSError:
            return None

    def write(self, name: str, make: Callable[[], bytes]) -> None:
        """Write something under a name, whole or not at all, in place of what was there.

        ``make`` returns it, and is called only where there is a folder.
        """
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        own = self.folder / f"{name}.{os.getpid()}.part"
        with own.open("wb") as file:
            file.write(make())
            file.flush()
            os.fsync(file.fileno())
        own.replace(self.folder / name)

    def finish(self) -> None:
        """Delete everything."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def clear_abandoned(self) -> None:
        """Delete the journals in this folder that nobody wrote to for ``KEPT_DAYS``."""
        if self.folder is None or not self.folder.is_dir():
            return
        for one in self.folder.iterdir():
            if time.time() - one.stat().st_mtime > KEPT_DAYS * 86400:
                shutil.rmtree(one, ignore_errors=True)

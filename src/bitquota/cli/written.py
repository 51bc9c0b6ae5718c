"""Files that a command writes: checked before the work; what they replaced is reported after it.

Design: docs/design/client.md
"""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from bitquota.canonical import digest_bytes, nearest_existing
from bitquota.cli import output
from bitquota.errors import InvalidInput
from bitquota.plan import SCHEMA as PLAN_SCHEMA
from bitquota.solver.archive import CertificateFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A file that will be written.

    Attributes:
        path: Where.
        former: What lies there and will be replaced, for a person; empty if nothing does.
    """

    path: Path
    former: str = ""

    @classmethod
    def at(
        cls,
        path: Path,
        option: str,
        *,
        former: Callable[[Path], str] = lambda _path: "the former one",
    ) -> Self:
        """Return the file that ``option`` names, after looking at what is there.

        Args:
            path: Where it will be written.
            option: For the message.
            former: Says what the file there is, or raises ``InvalidInput`` where it is nothing
                that this command writes.

        Raises:
            InvalidInput: A folder, a place that cannot be written to, or a file of another kind.
        """
        if path.is_dir():
            msg = f"{option} must name a file; '{path}' is a folder: name a file in it"
            raise InvalidInput(msg, path=str(path))
        require_folder(path.parent, option)
        if not path.is_file():
            return cls(path=path)  # nothing, or a pipe
        if not os.access(path, os.W_OK):
            msg = f"{option} must name a file that may be written; '{path}' may only be read"
            raise InvalidInput(msg, path=str(path))
        return cls(path=path, former=former(path) if path.stat().st_size else "an empty file")

    def save(self, write: Callable[[Path], object]) -> None:
        """Let ``write`` write the file, and say on standard error what became of the former."""
        before = _digest(self.path) if self.former and self.path.is_file() else ""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write(self.path)
        if not self.former:
            output.say(f"wrote {self.path}")
        elif before and _digest(self.path) == before:
            output.say(f"wrote {self.path} (as it was)")
        else:
            output.say(f"wrote {self.path} (replaced {self.former})")


def require_folder(folder: Path, option: str) -> None:
    """Raise ``InvalidInput`` unless ``folder`` is one to write to, or can be made."""
    nearest = nearest_existing(folder)
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        why = "may not be written to" if nearest.is_dir() else "is no folder"
        msg = f"{option} must lie in a folder that may be written to; '{nearest}' {why}"
        raise InvalidInput(msg, path=str(folder))


def former_plan(path: Path) -> str:
    """Return which plan a file is; raises ``InvalidInput`` where it is none."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or data.get("schema") != PLAN_SCHEMA:
        raise _other(path, "a plan")
    try:
        asked = " + ".join(b["text"] or f"{b['limit']} {b['resource']}" for b in data["budgets"])
    except (KeyError, TypeError):
        return "a plan"
    return f"a plan for {asked}"


def former_matrix(path: Path) -> str:
    """Return that a file is a matrix; raises ``InvalidInput`` where it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            known = "meta.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        known = False
    if not known:
        raise _other(path, "a sensitivity matrix")
    return "another matrix"


def former_certificate(path: Path) -> str:
    """Return that a file is a certificate; raises ``InvalidInput`` where it is none."""
    try:
        CertificateFile.from_bytes(path.read_bytes())
    except (OSError, InvalidInput) as err:
        raise _other(path, "a certificate") from err
    return "another certificate"


def former_weights(path: Path) -> str:
    """Return that a file holds quantized weights; raises ``InvalidInput`` where it does not."""
    try:
        with path.open("rb") as file:
            known = b"bitquota/weights/" in file.read(2**12)
    except OSError:
        known = False
    if not known:
        raise _other(path, "a file of quantized weights")
    return "other quantized weights"


def _other(path: Path, what: str) -> InvalidInput:
    msg = (
        f"only {what} is replaced by {what}; '{path}' is something else: name another file, or "
        "remove it"
    )
    return InvalidInput(msg, path=str(path))


def _digest(path: Path) -> str:
    return digest_bytes([path.read_bytes()])

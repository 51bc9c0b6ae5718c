"""What an engine is: a place where evaluators run, and a way to speak to each of them.

The driver does everything else alike for all engines: it holds lease and ledger, hands out the
chunks of a measurement, checks results, and starts another evaluator when one dies. So a job makes
the same plan wherever it runs, and an engine may lose a worker at any time.
"""

from __future__ import annotations

import queue
import shutil
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from bitquota.canonical import JsonObject
    from bitquota.service.security.sandbox import SandboxDirectory

Message = "tuple[JsonObject, list[bytes]]"
"""Head and raw parts, as in ``bitquota.service.wire``."""

Inbox = queue.SimpleQueue["tuple[Worker, tuple[JsonObject, list[bytes]] | BaseException | None]"]
"""What the workers of one job say, in order; ``None`` or an error once a worker is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputFile:
    """One input of a job.

    Attributes:
        role: What the kind of job calls it.
        name: File or folder name that it gets.
        digest: Of the stored file.
        path: Where the stored file lies here.
        unpack: Whether it is a zip that becomes a folder (its member names were checked).
    """

    role: str
    name: str
    digest: str
    path: Path
    unpack: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What one worker is to do.

    Attributes:
        head: Its first message, without ``inputs``: those are paths that only the engine knows.
        input_files: Inputs.
        needs_sandbox: Whether it must not run outside of a sandbox (a stranger's ``.pt2``).
    """

    head: JsonObject
    input_files: tuple[InputFile, ...]
    needs_sandbox: bool = True


class Worker(Protocol):
    """One evaluator.

    Attributes:
        place: Host or node it runs on, for logs.
    """

    place: str

    def send(self, head: JsonObject, parts: Sequence[bytes] = ()) -> None:
        """Send one message; a worker that is gone is noticed by its silence."""
        ...

    def end(self) -> None:
        """End it, at once."""
        ...


class Engine(Protocol):
    """Runs the evaluators of one driver.

    Attributes:
        name: As in the settings.
        starts_slowly: Whether a worker takes seconds to start, so that helpers should
            start with their job and not when there is something for them to do.
    """

    name: ClassVar[str]
    starts_slowly: ClassVar[bool]

    def open(self) -> None:
        """Get ready before there is a job: load what takes long.

        Raises:
            ServiceError: The engine cannot be reached.
            MissingDependency: A package is not installed.
        """
        ...

    def start(self, assignment: Assignment, inbox: Inbox) -> Worker:
        """Start one evaluator and give it its assignment; what it says goes to ``inbox``.

        Returns at once; a worker that could not be started says so in ``inbox``.

        Raises:
            UnsafeModel: The assignment needs a sandbox and this engine has none.
        """
        ...

    def close(self) -> None:
        """End every worker and remove what they left."""
        ...


def stage(directory: SandboxDirectory, input_files: Sequence[InputFile]) -> dict[str, list[str]]:
    """Put inputs into the inbox, which is read-only inside; return paths by role."""
    inputs: dict[str, list[str]] = {}
    for input_file in input_files:
        place = directory.inbox / input_file.name
        if not place.exists():
            if input_file.unpack:
                with zipfile.ZipFile(input_file.path) as archive:
                    archive.extractall(place)
            else:
                link_or_copy(input_file.path, place)
        inputs.setdefault(input_file.role, []).append(str(place))
    return inputs


def link_or_copy(source: Path, place: Path) -> None:
    """Make a file visible at another place."""
    try:
        place.hardlink_to(source)
    except OSError:  # another file system
        shutil.copyfile(source, place)

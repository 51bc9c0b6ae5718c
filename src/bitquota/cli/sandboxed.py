"""A command that opens a ``.pt2`` or ONNX file runs itself again, inside a sandbox.

Such a file may come from a stranger. Inside there is no network and no file but Python's own, the
files that the command line names (read-only), and the places that it writes to. What a command
writes as a file lands in a folder that stands in for the real one, and is moved from there; so its
neighbours are neither seen nor touched.

Design: docs/design/sandbox.md
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import typer

from bitquota.canonical import nearest_existing
from bitquota.cli import output
from bitquota.cli.here import default_ledger
from bitquota.errors import InvalidInput
from bitquota.models.sources import FACTORY
from bitquota.plan import BESIDE, weights_near

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

UNTRUSTED = (".pt2", ".onnx")
_WEIGHTS = (".data", ".bin", ".weight", ".weights")
"""Suffixes under which an ONNX file keeps weights beside it, unless named after it."""

_TERMINAL = (
    "TERM", "COLORTERM", "COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "GITHUB_STEP_SUMMARY",
    "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "HF_HUB_OFFLINE",
)  # fmt: skip
_ENTER = "from bitquota.cli.app import inside; inside()"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outside:
    """What a command must know to run itself again; there is none inside.

    Attributes:
        arguments: Of the command line.
        mode: ``auto``, ``require`` or ``off``.
    """

    arguments: tuple[str, ...]
    mode: str


OUTSIDE: ContextVar[Outside | None] = ContextVar("outside", default=None)
"""Set while the command line of a person runs, and not inside a sandbox."""


def sandboxed(
    *, files: Sequence[str] = (), folders: Sequence[str] = (), reads: Sequence[Path] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command run in a sandbox where it opens an untrusted model.

    Args:
        files: Parameters that name files, or folders that appear whole, which it writes.
        folders: Parameters that name folders which it keeps writing into.
        reads: What it reads where no parameter says so.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**values: Any) -> None:  # noqa: ANN401  # whatever the options hold
            outside = OUTSIDE.get()
            inputs = [v for name, v in values.items() if name not in {*files, *folders}]
            untrusted = [place for place in _existing(inputs) if place.suffix in UNTRUSTED]
            if outside is None or not untrusted or values.get("server") is not None:
                command(**values)
                return
            program = _bubblewrap(outside.mode, values, untrusted[0])
            if program is None:
                command(**values)
                return
            written = [
                _absolute(Path(values[name])) for name in files if values.get(name) is not None
            ]
            kept = [
                _absolute(Path(values[name])) for name in folders if values.get(name) is not None
            ]
            place = values.get("ledger")
            cache = None
            if place is not None:
                kept.append(_absolute(place.parent))
            elif "ledger" in values:
                # The user's ledger serves other models: what a stranger's code wrote into it
                # would be believed there.
                cache = _own_cache(untrusted[0])
                kept.append(cache)
            kept += _existing([os.environ.get("GITHUB_STEP_SUMMARY")])
            shown = _with_weights(_existing([*inputs, *reads]))
            raise typer.Exit(_run_inside(program, outside, shown, written, kept, cache))

        return run

    return decorate


def _bubblewrap(mode: str, values: dict[str, Any], model: Path) -> str | None:
    """Return the bubblewrap to use, or ``None``; says why where there should be one."""
    from bitquota.service.security.sandbox import sandbox_for

    program = sandbox_for(mode)
    if mode == "off":
        return None
    why = "there is none here (bubblewrap)" if program is None else _needs_outside(values)
    if why is None:
        return program
    if mode == "require":
        msg = f"a sandbox is required, but {why}: leave that out, or say --sandbox off"
        raise InvalidInput(msg)
    output.say(f"{model.name} is opened without a sandbox: {why}")
    return None


def _needs_outside(values: dict[str, Any]) -> str | None:
    """Return what a command wants that no sandbox has, if anything."""
    texts = [v for v in _flat(values.values()) if isinstance(v, str)]
    if values.get("log_to") is not None:
        return "--log-to needs the tracker"
    if any(FACTORY.fullmatch(text) and not Path(text).exists() for text in texts):
        return "a function of yours needs your files"
    return "torchrun needs the network" if "WORLD_SIZE" in os.environ else None


def _run_inside(
    program: str,
    outside: Outside,
    shown: list[Path],
    written: list[Path],
    kept: list[Path],
    cache: Path | None,
) -> int:
    from bitquota.service.security.sandbox import View, kernel_folders, launch

    environment = {name: os.environ[name] for name in _TERMINAL if name in os.environ}
    if cache is not None:
        environment["XDG_CACHE_HOME"] = str(cache)
    order = {
        "arguments": outside.arguments,
        "environment": environment,
        "folder": str(Path.cwd()),
    }
    if not kernel_folders():  # inside they would be compiled anew each time
        output.say("compiling kernels for this machine, once: about a minute of a processor")
        warm_up = [sys.executable, "-m", "bitquota.service.worker.evaluator", "--warm-up"]
        subprocess.run(warm_up, check=False, capture_output=True)  # noqa: S603  # our own module
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bitquota-")))
        stand_ins: dict[Path, Path] = {}
        # What lies in a folder that is written to itself (of --ledger) needs nothing to be moved.
        apart = [p for p in written if not any(p.is_relative_to(folder) for folder in kept)]
        for place in apart:
            _stand_in(place, stand_ins, stack)
        for place in apart:
            stack.callback(_move, place, stand_ins, frozenset(shown))
        for folder in kept:
            if not folder.exists():
                folder.mkdir(parents=True)
        view = View(
            work=work,
            read=tuple(shown),
            write=tuple(kept),
            stand_ins=tuple((own, place) for place, own in stand_ins.items()),
        )
        sys.stdout.flush()
        process = launch(
            program,
            view,
            ["-P", "-c", _ENTER, json.dumps(order)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if _is_file(sys.stdout) else None,
            stderr=subprocess.PIPE if _is_file(sys.stderr) else None,
        )
        with process, _copied(process.stdout, sys.stdout), _copied(process.stderr, sys.stderr):
            try:
                return process.wait()
            finally:
                process.kill()  # after Ctrl-C; else it has ended


def _stand_in(place: Path, stand_ins: dict[Path, Path], stack: contextlib.ExitStack) -> None:
    """Make the folder that stands in for that of ``place``, with what ``place`` is by now."""
    if place.exists() and not place.is_file() and not place.is_dir():
        return  # a pipe, which is the same inside
    folder = nearest_existing(place.parent)
    if folder not in stand_ins:
        try:
            own = tempfile.mkdtemp(prefix=".bitquota-", dir=folder)
        except OSError:
            return  # the command says that it cannot write there
        stand_ins[folder] = Path(stack.enter_context(_removed(own)))
    if place.is_file():
        shutil.copy2(place, stand_ins[folder] / place.relative_to(folder))
    elif place.is_dir() and not any(place.iterdir()):
        (stand_ins[folder] / place.relative_to(folder)).mkdir(exist_ok=True)


@contextlib.contextmanager
def _removed(folder: str) -> Any:  # noqa: ANN401  # a context of the folder's name
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(place: Path, stand_ins: dict[Path, Path], shown: frozenset[Path]) -> None:
    """Move what was written as ``place`` (or ``place``-1, …) from the stand-in to where it is due.

    With it goes what a plan has beside it.

    Only plain files and folders of such: a link could lead a later reader anywhere. What was shown
    to the command left an empty file in the stand-in, where bubblewrap mounted it.
    """
    folder = next((f for f in stand_ins if place.is_relative_to(f)), None)
    if folder is None:
        return
    made = stand_ins[folder] / place.parent.relative_to(folder)
    ends = "|".join(map(re.escape, (place.suffix, *BESIDE)))
    own = re.compile(rf"{re.escape(place.stem)}(-\d+)?({ends})")
    for found in sorted(made.iterdir()) if made.is_dir() else ():
        due = place.parent / found.name
        if (
            due in shown
            or not own.fullmatch(found.name)
            or not _is_plain(found)
            or _is_same(found, due)
        ):
            continue
        due.parent.mkdir(parents=True, exist_ok=True)
        found.replace(due)


def _is_plain(place: Path) -> bool:
    mode = place.lstat().st_mode
    if stat.S_ISREG(mode):
        place.chmod(stat.S_IMODE(mode) & 0o666)
        return True
    return stat.S_ISDIR(mode) and all(_is_plain(member) for member in place.iterdir())


def _is_same(found: Path, due: Path) -> bool:
    """Whether ``found`` is the copy of ``due`` that was made in the beginning."""
    if found.is_dir() or not due.exists():
        return found.is_dir() and due.is_dir() and any(due.iterdir())
    one, other = found.stat(), due.stat()
    return (one.st_size, one.st_mtime_ns) == (other.st_size, other.st_mtime_ns)


def _existing(values: Iterable[Any]) -> list[Path]:
    """Return which of ``values``, members of lists included, name something that is there."""
    places = []
    for value in _flat(values):
        if isinstance(value, (str, Path)) and str(value):
            with contextlib.suppress(OSError, ValueError):  # a text, not a name
                if Path(value).exists():
                    places.append(_absolute(Path(value)))
    return places


def _flat(values: Iterable[Any]) -> list[Any]:
    return [m for v in values for m in (v if isinstance(v, (list, tuple)) else [v])]


def _with_weights(places: list[Path]) -> list[Path]:
    """Add the weights that lie beside ONNX files and plans, and what links of a folder lead to."""
    found = list(places)
    for place in places:
        if place.suffix == ".onnx":
            found += [
                other
                for other in place.parent.iterdir()
                if other.name.startswith(place.stem) or other.suffix in _WEIGHTS
            ]
        elif place.suffix == ".json":
            found += weights_near([place])
        elif place.is_dir():
            found += [m.resolve() for m in place.iterdir() if m.is_symlink() and m.exists()]
    return list(dict.fromkeys(found))


def _own_cache(model: Path) -> Path:
    """Return the cache folder of one model file as it is now."""
    state = model.stat()
    key = f"{model} {state.st_size} {state.st_mtime_ns}"
    name = hashlib.sha256(key.encode()).hexdigest()[:16]
    return default_ledger().parent / "sandboxed" / name


def _absolute(place: Path) -> Path:
    return Path(os.path.abspath(place))  # noqa: PTH100  # links stay what the user wrote


def _is_file(stream: IO[str]) -> bool:
    """Whether a stream goes to a file, which a process that holds it could also read and cut."""
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def _copied(source: IO[bytes] | None, target: IO[str]) -> Any:  # noqa: ANN401  # a context
    """Copy ``source`` to a file of ours until it ends."""
    if source is None:
        yield
        return

    def copy() -> None:
        while data := os.read(source.fileno(), 2**16):
            os.write(target.fileno(), data)

    thread = threading.Thread(target=copy)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        source.close()

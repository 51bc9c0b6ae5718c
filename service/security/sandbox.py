"""Where code that nobody trusts runs: a bubblewrap sandbox where there is one, else none.

Inside there is no network, no other process, no descriptor but those handed over, and no file but
the system's libraries and Python (read-only) and what a ``View`` shows. Dangerous system calls are
refused (``seccomp``), further namespaces too. What a command may use up is limited elsewhere:
``limits`` says how much, ``watch`` ends what uses more.

Imports neither the web framework nor the database, so that the command line can run itself inside.

Design: docs/design/sandbox.md
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bitquota
from bitquota.errors import InvalidInput
from bitquota.service.security.seccomp import filter_program

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from bitquota.service.settings import Settings

MODES = ("auto", "require", "off")
TMP_FOLDERS = ("/tmp", "/dev/shm")  # noqa: S108  # private ones
"""Folders inside that lie in memory, each as large as the view says."""

_SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/sbin", "/opt/cuda")
_ETC = ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/alternatives")
_DEVICES = ("/dev/nvidiactl", "/dev/nvidia-uvm", "/dev/nvidia-uvm-tools", "/dev/nvidia-modeset")
_PROBE_S = 10.0
_PASSED_ON = ("LANG", "LC_ALL", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
_PLAIN_TOO = ("PATH", "PYTHONPATH", "VIRTUAL_ENV", "HOME")
_FOLDERS_BYTES = 2**16
"""Room for the mount points below a hidden folder; its file system holds nothing else."""
_MAX_OPEN_FILES = 4096
_WITH_KERNELS = ("solver", "quantizers")
_KERNEL = re.compile(r"^@compiled\ndef (\w+)", re.MULTILINE)
"""A function that numba compiles, read without importing numba."""

# Not root inside, whoever starts it: programs that ask "am I root" are told no.
_ISOLATED = (
    "--unshare-all", "--unshare-user", "--uid", "1000", "--gid", "1000", "--hostname", "evaluator",
    "--die-with-parent", "--new-session", "--cap-drop", "ALL",
)  # fmt: skip
_NO_NESTING = ("--disable-userns",)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What a command in a sandbox sees beside the system's libraries and Python.

    Attributes:
        work: Current folder and home; may be written to.
        read: Further files and folders that are there, read-only.
        write: Further files and folders that may be written to.
        stand_ins: Folders that may be written to and are there under another's name, ``(own,
            name)``, in its stead.
        hidden: Folders of which nothing is there, even if they lie below one that is shown.
        tmp_bytes: Room in ``/tmp`` and in ``/dev/shm``, each; it is memory.
    """

    work: Path
    read: tuple[Path, ...] = ()
    write: tuple[Path, ...] = ()
    stand_ins: tuple[tuple[Path, Path], ...] = ()
    hidden: tuple[Path, ...] = ()
    tmp_bytes: int = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxDirectory:
    """The folders of one evaluator, below one scratch folder that is removed with it.

    Attributes:
        scratch: All of it.
        inbox: The driver puts the job's files here; inside it is read-only.
        work: The evaluator may write here.
    """

    scratch: Path

    @property
    def inbox(self) -> Path:
        """The job's files."""
        return self.scratch / "in"

    @property
    def work(self) -> Path:
        """Scratch space and home folder."""
        return self.scratch / "work"

    def create(self) -> None:
        """Make the folders."""
        for folder in (self.inbox, self.work):
            folder.mkdir(mode=0o700)

    def remove(self) -> None:
        """Remove everything, also folders that the job has locked."""

        def unlock(_function: object, path: str, _error: object) -> None:
            with contextlib.suppress(OSError):
                Path(path).parent.chmod(0o700)
                Path(path).chmod(0o700)

        for _ in range(2):
            shutil.rmtree(self.scratch, onerror=unlock)
        shutil.rmtree(self.scratch, ignore_errors=True)

    def view(self, data_dir: Path, tmp_bytes: int) -> View:
        """Return what an evaluator sees; nothing of the server's own folder but this directory."""
        return View(work=self.work, read=(self.inbox,), hidden=(data_dir,), tmp_bytes=tmp_bytes)


@cache
def bubblewrap() -> str | None:
    """Return the path of a bubblewrap that works here (namespaces may be forbidden), if any."""
    program = shutil.which("bwrap")
    return program if program is not None and _works(program, *_ISOLATED) else None


@cache
def _works(program: str, *options: str) -> bool:
    probe = [program, *options, "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "true"]
    try:
        done = subprocess.run(probe, capture_output=True, timeout=_PROBE_S, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def sandbox_of(settings: Settings) -> str | None:
    """Return the bubblewrap to use, or ``None`` for plain processes.

    Raises:
        InvalidInput: The settings require a sandbox and there is none.
    """
    return sandbox_for(settings.sandbox)


def sandbox_for(mode: str) -> str | None:
    """Return the bubblewrap to use in ``mode``, one of ``MODES``; see ``sandbox_of``."""
    if mode not in MODES:
        msg = f"BITQUOTA_SANDBOX must be one of {', '.join(MODES)}; got {mode!r}"
        raise InvalidInput(msg)
    if mode == "off":
        return None
    found = bubblewrap()
    if found is None and mode == "require":
        msg = (
            "a sandbox is required and none can be had: bubblewrap is missing, or this system "
            "forbids user namespaces; install it, or set BITQUOTA_SANDBOX=off and accept only "
            "models that you trust"
        )
        raise InvalidInput(msg)
    return found


def launch(
    program: str | None,
    view: View,
    arguments: Sequence[str],
    *,
    enter: Sequence[str] = (),
    pass_fds: Sequence[int] = (),
    **streams: Any,  # noqa: ANN401  # those of Popen
) -> subprocess.Popen[Any]:
    """Start ``python arguments`` so that it sees ``view`` and return the process.

    Without a sandbox it is a plain process that sees everything.

    Args:
        program: The bubblewrap, or ``None``.
        view: What is there.
        arguments: For Python.
        enter: A command that becomes the one in its last arguments, such as one that joins a
            control group first.
        pass_fds: Descriptors that the command inherits, beside its standard ones.
        streams: ``stdin``, ``stdout``, ``stderr`` and other options of ``Popen``. A file handed
            over as a stream can be read and written from its beginning, through ``/proc/self/fd``;
            hand over pipes.
    """
    python = [sys.executable, *arguments]
    with _seccomp_file(program) as filters:
        line = python
        if program is not None:
            line = [program, *_options(program, view, filters), "--", *python]
        return subprocess.Popen(  # noqa: S603  # our own module
            [*enter, *line],
            env=environment_of(view, sandboxed=program is not None),
            cwd=view.work,
            pass_fds=(*pass_fds, *filters),
            **streams,
        )


@contextlib.contextmanager
def _seccomp_file(program: str | None) -> Iterator[tuple[int, ...]]:
    """Yield descriptors of the filters for a sandbox: one, or none where there is none."""
    code = filter_program(shared_memory=bool(_gpus())) if program is not None else None
    if code is None:
        yield ()
        return
    handle = os.memfd_create("seccomp")
    try:
        os.write(handle, code)
        os.lseek(handle, 0, os.SEEK_SET)
        yield (handle,)
    finally:
        os.close(handle)


def environment_of(view: View, *, sandboxed: bool) -> Mapping[str, str]:
    """Return the environment of a command: a few names, and no secret of ours."""
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    environment |= {"TMPDIR": str(view.work), "USER": "evaluator", "PYTHONDONTWRITEBYTECODE": "1"}
    # Waiting threads sleep instead of spinning: on a busy machine spinning took ten times the
    # processor time of the work itself.
    environment |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
    if sandboxed:
        return environment | {"HOME": str(view.work), "PATH": "/usr/bin:/bin"}
    plain = {name: os.environ[name] for name in _PLAIN_TOO if name in os.environ}
    return environment | plain | {"BITQUOTA_PARENT_PID": str(os.getpid())}


def _options(program: str, view: View, filters: Sequence[int]) -> list[str]:
    """Return the options of bubblewrap that make ``view``; each mount covers those before it."""
    line = [*_ISOLATED, "--proc", "/proc", "--dev", "/dev"]
    if _works(program, *_ISOLATED, *_NO_NESTING):
        line += _NO_NESTING
    for handle in filters:
        line += ["--seccomp", str(handle)]
    # What is mapped from here is memory that is in no file system and belongs to no process.
    line += ["--dev-bind", "/dev/null", "/dev/zero"]
    for folder in TMP_FOLDERS:
        line += ["--size", str(view.tmp_bytes), "--tmpfs", folder]
    # Before Python's folders, which may lie below: a project's .venv.
    for own, name in view.stand_ins:
        line += ["--bind", str(own), str(name)]
    shown = [Path(p) for p in _SYSTEM] + python_folders()
    for place in [*map(str, shown), *_ETC, "/sys/devices/system"]:
        line += ["--ro-bind-try", place, place]
    for place in _gpus():
        line += ["--dev-bind-try", place, place]
    # A data folder may lie below a folder that is shown, such as a home with Python in it.
    hidden = [folder.resolve() for folder in view.hidden]
    hidden = [folder for folder in hidden if any(folder.is_relative_to(path) for path in shown)]
    for folder in map(str, hidden):
        line += ["--size", str(_FOLDERS_BYTES), "--tmpfs", folder]
    for place in map(str, view.read):
        line += ["--ro-bind", place, place]
    for place in map(str, (view.work, *view.write)):
        line += ["--bind", place, place]
    for number, kernels in enumerate(kernel_folders()):
        # numba uses compiled kernels only from a folder that it may write to. What is written
        # there is thrown away with the folder: a kernel is code, and nobody else may run it.
        own = view.work / f"kernels-{number}"
        shutil.copytree(kernels, own, dirs_exist_ok=True)
        line += ["--bind", str(own), str(kernels)]
    # These lie in memory, too, and nothing has to be written there.
    for place in (*map(str, hidden), "/dev", "/"):
        line += ["--remount-ro", place]
    return [*line, "--chdir", str(view.work)]


def _gpus() -> list[str]:
    """Return the devices of NVIDIA's driver, unless the environment hides them."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in {"", "-1"}:
        return []
    numbered = sorted(str(p) for p in Path("/dev").glob("nvidia[0-9]*"))
    return [name for name in (*_DEVICES, *numbered) if Path(name).exists()]


@cache
def python_folders() -> list[Path]:
    """Return the folders that Python and Bitquota are imported from, and nothing else."""
    found = {Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).parent}
    found |= {Path(sysconfig.get_path(name)) for name in ("stdlib", "platlib", "purelib")}
    found.add(Path(sys.executable).resolve().parent)
    for place in bitquota.__path__:
        # An editable install shows the parts of the package through links.
        found.add(Path(place))
        found |= {p.resolve() for p in Path(place).iterdir() if p.is_dir()}
    return sorted(p for p in found | {p.resolve() for p in found} if p.is_dir())


def kernel_folders() -> list[Path]:
    """Return the folders of the package that hold compiled kernels, if all are compiled.

    A kernel that is missing, or older than its file, is compiled anew in every sandbox that needs
    it and thrown away with it. So unless each is there, none counts, and the folders are none.
    """
    current: dict[Path, set[str]] = defaultdict(set)  # from source file to its compiled kernels
    for cached in _kernels():
        stem, _, kernel = cached.name.partition(".")
        source = cached.parent.parent / f"{stem}.py"
        if source.exists() and cached.stat().st_mtime >= source.stat().st_mtime:
            current[source].add(kernel.partition("-")[0])
    found: set[Path] = set()
    for source in _sources():
        wanted = set(_KERNEL.findall(source.read_text()))
        if not wanted <= current[source]:
            return []
        if wanted:
            found.add(source.parent / "__pycache__")
    return sorted(found)


def discard_stale_kernels() -> None:
    """Remove compiled kernels that are older than their file, or whose file is gone."""
    for cached in _kernels():
        source = cached.parent.parent / (cached.name.partition(".")[0] + ".py")
        if not source.exists() or cached.stat().st_mtime < source.stat().st_mtime:
            with contextlib.suppress(OSError):  # of somebody else, or a read-only package
                cached.unlink()


def _kernels() -> list[Path]:
    """Return numba's index files, one for each kernel, without an editable install's links."""
    return [kernel for folder in _compiled() for kernel in folder.glob("__pycache__/*.nbi")]


def _sources() -> list[Path]:
    return [source for folder in _compiled() for source in sorted(folder.glob("*.py"))]


def _compiled() -> list[Path]:
    """Return the packages with kernels."""
    folders = [Path(place) / name for place in bitquota.__path__ for name in _WITH_KERNELS]
    return [folder.resolve() for folder in folders]


def counts_processes() -> bool:
    """Return whether ``RLIMIT_NPROC`` counts the processes of a sandbox apart from all others.

    Since Linux 5.14 it counts those of a user in one user namespace. (Never those of root.)
    """
    major, minor = (int(part) for part in os.uname().release.split(".")[:2])
    return (major, minor) >= (5, 14)


def limit_resources(memory_bytes: int, file_bytes: int, processes: int = 0) -> None:
    """Limit this process and each of its children alone, for good.

    Private memory, the size of a file, open files, core dumps; and where ``processes`` is not 0,
    processes and threads of this user in this user namespace. What all processes of a job may use
    together is watched from outside.

    ``RLIMIT_DATA`` rather than ``RLIMIT_AS``, because model files are memory-mapped and GPU
    drivers reserve address space by the terabyte.
    """
    wanted = {
        resource.RLIMIT_DATA: memory_bytes,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: _MAX_OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    if processes:
        wanted[resource.RLIMIT_NPROC] = processes
    for name, value in wanted.items():
        _, hard = resource.getrlimit(name)
        limit = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (limit, limit))

"""A copy of what git tracks, and the packages built from it; built once, without network."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from waiting import PATIENCE_S

# What the outer make tells its children would make the inner one speak differently.
_LEFT_OUT = {"PYTHONPATH", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES"}
ENVIRONMENT = {name: text for name, text in os.environ.items() if name not in _LEFT_OUT}


def run(*command: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and return it, whatever its exit status."""
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=ENVIRONMENT | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )


def tool(name: str) -> Path:
    """Return the program ``name`` of the environment that runs the tests."""
    return Path(sys.executable).parent / name


def build(kind: str, source: Path, out: Path) -> Path:
    """Return the ``--wheel`` or ``--sdist`` of ``source``."""
    done = run(
        sys.executable, "-m", "build", "--no-isolation", kind, "--outdir", out, source, cwd=source
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="session")
def tracked(repository):
    """Paths that git tracks and that are there, relative to the repository."""
    listed = run("git", "ls-files", "-z", cwd=repository)
    if listed.returncode:
        pytest.skip(f"needs a git checkout: {listed.stderr.strip()}")
    paths = [Path(name) for name in listed.stdout.split("\0") if name]
    return [path for path in paths if os.path.lexists(repository / path)]


@pytest.fixture(scope="session")
def source(repository, tracked, tmp_path_factory):
    """A copy of the tracked files, links kept as links."""
    folder = tmp_path_factory.mktemp("source") / "bitquota"
    for path in tracked:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(repository / path, folder / path, follow_symlinks=False)
    return folder


@pytest.fixture(scope="session")
def wheel(source, tmp_path_factory):
    """The wheel built from the copy."""
    return build("--wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def sdist(source, tmp_path_factory):
    """The source distribution built from the copy."""
    return build("--sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="session")
def unpacked_sdist(sdist, tmp_path_factory):
    """The one folder inside the source distribution."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (inner,) = folder.iterdir()
    return inner

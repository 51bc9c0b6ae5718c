"""The Makefile and the CI script do what their first lines say."""

from __future__ import annotations

import os
import re
import shutil

import pytest

from .conftest import run

WANTED = ("demo", "check", "test", "lint", "bench", "serve", "format", "clean", "help")


class TestHelp:
    def test_lists_every_target_with_its_comment(self, repository):
        """Both ways: nothing is left out, nothing is invented."""
        text = (repository / "Makefile").read_text()
        documented = dict(re.findall(r"^([a-z-]+):.*?## (.+)$", text, re.MULTILINE))
        shown = dict(re.findall(r"^  make ([a-z-]+) +(.+)$", self.show(repository), re.MULTILINE))
        assert documented == shown
        assert set(WANTED) <= set(shown)

    def test_is_the_default(self, repository):
        assert self.show(repository) == run("make", "--no-print-directory", cwd=repository).stdout

    def show(self, repository):
        done = run("make", "--no-print-directory", "help", cwd=repository)
        assert done.returncode == 0, done.stderr
        return done.stdout


class TestFast:
    def test_folders_and_longest_files_exist(self, repository):
        """A folder or file that moved would leave ``make check``, or begin late, unnoticed."""
        makefile = (repository / "Makefile").read_text()
        folders = re.search(r"^FAST := .*tests/,(.+)[)]$", makefile, re.MULTILINE)
        conftest = (repository / "tests" / "conftest.py").read_text()
        files = re.findall(r'"([\w/]+/test_\w+\.py)"', conftest)
        assert len(files) > 5
        missing = [
            n for n in (*folders[1].split(), *files) if not (repository / "tests" / n).exists()
        ]
        assert missing == []


class TestInstall:
    """In a copy whose environment is only a stamp: nothing is installed here."""

    @pytest.fixture
    def copy(self, repository, tmp_path):
        for name in ("Makefile", "pyproject.toml", "constraints.txt"):
            shutil.copy(repository / name, tmp_path)
        (tmp_path / ".venv" / "bin").mkdir(parents=True)
        (tmp_path / ".venv" / ".installed").touch()
        return tmp_path

    def plan(self, copy, *arguments):
        """What ``make lint`` would run."""
        done = run("make", "--dry-run", "lint", *arguments, cwd=copy)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def test_is_skipped_when_up_to_date(self, copy):
        assert "pip install" not in self.plan(copy)

    @pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
    def test_is_repeated_when_a_requirement_changes(self, copy, name):
        stamp = (copy / ".venv" / ".installed").stat().st_mtime
        os.utime(copy / name, (stamp + 5, stamp + 5))
        assert "install --constraint constraints.txt" in self.plan(copy)

    def test_an_old_python_is_refused(self, copy):
        """With a sentence that says what to do."""
        old = copy / "python3.9"
        old.write_text("#!/bin/sh\necho make needs Python 3.11 or later >&2; exit 1\n")
        old.chmod(0o755)
        (copy / ".venv" / ".installed").unlink()
        done = run("make", "lint", f"PYTHON={old}", cwd=copy)
        assert done.returncode == 2
        assert "make needs Python 3.11 or later" in done.stderr
        assert not (copy / ".venv" / ".installed").exists()

    def test_no_python_is_refused(self, copy):
        (copy / ".venv" / ".installed").unlink()
        done = run("make", "lint", "PYTHON=", cwd=copy)
        assert done.returncode == 2
        assert "found none: install python3.11" in done.stderr


class TestTest:
    def test_runs_every_check(self, repository):
        done = run("make", "--dry-run", "--always-make", "test", cwd=repository)
        assert done.returncode == 0, done.stderr
        for program in ("ruff check", "ruff format", "bin/mypy", "bin/lint-imports", "bin/pytest"):
            assert program in done.stdout

    def test_limits_the_threads(self, repository):
        """Of what it starts; two processes run at once."""
        text = (repository / "Makefile").read_text()
        assert re.search(r"^export OMP_NUM_THREADS := 1$", text, re.MULTILINE)


class TestBench:
    def test_runs_every_benchmark(self, repository):
        """A script that can be run and is not in the list would rot."""
        scripts = {
            path.stem
            for path in (repository / "benchmarks").glob("*.py")
            if "__main__" in path.read_text()
        } - {
            "solver_rivals",
            "rounding_peers",
            "assignment_peers",  # started by others of these
            "peers",  # installs other tools: a target of its own
        }
        planned = run("make", "--dry-run", "bench", cwd=repository).stdout
        assert scripts == set(re.findall(r"python benchmarks/(\w+)\.py", planned))


class TestCi:
    """``.ci/run`` in a folder with a Makefile that only says what it was given."""

    @pytest.fixture
    def clone(self, repository, tmp_path):
        folder = tmp_path / "clone"
        (folder / ".ci").mkdir(parents=True)
        shutil.copy(repository / ".ci" / "run", folder / ".ci" / "run")
        (folder / "Makefile").write_text('test:\n\t@echo "tested with [$$BITQUOTA_DATA]"; $(END)\n')
        return folder

    @pytest.fixture
    def programs(self, tmp_path):
        """A path with the bare minimum: no apt-get, no sudo, no dpkg."""
        folder = tmp_path / "bin"
        folder.mkdir()
        for name in ("bash", "make", "sh", "dirname", "id", "env", "echo"):
            (folder / name).symlink_to(shutil.which(name))
        return str(folder)

    def run(self, clone, programs, **variables):
        variables.setdefault("BITQUOTA_DATA", "")
        return run(clone / ".ci" / "run", cwd=clone.parent, PATH=programs, **variables)

    def test_works_without_a_package_manager(self, clone, programs):
        done = self.run(clone, programs)
        assert (0, "tested with []") == (done.returncode, done.stdout.strip())

    def test_finds_the_data_beside_the_clone(self, clone, programs):
        data = clone.parent / "shared" / "data"
        data.mkdir(parents=True)
        assert f"tested with [{data}]" in self.run(clone, programs).stdout

    def test_keeps_data_that_were_named(self, clone, programs):
        (clone.parent / "shared" / "data").mkdir(parents=True)
        assert "tested with [/named]" in self.run(clone, programs, BITQUOTA_DATA="/named").stdout

    def test_fails_when_the_tests_do(self, clone, programs):
        """A gate that is always open is none."""
        assert self.run(clone, programs, MAKEFLAGS="END=false").returncode != 0

    def test_is_executable_and_calls_make_test(self, repository):
        script = repository / ".ci" / "run"
        assert os.access(script, os.X_OK)
        text = script.read_text()
        assert "set -euo pipefail" in text
        assert text.rstrip().endswith("exec make test")

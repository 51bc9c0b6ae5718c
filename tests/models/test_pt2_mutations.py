"""Mutated files: each is read or refused in a sentence, and nothing in it is ever executed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import mutation_runner
from mutations import SUFFIXES, mutate

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parent.parent
SEEDS = 600


@pytest.fixture(scope="module")
def valid_files(tmp_path_factory) -> Path:
    """A folder with images and tokens in every format."""
    folder = tmp_path_factory.mktemp("valid")
    mutation_runner.write_valid_files(folder)
    return folder


class TestMutate:
    @pytest.mark.parametrize("suffix", SUFFIXES)
    def test_equal_seeds_give_equal_bytes(self, valid_files, suffix):
        """A finding can be reproduced, and every seed changes something."""
        data = (valid_files / f"image{suffix}").read_bytes()
        first = [mutate(data, suffix, seed) for seed in range(30)]
        assert first == [mutate(data, suffix, seed) for seed in range(30)]
        assert sum(changed != data for changed in first) >= 29


class TestReading:
    def test_mutated_files_are_read_or_refused(self, valid_files):
        """No other exception, no dead process, no code, no file, no module, in any of them."""
        line = [sys.executable, str(TESTS / "mutation_runner.py"), str(valid_files), "0"]
        done = subprocess.run([*line, str(SEEDS)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        result = json.loads(done.stdout)
        assert result["crashes"] == []
        assert result["violations"] == []
        for suffix in SUFFIXES:  # the mutator neither breaks everything nor nothing
            kinds = {k: n for k, n in result["counts"].items() if k.startswith(suffix)}
            assert sum(kinds.values()) == SEEDS // 4
            assert set(kinds) >= {f"{suffix} refused", f"{suffix} ran"}

    def test_the_audit_sees_what_runs(self):
        """The hook of the runner notices evaluated texts, processes, files and modules."""
        code = (
            "import json, mutation_runner, os\n"
            "audit = mutation_runner.Audit(); audit.armed = True\n"
            "eval('1 + 1'); open(os.devnull).close(); os.system('true'); import colorsys\n"
            "audit.armed = False; print(json.dumps([f.split()[0] for f in audit.found]))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=TESTS
        )
        assert {"compile", "exec", "open", "os.system", "import"} <= set(json.loads(done.stdout))

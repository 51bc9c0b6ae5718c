"""What importing loads: torch nowhere but in the worker, and imports go one way only."""

from __future__ import annotations

import importlib
import shutil
import sys

import grimp
import pytest

from .conftest import run, tool

PRINT_LOADED = (
    "import importlib, sys; importlib.import_module(sys.argv[1]); print(*sorted(sys.modules))"
)
WORKER_ONLY = {"torch", "transformers", "cvxpy", "ortools", "onnxruntime", "sklearn"}


def loaded(module: str, cwd) -> set[str]:
    """Top-level names that a fresh interpreter has loaded after importing ``module``."""
    done = run(sys.executable, "-c", PRINT_LOADED, module, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    "module",
    [
        "bitquota",
        "bitquota.solver",
        "bitquota.client",
        "bitquota.service",
        "bitquota.service.app",
        "bitquota.cli.app",
        "bitquota.plan",
        "bitquota.report.text",
        "bitquota.request",
        "bitquota.models.sources",
        "bitquota.exports.names",
    ],
)
def test_loads_no_torch(module, tmp_path):
    """Torch takes seconds and hundreds of megabytes; only who measures needs it."""
    assert not loaded(module, tmp_path) & WORKER_ONLY


@pytest.mark.parametrize(
    "module",
    [
        "errors",
        "canonical",
        "codec",
        "context",
        "candidates.storage",
        "candidates.targets",
        "candidates.budget",
        "matrix",
        "plan",
        "progress",
    ],
)
def test_vocabulary_needs_numpy_and_patterns_alone(module, tmp_path):
    """Every other part speaks it, so it must cost nothing to import."""
    before = loaded("numpy", tmp_path)
    light = {"bitquota", "re2", "_re2"}
    assert loaded(f"bitquota.{module}", tmp_path) <= before | set(sys.stdlib_module_names) | light


def python_files(folder):
    """All modules below ``folder``, links followed."""
    for path in folder.iterdir():
        if path.is_dir():
            yield from python_files(path)
        elif path.suffix == ".py":
            yield path


def test_linter_sees_every_module(repository):
    """The folders lie behind links; a linter that did not follow them would find no fault."""
    names = {"bitquota"}
    for path in python_files(repository / "src" / "bitquota"):
        parts = path.relative_to(repository / "src").with_suffix("").parts
        names.add(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    graph = grimp.build_graph("bitquota", cache_dir=None)
    assert names == graph.modules


class TestContract:
    """The contract of pyproject.toml bites, in a copy with a fault put in."""

    @pytest.fixture
    def copy(self, source, tmp_path):
        return shutil.copytree(source, tmp_path / "copy", symlinks=True)

    def lint(self, folder):
        return run(tool("lint-imports"), "--no-cache", cwd=folder, PYTHONPATH=str(folder / "src"))

    @pytest.mark.parametrize(
        ("path", "text"),
        [
            ("solver/fault.py", "import bitquota.sensitivity"),
            ("sensitivity/fault.py", "import bitquota.solver"),
            ("quantizers/fault.py", "from bitquota.search import allocate"),
            ("service/fault.py", "from bitquota.cli import app"),
        ],
    )
    def test_an_import_upwards_is_refused(self, copy, path, text):
        (copy / path).write_text(text + "\n")
        done = self.lint(copy)
        assert done.returncode == 1
        module = path.removesuffix(".py").replace("/", ".")
        assert f"bitquota.{module} -> " in done.stdout

    def test_a_new_file_must_be_placed(self, copy):
        (copy / "src" / "bitquota" / "fault.py").write_text("")
        done = self.lint(copy)
        assert done.returncode == 1
        assert "fault" in done.stdout


@pytest.mark.parametrize(
    "folder", ["solver", "sensitivity", "quantizers", "models", "exports", "training", "service"]
)
def test_a_folder_alone_cannot_be_imported(repository, folder):
    """``import solver`` would work from the repository's root and load a second copy."""
    (repository / folder).resolve(strict=True)
    done = run(
        "sh",
        "-c",
        f"printf 'import {folder}\\n' | {tool('ruff')} check --quiet --output-format concise "
        "--stdin-filename tests/probe.py -",
        cwd=repository,
    )
    assert "TID251" in done.stdout


@pytest.mark.parametrize(
    ("former", "now", "names"),
    [
        ("allocate", "search.allocate", ["allocate", "measure_matrix", "Allocation"]),
        ("allocate", "evaluate.scoring", ["evaluate_plans"]),
        ("budget", "candidates.budget", ["Budget"]),
        ("candidates", "candidates.layers", ["Layer", "Inventory"]),
        ("candidates", "candidates.table", ["Candidate", "CandidateTable", "enumerate_candidates"]),
        ("compare", "search.compare", ["compare"]),
        ("comparison_plot", "report.comparison_plot", ["plot_comparison"]),
        ("formats", "models", ["load_model", "load_calibration"]),
        ("formats.exports", "exports.export", ["export_plan", "load_export"]),
        ("formats.gate", "ci.check", ["check_lock"]),
        ("formats.lock", "ci.lock", ["Lock", "make_lock"]),
        ("formats.pt2_vetting", "models.pt2.vetting", ["vet_pt2"]),
        ("sensitivity.ledger", "sensitivity.cache", ["SqliteLedger"]),
        ("sensitivity.ledger", "context", ["MemoryLedger"]),
        ("storage", "candidates.storage", ["Scheme", "StorageSize"]),
    ],
)
def test_former_names_lead_to_the_same_objects(former, now, names):
    """README and reference named these modules before packages were split by task."""
    old, new = (importlib.import_module(f"bitquota.{name}") for name in (former, now))
    assert all(getattr(old, name) is getattr(new, name) for name in names)

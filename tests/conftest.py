"""What every test shares: one thread, reproducible property tests, and where the data lie."""

from __future__ import annotations

import functools
import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

# Before anything loads a library with threads of its own; the suite runs several processes.
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Bytecode is kept even if the environment says otherwise: without it each process of the suite
# rewrites every test, and each server and driver compiles what it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

import hypothesis  # noqa: E402  # see above
import pytest  # noqa: E402

# Derandomised: a run that fails, fails again. Without a deadline: the machine may be busy.
hypothesis.settings.register_profile("bitquota", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("bitquota")

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("BITQUOTA_DATA", ROOT.parent / "shared" / "data"))

LONGEST = (
    "service/test_durability.py", "browser/test_journey.py", "service/jobs/test_training_kinds.py",
    "service/worker/test_engines.py", "service/worker/test_ray_engine.py",
    "service/worker/test_time_limits.py", "browser/test_looks.py", "service/jobs/test_kinds.py",
    "cli/test_remote.py", "exports/test_menus.py", "search/test_allocate.py", "docs/test_readme.py",
    "cli/test_sandboxed.py", "service/test_hostile.py", "evaluate/test_one_number.py",
    "cli/test_commands.py", "docs/test_quickstarts.py", "docs/test_training_page.py",
    "models/test_transformer_classes.py", "quantizers/test_resuming.py", "training/test_learn.py",
    "evaluate/test_shipped_weights.py", "models/test_fuzzed.py", "quantizers/test_stacked.py",
    "docs/test_quickstart_ci.py", "models/test_pt2_mutations.py", "service/test_telemetry.py",
    "sensitivity/metrics/test_resnet20.py", "sensitivity/metrics/test_stack_shares.py",
    "service/api/test_schema.py", "quantizers/test_corrections.py", "training/test_loop.py",
    "packaging/test_ci.py", "models/test_plain_weights.py", "docs/test_site.py",
)  # fmt: skip
"""Files below tests/, in the order in which they begin; after them come all others."""

LIVE = ("browser", "cli", "client", "service")
"""Folders of tests that start, stop and kill processes. On a busy machine the operating system
may decide such a test, not the product; it gets a second try, and the summary lists the first."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Look for no garbage while everything is imported, which takes half as long again otherwise.

    What was imported stays, so that the collector need not walk through it later either.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, and skip what needs shared networks where they are missing."""
    live = tuple(f"tests/{name}/" for name in LIVE)
    for item in items:
        if item.nodeid.startswith(live):
            item.add_marker(pytest.mark.flaky(reruns=1))
    place = {ROOT / "tests" / name: k for k, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
    if DATA.is_dir():
        return
    missing = pytest.mark.skip(reason=f"no trained networks at {DATA}; set BITQUOTA_DATA")
    for item in items:
        if "shared_data" in item.keywords:
            item.add_marker(missing)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of trained networks; use it with the marker ``shared_data``."""
    return DATA


@pytest.fixture(scope="session")
def repository() -> Path:
    """Return the root of the working tree."""
    return ROOT


@pytest.fixture(scope="session")
def operators_read_once() -> Iterator[None]:
    """Torch's ONNX exporter parses its operators, which takes half a second, for one model only."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    read = functools.cache(ONNXRegistry.from_torchlib)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(read))
        yield


@pytest.fixture(scope="session")
def tiny_pt2(tmp_path_factory) -> Path:
    """The tiny network as ``.pt2``."""
    import torch

    from format_networks import tiny_net, write_pt2

    path = tmp_path_factory.mktemp("pt2") / "tiny.pt2"
    return write_pt2(tiny_net(), (torch.randn(2, 3, 8, 8),), path)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    """A tiny random Llama with a tied head, as transformers saves it."""
    from format_networks import write_llama

    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def digits_files(tmp_path_factory) -> tuple[Path, Path]:
    """A trained network as ``.pt2`` and its calibration set as ``.npz``."""
    from live_server import train_and_export

    return train_and_export(tmp_path_factory.mktemp("digits"))

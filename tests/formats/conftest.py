"""Fixtures: exported files and folders of small networks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch

from format_networks import tiny_net, write_llama, write_pt2

if TYPE_CHECKING:
    from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_pt2(tmp_path_factory) -> Path:
    """The tiny network as ``.pt2``."""
    path = tmp_path_factory.mktemp("pt2") / "tiny.pt2"
    return write_pt2(tiny_net(), (torch.randn(2, 3, 8, 8),), path)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    """A tiny random Llama with a tied head, as transformers saves it."""
    return write_llama(tmp_path_factory.mktemp("llama"))

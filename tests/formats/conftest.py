"""Fixtures: exported files and folders of small networks."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
from format_networks import tiny_net
from torch.export import Dim, export, save

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def write_pt2(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], path: Path) -> Path:
    """Export with a dynamic batch."""
    dynamic = tuple({0: Dim.DYNAMIC} for _ in inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        save(export(module, inputs, dynamic_shapes=dynamic), path)
    return path


@pytest.fixture(scope="session")
def tiny_pt2(tmp_path_factory) -> Path:
    """The tiny network as ``.pt2``."""
    path = tmp_path_factory.mktemp("pt2") / "tiny.pt2"
    return write_pt2(tiny_net(), (torch.randn(2, 3, 8, 8),), path)


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    """A tiny random Llama with a tied head, as transformers saves it."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    path = tmp_path_factory.mktemp("llama")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path

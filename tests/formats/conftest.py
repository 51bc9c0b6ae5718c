"""Fixtures: exported files and folders of small networks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch

from format_networks import tiny_net, write_pt2

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

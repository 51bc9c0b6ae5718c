"""Tiny language models as GGUF files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from bitquota.exports.export import export_plan
from bitquota.models.load import load_model
from format_networks import plan_with

if TYPE_CHECKING:
    from pathlib import Path


def write_model(path: Path, kind: str = "llama", **config: Any) -> Path:
    """Save a tiny random language model as transformers does; biases and norms are random too."""
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "head_dim": 16,
    }  # fmt: skip
    settings = transformers.AutoConfig.for_model(kind, **(sizes | config))
    model = transformers.AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    model.save_pretrained(path)
    return path


def write_gguf(folder: Path, out: Path, *bits: int) -> Path:
    """Return the file that our exporter writes of the model in ``folder``; 32 bits by default."""
    model = load_model(str(folder))
    plan = plan_with(model, model.example_inputs, target="gguf-py", bits=bits or (32,))
    export_plan(model, plan, out, target="gguf-py")
    return out / "model.gguf"

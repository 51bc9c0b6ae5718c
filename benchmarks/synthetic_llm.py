"""Language models of random weights in the size and layout of real ones, for measurements of cost.

``python benchmarks/synthetic_llm.py OUT`` writes a folder as Hugging Face's hub has them: config,
an index, and bf16 safetensors in shards of about 500 MB. One shard at a time is in memory, and each
tensor is drawn from a seed of its own, so that values do not depend on the size of the shards.
Losses on such a model say nothing about real ones; memory, seconds and bytes read do. Its texts
take ``--tokenizer bytes``.
"""

from __future__ import annotations

import argparse
import json
import math
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

if TYPE_CHECKING:
    from collections.abc import Iterator

_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
_MIXTURE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "tie_word_embeddings": True,
}
_SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 256}
KINDS: dict[str, dict[str, Any]] = {
    "llama-1.1b": _LLAMA,
    "mixture-0.3b": _MIXTURE,
    "llama-small": _LLAMA | _SMALL,
    "mixture-small": _MIXTURE | _SMALL | {"moe_intermediate_size": 64, "num_experts": 4},
}
"""Configs by name; the first has the shapes of TinyLlama-1.1B."""


def stored_shapes(config: Any) -> dict[str, tuple[int, ...]]:  # noqa: ANN401  # of transformers
    """Return every tensor of a checkpoint, in the order of the model; no weight is allocated."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(model.all_tied_weights_keys)
    order = {name: k for k, name in enumerate(model.state_dict())}
    # Experts that transformers stacks have names of their own in files.
    stored = revert_weight_conversion(
        model, {name: t for name, t in model.state_dict().items() if name not in tied}
    )
    layer = {name: name.split(".experts.")[0] for name in stored}
    first = {
        part: min(k for n, k in order.items() if n.startswith(part)) for part in layer.values()
    }
    return {
        name: tuple(stored[name].shape) for name in sorted(stored, key=lambda n: first[layer[n]])
    }


def drawn(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return one tensor as an untrained network has it, in bf16."""
    if len(shape) < 2:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(seed << 32 | zlib.crc32(name.encode()))
    made = torch.empty(shape, dtype=torch.bfloat16)
    for part in made.flatten(0, -2).split(4096):  # float32 for a few rows only
        part.copy_(0.02 * torch.randn(part.shape, generator=generator))
    return made


def shards(shapes: dict[str, tuple[int, ...]], limit: int) -> Iterator[list[str]]:
    """Yield the names of each file, in order; a tensor larger than ``limit`` has its own."""
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        n_bytes = 2 * math.prod(shape)
        if names and size + n_bytes > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += n_bytes
    yield names


def write(kind: str, folder: Path, *, shard_bytes: int = 500_000_000, seed: int = 0) -> int:
    """Write the model ``kind`` of ``KINDS`` into ``folder``; return its number of weights.

    Memory: one shard.
    """
    settings = KINDS[kind]
    config = AutoConfig.for_model(**settings)
    shapes = stored_shapes(config)
    folder.mkdir(parents=True, exist_ok=True)
    files = list(shards(shapes, shard_bytes))
    where = {}
    for k, names in enumerate(files, 1):
        file = f"model-{k:05}-of-{len(files):05}.safetensors"
        tensors = {name: drawn(name, shapes[name], seed) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
        print(f"{file}: {len(names)} tensors", flush=True)
    n_weights = sum(map(math.prod, shapes.values()))
    index = {"metadata": {"total_size": 2 * n_weights}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    # The config is written last: a folder without one is no model.
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]  # noqa: SLF001  # no public name
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    return n_weights


def main() -> None:
    """Write a model and print its size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder that is made")
    parser.add_argument("--kind", choices=KINDS, default="llama-1.1b")
    parser.add_argument("--shard-mb", type=float, default=500.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    n_weights = write(args.kind, args.out, shard_bytes=int(args.shard_mb * 1e6), seed=args.seed)
    print(f"{args.kind}: {n_weights:,} weights in {args.out}")


if __name__ == "__main__":
    main()

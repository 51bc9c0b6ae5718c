"""Train a tiny Llama on the source text of Python's standard library: real weights in seconds.

``python -m examples.tiny_llama`` writes the folder ``tiny-llama`` (config, safetensors and a
byte-level ``tokenizer.json``), ``calibration.txt`` and ``test.txt``.
"""

from __future__ import annotations

import argparse
import inspect
import textwrap
from importlib import import_module
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

MODULES = ("argparse", "textwrap", "difflib", "calendar", "statistics", "shutil", "tarfile")
WINDOW = 64
TEST_BYTES = 16_000


def text() -> str:
    """Return the source of a few modules of the standard library, as plain letters."""
    sources = [inspect.getsource(import_module(name)) for name in MODULES]
    return textwrap.dedent("\n\n".join(sources)).encode("ascii", "ignore").decode()


def tokenizer() -> Tokenizer:
    """Return a tokenizer whose 256 tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: k for k, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


def train(ids: torch.Tensor, *, steps: int, seed: int = 0) -> LlamaForCausalLM:
    """Return a Llama of two blocks and width 64, trained on windows of ``ids``."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - WINDOW - 1, (16,)).tolist()
        windows = torch.stack([ids[s : s + WINDOW + 1] for s in starts])
        logits = model(windows[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def main(arguments: list[str] | None = None) -> None:
    """Write model and texts into the current folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--steps", type=int, default=300)
    steps = parser.parse_args(arguments).steps
    whole = text()
    train_text, test_text = whole[:-TEST_BYTES], whole[-TEST_BYTES:]
    bytes_of = tokenizer()
    model = train(torch.tensor(bytes_of.encode(train_text).ids), steps=steps)
    folder = Path("tiny-llama")
    model.save_pretrained(folder)
    bytes_of.save(str(folder / "tokenizer.json"))
    Path("calibration.txt").write_text(train_text)
    Path("test.txt").write_text(test_text)


if __name__ == "__main__":
    main()

"""Tiny random language models and tokenizers, saved as transformers does."""

from __future__ import annotations

import json
from typing import Any

import torch

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def folder(path, kind: str = "llama", **config: Any):
    """Save a tiny random language model as transformers does."""
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    settings = transformers.CONFIG_MAPPING[kind](**(sizes | config))
    transformers.AutoModelForCausalLM.from_config(settings).save_pretrained(path)
    return path


def tokenizer(split: str | None = None) -> Any:
    """Return a byte-level BPE of 300 tokens that splits like GPT-2, or by ``split``."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split is not None:
        steps = [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
        made.pre_tokenizer = pre_tokenizers.Sequence(steps)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["the cat sat on the mat 12345 times, it isn't 2026"] * 9, trainer)
    return made


def sentence_piece(*, newer: bool = False) -> Any:
    """Return a BPE like Llama 2's: spaces as U+2581, unknown letters as bytes.

    ``newer`` marks spaces by a pre-tokenizer, as transformers does where ``legacy`` is false.
    """
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

    texts = ["the cat sat on the mat 12345 times, it isn't 2026  \n"] * 9
    made = Tokenizer(models.BPE())
    marked = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    made.normalizer = marked
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=90, show_progress=False))
    trained = json.loads(made.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{k:02X}>" for k in range(256)), *trained["vocab"]]
    model = models.BPE(
        vocab={piece: k for k, piece in enumerate(pieces)},
        merges=[tuple(pair) for pair in trained["merges"]],
        unk_token="<unk>",  # noqa: S106  # a token of text
        fuse_unk=True,
        byte_fallback=True,
    )
    made = Tokenizer(model)
    if newer:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        made.normalizer = marked
    made.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    return made

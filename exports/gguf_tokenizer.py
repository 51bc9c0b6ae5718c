"""The tokenizer of a Hugging Face folder as GGUF's own entries, where llama.cpp has the same one.

llama.cpp splits texts by rules of its own, chosen by name, and knows byte-level BPE by the rules of
the models that it was written for. A tokenizer whose rule is not among them is left out and the
report says so: with another rule it would give other tokens, and no error.

References:
    ggml-org/llama.cpp: conversion/base.py (get_vocab_base, get_vocab_base_pre), src/llama-vocab.cpp

Design: docs/design/targets.md
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from bitquota.canonical import JsonObject

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    rf"{_WORDS}\p{{N}}{{1,3}}{_REST}": "llama-bpe",
    rf"{_WORDS}\p{{N}}{_REST}": "qwen2",
    "byte level": "gpt-2",
    "digits, byte level": "smollm",
}
"""llama.cpp's names of rules, by the expression that splits a text (or what stands for it)."""

NO_TOKENIZER = "the file has no tokenizer: llama.cpp needs one added"
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def add_tokenizer(writer: Any, folder: Path, n_tokens: int) -> tuple[str, ...]:  # noqa: ANN401
    """Write the tokenizer of ``folder``, if llama.cpp has its like.

    Args:
        writer: gguf's ``GGUFWriter``.
        folder: Of the model.
        n_tokens: Rows of the embedding; the list of tokens is filled up to them.

    Returns:
        What the report must say: nothing where the tokenizer was written.
    """
    import gguf

    file = folder / "tokenizer.json"
    try:
        described = json.loads(file.read_text())
        rule, why = _rule(described), "llama.cpp has no rule that splits texts like it"
    except FileNotFoundError:
        rule, why = None, "the folder has no tokenizer.json"
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        rule, why = None, "tokenizer.json cannot be read"
    tokens = {} if rule is None else _tokens(described)
    if tokens and not 0 <= max(tokens) < n_tokens:
        rule, why = None, f"it has {max(tokens) + 1:,} tokens and the model {n_tokens:,}"
    if rule is None or not tokens:
        writer.add_tokenizer_model("no_vocab")
        return (f"{NO_TOKENIZER} ({why})",)
    filled = [tokens.get(k, (f"[PAD{k}]", _UNUSED)) for k in range(n_tokens)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list([text for text, _ in filled])
    writer.add_token_types([kind for _, kind in filled])
    special = gguf.SpecialVocab(folder, load_merges=True, n_vocab=n_tokens)
    # llama.cpp wants merges. One that leads to no token is undone: its text falls apart into bytes.
    special.merges = special.merges or ["~ ~"]
    special.add_special_token.setdefault("bos", False)  # llama.cpp would add one for some rules
    special.add_to_gguf(writer, quiet=True)
    return ()


def _rule(described: JsonObject) -> str | None:
    """Return llama.cpp's name of the rule by which a byte-level BPE splits texts."""
    model = described["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        return None
    steps = described.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    kinds = [step.get("type") for step in steps]
    if not kinds or kinds[-1] != "ByteLevel" or steps[-1].get("add_prefix_space"):
        return None
    by_words = steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and (by_words or not model.get("merges")):  # none: no split matters
        return SPLITS["byte level"]
    if kinds == ["Digits", "ByteLevel"] and by_words and steps[0].get("individual_digits"):
        return SPLITS["digits, byte level"]
    if kinds == ["Split", "ByteLevel"] and not by_words:
        plain = steps[0].get("behavior") == "Isolated" and not steps[0].get("invert")
        return SPLITS.get(steps[0]["pattern"].get("Regex", "")) if plain else None
    return None


def _tokens(described: JsonObject) -> dict[int, tuple[str, int]]:
    """Return text and GGUF's type of each token by its number."""
    found = {int(k): (str(text), _NORMAL) for text, k in described["model"]["vocab"].items()}
    for added in described.get("added_tokens") or ():
        kind = _CONTROL if added.get("special") else _USER_DEFINED
        found[int(added["id"])] = str(added["content"]), kind
    return found

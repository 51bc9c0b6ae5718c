"""The tokenizer of a Hugging Face folder as GGUF's own entries, where llama.cpp has the same one.

llama.cpp splits texts by rules of its own, chosen by name, and knows byte-level BPE by the rules
of the models that it was written for. SentencePiece's BPE (bytes for unknown letters, spaces as
U+2581) it merges by scores of tokens: the rank of the merge that makes one. A tokenizer of another
kind is left out and the report says so: with another rule it would give other tokens, and no error.

References:
    ggml-org/llama.cpp: conversion/base.py (get_vocab_base, get_vocab_base_pre), src/llama-vocab.cpp

Design: docs/design/targets.md
"""

from __future__ import annotations

import json
import re
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
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPACE = "\u2581"
_SENTENCE_PIECE = "sentence piece"


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
    # The list of tokens, filled up; then what puts them together: merges, or scores.
    filled = [tokens.get(k, (f"[PAD{k}]", _UNUSED)) for k in range(n_tokens)]
    by_scores = rule == _SENTENCE_PIECE
    writer.add_tokenizer_model("llama" if by_scores else "gpt2")
    writer.add_tokenizer_pre("default" if by_scores else rule)
    writer.add_token_list([text for text, _ in filled])
    writer.add_token_types([kind for _, kind in filled])
    special = gguf.SpecialVocab(folder, load_merges=not by_scores, n_vocab=n_tokens)
    if by_scores:
        ranks = _ranks(described)
        writer.add_token_scores([-float(ranks.get(text, len(ranks))) for text, _ in filled])
        writer.add_add_space_prefix(_begins_with_space(described))
    else:
        # llama.cpp wants merges. One that leads to no token is undone: it falls apart into bytes.
        special.merges = special.merges or ["~ ~"]
    special.add_special_token.setdefault("bos", False)  # llama.cpp would add one for some rules
    special.add_to_gguf(writer, quiet=True)
    return ()


def _rule(described: JsonObject) -> str | None:
    """Return llama.cpp's name of the rule by which a byte-level BPE splits texts."""
    model = described["model"]
    if model["type"] != "BPE":
        return None
    if model.get("byte_fallback"):
        return _SENTENCE_PIECE if _marks_spaces(described) else None
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


def _marks_spaces(described: JsonObject) -> bool:
    """Whether spaces become U+2581, and nothing else happens before merging."""
    steps = [*_steps(described.get("normalizer")), *_steps(described.get("pre_tokenizer"))]
    known: dict[str, JsonObject] = {
        "Prepend": {"prepend": _SPACE},
        "Replace": {"pattern": {"String": " "}, "content": _SPACE},
        "Metaspace": {"replacement": _SPACE, "split": False},
    }
    return bool(steps) and all(
        step["type"] in known and known[step["type"]].items() <= step.items() for step in steps
    )


def _begins_with_space(described: JsonObject) -> bool:
    """Whether a text gets a space in front of it."""
    return any(
        step["type"] == "Prepend" or step.get("prepend_scheme", "never") != "never"
        for key in ("normalizer", "pre_tokenizer")
        for step in _steps(described.get(key))
    )


def _steps(described: JsonObject | None) -> list[JsonObject]:
    if not described:
        return []
    inner = described.get("normalizers") or described.get("pretokenizers")
    return [described] if inner is None else list(inner)


def _ranks(described: JsonObject) -> dict[str, int]:
    """Return the rank of the first merge that makes each token."""
    ranks: dict[str, int] = {}
    for k, pair in enumerate(described["model"]["merges"]):
        ranks.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), k)
    return ranks


def _tokens(described: JsonObject) -> dict[int, tuple[str, int]]:
    """Return text and GGUF's type of each token by its number."""
    model = described["model"]
    found = {int(k): (str(text), _NORMAL) for text, k in model["vocab"].items()}
    if model.get("byte_fallback"):
        for k, (text, _) in found.items():
            if re.fullmatch("<0x[0-9A-F]{2}>", text):
                found[k] = text, _BYTE
    for added in described.get("added_tokens") or ():
        kind = _CONTROL if added.get("special") else _USER_DEFINED
        if model.get("byte_fallback") and added["content"] == model.get("unk_token"):
            kind = _UNKNOWN
        found[int(added["id"])] = str(added["content"]), kind
    return found

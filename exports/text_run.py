"""What a runtime of language models computes from exported files, beside the plan's model.

Tokens of texts, logits of windows, and the speed of both; runtimes that round activations are held
to what that rounding explains.

Design: docs/design/targets.md
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import torch
from torch.nn.functional import log_softmax

from bitquota.errors import BitquotaError, ExportFailed
from bitquota.exports.export_report import TextRun
from bitquota.models.running import primary_output

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from torch import Tensor

    from bitquota.exports.prepared import PreparedExport

LONGEST = 512
"""Tokens of a window that are run at most."""
GENERATED = 32
"""Tokens that are generated, to time them."""
_MOST_TOKENS, _MOST_WINDOWS = 4096, 32
_OTHER_TOKENS = "{} splits {} of our texts otherwise than tokenizer.json, such as {!r}"

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "It's 12,345.67 or 1e-9; isn't it? WE'LL see...",
    "  two spaces,\ttabs\n\n\nand lines  \n",
    "def f(x):\n    return {'a': x[0] ** 2}  # done\n",
    "Größe, façade, naïve, señor",
    "Привет, мир! Γειά σου",
    "你好,世界。今日は2026年です",
    "السلام عليكم",
    "emoji 😀👍🏽 and symbols ∑≤→",
    "snake_case camelCase HTTPServer2",
)
"""Texts that rules of splitting differ on: contractions, digits, spaces, scripts."""


class TextRuntime(Protocol):
    """Exported files in a runtime of language models, on one thread.

    Attributes:
        name: Of the runtime.
        version: Of the package that it came from.
    """

    name: str
    version: str

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Return the tokens of ``text``; ``special`` adds what a text begins and ends with."""
        ...

    def logits(self, tokens: Sequence[int]) -> tuple[Tensor, float]:
        """Return logits behind each of ``tokens``, f32[n, tokens known], and the seconds."""
        ...

    def continue_greedily(self, tokens: Sequence[int], n: int) -> tuple[list[int], float]:
        """Return the ``n`` most probable next tokens, and the seconds of all but the first."""
        ...


def run_windows(
    prepared: PreparedExport,
    runtime: TextRuntime,
    tokenizer: Path | None,
    *,
    rounding: Callable[[PreparedExport], AbstractContextManager[None]] | None = None,
) -> tuple[TextRun | None, tuple[str, ...]]:
    """Run the samples in ``runtime``; return what it computed, and notes.

    Without samples nothing is returned, but texts are split.

    Args:
        prepared: What the files were written from.
        runtime: What runs them.
        tokenizer: The ``tokenizer.json`` that the files hold too, if they have one.
        rounding: While it is open, the plan's model rounds activations as the runtime does.

    Cost: a pass over up to 32 windows of up to 512 tokens, 4,096 in all, and one of the plan's
    model where ``rounding`` is given.

    Raises:
        ExportFailed: The runtime does not compute something.
    """
    windows, reference = _windows(prepared)
    n_texts, different = _compare_tokens(runtime, tokenizer)
    notes: tuple[str, ...] = ()
    if different:
        notes = (_OTHER_TOKENS.format(runtime.name, len(different), different[0]),)
    if not len(windows):
        return None, notes
    found, seconds = [], 0.0
    try:
        for window in windows:
            values, taken = runtime.logits(window.tolist())
            found.append(values)
            seconds += taken
        _, generating = runtime.continue_greedily(windows[0].tolist(), GENERATED)
    except BitquotaError:
        raise
    except Exception as err:  # runtimes raise RuntimeError and their own kinds
        msg = f"{runtime.name} must run the exported files; it says: {err}"
        raise ExportFailed(msg) from err
    rounded = reference
    if rounding is not None:
        with torch.no_grad(), rounding(prepared):
            rounded = primary_output(prepared.module(windows))
    # A window at a time: logits of a large vocabulary in float64 are large.
    divergence = likelihood = planned = alike = 0.0
    for tokens, wanted, got in zip(windows, reference, found, strict=True):
        ours, theirs = log_softmax(wanted.double(), -1), log_softmax(got.double(), -1)
        following = tokens[1:, None]
        divergence += float((ours.exp() * (ours - theirs)).sum(-1).mean())
        likelihood += float(theirs[:-1].gather(1, following).mean())
        planned += float(ours[:-1].gather(1, following).mean())
        alike += float((ours.argmax(-1) == theirs.argmax(-1)).double().mean())
    n = len(windows)
    ran = TextRun(
        runtime=runtime.name,
        version=runtime.version,
        n_windows=len(windows),
        n_tokens=windows.numel(),
        relative=_apart(found, reference),
        explained=_apart(rounded, reference),
        kl=divergence / n,
        log_likelihood=likelihood / n,
        planned_log_likelihood=planned / n,
        same_top=alike / n,
        texts=n_texts,
        texts_alike=n_texts - len(different),
        prompt_tokens_per_second=round(windows.numel() / seconds, 1),
        tokens_per_second=round((GENERATED - 1) / generating, 1),
    )
    return ran, notes


def _windows(prepared: PreparedExport) -> tuple[Tensor, Tensor]:
    """Return tokens ``i64[n, length]`` of unmasked windows, and the plan's logits of them."""
    none = torch.zeros((0, 2), dtype=torch.int64)
    if prepared.inputs is None or prepared.reference is None:
        return none, none
    tokens, *others = prepared.inputs
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.shape[1] < 2:
        return none, none
    whole = torch.ones(len(tokens), dtype=torch.bool)
    for mask in others:
        whole &= (mask != 0).reshape(len(tokens), -1).all(1)
    tokens, reference = tokens[whole, :LONGEST], prepared.reference[whole, :LONGEST]
    n = min(_MOST_WINDOWS, max(1, _MOST_TOKENS // tokens.shape[1]))
    return tokens[:n], reference[:n]


def _apart(values: Iterable[Tensor], reference: Iterable[Tensor]) -> float:
    """Return the norm of the difference over that of the reference, both about their means.

    What all logits of a token have in common changes no probability.
    """
    squares = energy = 0.0
    for one, other in zip(values, reference, strict=True):
        mine, wanted = (t.double() - t.double().mean(-1, keepdim=True) for t in (one, other))
        squares += float((mine - wanted).square().sum())
        energy += float(wanted.square().sum())
    return math.sqrt(squares / energy)


def _compare_tokens(runtime: TextRuntime, tokenizer: Path | None) -> tuple[int, list[str]]:
    """Return how many texts were split, and those with other tokens in the runtime.

    Each is split with and without what texts begin and end with.
    """
    if tokenizer is None:
        return 0, []
    from tokenizers import Tokenizer

    source = Tokenizer.from_file(str(tokenizer))
    source.no_padding()
    source.no_truncation()
    different = [
        text
        for text in TEXTS
        if any(
            source.encode(text, add_special_tokens=special).ids
            != runtime.tokenize(text, special=special)
            for special in (False, True)
        )
    ]
    return len(TEXTS), different

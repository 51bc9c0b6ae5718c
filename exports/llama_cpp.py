"""What llama.cpp computes from a GGUF file, and how near it is to the plan's model.

llama.cpp rounds the inputs of quantized layers to 8 bits, in blocks as long as those of the
weights. The model with fake-quantized weights and inputs rounded like this says how far its logits
may lie from those of the plan; a file that is read wrongly lies far outside.

Design: docs/design/targets.md
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch.nn.functional import log_softmax

from bitquota.candidates.storage import K_BLOCK, Grid
from bitquota.errors import ExportFailed, MissingDependency
from bitquota.exports.export_report import TextRun
from bitquota.exports.gguf_blocks import BLOCK
from bitquota.models.running import primary_output

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from bitquota.canonical import JsonObject
    from bitquota.exports.prepared import PreparedExport

MISSING = "llama.cpp did not run the file: pip install bitquota[llama-cpp]"
_MOST_TOKENS, _MOST_WINDOWS, _LONGEST = 4096, 32, 512
_GENERATED = 32
_OTHER_TOKENS = "llama.cpp splits {} of our texts otherwise than tokenizer.json, such as {!r}"

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


class LlamaCpp:
    """A GGUF file in llama.cpp, in a process of its own, on one thread of the processor.

    Args:
        path: The file.
        context: Positions that are kept.

    Raises:
        MissingDependency: xllamacpp is not installed, or of an unknown build.
        ExportFailed: llama.cpp does not load the file, or ends while it computes.
    """

    def __init__(self, path: Path, context: int = _LONGEST) -> None:
        self._path = path
        self._process = subprocess.Popen(  # noqa: S603  # our own module
            [sys.executable, "-m", "bitquota.exports.llama_cpp_library", str(path), str(context)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._process.stdin is not None  # noqa: S101  # for types: both are pipes
        assert self._process.stdout is not None  # noqa: S101
        self._requests, self._answers = self._process.stdin, self._process.stdout
        try:
            said = self._answer()
        except BaseException:
            self.close()
            raise
        self.version, self.n_vocab = str(said["version"]), int(said["n_vocab"])

    def __enter__(self) -> Self:
        """Return the same."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self.close()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Return the tokens of ``text``; ``special`` adds what a text begins and ends with."""
        return list(self._ask(do="tokenize", text=text, special=special)["found"])

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of ``tokens``."""
        return str(self._ask(do="text", tokens=list(tokens))["found"])

    def logits(self, tokens: Sequence[int]) -> tuple[Tensor, float]:
        """Return logits behind each of ``tokens``, f32[n, tokens known], and the seconds."""
        said = self._ask(do="logits", tokens=list(tokens))
        raw = self._answers.read(4 * int(np.prod(said["shape"])))
        values = np.frombuffer(raw, dtype=np.float32).reshape(said["shape"])
        return torch.from_numpy(values.copy()), float(said["seconds"])

    def continue_greedily(self, tokens: Sequence[int], n: int) -> tuple[list[int], float]:
        """Return the ``n`` most probable next tokens, and the seconds of all but the first."""
        said = self._ask(do="continue_greedily", tokens=list(tokens), n=n)
        return list(said["found"]), float(said["seconds"])

    def _ask(self, **request: Any) -> JsonObject:  # noqa: ANN401  # JSON
        with suppress(BrokenPipeError):  # the answer says why
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()
        return self._answer()

    def _answer(self) -> JsonObject:
        line = self._answers.readline()
        if not line:
            said = self._process.communicate()[1].decode("utf-8", "replace").strip()
            msg = (
                f"llama.cpp must run '{self._path.name}'; its process ended with code "
                f"{self._process.returncode}: {said[-400:] or 'it said nothing'}"
            )
            raise ExportFailed(msg)
        found: JsonObject = json.loads(line)
        if "error" in found:
            raise (MissingDependency if found["missing"] else ExportFailed)(found["error"])
        return found


def installed() -> bool:
    """Return whether xllamacpp is there."""
    return importlib.util.find_spec("xllamacpp") is not None


def run_text(
    prepared: PreparedExport, path: Path, tokenizer: Path | None
) -> tuple[TextRun | None, tuple[str, ...]]:
    """Run a GGUF file in llama.cpp on the samples; return what it computed, and notes.

    Without samples nothing is returned, but the file must load.

    Args:
        prepared: What the file was written from.
        path: The file.
        tokenizer: The ``tokenizer.json`` that the file holds too, if it has one.

    Cost: two passes over up to 32 windows of up to 512 tokens, 4,096 in all.

    Raises:
        ExportFailed: llama.cpp does not load or run the file.
    """
    windows, reference = _windows(prepared)
    length = windows.shape[1]
    found, seconds = [], 0.0
    with LlamaCpp(path, length + _GENERATED) as runtime:
        n_texts, different = _compare_tokens(runtime, tokenizer)
        notes = () if not different else (_OTHER_TOKENS.format(len(different), different[0]),)
        if not len(windows):
            return None, notes
        for window in windows:
            values, taken = runtime.logits(window.tolist())
            found.append(values)
            seconds += taken
        _, generating = runtime.continue_greedily(windows[0].tolist(), _GENERATED)
        version = runtime.version
    logits = torch.stack(found)
    with torch.no_grad(), _inputs_in_eight_bits(prepared):
        rounded = primary_output(prepared.module(windows))
    ours, theirs = log_softmax(reference.double(), -1), log_softmax(logits.double(), -1)
    following = windows[:, 1:, None]
    ran = TextRun(
        runtime="llama.cpp",
        version=version,
        n_windows=len(windows),
        n_tokens=windows.numel(),
        relative=_apart(logits, reference),
        explained=_apart(rounded, reference),
        kl=float((ours.exp() * (ours - theirs)).sum(-1).mean()),
        log_likelihood=float(theirs[:, :-1].gather(2, following).mean()),
        planned_log_likelihood=float(ours[:, :-1].gather(2, following).mean()),
        same_top=float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()),
        texts=n_texts,
        texts_alike=n_texts - len(different),
        prompt_tokens_per_second=round(windows.numel() / seconds, 1),
        tokens_per_second=round((_GENERATED - 1) / generating, 1),
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
    tokens, reference = tokens[whole, :_LONGEST], prepared.reference[whole, :_LONGEST]
    n = min(_MOST_WINDOWS, max(1, _MOST_TOKENS // tokens.shape[1]))
    return tokens[:n], reference[:n]


def _apart(values: Tensor, reference: Tensor) -> float:
    """Return the norm of the difference over that of the reference, both about their means.

    What all logits of a token have in common changes no probability.
    """
    values, reference = values.double(), reference.double()
    values = values - values.mean(-1, keepdim=True)
    reference = reference - reference.mean(-1, keepdim=True)
    return float((values - reference).norm() / reference.norm())


class _inputs_in_eight_bits:  # noqa: N801  # a context manager
    """While it is open, quantized linear layers of the plan's model round their inputs.

    Blocks of 32 have a scale in fp16 (Q8_0), blocks of 256 one in float32 (Q8_K).
    """

    def __init__(self, prepared: PreparedExport) -> None:
        self._hooks = [
            module.register_forward_pre_hook(_rounding(block))
            for module, block in _rounded_layers(prepared)
        ]

    def __enter__(self) -> None:
        """Do nothing more."""

    def __exit__(self, *_: object) -> None:
        """Take the rounding out."""
        for hook in self._hooks:
            hook.remove()


def _rounded_layers(prepared: PreparedExport) -> Iterator[tuple[nn.Module, int]]:
    for name, weight in prepared.weights.items():
        block = K_BLOCK if weight.scheme.grid is Grid.K_BLOCKS else BLOCK
        layer = prepared.layers[name]
        for tensor in (layer.weight_name, *layer.aliases):
            module = prepared.module.get_submodule(tensor.rpartition(".")[0])
            if isinstance(module, torch.nn.Linear):
                yield module, block


def _rounding(block: int) -> Any:  # noqa: ANN401  # a hook
    def rounded(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        blocks = inputs[0].reshape(*inputs[0].shape[:-1], -1, block)
        step = blocks.abs().amax(-1, keepdim=True) / 127
        if block == BLOCK:
            step = step.half().to(blocks.dtype)
        codes = (blocks / torch.where(step == 0, 1, step)).round().clamp(-127, 127)
        return ((codes * step).flatten(-2), *inputs[1:])

    return rounded


def _compare_tokens(runtime: LlamaCpp, tokenizer: Path | None) -> tuple[int, list[str]]:
    """Return how many texts were split, and those with other tokens in llama.cpp.

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

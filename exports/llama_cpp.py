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

from bitquota.candidates.storage import K_BLOCK, Grid
from bitquota.errors import ExportFailed, MissingDependency
from bitquota.exports.gguf_blocks import BLOCK
from bitquota.exports.text_run import GENERATED, LONGEST, run_windows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from bitquota.canonical import JsonObject
    from bitquota.exports.export_report import TextRun
    from bitquota.exports.prepared import PreparedExport

MISSING = "llama.cpp did not run the file: pip install bitquota[llama-cpp]"


class LlamaCpp:
    """A GGUF file in llama.cpp, in a process of its own, on one thread of the processor.

    Attributes:
        name: ``llama.cpp``.
        version: Of xllamacpp.
        n_vocab: Tokens that the file knows.

    Args:
        path: The file.
        context: Positions that are kept.

    Raises:
        MissingDependency: xllamacpp is not installed, or of an unknown build.
        ExportFailed: llama.cpp does not load the file, or ends while it computes.
    """

    name = "llama.cpp"

    def __init__(self, path: Path, context: int = LONGEST) -> None:
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

    Args:
        prepared: What the file was written from.
        path: The file.
        tokenizer: The ``tokenizer.json`` that the file holds too, if it has one.

    Cost: two passes over up to 32 windows of up to 512 tokens, 4,096 in all.

    Raises:
        ExportFailed: llama.cpp does not load or run the file.
    """
    with LlamaCpp(path, LONGEST + GENERATED) as runtime:
        return run_windows(prepared, runtime, tokenizer, rounding=_inputs_in_eight_bits)


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

"""llama.cpp through its C interface, from the library inside the package ``xllamacpp``.

The package's own Python interface is a server that answers with texts; logits and tokens are in
``llama.h``. Parameters are passed on as llama.cpp's defaults, a block of bytes of which only the
first three numbers are changed, because the rest differs from version to version. llama.cpp ends
its process where a file breaks an assertion, so this module is run as a process of its own
(``bitquota.exports.llama_cpp``): requests are lines of JSON, answers too, with logits behind them.

References:
    ggml-org/llama.cpp: include/llama.h

Design: docs/design/targets.md
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitquota.errors import BitquotaError, ExportFailed, MissingDependency

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import BinaryIO

    from numpy.typing import NDArray

    from bitquota.canonical import JsonObject

_DEFAULTS = (512, 2048, 512)
"""Context, batch and physical batch of llama.cpp's defaults: how their places are recognized."""


class _Parameters(ctypes.Structure):
    """Room for any version's parameters: functions read and write what they know of them."""

    _fields_ = (("numbers", ctypes.c_uint32 * 256),)


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)


def load_library() -> tuple[Any, str]:
    """Return the library and the version of the package.

    Raises:
        MissingDependency: The package is missing, or has no such library.
    """
    try:
        import xllamacpp
    except ImportError as err:
        msg = "llama.cpp needs xllamacpp; install it with: pip install bitquota[llama-cpp]"
        raise MissingDependency(msg) from err
    folder = Path(xllamacpp.__file__).parent
    try:
        library = ctypes.CDLL(str(next(iter(sorted(folder.glob("*.so"))))))
        _declare(library)
    except (StopIteration, OSError, AttributeError) as err:
        msg = (
            f"llama.cpp needs a build of xllamacpp that exports llama.h; that in '{folder}' does "
            "not: install another version"
        )
        raise MissingDependency(msg) from err
    return library, str(xllamacpp.__version__)


def _declare(library: Any) -> None:  # noqa: ANN401  # ctypes
    """Say what each function takes and returns."""
    pointer, whole, text, flag = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p, ctypes.c_bool
    floats, tokens = ctypes.POINTER(ctypes.c_float), ctypes.POINTER(ctypes.c_int32)
    for name, result, *takes in (
        ("llama_backend_init", None),
        ("llama_log_set", None, _LOG, pointer),
        ("llama_model_default_params", _Parameters),
        ("llama_context_default_params", _Parameters),
        ("llama_model_load_from_file", pointer, text, _Parameters),
        ("llama_init_from_model", pointer, pointer, _Parameters),
        ("llama_model_get_vocab", pointer, pointer),
        ("llama_vocab_n_tokens", whole, pointer),
        ("llama_tokenize", whole, pointer, text, whole, tokens, whole, flag, flag),
        ("llama_detokenize", whole, pointer, tokens, whole, text, whole, flag, flag),
        ("llama_set_n_threads", None, pointer, whole, whole),
        ("llama_batch_init", _Batch, whole, whole, whole),
        ("llama_decode", whole, pointer, _Batch),
        ("llama_get_logits", floats, pointer),
        ("llama_get_memory", pointer, pointer),
        ("llama_memory_clear", None, pointer, flag),
    ):  # fmt: skip
        function = getattr(library, name)
        function.restype, function.argtypes = result, takes


class LoadedGguf:
    """A GGUF file in llama.cpp, in this process.

    Args:
        path: The file.
        context: Positions that are kept.

    Raises:
        ExportFailed: llama.cpp does not load the file; its own last words are in the message.
        MissingDependency: See ``load_library``.
    """

    def __init__(self, path: Path, context: int) -> None:
        self.library, self.version = load_library()
        self._said: list[str] = []
        self._log = _LOG(lambda _level, text, _: self._said.append(text.decode("utf-8", "replace")))
        self.library.llama_log_set(self._log, None)
        self.library.llama_backend_init()
        model = self.library.llama_model_load_from_file(
            str(path).encode(), self.library.llama_model_default_params()
        )
        given = self.library.llama_context_default_params()
        if tuple(given.numbers[:3]) != _DEFAULTS:
            msg = (
                f"llama.cpp's parameters must begin with {_DEFAULTS}; those of xllamacpp "
                f"{self.version} begin with {tuple(given.numbers[:3])}: install another version"
            )
            raise MissingDependency(msg)
        given.numbers[:3] = (context, context, context)
        self._state = model and self.library.llama_init_from_model(model, given)
        if not self._state:
            raise ExportFailed(f"llama.cpp must load '{path.name}'; it says: {self._last_words()}")
        self.library.llama_set_n_threads(self._state, 1, 1)
        self._vocabulary = self.library.llama_model_get_vocab(model)
        self.n_vocab = int(self.library.llama_vocab_n_tokens(self._vocabulary))
        self._batch = self.library.llama_batch_init(context, 0, 1)
        self._context = context

    def _last_words(self) -> str:
        lines = "".join(self._said).splitlines()
        wrong = [line for line in lines if "error" in line or "fail" in line]
        return " / ".join((wrong or lines)[-3:])

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """Return the tokens of ``text``; ``special`` adds what a text begins and ends with."""
        raw = text.encode()
        found = (ctypes.c_int32 * (len(raw) + 8))()
        n = self.library.llama_tokenize(
            self._vocabulary, raw, len(raw), found, len(found), special, 1
        )
        if n < 0:
            raise ExportFailed(f"llama.cpp must split a text into tokens; got code {n}")
        return list(found[:n])

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of ``tokens``."""
        given = (ctypes.c_int32 * len(tokens))(*tokens)
        room = ctypes.create_string_buffer(64 * len(tokens) + 64)
        n = self.library.llama_detokenize(
            self._vocabulary, given, len(tokens), room, len(room), 0, 1
        )
        return room.raw[: max(n, 0)].decode("utf-8", "replace")

    def logits(self, tokens: Sequence[int]) -> tuple[NDArray[np.float32], float]:
        """Return logits behind each of ``tokens``, f32[n, tokens known], and the seconds."""
        self.library.llama_memory_clear(self.library.llama_get_memory(self._state), 1)
        start = time.perf_counter()
        self._decode(tokens, 0)
        found = self.library.llama_get_logits(self._state)
        values = np.ctypeslib.as_array(found, (len(tokens), self.n_vocab)).copy()
        return values, time.perf_counter() - start

    def continue_greedily(self, tokens: Sequence[int], n: int) -> tuple[list[int], float]:
        """Return the ``n`` most probable next tokens, and the seconds of all but the first."""
        made = [int(self.logits(tokens)[0][-1].argmax())]
        start = time.perf_counter()
        for k in range(n - 1):
            self._decode(made[-1:], len(tokens) + k)
            found = np.ctypeslib.as_array(
                self.library.llama_get_logits(self._state), (self.n_vocab,)
            )
            made.append(int(found.argmax()))
        return made, time.perf_counter() - start

    def _decode(self, tokens: Sequence[int], first: int) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for k, token in enumerate(tokens):
            batch.token[k], batch.pos[k] = token, first + k
            batch.n_seq_id[k], batch.seq_id[k][0], batch.logits[k] = 1, 0, 1
        if code := self.library.llama_decode(self._state, batch):
            raise ExportFailed(f"llama.cpp must compute {len(tokens)} tokens; got code {code}")


def main() -> None:
    """Answer requests about a file until the input ends.

    Arguments are the file and the positions that are kept. A request ``{"do": NAME, ...}`` names a
    method of ``LoadedGguf``; the answer to ``logits`` is followed by its numbers.
    """
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever the library prints is no answer
    try:
        loaded = LoadedGguf(Path(sys.argv[1]), int(sys.argv[2]))
        _answer(answers, {"version": loaded.version, "n_vocab": loaded.n_vocab})
        for line in sys.stdin:
            request = json.loads(line)
            found = getattr(loaded, request.pop("do"))(**request)
            if "special" in request or isinstance(found, str):
                _answer(answers, {"found": found})
                continue
            values, seconds = found
            if isinstance(values, np.ndarray):
                _answer(answers, {"seconds": seconds, "shape": values.shape}, values.tobytes())
            else:
                _answer(answers, {"seconds": seconds, "found": values})
    except BitquotaError as err:
        _answer(answers, {"error": err.message, "missing": isinstance(err, MissingDependency)})


def _answer(answers: BinaryIO, said: JsonObject, numbers: bytes = b"") -> None:
    answers.write(json.dumps(said).encode() + b"\n" + numbers)
    answers.flush()


if __name__ == "__main__":
    main()

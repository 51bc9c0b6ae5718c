"""Text as a calibration set: tokenized, cut into windows of one length."""

from __future__ import annotations

from pathlib import Path

import torch

from bitquota.errors import InvalidCalibration, MissingDependency
from bitquota.models.calibration import CalibrationSet
from bitquota.models.gguf_folder import unpacked_gguf
from bitquota.models.sources import BYTES, require_tokenizer
from bitquota.models.tables import MAX_BYTES

DEFAULT_LENGTH = 128


def load_text(
    path: Path,
    *,
    tokenizer: str | None = None,
    length: int = DEFAULT_LENGTH,
    n: int | None = None,
    seed: int = 0,
) -> CalibrationSet:
    """Return the windows of a ``.txt``, as ``text_windows`` does, and raise what it raises."""
    if path.stat().st_size > MAX_BYTES:
        msg = f"a text must be at most {MAX_BYTES:,} bytes; '{path.name}' is larger"
        raise InvalidCalibration(msg, source=str(path))
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as err:
        msg = f"a text must be UTF-8; '{path.name}' is not: {err!r}"
        raise InvalidCalibration(msg, source=str(path)) from err
    return text_windows(text, path, tokenizer=tokenizer, length=length, n=n, seed=seed)


def text_windows(
    text: str,
    path: Path,
    *,
    tokenizer: str | None,
    length: int,
    n: int | None = None,
    seed: int = 0,
) -> CalibrationSet:
    """Return windows of ``length`` tokens, without overlap; what is left at the end is dropped.

    The windows carry no labels: of a language model, the next tokens are the labels.

    Args:
        text: What is tokenized, documents joined by an empty line.
        path: Where it is from.
        tokenizer: A folder with ``tokenizer.json`` (the model's own), or ``bytes``.
        length: Tokens per sample.
        n: Draw this many windows, in their original order; all if left out.
        seed: Of that draw.

    Raises:
        InvalidCalibration: No tokenizer, or less than one window.
        MissingDependency: ``tokenizers`` is not installed.
    """
    if length < 2:
        msg = f"a window must have at least 2 tokens; got {length}"
        raise InvalidCalibration(msg, length=length)
    ids = _tokenize(text, require_tokenizer(path, tokenizer))
    windows = len(ids) // length
    if windows == 0:
        msg = f"'{path.name}' must have at least {length} tokens; it has {len(ids)}"
        raise InvalidCalibration(msg, tokens=len(ids))
    tokens = torch.tensor(ids[: windows * length], dtype=torch.int64).reshape(windows, length)
    whole = CalibrationSet(inputs=(tokens,))
    return whole if n is None or n == len(whole) else whole.subset(n, seed)


def _tokenize(text: str, tokenizer: str) -> list[int]:
    if tokenizer == BYTES:
        return list(text.encode())
    folder = Path(tokenizer)
    if folder.suffix == ".gguf":
        folder = unpacked_gguf(folder)
    file = folder / "tokenizer.json"
    if not file.is_file():
        msg = f"'{tokenizer}' must hold a tokenizer whose rules are known; name one: --tokenizer"
        raise InvalidCalibration(msg, tokenizer=tokenizer)
    try:
        from tokenizers import Tokenizer
    except ImportError as err:
        msg = "tokenizing text needs tokenizers; install it with: pip install bitquota[hf]"
        raise MissingDependency(msg) from err
    try:
        loaded = Tokenizer.from_file(str(file))
    except Exception as err:  # tokenizers raises plain Exception
        msg = f"'{file}' must be a tokenizer that the tokenizers package reads; it says: {err}"
        raise InvalidCalibration(msg, tokenizer=tokenizer) from err
    ids: list[int] = loaded.encode(text, add_special_tokens=False).ids
    return ids

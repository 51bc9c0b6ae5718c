"""Text as a calibration set: tokenized, cut into windows of one length."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bitquota.errors import InvalidCalibration, MissingDependency
from bitquota.models.calibration import CalibrationSet
from bitquota.models.gguf_folder import unpacked_gguf
from bitquota.models.sources import BYTES, require_tokenizer
from bitquota.models.tables import MAX_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bitquota.models.tables import Conversation

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


def conversation_text(
    conversations: Sequence[Conversation], path: Path, *, tokenizer: str | None
) -> str:
    """Return conversations as the model's own chat template writes them, one behind the other.

    Args:
        conversations: Their messages.
        path: Where they are from.
        tokenizer: A folder with ``tokenizer.json`` and a chat template, or a ``.gguf`` with both.

    Raises:
        InvalidCalibration: No tokenizer, no template, or messages that it does not take.
        MissingDependency: ``transformers`` is not installed.
    """
    tokenizer = require_tokenizer(path, tokenizer)
    try:
        from transformers import AutoTokenizer
    except ImportError as err:
        msg = "chat templates need transformers; install it with: pip install bitquota[hf]"
        raise MissingDependency(msg) from err
    reason = "it has no chat template"
    if tokenizer != BYTES:
        try:
            # Templates run in Jinja's sandbox; code of the folder does not run.
            loaded = AutoTokenizer.from_pretrained(
                str(_folder_of(tokenizer)), local_files_only=True, trust_remote_code=False
            )
            if loaded.chat_template:
                return "".join(
                    loaded.apply_chat_template(messages, tokenize=False)
                    for messages in conversations
                )
        except Exception as err:  # noqa: BLE001  # tokenizers and templates may fail in any way
            reason = str(err).strip().splitlines()[0][:200] if str(err).strip() else repr(err)
    msg = (
        f"the tokenizer '{tokenizer}' must write the messages of '{path.name}' by its chat "
        f"template; {reason}: write them as a column 'text' yourself"
    )
    raise InvalidCalibration(msg, source=str(path), tokenizer=tokenizer)


def _folder_of(tokenizer: str) -> Path:
    folder = Path(tokenizer)
    return unpacked_gguf(folder) if folder.suffix == ".gguf" else folder


def _tokenize(text: str, tokenizer: str) -> list[int]:
    if tokenizer == BYTES:
        return list(text.encode())
    file = _folder_of(tokenizer) / "tokenizer.json"
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

"""Text as a calibration set: tokenized, cut into windows of one length."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from bitquota.errors import InvalidCalibration, MissingDependency
from bitquota.models.calibration import CalibrationSet
from bitquota.models.sources import BYTES, require_tokenizer

DEFAULT_LENGTH = 128
MAX_BYTES = 2**31


def load_text(
    path: Path,
    *,
    tokenizer: str | None = None,
    length: int = DEFAULT_LENGTH,
    n: int | None = None,
    seed: int = 0,
) -> CalibrationSet:
    """Return windows of ``length`` tokens, without overlap; what is left at the end is dropped.

    The windows carry no labels: of a language model, the next tokens are the labels.

    Args:
        path: ``.txt``, read as one text, or ``.jsonl`` with one object per line whose ``text``
            is a document, or ``.parquet`` with a column ``text`` of them; documents are joined by
            an empty line.
        tokenizer: A folder with ``tokenizer.json`` (the model's own), or ``bytes``.
        length: Tokens per sample.
        n: Draw this many windows, in their original order; all if left out.
        seed: Of that draw.

    Raises:
        InvalidCalibration: Unreadable text, no tokenizer, or less than one window.
        MissingDependency: ``tokenizers`` is not installed, or for parquet ``pyarrow``.
    """
    if length < 2:
        msg = f"a window must have at least 2 tokens; got {length}"
        raise InvalidCalibration(msg, length=length)
    tokenizer = require_tokenizer(path, tokenizer)
    ids = _tokenize(_read(path), tokenizer)
    windows = len(ids) // length
    if windows == 0:
        msg = f"'{path.name}' must have at least {length} tokens; it has {len(ids)}"
        raise InvalidCalibration(msg, tokens=len(ids))
    tokens = torch.tensor(ids[: windows * length], dtype=torch.int64).reshape(windows, length)
    whole = CalibrationSet(inputs=(tokens,))
    return whole if n is None or n == len(whole) else whole.subset(n, seed)


def _read(path: Path) -> str:
    if path.stat().st_size > MAX_BYTES:
        msg = f"a text must be at most {MAX_BYTES:,} bytes; '{path.name}' is larger"
        raise InvalidCalibration(msg, source=str(path))
    if path.suffix == ".parquet":
        return "\n\n".join(_parquet_documents(path))
    try:
        raw = path.read_text(encoding="utf-8")
        if path.suffix != ".jsonl":
            return raw
        documents = [json.loads(line) for line in raw.splitlines() if line.strip()]
        return "\n\n".join(document["text"] for document in documents)
    except (OSError, ValueError, KeyError, TypeError) as err:
        msg = (
            f"a text must be UTF-8, and each line of a .jsonl an object with a 'text'; "
            f"'{path.name}' is not: {err!r}"
        )
        raise InvalidCalibration(msg, source=str(path)) from err


def _parquet_documents(path: Path) -> list[str]:
    try:
        from pyarrow import ArrowException, parquet, types
    except ImportError as err:
        msg = "texts in .parquet need pyarrow; install it with: pip install bitquota[parquet]"
        raise MissingDependency(msg) from err
    try:
        with parquet.ParquetFile(path) as file:
            rows = file.metadata.num_rows
            columns = {field.name: field.type for field in file.schema_arrow}
            kind = columns.get("text")
            if kind is None or not (types.is_string(kind) or types.is_large_string(kind)):
                msg = (
                    f"a .parquet must have a column 'text' of strings; '{path.name}' has "
                    f"{', '.join(f'{n} ({k})' for n, k in columns.items())} in {rows} rows"
                )
                raise InvalidCalibration(msg, source=str(path))
            documents: list[str] = []
            total = 0
            # In pieces: a small file may unpack to a large one.
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                total += batch.nbytes
                if total > MAX_BYTES:
                    msg = (
                        f"a text must be at most {MAX_BYTES:,} bytes; '{path.name}' unpacks to more"
                    )
                    raise InvalidCalibration(msg, source=str(path))
                documents += [text for text in batch.column(0).to_pylist() if text]
    except (OSError, ArrowException) as err:
        msg = f"a .parquet must be a whole file; '{path.name}' cannot be read: {err}"
        raise InvalidCalibration(msg, source=str(path)) from err
    return documents


def _tokenize(text: str, tokenizer: str) -> list[int]:
    if tokenizer == BYTES:
        return list(text.encode())
    file = Path(tokenizer) / "tokenizer.json"
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

"""Tables in: ``.jsonl`` and ``.parquet``, whose columns are documents or inputs by their names.

Design: docs/design/models.md
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from bitquota.errors import InvalidCalibration, MissingDependency

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

TEXT_COLUMN = "text"

MESSAGES_COLUMN = "messages"

Conversation = list[dict[str, Any]]
"""Messages in order, each with its ``role`` and ``content``."""

MAX_BYTES = 2**31
"""Bytes of a text, or of a table when it is unpacked."""


def read_table(
    path: Path, *, max_bytes: int = MAX_BYTES
) -> str | list[Conversation] | dict[str, NDArray[Any]]:
    """Return the documents of a table with a column ``text`` of strings, else all its columns.

    A column ``messages`` of lists of objects holds conversations, which a tokenizer's chat template
    makes a text of.

    A column holds numbers, or lists of them (nested for more dimensions) that are equally long in
    each row.

    Args:
        path: ``.jsonl`` with one object per line, all with the same keys, or ``.parquet``.
        max_bytes: That it may unpack to.

    Returns:
        The documents joined by an empty line, the conversations, or an array ``[N, ...]`` for each
        column.

    Raises:
        InvalidCalibration: Not a whole file, rows of different keys or lengths, or columns that
            hold something else.
        MissingDependency: A ``.parquet`` without ``pyarrow``.
    """
    read = _read_parquet if path.suffix == ".parquet" else _read_jsonl
    return read(path, max_bytes)


def _read_jsonl(path: Path, max_bytes: int) -> str | list[Conversation] | dict[str, NDArray[Any]]:
    rows = _objects(path, max_bytes)
    names = list(rows[0]) if rows else []
    if TEXT_COLUMN not in names and rows and all(_talks(r.get(MESSAGES_COLUMN)) for r in rows):
        return [row[MESSAGES_COLUMN] for row in rows]
    _check_keys(path, rows, names)
    if TEXT_COLUMN in names:
        return "\n\n".join(row[TEXT_COLUMN] for row in rows)
    return {name: _listed(path, name, [row[name] for row in rows]) for name in names}


def _objects(path: Path, max_bytes: int) -> list[dict[str, Any]]:
    """Return the object of each line of a ``.jsonl``."""
    if path.stat().st_size > max_bytes:
        raise _too_large(path, max_bytes)
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as err:
        msg = f"each line of a .jsonl must be an object in UTF-8; '{path.name}' is not: {err!r}"
        raise InvalidCalibration(msg, source=str(path)) from err
    if not all(isinstance(row, dict) for row in rows):
        msg = f"each line of a .jsonl must be an object; '{path.name}' has others"
        raise InvalidCalibration(msg, source=str(path))
    return rows


def _check_keys(path: Path, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Raise unless each row has a text, or all have the keys of the first."""
    for k, row in enumerate(rows):
        if TEXT_COLUMN in names and isinstance(row.get(TEXT_COLUMN), str):
            continue
        if TEXT_COLUMN not in names and set(row) == set(names):
            continue
        msg = (
            f"all lines of a .jsonl must have the same keys, or a '{TEXT_COLUMN}' each; in "
            f"'{path.name}' object 1 has {', '.join(names)} and object {k + 1} "
            f"{', '.join(row)}"
        )
        raise InvalidCalibration(msg, source=str(path))


def _talks(value: object) -> bool:
    """Whether this is a conversation."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)
    )


def _listed(path: Path, name: str, values: Sequence[Any]) -> NDArray[Any]:
    """Return the values of a key as one array."""
    try:
        array = np.asarray(values)
    except ValueError:  # numpy's word for lists of different lengths
        _refuse(path, name, "lists of different lengths")
    if array.dtype.kind not in "iufb":
        _refuse(path, name, "something else (text, null, objects, or too large numbers)")
    return array


def _read_parquet(path: Path, max_bytes: int) -> str | list[Conversation] | dict[str, NDArray[Any]]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as err:
        msg = "samples in .parquet need pyarrow; install it with: pip install bitquota[parquet]"
        raise MissingDependency(msg) from err
    try:
        with parquet.ParquetFile(path) as file:
            names = [field.name for field in file.schema_arrow]
            words = _column_of_words(file.schema_arrow)
            batches, total = [], 0
            # In pieces: a small file may unpack to a large one.
            for batch in file.iter_batches(batch_size=1024, columns=[words] if words else names):
                total += batch.nbytes
                if total > max_bytes:
                    raise _too_large(path, max_bytes)
                batches.append(batch)
            if words == TEXT_COLUMN:
                documents = (text for b in batches for text in b.column(0).to_pylist() if text)
                return "\n\n".join(documents)
            if words == MESSAGES_COLUMN:
                return [talk for b in batches for talk in b.column(0).to_pylist() if _talks(talk)]
            table = pa.Table.from_batches(batches, file.schema_arrow)
            return {name: _column(path, name, table.column(name)) for name in names}
    except (OSError, pa.ArrowException) as err:
        msg = f"a .parquet must be a whole file; '{path.name}' cannot be read: {err}"
        raise InvalidCalibration(msg, source=str(path)) from err


def _column_of_words(schema: Any) -> str | None:  # noqa: ANN401  # pyarrow's
    """Return the column that holds documents or conversations, if there is one."""
    from pyarrow import types

    kinds = {field.name: field.type for field in schema}
    text, talks = kinds.get(TEXT_COLUMN), kinds.get(MESSAGES_COLUMN)
    if text is not None and (types.is_string(text) or types.is_large_string(text)):
        return TEXT_COLUMN
    if talks is not None and types.is_list(talks) and types.is_struct(talks.value_type):
        return MESSAGES_COLUMN
    return None


def _column(path: Path, name: str, column: Any) -> NDArray[Any]:  # noqa: ANN401  # pyarrow's
    """Return a column of numbers, or of nested lists of one length, as one array."""
    from pyarrow import compute, types

    values, shape = column.combine_chunks(), [len(column)]
    while types.is_list(values.type) or types.is_large_list(values.type) or (
        types.is_fixed_size_list(values.type)
    ):  # fmt: skip
        lengths = compute.unique(compute.list_value_length(values)).to_pylist()
        if len(lengths) > 1 or None in lengths:
            _refuse(path, name, "lists of different lengths")
        values = values.flatten()
        shape += lengths
    kind = values.type
    if not (types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)):
        _refuse(path, name, f"values of type {kind}")
    if values.null_count:
        _refuse(path, name, "missing values")
    array: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return array.reshape(shape)


def _refuse(path: Path, name: str, got: str) -> NoReturn:
    msg = (
        f"a column of samples must hold numbers, or lists of numbers that are equally long in each "
        f"row (or be '{TEXT_COLUMN}' and hold documents); '{name}' of '{path.name}' holds {got}: "
        "leave it out, or pad it to one length"
    )
    raise InvalidCalibration(msg, source=str(path), column=name)


def _too_large(path: Path, max_bytes: int) -> InvalidCalibration:
    msg = f"a table must unpack to at most {max_bytes:,} bytes; '{path.name}' is larger"
    return InvalidCalibration(msg, source=str(path))

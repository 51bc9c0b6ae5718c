"""Files of tensors that are too many to be in memory at once.

Design: docs/design/language-models.md
"""

from __future__ import annotations

import json
import tempfile
from typing import IO, TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from bitquota.canonical import JsonObject

_TYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3", torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32",
    torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64",
}  # fmt: skip
"""Types of safetensors, in the order of its own enumeration: files hold the last of them first."""


def write_tensors(
    file: IO[bytes], tensors: Iterable[tuple[str, Tensor]], *, metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file from tensors that are made one after the other.

    The bytes are those of ``safetensors.torch.save_file``. Tensors wait in a temporary file, so one
    of them is in memory. ``metadata`` is read after the last of them.
    """
    ranks = {dtype: rank for rank, dtype in enumerate(_TYPES)}
    places: dict[str, tuple[torch.dtype, list[int], int, int]] = {}
    with tempfile.TemporaryFile() as waiting:
        for name, tensor in tensors:
            data = tensor.detach().cpu().contiguous()
            start = waiting.tell()
            waiting.write(data.reshape(-1).view(torch.uint8).numpy().data)
            places[name] = data.dtype, list(data.shape), start, waiting.tell() - start
        order = sorted(places, key=lambda name: (-ranks[places[name][0]], name))
        header: JsonObject = {"__metadata__": dict(metadata)}
        end = 0
        for name in order:
            dtype, shape, _, size = places[name]
            offsets = [end, end + size]
            header[name] = {"dtype": _TYPES[dtype], "shape": shape, "data_offsets": offsets}
            end += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            _, _, start, size = places[name]
            waiting.seek(start)
            for at in range(0, size, _COPIED):
                file.write(waiting.read(min(_COPIED, size - at)))


_COPIED = 2**24
"""Bytes that are copied at once."""

"""Weights that stay in their files: mapped into memory, read when they are used, let go afterwards.

Of a large model only what is being worked on is in memory. Its tensors are in the precision of the
checkpoint; whoever computes with them takes a copy in float32 (``stack.Stack.part``).

Design: docs/design/language-models.md
"""

from __future__ import annotations

import json
import mmap
import warnings
from typing import TYPE_CHECKING

import torch

from bitquota.errors import InvalidModel

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Types of safetensors that language models are stored in."""

_AHEAD_BYTES = 2**17


class Pages:
    """The tensors of safetensors files.

    Attributes:
        tensors: By name, over mapped memory, which must not be written to.
        bytes_read: How many bytes were let go after they had been read.
    """

    def __init__(self, *paths: Path) -> None:
        """Map the files; raises ``InvalidModel`` for a type of tensor that is not known."""
        self.tensors: dict[str, Tensor] = {}
        self.bytes_read = 0
        self._places: dict[int, tuple[mmap.mmap, int, int]] = {}
        for path in paths:
            self._map(path)

    def release(self, module: nn.Module, read_bytes: int | None = None) -> None:
        """Let the operating system take back the memory of a module's mapped tensors."""
        for tensor in (*module.parameters(), *module.buffers()):
            self.release_tensor(tensor, read_bytes)

    def release_tensor(self, tensor: Tensor, read_bytes: int | None = None) -> None:
        """Let the memory of a tensor go, if it is mapped; it is read again when it is used.

        ``read_bytes`` is how much of it was read, if not all.
        """
        place = self._places.get(tensor.untyped_storage().data_ptr())
        if place is None:
            return
        mapped, start, length = place
        self.bytes_read += length if read_bytes is None else read_bytes
        # Whole pages only: those at the ends are shared with the tensors beside it.
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (start + length) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            mapped.madvise(mmap.MADV_DONTNEED, first, last - first)

    def prefetch(self, module: nn.Module) -> None:
        """Have the operating system begin to read a module's mapped tensors into its cache."""
        for tensor in (*module.parameters(), *module.buffers()):
            place = self._places.get(tensor.untyped_storage().data_ptr())
            if place is None:
                continue
            mapped, start, length = place
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            # Linux reads no more than about this much ahead for one request.
            for at in range(first, start + length, _AHEAD_BYTES):
                mapped.madvise(mmap.MADV_WILLNEED, at, min(_AHEAD_BYTES, start + length - at))

    def _map(self, path: Path) -> None:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
            # A writable mapping would count for the memory limit of a sandbox as a whole.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in _DTYPES:
                msg = (
                    f"weights must be stored as one of {', '.join(_DTYPES)}; '{name}' of "
                    f"'{path.name}' is {entry['dtype']}: provide the original checkpoint"
                )
                raise InvalidModel(msg, tensor=name, dtype=entry["dtype"])
            dtype = _DTYPES[entry["dtype"]]
            begin, end = entry["data_offsets"]
            start = 8 + header_bytes + begin
            count = (end - begin) // dtype.itemsize
            if not count:
                self.tensors[name] = torch.empty(entry["shape"], dtype=dtype)
                continue
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The given buffer is not writable")
                flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=start)
            self.tensors[name] = flat.reshape(entry["shape"])
            self._places[flat.untyped_storage().data_ptr()] = mapped, start, end - begin

"""Tensors that are kept for later: in memory up to a limit, then in a temporary file.

Design: docs/design/language-models.md
"""

from __future__ import annotations

import math
import os
import tempfile
import weakref
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True, eq=False)
class Keeper:
    """Keeps tensors in memory until they would take more than ``limit_bytes``, others in files.

    The operating system may drop the pages of a file, so they count for nobody's memory.

    Attributes:
        limit_bytes: What all tensors together may take in memory.
        used_bytes: What they take.
        most_bytes: The most that they took.
        written_bytes: What was written to files.
    """

    limit_bytes: int
    used_bytes: int = 0
    most_bytes: int = 0
    written_bytes: int = 0

    def series(self) -> Series:
        """Return an empty series of tensors."""
        return Series(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    """Where in the file of a series a tensor is."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(slots=True, eq=False, weakref_slot=True)
class Series:
    """Tensors in the order in which they were added, such as activations batch after batch."""

    keeper: Keeper
    _held: list[Tensor | _Written] = field(default_factory=list)
    _file: IO[bytes] | None = None

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._held)

    def append(self, tensor: Tensor) -> None:
        """Keep one more tensor."""
        tensor = tensor.detach()
        size = tensor.numel() * tensor.element_size()
        keeper = self.keeper
        if keeper.used_bytes + size <= keeper.limit_bytes:
            keeper.used_bytes += size
            keeper.most_bytes = max(keeper.most_bytes, keeper.used_bytes)
            # A view would hold on to all that it was cut from.
            whole = tensor.numel() == tensor.untyped_storage().nbytes() // tensor.element_size()
            self._held.append(tensor if whole else tensor.clone())
            return
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the series
            weakref.finalize(self, self._file.close)
        start = self._file.seek(0, 2)
        flat = tensor.contiguous().cpu().reshape(-1)
        self._file.write(flat.view(torch.uint8).numpy().data)
        self._file.flush()  # what is read, here and in forked processes, is read from the file
        keeper.written_bytes += size
        written = _Written(
            start=start, shape=tuple(tensor.shape), dtype=tensor.dtype, device=tensor.device
        )
        self._held.append(written)

    def __getitem__(self, k: int) -> Tensor:
        """Return the ``k``-th tensor."""
        found = self._held[k]
        if not isinstance(found, _Written):
            return found
        assert self._file is not None  # noqa: S101  # it was written
        size = math.prod(found.shape) * found.dtype.itemsize
        content = np.empty(size, np.uint8)
        # Forked processes share one position in the file.
        done = 0
        while done < size:
            done += os.preadv(self._file.fileno(), [content.data[done:]], found.start + done)
        return torch.from_numpy(content).view(found.dtype).reshape(found.shape).to(found.device)

    def drop(self) -> None:
        """Forget all tensors."""
        for tensor in self._held:
            if not isinstance(tensor, _Written):
                self.keeper.used_bytes -= tensor.numel() * tensor.element_size()
        self._held.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

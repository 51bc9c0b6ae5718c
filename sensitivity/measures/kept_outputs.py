"""Outputs of many variants on the same samples: in memory, or in a file where they are large."""

from __future__ import annotations

import math
import tempfile
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor


class KeptOutputs:
    """Takes the outputs ``[n, ...]`` of ``k`` variants one by one, and gives them back by samples.

    In memory up to ``limit_bytes``; beyond that in a temporary file, whose pages the operating
    system may drop. A context manager: the file ends with it.

    Args:
        k: How many variants there will be.
        like: An output of the kind to come, f32[n, ...].
        limit_bytes: What all together may take in memory.
    """

    def __init__(self, k: int, like: Tensor, limit_bytes: int) -> None:
        self._like = like
        self._held: list[Tensor] = []
        large = k * like.numel() * like.element_size() > limit_bytes
        self._file = tempfile.TemporaryFile() if large else None  # noqa: SIM115  # closed by __exit__
        self._count = 0

    def append(self, output: Tensor) -> None:
        """Keep the output of the next variant."""
        if self._file is None:
            self._held.append(output)
        else:
            self._file.write(output.to(self._like.dtype).contiguous().cpu().numpy().data)
        self._count += 1

    def samples(self, rows: slice) -> Tensor:
        """Return f32[k, rows, ...] on the device of the outputs."""
        if self._file is None:
            return torch.stack([output[rows] for output in self._held])
        dtype = np.dtype(str(self._like.dtype).removeprefix("torch."))
        shape = self._like[rows].shape
        size = dtype.itemsize * math.prod(self._like.shape[1:])
        found = np.empty((self._count, *shape), dtype)
        start = rows.start * size
        for variant in range(self._count):
            self._file.seek(variant * size * len(self._like) + start)
            self._file.readinto(found[variant].reshape(-1).view(np.uint8).data)
        return torch.from_numpy(found).to(self._like.device)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Drop what is kept."""
        self._held.clear()
        if self._file is not None:
            self._file.close()

"""What is seen of the full-precision model, kept so that it is run once for each chunk."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

REFERENCE_BYTES = 2**28
"""How much of the full-precision outputs a runner keeps, so that they are computed once."""


@dataclass(slots=True)
class References:
    """Full-precision outputs by chunk: all of them while they are small, else the last one.

    ``statistics`` are the moments of batch norms' inputs, by batch of the samples that the
    correction is fitted on (``reestimate_batch_norm``).
    """

    limit_bytes: int = REFERENCE_BYTES
    kept: dict[int, Tensor] = field(default_factory=dict)
    statistics: dict[int, Any] = field(default_factory=dict)

    def get(self, chunk: int, compute: Callable[[], Tensor]) -> Tensor:
        """Return the output of a chunk, computed if it is not kept."""
        if chunk not in self.kept:
            output = compute()
            others = sum(v.numel() * v.element_size() for v in self.kept.values())
            if others + output.numel() * output.element_size() > self.limit_bytes:
                self.kept.clear()
            self.kept[chunk] = output
        return self.kept[chunk]

"""Orthogonal matrices that are stored as a few numbers and multiplied with in few operations.

References:
    [QuIP#] A. Tseng et al., "QuIP#: Even Better LLM Quantization with Hadamard Incoherence and
    Lattice Codebooks", 2024, arXiv 2402.04396, section 3.

Design: docs/design/rounding.md
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

if TYPE_CHECKING:
    from torch import Tensor

VALUES_AT_ONCE = 2**22
"""Numbers that are in float64 together."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Orthogonal:
    """``Q = diag(signs) (odd ⊗ H)``, ``H`` the Hadamard matrix of the largest power of two.

    With random signs the product with ``Q`` spreads every large entry over all others ([QuIP#]).

    Attributes:
        odd: f64[q, q], orthogonal.
        signs: i8[n], 1 or -1; ``n`` is ``q`` times a power of two.
    """

    odd: Tensor
    signs: Tensor

    def __post_init__(self) -> None:
        """Check the sizes; raises ``ValueError``."""
        q, n = len(self.odd), self.signs.numel()
        if self.odd.shape != (q, q) or self.signs.shape != (n,) or not q or n % q:
            msg = f"signs must be a multiple of the {q} rows of a square matrix; got {n}"
            raise ValueError(msg)
        if (n // q).bit_count() != 1:
            msg = f"there must be a power of two times {q} signs; got {n}"
            raise ValueError(msg)

    @classmethod
    def drawn(cls, size: int, seed: int) -> Self:
        """Draw a matrix of ``size`` rows, by ``seed``."""
        generator = torch.Generator().manual_seed(seed)
        q = size // (size & -size)
        odd = torch.linalg.qr(torch.randn(q, q, dtype=torch.float64, generator=generator)).Q
        signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
        return cls(odd=odd.contiguous(), signs=signs.to(torch.int8))

    def along(self, tensor: Tensor, axis: int) -> Tensor:
        """Return ``tensor`` with each ``n`` consecutive numbers ``x`` of an axis as ``x Q``.

        Computed in float64, returned in the tensor's own type. Cost: ``q + 2 sqrt(n / q)``
        multiplications for each number.

        Raises:
            RuntimeError: The axis is not a multiple of ``n`` long.
        """
        size, q = len(self.signs), len(self.odd)
        odd, signs = self.odd.to(tensor.device), self.signs.to(tensor.device)
        # H of a power of two is the Kronecker product of two smaller ones.
        exponent = (size // q).bit_length() - 1
        first, second = (
            _hadamard(n).to(tensor.device) for n in (exponent // 2, exponent - exponent // 2)
        )
        moved = tensor.movedim(axis, -1)
        rows = moved.reshape(-1, size)
        turned = torch.empty_like(rows)
        step = max(1, VALUES_AT_ONCE // size)
        for start in range(0, len(rows), step):
            part = rows[start : start + step].double() * signs
            cube = first @ (part.reshape(-1, q, len(first), len(second)) @ second)
            mixed = torch.einsum("noab,oq->nqab", cube, odd)
            turned[start : start + step] = mixed.reshape(-1, size).to(turned.dtype)
        return turned.reshape(moved.shape).movedim(-1, axis)


def _hadamard(exponent: int) -> Tensor:
    """Return f64[2^exponent, 2^exponent], symmetric and orthogonal."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(exponent):
        top = torch.cat([matrix, matrix], dim=1)
        matrix = torch.cat([top, torch.cat([matrix, -matrix], dim=1)]) / 2**0.5
    return matrix

"""Codebook weights: learnable levels that are moved directly by exact gradients.

A reconstruction after Hoang et al. 2020, of which only the abstract could be read and no code was
released; accuracy claims of theirs are not claimed here. Weights take one of ``K = 2^b`` levels
``L``; the latent weights follow their levels (*carry*), so that moving a level never changes an
assignment by itself.

References:
    [Hoang20] T. Hoang, T. Do, T. Nguyen, N. Cheung, "Direct Quantization for Training Highly
    Accurate Low Bit-width Deep Neural Networks", IJCAI 2020, arXiv 2012.13762.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bitquota.errors import InvalidInput
from bitquota.quantizers.packing import pack_bits
from bitquota.storage import StorageSize

OUTLIER_SHARE = 0.001
"""Share of weights on each side that the start of the levels leaves out."""


def assign(values: Tensor, levels: Tensor) -> Tensor:
    """Return i64 codes: the index of the nearest level, lower index on a tie.

    Args:
        values: Any shape.
        levels: ``[K]``, ascending.
    """
    middles = (levels[1:] + levels[:-1]) / 2
    return torch.bucketize(values.detach().contiguous(), middles.detach())


class _Lookup(torch.autograd.Function):
    """``L[a]`` with the exact gradient to the levels and straight-through to the latents."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, levels: Tensor) -> Tensor:  # noqa: ANN401
        codes = assign(latents, levels)
        ctx.save_for_backward(latents, levels, codes)
        return levels[codes]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        latents, levels, codes = ctx.saved_tensors
        gradient = gradients[0]
        # dJ/dL_k is the sum of dJ/dq_i over the weights at level k: exact, no approximation.
        to_levels = torch.zeros_like(levels)
        to_levels.index_add_(0, codes.flatten(), gradient.flatten())
        reach = levels[-1] - levels[0]
        inside = (latents >= levels[0] - reach) & (latents <= levels[-1] + reach)
        return gradient * inside, to_levels


def start_levels(values: Tensor, bits: int, *, symmetric: bool = False, steps: int = 20) -> Tensor:
    """Return ``[2^b]`` ascending levels: Lloyd's k-means from the quantiles of the weights.

    Args:
        values: The weights, outliers beyond the ``OUTLIER_SHARE`` quantiles are clipped.
        bits: 1 to 8.
        symmetric: Force ``L_k = -L_(K+1-k)``.
        steps: Lloyd steps.
    """
    if not 1 <= bits <= 8:
        msg = f"a codebook must have 1 to 8 bits; got {bits}"
        raise InvalidInput(msg, bits=bits)
    flat = values.detach().double().flatten()
    if symmetric:
        flat = torch.cat([flat, -flat])
    ordered = flat.sort().values
    cut = int(OUTLIER_SHARE * len(ordered))
    ordered = ordered.clamp(float(ordered[cut]), float(ordered[-1 - cut]))
    n_levels = 2**bits
    places = ((torch.arange(n_levels) + 0.5) / n_levels * len(ordered)).long()
    levels = ordered[places.clamp(max=len(ordered) - 1)]
    for _ in range(steps):
        codes = assign(ordered, levels)
        sums = torch.zeros(n_levels, dtype=torch.float64).index_add_(0, codes, ordered)
        counts = torch.zeros(n_levels, dtype=torch.float64).index_add_(
            0, codes, torch.ones_like(ordered)
        )
        # An empty level restarts at the largest error.
        levels = torch.where(counts > 0, sums / counts.clamp(min=1), levels)
        for k in torch.nonzero(counts == 0)[:, 0].tolist():
            worst = (ordered - levels[assign(ordered, levels.sort().values)]).abs().argmax()
            levels[k] = ordered[worst]
        levels = levels.sort().values
    if symmetric:
        levels = (levels - levels.flip(0)) / 2
    return levels.to(values.dtype)


class CodebookWeight(nn.Module):
    """Levels of one weight, and what keeps them and the latent weights together.

    Args:
        values: The full-precision weights.
        bits: 1 to 8.
        symmetric: Keep ``L_k = -L_(K+1-k)``.
    """

    def __init__(self, values: Tensor, bits: int, *, symmetric: bool = False) -> None:
        super().__init__()
        self.bits, self.symmetric = bits, symmetric
        self.levels = nn.Parameter(start_levels(values, bits, symmetric=symmetric))
        self.register_buffer("previous", self.levels.detach().clone())
        self.previous: Tensor

    def forward(self, latents: Tensor) -> Tensor:
        """Return the quantized weights; the levels' gradient is divided by ``sqrt(n)``."""
        factor = 1.0 / math.sqrt(latents.numel())
        scaled = self.levels * factor + (self.levels - self.levels * factor).detach()
        quantized: Tensor = _Lookup.apply(latents, scaled)  # type: ignore[no-untyped-call]
        return quantized

    @torch.no_grad()
    def carry(self, latents: Tensor) -> None:
        """Move each latent weight along with its level, after an optimizer step, in place.

        Latents are mapped piecewise linearly: old levels to new levels, and the middles between
        old levels to the middles between new ones. So a step of the levels alone changes no
        assignment, as long as the levels keep their order. (Adding the level's movement alone, as
        one would read the paper's description, moves latents across the new middles whenever
        neighbours move by different amounts.) A movement of the latent itself is kept.
        """
        if self.symmetric:
            self.levels.copy_((self.levels - self.levels.flip(0)) / 2)
        self.levels.copy_(self.levels.sort().values)
        # Levels that meet would leave their order to chance.
        gap = 1e-6 * (self.levels[-1] - self.levels[0]).clamp(min=1e-12)
        for k in range(1, len(self.levels)):
            self.levels[k] = max(self.levels[k], self.levels[k - 1] + gap)
        codes = assign(latents, self.previous)
        residual = latents - self.previous[codes]
        old, new = self.previous.diff(), self.levels.diff()
        ratio = torch.where(old > 0, new / old.clamp(min=1e-30), 1.0)
        one = ratio.new_ones(1)
        below, above = torch.cat([one, ratio]), torch.cat([ratio, one])  # beyond the ends: shift
        stretch = torch.where(residual < 0, below[codes], above[codes])
        latents.copy_(self.levels[codes] + residual * stretch)
        self.previous.copy_(self.levels)

    def size(self, n_weights: int) -> StorageSize:
        """Return the exact storage: dense codes, and one fp32 per level."""
        codes = n_weights * self.bits
        return StorageSize(codes=codes, scales=32 * 2**self.bits, padding=-codes % 8)

    def stored(self, latents: Tensor) -> StoredCodebook:
        """Return codes and levels as they are written to disk."""
        codes = assign(latents, self.levels).cpu().numpy().astype(np.uint16)
        return StoredCodebook(
            codes=pack_bits(codes.reshape(1, -1), self.bits),
            levels=self.levels.detach().cpu().float(),
            bits=self.bits,
            shape=tuple(latents.shape),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredCodebook:
    """A codebook weight as bytes.

    Attributes:
        codes: u8[...], dense bit stream of level indices (see ``packing``).
        levels: f32[2^bits].
        bits: Bit-width.
        shape: Shape of the weight.
    """

    codes: np.ndarray[Any, np.dtype[np.uint8]]
    levels: Tensor
    bits: int
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of codes and levels."""
        return len(self.codes) + 4 * len(self.levels)

    def dequantize(self) -> Tensor:
        """Return f32 weights in their shape."""
        from bitquota.quantizers.packing import unpack_bits

        codes = unpack_bits(self.codes, 1, math.prod(self.shape), self.bits).astype(np.int64)
        return self.levels[torch.from_numpy(codes)].reshape(self.shape)

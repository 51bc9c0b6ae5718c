"""Codebook weights: learnable levels that are moved directly by exact gradients.

A reconstruction after Hoang et al. 2020, of which only the abstract could be read and no code was
released; accuracy claims of theirs are not claimed here. Weights take one of ``K = 2^b`` levels
``L``; the latent weights follow their levels (*carry*), so that moving a level never changes an
assignment by itself.

References:
    [Hoang20] T. Hoang, T. Do, T. Nguyen, N. Cheung, "Direct Quantization for Training Highly
    Accurate Low Bit-width Deep Neural Networks", IJCAI 2020, arXiv 2012.13762.

Design: docs/design/training.md
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from bitquota.errors import InvalidInput

OUTLIER_SHARE = 0.001
"""Share of weights on each side that the start of the levels leaves out."""


def assign(values: Tensor, levels: Tensor) -> Tensor:
    """Return i64 codes: the index of the nearest level, lower index on a tie.

    Args:
        values: Any shape; ``[lines, n]`` with levels of its own for every line.
        levels: ``[K]`` or ``[lines, K]``, ascending.
    """
    flat, known = values.detach().contiguous(), levels.detach()
    middles = ((known[..., 1:] + known[..., :-1]) / 2).contiguous()
    if known.ndim == 1:
        return torch.bucketize(flat, middles)
    return torch.searchsorted(middles, flat)


def look_up(levels: Tensor, codes: Tensor) -> Tensor:
    """Return the level of each code."""
    return levels[codes] if levels.ndim == 1 else levels.gather(1, codes)


class _Lookup(torch.autograd.Function):
    """``L[a]`` with the exact gradient to the levels and straight-through to the latents."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, levels: Tensor) -> Tensor:  # noqa: ANN401
        codes = assign(latents, levels)
        ctx.save_for_backward(latents, levels, codes)
        return look_up(levels, codes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        latents, levels, codes = ctx.saved_tensors
        gradient = gradients[0]
        # dJ/dL_k is the sum of dJ/dq_i over the weights at level k: exact, no approximation.
        to_levels = torch.zeros_like(levels)
        if levels.ndim == 1:
            to_levels.index_add_(0, codes.flatten(), gradient.flatten())
        else:
            to_levels.scatter_add_(1, codes, gradient)
        lowest, highest = levels[..., :1], levels[..., -1:]
        reach = highest - lowest
        inside = (latents >= lowest - reach) & (latents <= highest + reach)
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
        values: The full-precision weights; ``[rows, n]`` for levels of each row's own.
        bits: 1 to 8.
        symmetric: Keep ``L_k = -L_(K+1-k)``.
        per_row: Whether every row has levels of its own; by default all share them.
        stored_as: Floating-point format that levels are stored in; training sees them rounded.
    """

    def __init__(
        self,
        values: Tensor,
        bits: int,
        *,
        symmetric: bool = False,
        per_row: bool = False,
        stored_as: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.bits, self.symmetric, self.stored_as = bits, symmetric, stored_as
        if per_row:
            start = torch.stack([start_levels(row, bits, symmetric=symmetric) for row in values])
        else:
            start = start_levels(values, bits, symmetric=symmetric)
        self.levels = nn.Parameter(start)
        self.register_buffer("previous", self.levels.detach().clone())
        self.previous: Tensor

    def forward(self, latents: Tensor) -> Tensor:
        """Return the quantized weights; the levels' gradient is divided by ``sqrt(n)``."""
        lines = self.levels.shape[0] if self.levels.ndim > 1 else 1
        factor = 1.0 / math.sqrt(latents.numel() / lines)
        scaled = self.levels * factor + (self.stored_levels() - self.levels * factor).detach()
        quantized: Tensor = _Lookup.apply(latents, scaled)  # type: ignore[no-untyped-call]
        return quantized

    def stored_levels(self) -> Tensor:
        """Return the levels as they are stored, detached."""
        exact = self.levels.detach()
        return exact if self.stored_as == torch.float32 else exact.to(self.stored_as).to(exact)

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
            self.levels.copy_((self.levels - self.levels.flip(-1)) / 2)
        self.levels.copy_(self.levels.sort(dim=-1).values)
        # Levels that meet would leave their order to chance.
        gap = 1e-6 * (self.levels[..., -1] - self.levels[..., 0]).clamp(min=1e-12)
        for k in range(1, self.levels.shape[-1]):
            self.levels[..., k] = torch.maximum(self.levels[..., k], self.levels[..., k - 1] + gap)
        codes = assign(latents, self.previous)
        residual = latents - look_up(self.previous, codes)
        old, new = self.previous.diff(dim=-1), self.levels.diff(dim=-1)
        ratio = torch.where(old > 0, new / old.clamp(min=1e-30), 1.0)
        one = torch.ones_like(ratio[..., :1])
        below = torch.cat([one, ratio], dim=-1)  # beyond the ends: shift
        above = torch.cat([ratio, one], dim=-1)
        stretch = torch.where(residual < 0, look_up(below, codes), look_up(above, codes))
        latents.copy_(look_up(self.levels, codes) + residual * stretch)
        self.previous.copy_(self.levels)

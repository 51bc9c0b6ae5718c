"""Trainable weights of one layer at a fixed bit-width: learned steps, or a learned codebook."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from bitquota.errors import InvalidInput
from bitquota.quantizers.codebook import CodebookWeight, StoredCodebook
from bitquota.quantizers.differentiable import binary, lsq
from bitquota.quantizers.grid import levels, nearest_codes, spread
from bitquota.quantizers.layout import from_matrix, to_matrix
from bitquota.quantizers.weights import SCALE_DTYPES, QuantizedWeight, quantize
from bitquota.storage import FULL_PRECISION_BITS

if TYPE_CHECKING:
    from bitquota.candidates import Candidate, Layer


class TrainableWeight(Protocol):
    """How a layer's latent weight becomes the weight that the model runs with."""

    def fake(self, latent: Tensor) -> Tensor:
        """Return the quantized weight, differentiable, in the shape of ``latent``."""
        ...

    def after_step(self, latent: Tensor) -> None:
        """Do what must follow an optimizer step; may change ``latent`` in place."""
        ...

    def stored(self, latent: Tensor) -> QuantizedWeight | StoredCodebook:
        """Return what is written to disk."""
        ...


class LearnedSteps(nn.Module):
    """Learned step size quantization of one layer under one candidate.

    The steps start at the candidate's own fit and move in the logarithm, ``s = s0 exp(t)``, so
    that one learning rate serves steps of any size and a step keeps its sign. Steps are rounded
    to their storage format in the forward pass, straight-through; zero points stay as fitted.

    Args:
        latent: The full-precision weight.
        layer: What it is.
        candidate: Bit-width (not 32) and scheme.
    """

    def __init__(self, latent: Tensor, layer: Layer, candidate: Candidate) -> None:
        super().__init__()
        self.layer, self.bits, self.scheme = layer, candidate.weight_bits, candidate.scheme
        matrix = to_matrix(latent.detach(), layer)
        start = quantize(matrix, self.bits, nearest_of(candidate).scheme)
        scales = start.scales.float()
        # A line of zeros has no step to learn from; any small one will do.
        scales = torch.where(scales == 0, scales.abs().mean().clamp(min=1e-8), scales)
        self.register_buffer("start", scales)
        self.register_buffer("zero_points", start.zero_points)
        self.start: Tensor
        self.zero_points: Tensor | None
        self.log_factor = nn.Parameter(torch.zeros_like(scales))

    def steps(self) -> Tensor:
        """Return the steps as they are stored, differentiable."""
        exact = self.start * torch.exp(self.log_factor)
        stored = exact.detach().to(SCALE_DTYPES[self.scheme.scale_format]).float()
        return exact + (stored - exact.detach())

    def fake(self, latent: Tensor) -> Tensor:
        """Return the quantized weight."""
        matrix = to_matrix(latent, self.layer)
        columns = matrix.shape[1]
        step = spread(self.steps(), columns, self.scheme)
        if self.zero_points is not None:
            zero = spread(self.zero_points.float(), columns, self.scheme)
            quantized = lsq(matrix, step, -zero, 2**self.bits - 1 - zero)
        elif self.bits == 1:
            quantized = binary(matrix, step)
        else:
            quantized = lsq(matrix, step, *levels(self.bits))
        return from_matrix(quantized, self.layer)

    def after_step(self, latent: Tensor) -> None:
        """Nothing to do."""

    @torch.no_grad()
    def stored(self, latent: Tensor) -> QuantizedWeight:
        """Return codes and steps."""
        matrix = to_matrix(latent.detach(), self.layer)
        scales = self.steps().to(SCALE_DTYPES[self.scheme.scale_format])
        codes = nearest_codes(matrix.double(), scales, self.zero_points, self.bits, self.scheme)
        return QuantizedWeight(
            codes=codes,
            scales=scales,
            zero_points=self.zero_points,
            bits=self.bits,
            scheme=self.scheme,
        )


class LearnedLevels(nn.Module):
    """A codebook of one layer whose levels are moved directly (``quantizers.codebook``).

    The levels are one per tensor, ``2^bits`` of them; a candidate's scheme has no say.

    Args:
        latent: The full-precision weight.
        layer: What it is.
        candidate: Its bit-width counts, 1 to 8.
        symmetric: Keep the levels mirrored.
    """

    def __init__(
        self, latent: Tensor, layer: Layer, candidate: Candidate, *, symmetric: bool = False
    ) -> None:
        super().__init__()
        self.layer = layer
        self.codebook = CodebookWeight(
            latent.detach().clone(), candidate.weight_bits, symmetric=symmetric
        )

    def fake(self, latent: Tensor) -> Tensor:
        """Return the level of each weight."""
        quantized: Tensor = self.codebook(latent)
        return quantized

    def after_step(self, latent: Tensor) -> None:
        """Carry the latents along with their levels."""
        self.codebook.carry(latent)

    def stored(self, latent: Tensor) -> StoredCodebook:
        """Return codes and levels."""
        return self.codebook.stored(latent.detach())


def nearest_of(candidate: Candidate) -> Candidate:
    """Return the candidate with rounding to nearest: training moves weights by itself."""
    from dataclasses import replace

    from bitquota.storage import Rounding

    return replace(candidate, scheme=replace(candidate.scheme, rounding=Rounding.NEAREST))


METHODS = {"lsq": LearnedSteps, "direct": LearnedLevels}
"""Ways to train under a plan, by name, in order of preference."""


def trainable_weight(
    method: str, latent: Tensor, layer: Layer, candidate: Candidate
) -> LearnedSteps | LearnedLevels:
    """Return the trainable weight of one layer.

    Raises:
        InvalidInput: There is no such method, or the candidate is full precision.
    """
    if method not in METHODS:
        msg = f"a training method must be one of {', '.join(METHODS)}; got '{method}'"
        raise InvalidInput(msg, method=method)
    if candidate.weight_bits == FULL_PRECISION_BITS:
        msg = f"layer '{layer.name}' stays in full precision; it has no quantizer to train"
        raise InvalidInput(msg, layer=layer.name)
    trainable: LearnedSteps | LearnedLevels = METHODS[method](latent, layer, candidate)
    return trainable


def effective_bits(stored: QuantizedWeight | StoredCodebook, n_weights: int) -> float:
    """Return stored bits per weight, scales or levels included."""
    if isinstance(stored, StoredCodebook):
        return 8 * stored.n_bytes / n_weights
    from bitquota.quantizers.packing import pack

    return 8 * pack(stored).n_bytes / math.prod(stored.codes.shape)

"""Trainable weights of one layer at a fixed bit-width: learned steps, thresholds or levels.

References:
    [LSQ] S. Esser et al., "Learned Step Size Quantization", ICLR 2020, arXiv 1902.08153.
    [TQT] S. Jain et al., "Trained Quantization Thresholds for Accurate and Efficient Fixed-Point
    Inference of Deep Neural Networks", MLSys 2020, arXiv 1903.08066.

Design: docs/design/training.md
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bitquota.candidates.storage import (
    FULL_PRECISION_BITS,
    PRUNED_BITS,
    Granularity,
    Grid,
    Rounding,
    ScaleRule,
)
from bitquota.candidates.table import Candidate
from bitquota.errors import InvalidInput
from bitquota.models.layout import from_matrix, to_matrix
from bitquota.quantizers.codebook import CodebookWeight, assign
from bitquota.quantizers.differentiable import binary, lsq, ste_ceil
from bitquota.quantizers.grid import (
    code_range,
    levels,
    nearest_codes,
    power_codes,
    power_values,
    spread,
)
from bitquota.quantizers.parameters import SCALE_DTYPES
from bitquota.quantizers.weights import QuantizedWeight, pruned, quantize, rows_by_width

if TYPE_CHECKING:
    from bitquota.candidates.layers import Layer
    from bitquota.candidates.storage import Scheme


class LearnedSteps(nn.Module):
    """Learned step size quantization of one layer under one candidate.

    The steps start at the candidate's own fit and move in the logarithm, ``s = s0 exp(t)``, so
    that one learning rate serves steps of any size and a step keeps its sign. Steps are rounded
    to their storage format in the forward pass, straight-through; zero points stay as fitted. Rows
    may have different bit-widths; those of 0 bits, or all weights at 0 bits, are and stay zero.

    Args:
        latent: The full-precision weight.
        layer: What it is.
        candidate: Bit-width (not 32) and scheme, as ``trained_candidate`` returns it.
    """

    def __init__(self, latent: Tensor, layer: Layer, candidate: Candidate) -> None:
        super().__init__()
        self.layer, self.bits, self.scheme = layer, candidate.weight_bits, candidate.scheme
        matrix = to_matrix(latent.detach(), layer)
        start = quantize(matrix, self.bits, self.scheme)
        scales = start.scales.float()
        # A line of zeros has no step to learn from; any small one will do.
        scales = torch.where(scales == 0, scales.abs().mean().clamp(min=1e-8), scales)
        self.register_buffer("start", scales)
        self.register_buffer("zero_points", start.zero_points)
        self.register_buffer("ends", _ends(self.scheme), persistent=False)
        self.start: Tensor
        self.zero_points: Tensor | None
        self.ends: Tensor | None
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
        if self.bits == PRUNED_BITS:
            return latent * 0.0
        step = spread(self.steps(), columns, self.scheme)
        if self.scheme.grid is Grid.POWER_OF_TWO:
            v = torch.clamp(matrix / step, -1.0, 1.0)
            level = power_values(power_codes(v.detach(), self.bits), self.bits)
            quantized = (v + (level - v).detach()) * step
        elif self.zero_points is not None:
            zero = spread(self.zero_points.float(), columns, self.scheme)
            least, most = (0, 2**self.bits - 1) if self.ends is None else self.ends
            quantized = lsq(matrix, step, least - zero, most - zero)
        elif self.bits == 1:
            quantized = binary(matrix, step)
        else:
            quantized = lsq(matrix, step, *(levels(self.bits) if self.ends is None else self.ends))
        return from_matrix(quantized, self.layer)

    def after_step(self, latent: Tensor) -> None:
        """Nothing to do."""

    @torch.no_grad()
    def stored(self, latent: Tensor) -> QuantizedWeight:
        """Return codes and steps."""
        matrix = to_matrix(latent.detach(), self.layer)
        scales = self.steps().to(SCALE_DTYPES[self.scheme.scale_format])

        def of(rows: Tensor, bits: int, scheme: Scheme) -> QuantizedWeight:
            if bits == PRUNED_BITS:
                return pruned(len(rows), matrix.shape[1], scheme, matrix.device)
            own = rows if len(scales) == len(matrix) else slice(None)
            zeros = None if self.zero_points is None else self.zero_points[own]
            codes = nearest_codes(matrix[rows].double(), scales[own], zeros, bits, scheme)
            return QuantizedWeight(
                codes=codes, scales=scales[own], zero_points=zeros, bits=bits, scheme=scheme
            )

        if not self.scheme.row_bits:
            return of(torch.arange(len(matrix)), self.bits, self.scheme)
        parts = rows_by_width(self.scheme.row_bits)
        return QuantizedWeight.of_parts(
            [(rows, of(rows, bits, self.scheme.of_parts)) for bits, rows in parts], self.scheme
        )


def _ends(scheme: Scheme) -> Tensor | None:
    """Return f32[2, rows, 1]: least and greatest code where rows have different bit-widths."""
    if not scheme.row_bits:
        return None
    ends = [code_range(scheme.grid, b) if b else (0, 0) for b in scheme.row_bits]
    return torch.tensor(ends, dtype=torch.float32).T[:, :, None]


class LearnedThresholds(nn.Module):
    """Trained thresholds [TQT]: steps are powers of two, so that scaling is a shift.

    ``s = 2^ceil(log2 t) / 2^(b-1)``, ``log2 t`` learned; it starts in the middle of the octave that
    is nearest to the candidate's own fit.

    Args:
        latent: The full-precision weight.
        layer: What it is.
        candidate: Bit-width of 2 or more, on the symmetric grid.
    """

    def __init__(self, latent: Tensor, layer: Layer, candidate: Candidate) -> None:
        super().__init__()
        self.layer, self.bits, self.scheme = layer, candidate.weight_bits, candidate.scheme
        if self.scheme.grid is not Grid.SYMMETRIC or self.bits < 2 or self.scheme.row_bits:
            msg = (
                "method 'tqt' trains symmetric integer grids of one width, 2 bits or more; layer "
                f"'{layer.name}' is {candidate.label} on the grid '{self.scheme.grid}': take "
                "method 'lsq' or 'direct'"
            )
            raise InvalidInput(msg, layer=layer.name)
        matrix = to_matrix(latent.detach(), layer)
        start = quantize(matrix, self.bits, self.scheme).scales.float().abs()
        start = torch.where(start == 0, start.mean().clamp(min=1e-8), start)
        octave = torch.round(torch.log2(start)) + self.bits - 1
        self.log2_threshold = nn.Parameter(octave - 0.5)

    def steps(self) -> Tensor:
        """Return the steps, powers of two, differentiable."""
        return 2.0 ** (ste_ceil(self.log2_threshold) - (self.bits - 1))

    def fake(self, latent: Tensor) -> Tensor:
        """Return the quantized weight."""
        matrix = to_matrix(latent, self.layer)
        step = spread(self.steps(), matrix.shape[1], self.scheme)
        return from_matrix(lsq(matrix, step, *levels(self.bits)), self.layer)

    def after_step(self, latent: Tensor) -> None:
        """Nothing to do."""

    @torch.no_grad()
    def stored(self, latent: Tensor) -> QuantizedWeight:
        """Return codes and steps."""
        matrix = to_matrix(latent.detach(), self.layer)
        scales = self.steps().to(SCALE_DTYPES[self.scheme.scale_format])
        codes = nearest_codes(matrix.double(), scales, None, self.bits, self.scheme)
        return QuantizedWeight(
            codes=codes, scales=scales, zero_points=None, bits=self.bits, scheme=self.scheme
        )


class LearnedLevels(nn.Module):
    """A codebook of one layer whose levels are moved directly (``quantizers.codebook``).

    Args:
        latent: The full-precision weight.
        layer: What it is.
        candidate: On the codebook grid, per tensor or per channel.
        symmetric: Keep the levels mirrored.
    """

    def __init__(
        self, latent: Tensor, layer: Layer, candidate: Candidate, *, symmetric: bool = False
    ) -> None:
        super().__init__()
        self.layer, self.bits, self.scheme = layer, candidate.weight_bits, candidate.scheme
        matrix = to_matrix(latent.detach(), layer)
        self.codebook = CodebookWeight(
            matrix.clone(),
            self.bits,
            symmetric=symmetric,
            per_row=self.scheme.granularity is Granularity.CHANNEL,
            stored_as=SCALE_DTYPES[self.scheme.scale_format],
        )

    def fake(self, latent: Tensor) -> Tensor:
        """Return the level of each weight."""
        return from_matrix(self.codebook(to_matrix(latent, self.layer)), self.layer)

    def after_step(self, latent: Tensor) -> None:
        """Carry the latents along with their levels."""
        matrix = to_matrix(latent, self.layer).contiguous()
        self.codebook.carry(matrix)
        latent.copy_(from_matrix(matrix, self.layer))

    @torch.no_grad()
    def stored(self, latent: Tensor) -> QuantizedWeight:
        """Return codes and levels."""
        matrix = to_matrix(latent.detach(), self.layer)
        table = self.codebook.stored_levels()
        codes = assign(matrix, table).int()
        return QuantizedWeight(
            codes=codes,
            scales=table.reshape(-1, table.shape[-1]).to(SCALE_DTYPES[self.scheme.scale_format]),
            zero_points=None,
            bits=self.bits,
            scheme=self.scheme,
        )


METHODS = ("lsq", "tqt", "direct")
"""Ways to train under a plan, by name, in order of preference."""

DIRECT_BITS = 4
"""Up to so many bits ``direct`` turns integers into a codebook; above it, free levels gain nothing
over integers and their table grows: such layers keep their integers, with learned steps."""


def trained_candidate(method: str, layer: Layer, candidate: Candidate) -> Candidate:
    """Return what a layer is stored as after training with ``method``, its size counted.

    Only ``direct`` changes the format: integers of up to ``DIRECT_BITS`` bits, the same in all
    rows, become one codebook for the tensor, with levels in the format of the scales. How scales
    were fitted and weights rounded is over once they are trained: the rule on record becomes least
    squares, which finds the grid of weights that lie on one, so that quantizing trained weights
    again changes nothing (the range of the weights does not tell their grid), and rounding is to
    nearest.

    Raises:
        InvalidInput: There is no such method, or the candidate is full precision.
    """
    if method not in METHODS:
        msg = f"a training method must be one of {', '.join(METHODS)}; got '{method}'"
        raise InvalidInput(msg, method=method)
    if candidate.weight_bits == FULL_PRECISION_BITS:
        msg = f"layer '{layer.name}' stays in full precision; it has no quantizer to train"
        raise InvalidInput(msg, layer=layer.name)
    if candidate.sparse:
        msg = (
            f"layer '{layer.name}' leaves two of four weights out, which training does not keep: "
            f"plan without --allow {candidate.scheme.sparsity} to train"
        )
        raise InvalidInput(msg, layer=layer.name)
    if candidate.pruned:
        return candidate
    ranged = candidate.scheme.scale_rule in (ScaleRule.ABSMAX, ScaleRule.PERCENTILE)
    scheme = replace(
        candidate.scheme,
        rounding=Rounding.NEAREST,
        scale_rule=ScaleRule.LEAST_SQUARES_POSITIVE if ranged else candidate.scheme.scale_rule,
    )
    integers = not scheme.grid.is_integer or scheme.row_bits or candidate.weight_bits > DIRECT_BITS
    if method != "direct" or integers:
        return replace(candidate, scheme=scheme)
    levels_of_tensor = replace(
        scheme,
        grid=Grid.CODEBOOK,
        granularity=Granularity.TENSOR,
        group_size=None,
    )
    return Candidate.of(layer, candidate.weight_bits, levels_of_tensor, candidate.activation_bits)


def trainable_weight(
    method: str, latent: Tensor, layer: Layer, candidate: Candidate, *, symmetric: bool = False
) -> LearnedSteps | LearnedThresholds | LearnedLevels:
    """Return the trainable weight of one layer.

    Args:
        method: One of ``METHODS``.
        latent: The full-precision weight.
        layer: What it is.
        candidate: As ``trained_candidate`` returns it.
        symmetric: Keep the levels of codebooks mirrored.

    Raises:
        InvalidInput: There is no such method, it cannot train this grid, or the candidate is full
            precision.
    """
    candidate = trained_candidate(method, layer, candidate)
    if candidate.pruned:
        return LearnedSteps(latent, layer, candidate)
    if candidate.scheme.grid is Grid.CODEBOOK:
        if method != "direct":
            msg = (
                f"layer '{layer.name}' has a codebook, whose levels method '{method}' cannot "
                "train: take method 'direct'"
            )
            raise InvalidInput(msg, layer=layer.name, method=method)
        return LearnedLevels(latent, layer, candidate, symmetric=symmetric)
    if candidate.scheme.grid not in (Grid.SYMMETRIC, Grid.ASYMMETRIC, Grid.POWER_OF_TWO):
        msg = (
            f"layer '{layer.name}' is on the grid '{candidate.scheme.grid}', which cannot be "
            "trained: plan on an integer grid, a codebook or powers of two"
        )
        raise InvalidInput(msg, layer=layer.name, grid=str(candidate.scheme.grid))
    if method == "tqt":
        return LearnedThresholds(latent, layer, candidate)
    return LearnedSteps(latent, layer, candidate)

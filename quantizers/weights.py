"""Quantize a weight matrix: codes, scales and zero points as they would be stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from bitquota.candidates.storage import (
    FULL_PRECISION_BITS,
    GRID_BITS,
    K_BLOCK,
    WEIGHT_BITS,
    Granularity,
    Grid,
    Rounding,
    ScaleFormat,
    Scheme,
)
from bitquota.errors import InvalidInput, InvalidModel
from bitquota.models.layout import from_matrix, to_matrix
from bitquota.quantizers.affine_fit import fit_affine
from bitquota.quantizers.gptq import error_feedback_codes
from bitquota.quantizers.grid import nearest_codes, power_values, spread
from bitquota.quantizers.kquants import fit_k_blocks, read_k_blocks
from bitquota.quantizers.levels import fit_levels, fit_power_scale
from bitquota.quantizers.scales import asymmetric_scale, symmetric_scale

if TYPE_CHECKING:
    from torch import Tensor

    from bitquota.candidates.layers import Layer

SCALE_DTYPES = {
    ScaleFormat.FP32: torch.float32,
    ScaleFormat.FP16: torch.float16,
    ScaleFormat.BF16: torch.bfloat16,
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedWeight:
    """A weight matrix as it is stored.

    Attributes:
        codes: i32[rows, columns]. Symmetric: -2^(b-1)..2^(b-1)-1 (one bit: -1 and +1);
            asymmetric, codebook and power of two (see ``grid``): 0..2^b-1.
        scales: ``[rows, n]`` in the scale format: one column per group, or ``[rows, 1]`` per
            channel, or ``[1, 1]`` per tensor. Of a codebook the levels, ascending: 2^b columns.
            Of the grid with offsets scale and offset in turn; of K blocks their parameters (see
            ``k_blocks``).
        zero_points: i32 in 0..2^b-1, shaped like ``scales``; ``None`` on a symmetric grid.
        bits: Bit-width.
        scheme: Everything else.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    bits: int
    scheme: Scheme

    def dequantize(self) -> Tensor:
        """Return f32[rows, columns]: ``scale * (code - zero_point)``, or the code's level."""
        rows, columns = self.codes.shape
        if self.scheme.grid is Grid.CODEBOOK:
            return self.scales.float().expand(rows, -1).gather(1, self.codes.long())
        if self.scheme.grid is Grid.POWER_OF_TWO:
            scale = spread(self.scales.float(), columns, self.scheme)
            return scale * power_values(self.codes, self.bits)
        if self.scheme.grid is Grid.OFFSET:
            pairs = self.scales.float().reshape(len(self.scales), -1, 2)
            steps, offsets = (spread(part, columns, self.scheme) for part in pairs.unbind(2))
            return steps * self.codes.float() + offsets
        if self.scheme.grid is Grid.K_BLOCKS:
            return read_k_blocks(self.codes, self.scales, self.bits)
        levels = self.codes.float()
        if self.zero_points is not None:
            levels = levels - spread(self.zero_points.float(), columns, self.scheme)
        return levels * spread(self.scales.float(), columns, self.scheme)


def quantize(
    matrix: Tensor,
    bits: int,
    scheme: Scheme,
    *,
    importance: Tensor | None = None,
    inputs_gram: Tensor | None = None,
) -> QuantizedWeight:
    """Quantize ``matrix`` to ``bits``.

    Scales are rounded to their storage format before the codes are chosen, so codes are the
    best for the scale that a runtime will read.

    Args:
        matrix: Floating-point ``[rows, columns]``, finite.
        bits: 1 to 8, or 16.
        scheme: Grid, granularity, scale rule and format, rounding.
        importance: Not negative, broadcastable to ``[rows, columns]``: weighs the squared errors
            of the least-squares rule. Other rules ignore it.
        inputs_gram: ``X^T X`` of the layer's inputs, ``[columns, columns]``, or one per group of
            rows ``[groups, columns, columns]``. Needed by, and only used by, error feedback.

    Raises:
        InvalidInput: A bit-width off the list, a wrong shape, or error feedback without a Gram.
        InvalidModel: The weights are not finite.
    """
    _check(matrix, bits, importance)
    values = matrix.detach().double()
    weight = None if importance is None else importance.detach().double().expand_as(values)
    zero: Tensor | None = None
    least, most = GRID_BITS.get(scheme.grid, (1, FULL_PRECISION_BITS))
    if not least <= bits <= most:
        msg = f"the grid '{scheme.grid}' takes {least} to {most} bits; got {bits}"
        raise InvalidInput(msg, weight_bits=bits, grid=str(scheme.grid))

    # Grids whose codes come with their parameters.
    if scheme.grid is Grid.K_BLOCKS:
        if values.shape[1] % K_BLOCK:
            msg = f"the grid '{scheme.grid}' needs {K_BLOCK} to divide the row; got {values.shape}"
            raise InvalidInput(msg, columns=values.shape[1])
        codes, parameters = fit_k_blocks(values, bits, weight)
        return QuantizedWeight(
            codes=codes, scales=parameters, zero_points=None, bits=bits, scheme=scheme
        )
    lines, line_weight = _lines(values, weight, scheme)
    if scheme.grid is Grid.OFFSET:
        pairs = torch.stack(fit_affine(lines, bits, line_weight), dim=1)
        pairs = _store_scale(pairs, scheme.scale_format)
        n = 1 if scheme.granularity is Granularity.TENSOR else len(values)
        steps, offsets = (
            spread(part.double(), values.shape[1], scheme)
            for part in pairs.reshape(n, -1, 2).unbind(2)
        )
        safe = torch.where(steps == 0, torch.ones_like(steps), steps)
        codes = ((values - offsets) / safe).round().clamp(0, 2**bits - 1)
        return QuantizedWeight(
            codes=torch.where(steps == 0, torch.zeros_like(codes), codes).int(),
            scales=pairs.reshape(n, -1),
            zero_points=None,
            bits=bits,
            scheme=scheme,
        )

    # Scales, by the rule of the grid.
    if scheme.grid is Grid.CODEBOOK:
        scale = fit_levels(lines, bits, line_weight)
    elif scheme.grid is Grid.POWER_OF_TWO:
        scale = fit_power_scale(lines, bits, line_weight)
    elif scheme.grid is Grid.ASYMMETRIC:
        scale, zero = asymmetric_scale(lines, bits, scheme.scale_rule, line_weight)
    else:
        scale = symmetric_scale(lines, bits, scheme.scale_rule, line_weight)

    # Scales as they are stored, then the codes that are best for them.
    stored = _store_scale(scale, scheme.scale_format)
    shape = (1, -1) if scheme.granularity is Granularity.TENSOR else (len(values), -1)
    scales = stored.reshape(shape)
    zeros = None if zero is None else zero.reshape(shape).int()
    if scheme.rounding is Rounding.ERROR_FEEDBACK:
        if inputs_gram is None:
            msg = (
                "error-feedback rounding needs inputs_gram, the second moment of the layer's "
                "inputs; got none: collect it on the calibration set, or round to nearest"
            )
            raise InvalidInput(msg)
        codes = error_feedback_codes(values, scales, zeros, bits, scheme, inputs_gram)
    else:
        codes = nearest_codes(values, scales, zeros, bits, scheme)
    return QuantizedWeight(codes=codes, scales=scales, zero_points=zeros, bits=bits, scheme=scheme)


def fake_quantize(
    weight: Tensor,
    layer: Layer,
    bits: int,
    scheme: Scheme,
    *,
    importance: Tensor | None = None,
    inputs_gram: Tensor | None = None,
) -> Tensor:
    """Return ``weight`` as it is after storing it at ``bits`` and reading it back.

    Args:
        weight: In the shape that the framework stores.
        layer: What the weight is.
        bits: 1 to 8, 16, or 32 for the weight itself (the same object).
        scheme: Everything else about the quantization.
        importance: As in ``quantize``, or in the shape of ``weight``.
        inputs_gram: As in ``quantize``.

    Returns:
        Same shape and dtype as ``weight``, detached.

    Raises:
        InvalidInput: As ``quantize``.
        InvalidModel: The weight has another shape than ``layer``, or is not finite.
    """
    if bits == FULL_PRECISION_BITS:
        return weight
    matrix = to_matrix(weight.detach(), layer)
    if not bool(torch.isfinite(matrix).all()):
        bad = int((~torch.isfinite(matrix)).sum())
        msg = (
            f"the weights of layer '{layer.name}' must be finite; {bad} of {layer.n_weights} are "
            "NaN or infinite: repair the checkpoint"
        )
        raise InvalidModel(msg, layer=layer.name, n_bad=bad)
    if importance is not None and importance.shape == weight.shape:
        importance = to_matrix(importance, layer)
    stored = quantize(matrix, bits, scheme, importance=importance, inputs_gram=inputs_gram)
    return from_matrix(stored.dequantize().to(weight.dtype), layer)


def _check(matrix: Tensor, bits: int, importance: Tensor | None) -> None:
    if bits not in WEIGHT_BITS or bits == FULL_PRECISION_BITS:
        allowed = ", ".join(str(b) for b in WEIGHT_BITS if b != FULL_PRECISION_BITS)
        msg = f"a bit-width to quantize to must be one of {allowed}; got {bits}"
        raise InvalidInput(msg, weight_bits=bits)
    if matrix.ndim != 2 or not matrix.numel() or not matrix.is_floating_point():
        msg = (
            f"a weight matrix must be a non-empty floating-point [rows, columns]; got "
            f"{list(matrix.shape)} {matrix.dtype}"
        )
        raise InvalidInput(msg, shape=list(matrix.shape))
    if not bool(torch.isfinite(matrix).all()):
        bad = int((~torch.isfinite(matrix)).sum())
        msg = (
            f"weights must be finite; {bad} of {matrix.numel()} are NaN or infinite: repair the "
            "checkpoint"
        )
        raise InvalidModel(msg, n_bad=bad)
    if importance is None:
        return
    try:
        fits = importance.expand_as(matrix).shape == matrix.shape
    except RuntimeError:
        fits = False
    if not fits or not bool((importance >= 0).all()) or bool(importance.isinf().any()):
        msg = (
            f"importance must be finite, not negative, and broadcastable to {list(matrix.shape)}; "
            f"got shape {list(importance.shape)}"
        )
        raise InvalidInput(msg, shape=list(importance.shape))


def _lines(
    values: Tensor, importance: Tensor | None, scheme: Scheme
) -> tuple[Tensor, Tensor | None]:
    """Return values and importance as one line per scale; a short last group is padded."""
    if scheme.granularity is Granularity.TENSOR:
        return values.reshape(1, -1), None if importance is None else importance.reshape(1, -1)
    if scheme.granularity is Granularity.CHANNEL:
        return values, importance
    assert scheme.group_size is not None  # noqa: S101  # invariant of Scheme
    missing = -values.shape[1] % scheme.group_size
    if missing:
        weight = torch.ones_like(values) if importance is None else importance
        importance = torch.nn.functional.pad(weight, (0, missing))
        values = torch.nn.functional.pad(values, (0, missing))
    size = scheme.group_size
    return values.reshape(-1, size), None if importance is None else importance.reshape(-1, size)


def _store_scale(scale: Tensor, scale_format: ScaleFormat) -> Tensor:
    dtype = SCALE_DTYPES[scale_format]
    largest = torch.finfo(dtype).max
    return scale.clamp(-largest, largest).to(dtype)

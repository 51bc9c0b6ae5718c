"""Quantize a weight matrix: codes, scales and zero points as they would be stored."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from bitquota.candidates.storage import (
    FULL_PRECISION_BITS,
    PRUNED_BITS,
    WEIGHT_BITS,
    Granularity,
    Scheme,
    check_width,
)
from bitquota.errors import InvalidInput, InvalidModel
from bitquota.models.layout import from_matrix, to_matrix
from bitquota.models.running import n_not_finite
from bitquota.quantizers.grid import matrix_grid, stacked
from bitquota.quantizers.parameters import fitted_parameters
from bitquota.quantizers.refit import refitted
from bitquota.quantizers.rounders import Rounder, checked_gram, round_codes, rounder_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from bitquota.candidates.layers import Layer

BLOCK_WEIGHTS = 2**21
"""Weights at least that are rounded together: of so many the scales are searched as those of any
larger matrix (``scales.EXACT_LIMIT_BREAKPOINTS``)."""

LEAST_IMPORTANCE = 1e-6
"""Share of the mean importance that every column has at least (as of an importance matrix)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedWeight:
    """A weight matrix as it is stored.

    Attributes:
        codes: i32[rows, columns], or of a smaller type (``compact``). Symmetric:
            -2^(b-1)..2^(b-1)-1 (one bit: -1 and +1); asymmetric, codebook and power of two (see
            ``grid``): 0..2^b-1.
        scales: ``[rows, n]`` in the scale format: one column per group, or ``[rows, 1]`` per
            channel, or ``[1, 1]`` per tensor. Of a codebook the levels, ascending: 2^b columns.
            Of the grid with offsets scale and offset in turn, of companded levels scale and
            exponent; of K blocks their parameters (see
            ``k_blocks``).
        zero_points: i32 in 0..2^b-1, shaped like ``scales``; ``None`` on a symmetric grid.
        bits: Bit-width; 0 where all weights are zero and nothing is stored.
        scheme: Everything else. Where rows have different bit-widths (``row_bits``), ``bits`` is
            the widest and the codes of each row are those of its own.
    """

    codes: Tensor
    scales: Tensor
    zero_points: Tensor | None
    bits: int
    scheme: Scheme

    def to(self, device: torch.device) -> QuantizedWeight:
        """Return the same on a device."""
        zeros = None if self.zero_points is None else self.zero_points.to(device)
        return replace(
            self, codes=self.codes.to(device), scales=self.scales.to(device), zero_points=zeros
        )

    def dequantize(self) -> Tensor:
        """Return f32[rows, columns]: ``scale * (code - zero_point)``, or the code's level."""
        if self.bits == PRUNED_BITS:
            return torch.zeros_like(self.codes, dtype=torch.float32)
        n, columns = self.codes.shape
        blocks = row_blocks(n, columns, self.scheme)
        if len(blocks) > 1:
            values = torch.empty(self.codes.shape, device=self.codes.device)
            for block in blocks:
                values[block.start : block.stop] = self._rows(block).dequantize()
            return values
        grid = matrix_grid(
            self.scales,
            self.zero_points,
            self.bits,
            self.scheme,
            self.codes.shape[1],
            torch.float32,
        )
        return grid.read(self.codes.int())

    def _rows(self, block: range) -> QuantizedWeight:
        rows = slice(block.start, block.stop)
        zeros = None if self.zero_points is None else self.zero_points[rows]
        return replace(self, codes=self.codes[rows], scales=self.scales[rows], zero_points=zeros)

    def parts(self) -> list[tuple[Tensor, QuantizedWeight]]:
        """Return the parts of one bit-width each, narrowest first, and i64[n]: which rows they are.

        That is the weight itself, where all rows are alike.
        """
        if not self.scheme.row_bits:
            return [(torch.arange(len(self.codes)), self)]
        return [
            (rows, replace(self.take(rows), bits=bits, scheme=self.scheme.of_parts))
            for bits, rows in rows_by_width(self.scheme.row_bits)
        ]

    def take(self, rows: Tensor) -> QuantizedWeight:
        """Return the same of some ``rows``, i64[n], alone."""
        return replace(
            self,
            codes=self.codes[rows],
            scales=self.scales[rows],
            zero_points=None if self.zero_points is None else self.zero_points[rows],
        )

    def order(self) -> Tensor:
        """Return i64[rows]: which rows the parts have, one part after the other."""
        return torch.cat([rows for rows, _ in self.parts()])

    @classmethod
    def of_parts(
        cls, parts: Sequence[tuple[Tensor, QuantizedWeight]], scheme: Scheme
    ) -> QuantizedWeight:
        """Return the weight that has these ``parts``; exact."""
        order = torch.cat([rows for rows, _ in parts]).argsort()
        weights = [weight for _, weight in parts]
        widest = weights[-1]

        def joined(what: str) -> Tensor:
            """Join scales or zero points; those of rows of zeros are 0."""
            n = getattr(widest, what).shape[1]
            own = [
                getattr(widest, what).new_zeros(len(weight.codes), n)
                if weight.bits == PRUNED_BITS
                else getattr(weight, what)
                for weight in weights
            ]
            return torch.cat(own)[order]

        return cls(
            codes=torch.cat([weight.codes for weight in weights])[order],
            scales=joined("scales"),
            zero_points=None if widest.zero_points is None else joined("zero_points"),
            bits=max(weight.bits for weight in weights),
            scheme=scheme,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return what is stored, by name; codes of up to eight bits in two bytes at most."""
        codes = self.codes if self.bits > 8 else self.codes.to(torch.int16)
        held = {"codes": codes, "scales": self.scales, "zeros": self.zero_points}
        return {key: value for key, value in held.items() if value is not None}

    def compact(self) -> QuantizedWeight:
        """Return the same with codes of the smallest type that holds them, to be kept."""
        if self.bits > 8:
            return self
        signed = bool((self.codes < 0).any())
        return replace(self, codes=self.codes.to(torch.int8 if signed else torch.uint8))


def row_blocks(rows: int, columns: int, scheme: Scheme, gram: Tensor | None = None) -> list[range]:
    """Return the rows of a weight that may be quantized at a time, ``joined_rows`` afterwards.

    No row depends on another, and in float64 the whole of a large weight takes several times its
    own memory. One block where rows share a scale or Grams belong to groups of them.
    """
    shared = (
        scheme.granularity is Granularity.TENSOR
        or scheme.scale_format.tensor_bits
        or scheme.row_bits
        or (gram is not None and len(gram) > 1)
    )
    n = 1 if shared else max(1, rows * columns // BLOCK_WEIGHTS)
    return [range(rows * k // n, rows * (k + 1) // n) for k in range(n)]


def joined_rows(
    parts: Sequence[Mapping[str, Tensor]], bits: int, scheme: Scheme
) -> QuantizedWeight:
    """Return the weight of consecutive blocks of rows, each as ``QuantizedWeight.tensors``."""
    joined = {
        key: parts[0][key] if len(parts) == 1 else torch.cat([part[key] for part in parts])
        for key in parts[0]
    }
    return QuantizedWeight(
        codes=joined["codes"],
        scales=joined["scales"],
        zero_points=joined.get("zeros"),
        bits=bits,
        scheme=scheme,
    )


def quantize(
    matrix: Tensor,
    bits: int,
    scheme: Scheme,
    *,
    importance: Tensor | None = None,
    inputs_gram: Tensor | None = None,
    rounding: Rounder | str | None = None,
    polish: bool = True,
) -> QuantizedWeight:
    """Quantize ``matrix`` to ``bits``.

    Scales are rounded to their storage format before the codes are chosen, so codes are the
    best for the scale that a runtime will read.

    Args:
        matrix: Floating-point ``[rows, columns]``, finite. To make up for changed inputs, pass
            the moved weights of ``qep.propagated``, with the Gram of the changed inputs.
        bits: 1 to 8, or 16; 0 for zeros.
        scheme: Grid, granularity, scale rule and format, rounding, sparsity.
        importance: Not negative, broadcastable to ``[rows, columns]``: weighs the squared errors
            of the least-squares rule. Other rules ignore it. By default the diagonal of the Gram
            where the rounder has feedback (GPTQ then fits scales again, ``polish``), else all
            weights count alike.
        inputs_gram: ``X^T X`` of the layer's inputs, ``[columns, columns]``, or one per group of
            rows ``[groups, columns, columns]``; its unit does not matter. Needed by, and only
            used by, rounders with feedback.
        rounding: A ``Rounder``; by default what the scheme says, whose error feedback is GPTQ.
        polish: Whether GPTQ's codes, and scales that nobody asked for, are improved in turn (see
            ``refit``). It takes several times what GPTQ alone does, so an estimate may do without.

    Raises:
        InvalidInput: A bit-width off the list, a wrong shape, an unknown rounder, feedback
            without a Gram.
        InvalidModel: The weights are not finite.

    Cost: the fit of the scales (see ``scales``) and of ``rounders.round_codes``.
    """
    if bits == PRUNED_BITS:
        rows, columns = matrix.shape
        return pruned(rows, columns, scheme, matrix.device)
    if scheme.row_bits:
        return _of_rows(matrix, scheme, importance, inputs_gram, rounding, polish=polish)
    values, rounder, gram, weight = _made_ready(
        matrix, bits, scheme, importance, inputs_gram, rounding
    )
    # Parameters of the grid, as they are stored; then the codes that are best for them.
    scales, zeros, kept = fitted_parameters(values, bits, scheme, weight)
    grid = matrix_grid(scales, zeros, bits, scheme, values.shape[1], kept=kept)
    codes = round_codes(values, grid, rounder, gram)
    if polish and rounder is Rounder.GPTQ and gram is not None:
        codes, scales = refitted(
            values,
            codes,
            scales,
            zeros,
            bits,
            scheme,
            gram,
            scales_stay=importance is not None,
            kept=kept,
        )
    return QuantizedWeight(codes=codes, scales=scales, zero_points=zeros, bits=bits, scheme=scheme)


def pruned(
    rows: int, columns: int, scheme: Scheme, device: torch.device | None = None
) -> QuantizedWeight:
    """Return a weight of zeros, of which nothing is stored."""
    codes = torch.zeros(rows, columns, dtype=torch.int32, device=device)
    return QuantizedWeight(
        codes=codes, scales=torch.zeros(rows, 0), zero_points=None, bits=PRUNED_BITS, scheme=scheme
    )


def rows_by_width(row_bits: Sequence[int]) -> list[tuple[int, Tensor]]:
    """Return which rows have each bit-width, i64[n], narrowest first."""
    widths = torch.tensor(row_bits)
    return [(bits, (widths == bits).nonzero()[:, 0]) for bits in sorted(set(row_bits))]


def _of_rows(
    matrix: Tensor,
    scheme: Scheme,
    importance: Tensor | None,
    inputs_gram: Tensor | None,
    rounding: Rounder | str | None,
    *,
    polish: bool,
) -> QuantizedWeight:
    """Quantize rows to bit-widths of their own; arguments as of ``quantize``.

    No row depends on another, so it gets what it would in a weight of its width.
    """
    if len(scheme.row_bits) != len(matrix):
        msg = (
            f"row_bits must hold a bit-width for each of {len(matrix)} rows; got "
            f"{len(scheme.row_bits)}"
        )
        raise InvalidInput(msg, rows=len(matrix))
    # Moments of groups of rows stand for all of these.
    whole = inputs_gram is not None and inputs_gram.ndim == 3 and len(inputs_gram) > 1
    parts = []
    for bits, rows in rows_by_width(scheme.row_bits):
        taken = torch.arange(len(matrix)) if whole else rows
        weight = None if importance is None else importance.expand_as(matrix)[taken]
        found = quantize(
            matrix[taken],
            bits,
            scheme.of_parts,
            importance=weight,
            inputs_gram=inputs_gram,
            rounding=rounding,
            polish=polish,
        )
        parts.append((rows, found.take(rows) if whole else found))
    return QuantizedWeight.of_parts(parts, scheme)


SCANNED_BITS = 6
"""Estimates of so many bits and more have scales from a scan. On a ResNet-20 scores of 6 and 8 bits
differ by up to 12 and 20 % from exact fits, and plans of 2.25 to 4 bits are the same."""

ROWS_TOGETHER = 1024
"""Rows of several widths that are rounded together."""


def estimated(
    matrix: Tensor,
    wanted: Sequence[tuple[int, Scheme]],
    *,
    importance: Tensor | None = None,
    inputs_gram: Tensor | None = None,
    rounding: Rounder | str | None = None,
) -> Iterator[Tensor]:
    """Yield about what a matrix becomes at several widths, f64[rows, columns] each.

    As ``quantize`` without ``polish``. Of few rows most of the time goes into going from column to
    column, so all widths do that together.

    Args:
        matrix: As of ``quantize``, as are the errors.
        wanted: Bits and scheme of each.
        importance: As of ``quantize``.
        inputs_gram: Likewise.
        rounding: Likewise.

    Cost: a fit of scales for each, and a rounding for all of one grid.
    """
    values = matrix.detach().double()
    made = []
    for bits, scheme in wanted:
        _, rounder, gram, weight = _made_ready(
            matrix, bits, scheme, importance, inputs_gram, rounding
        )
        scales, zeros, kept = fitted_parameters(
            values, bits, scheme, weight, scan=bits >= SCANNED_BITS
        )
        grid = matrix_grid(scales, zeros, bits, scheme, values.shape[1], kept=kept)
        made.append((grid, rounder, gram))
    rows, columns = values.shape
    (_, rounder, gram), grids = made[0], [grid for grid, _, _ in made]
    alike = all(r is rounder for _, r, _ in made) and (gram is None or len(gram) == 1)
    whole = None
    if alike and rows * len(grids) <= ROWS_TOGETHER:
        whole = stacked(grids, rows, columns)
    if whole is not None:
        repeated = values.repeat(len(grids), 1)
        yield from torch.split(whole.read(round_codes(repeated, whole, rounder, gram)), rows)
        return
    for grid, own, gram in made:
        yield grid.read(round_codes(values, grid, own, gram))


def _made_ready(
    matrix: Tensor,
    bits: int,
    scheme: Scheme,
    importance: Tensor | None,
    inputs_gram: Tensor | None,
    rounding: Rounder | str | None,
) -> tuple[Tensor, Rounder, Tensor | None, Tensor | None]:
    """Check arguments of ``quantize``; return values, rounder, Gram, and what weights count for."""
    _check(matrix, bits, importance)
    values = matrix.detach().double()
    check_width(scheme.grid, bits)
    rounder = rounder_of(rounding, scheme)
    gram = None
    if rounder is not Rounder.NEAREST:
        gram = checked_gram(inputs_gram, rounder, values)
    weight = None if importance is None else importance.detach().double().expand_as(values)
    if weight is None and gram is not None:
        weight = _diagonal_importance(gram, values)
    return values, rounder, gram, weight


def _diagonal_importance(gram: Tensor, values: Tensor) -> Tensor | None:
    """Return f64[rows, columns]: the mean squared input of each weight, up to a factor."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(dim=1, keepdim=True)
    if not bool((mean > 0).all()):
        return None
    # A column that no sample reached still counts a little.
    relative = torch.maximum(diagonal / mean, torch.full_like(mean, LEAST_IMPORTANCE))
    return relative.repeat_interleave(len(values) // len(gram), dim=0)


def fake_quantize(
    weight: Tensor,
    layer: Layer,
    bits: int,
    scheme: Scheme,
    *,
    importance: Tensor | None = None,
    inputs_gram: Tensor | None = None,
    rounding: Rounder | str | None = None,
) -> Tensor:
    """Return ``weight`` as it is after storing it at ``bits`` and reading it back.

    Args:
        weight: In the shape that the framework stores.
        layer: What the weight is.
        bits: 1 to 8, 16, or 32 for the weight itself (the same object).
        scheme: Everything else about the quantization.
        importance: As in ``quantize``, or in the shape of ``weight``.
        inputs_gram: As in ``quantize``.
        rounding: As in ``quantize``.

    Returns:
        Same shape and dtype as ``weight``, detached.

    Raises:
        InvalidInput: As ``quantize``.
        InvalidModel: The weight has another shape than ``layer``, or is not finite.
    """
    if bits == FULL_PRECISION_BITS:
        return weight
    matrix = finite_matrix(weight, layer)
    if importance is not None and importance.shape == weight.shape:
        importance = to_matrix(importance, layer)
    stored = quantize(
        matrix, bits, scheme, importance=importance, inputs_gram=inputs_gram, rounding=rounding
    )
    return from_matrix(stored.dequantize().to(weight.dtype), layer)


def finite_matrix(weight: Tensor, layer: Layer) -> Tensor:
    """Return a layer's weight as ``[rows, columns]``.

    Raises:
        InvalidModel: It has another shape than ``layer``, or is not finite.
    """
    matrix = to_matrix(weight.detach(), layer)
    bad = n_not_finite(weight)
    if bad:
        msg = (
            f"the weights of layer '{layer.name}' must be finite; {bad} of {layer.n_weights} are "
            "NaN or infinite: repair the checkpoint"
        )
        raise InvalidModel(msg, layer=layer.name, n_bad=bad)
    return matrix


def _check(matrix: Tensor, bits: int, importance: Tensor | None) -> None:
    if bits not in (PRUNED_BITS, *WEIGHT_BITS) or bits == FULL_PRECISION_BITS:
        allowed = ", ".join(str(b) for b in WEIGHT_BITS if b != FULL_PRECISION_BITS)
        msg = f"a bit-width to quantize to must be one of {allowed}; got {bits}"
        raise InvalidInput(msg, weight_bits=bits)
    if matrix.ndim != 2 or not matrix.numel() or not matrix.is_floating_point():
        msg = (
            f"a weight matrix must be a non-empty floating-point [rows, columns]; got "
            f"{list(matrix.shape)} {matrix.dtype}"
        )
        raise InvalidInput(msg, shape=list(matrix.shape))
    bad = n_not_finite(matrix)
    if bad:
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

"""Scale channels between layers so that weights round better, at no cost in bytes.

A producer's output channels are divided by positive numbers ``s``, and the input channels of all
layers that read them multiplied by ``s`` (``models.channel_flow`` finds the places). The model
computes what it did, but the readers lose less to rounding, ``Q(W diag(s)) diag(s)^-1``, in the
channels where ``s`` is large. The producer loses nothing where each of its rows has scales of its
own, which take ``1/s`` up, or where it is a norm.

For each producer we try

    s_c = E[x_c^2]^(a/2) / E_r[w_rc^2]^(b/2),    divided by its geometric mean,

with a few ``a`` and ``b``, and keep what gives the smallest output error, ``tr(E G E^T)`` with
``E`` the error of the readers' rounded weights and ``G`` the second moment of their inputs, if it
is smaller than that of ``s = 1``. Where inputs are quantized to ``b`` bits too, an error of
``(2 p)^2 max_c G_cc / (12 * 4^b)`` in each of them counts as well, ``p = PEAK``: large channels set
the range for all. ``b = 0`` is [AWQ]; ``a = b`` divides the range of inputs and
weights evenly as [SmoothQuant] does; ``a = 0, b = 1`` evens out the weights' ranges as [Nagel19]
does. Unlike [Nagel19] the producer's own error counts only if its rows share one scale.

References:
    [AWQ] J. Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and
    Acceleration", 2023, arXiv 2306.00978.
    [SmoothQuant] G. Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization
    for Large Language Models", 2022, arXiv 2211.10438.
    [Nagel19] M. Nagel, M. van Baalen, T. Blankevoort, M. Welling, "Data-Free Quantization Through
    Weight Equalization and Bias Correction", 2019, arXiv 1906.04721, section 4.1.

Design: docs/design/rounding.md
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from bitquota.candidates.storage import FULL_PRECISION_BITS, Granularity, ScaleRule
from bitquota.errors import InvalidPlan
from bitquota.models.channel_flow import FARTHEST, channel_pairs
from bitquota.models.layout import from_matrix, to_matrix
from bitquota.models.onnx.channel_flow import onnx_channel_pairs
from bitquota.models.onnx.program import source_of
from bitquota.models.running import put_in_eval_mode, run_module, tensor_of
from bitquota.quantizers.input_moments import input_grams
from bitquota.quantizers.rounders import Rounder
from bitquota.quantizers.weights import quantize

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from bitquota.candidates.layers import Inventory, Layer
    from bitquota.candidates.table import Candidate
    from bitquota.canonical import JsonObject
    from bitquota.models.channel_flow import ChannelPair, Reader

POWERS = tuple((a, b) for a in (0.0, 0.25, 0.5, 0.75, 1.0) for b in (0.0, 0.5, 1.0) if a or b)
"""``a`` and ``b`` that are tried."""

ROWS = 64
"""Rows of a reader on which errors are compared, where rows have scales of their own."""

FINE_BITS = 6
"""Bit-width from which on scales of the comparison are not searched for: it would take most of the
time, and change nothing."""

UNCHANGED = 1e-4
"""Relative change of the outputs in full precision from which on nothing is scaled."""

PEAK = 4.0
"""Largest input of a layer, as a multiple of the root mean square of its largest channel."""

LEAST_SQUARE = 1e-4
"""Mean square of a channel at least, as a share of the mean over channels: one that the samples do
not reach may be reached by others."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scaling:
    """A place where channels are scaled, and by how much.

    Attributes:
        pair: The place.
        factors: f32[channels]: the readers' weights are multiplied by them, the producer's divided.
    """

    pair: ChannelPair
    factors: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Smoothing:
    """A model whose channels were scaled.

    Attributes:
        module: It computes what the original does, up to rounding.
        scalings: Where it differs.
        undone: Why nothing was scaled, where that was not for want of places or gains.
    """

    module: nn.Module
    scalings: tuple[Scaling, ...]
    undone: str = ""

    def to_json(self) -> JsonObject:
        """Return what a plan says of it."""
        told: JsonObject = {"places": [scaling.pair.weight for scaling in self.scalings]}
        return told | ({"undone": self.undone} if self.undone else {})


def smooth(
    module: nn.Module,
    inventory: Inventory,
    candidates: Mapping[str, Candidate],
    batches: Sequence[tuple[Tensor, ...]],
    *,
    powers: Sequence[tuple[float, float]] = POWERS,
) -> Smoothing:
    """Return a copy of ``module`` whose weights round better.

    Heuristic: places are taken one after the other, and each weighs its readers' errors alike,
    relative to what they are without scaling.

    Args:
        module: The full-precision model in eval mode; it is not changed.
        inventory: Its layers.
        candidates: About how each layer will be quantized; others count nothing.
        batches: Positional arguments of forward passes.
        powers: ``a`` and ``b`` to try.

    Cost: a few passes over two samples, one over the batches, and for each place the moments of
    its readers' inputs and ``len(powers)`` quantizations of ``ROWS`` rows of each.
    """
    few = tuple(tensor[:2] for tensor in batches[0])
    layers = {layer.name: layer for layer in inventory.layers}
    chosen = {k: c for k, c in candidates.items() if c.weight_bits != FULL_PRECISION_BITS}
    places = channel_pairs if source_of(module) is None else onnx_channel_pairs
    pairs = [
        pair
        for pair in places(module, inventory, few)
        if any(reader.layer in chosen for reader in pair.readers)
    ]
    seen = {r.layer for p in pairs for r in p.readers} | {
        p.layer for p in pairs if p.layer in chosen and _share_a_scale(chosen[p.layer])
    }
    grams = input_grams(module, inventory, batches, layers=seen & chosen.keys())
    smoothed = put_in_eval_mode(copy.deepcopy(module))
    found: list[Scaling] = []
    for pair in pairs:
        parts = _parts(pair, smoothed, layers, chosen, grams)
        factors = _best_factors(pair.channels, parts, powers)
        if factors is not None:
            found.append(Scaling(pair=pair, factors=factors.float()))
            scale_channels(smoothed, inventory, found[-1])
    before, after = (run_module(m, few).double() for m in (module, smoothed))
    change = float((after - before).norm() / before.norm().clamp(min=1e-300))
    if not change <= UNCHANGED:
        undone = f"it would change outputs in full precision by {change:.1e}, relative"
        return Smoothing(module=module, scalings=(), undone=undone)
    return Smoothing(module=smoothed, scalings=tuple(found))


def scale_channels(module: nn.Module, inventory: Inventory, scaling: Scaling) -> None:
    """Scale the channels of one place in ``module``, in place.

    Raises:
        InvalidModel: The model lacks a tensor of the place.
        InvalidPlan: Its tensors have other shapes.
    """
    layers = {layer.name: layer for layer in inventory.layers}
    pair = scaling.pair
    with torch.no_grad():
        try:
            weight = tensor_of(module, pair.weight)
            factors = scaling.factors.to(weight)
            if pair.layer is None:
                weight.div_(factors)
            else:
                matrix = to_matrix(weight, layers[pair.layer]) / factors[:, None]
                weight.copy_(from_matrix(matrix, layers[pair.layer]))
            if pair.bias is not None:
                tensor_of(module, pair.bias).div_(factors)
            for reader in pair.readers:
                layer = layers[reader.layer]
                read = tensor_of(module, layer.weight_name)
                columns = column_factors(reader, factors, layer)
                rows = to_matrix(read, layer).reshape(len(columns), -1, layer.columns)
                scaled = (rows * columns[:, None]).reshape(layer.rows, layer.columns)
                read.copy_(from_matrix(scaled, layer))
        except (RuntimeError, KeyError, ZeroDivisionError) as err:
            msg = (
                f"channels of '{pair.weight}' must be scaled in the model that the plan was made "
                f"for; this one does not fit ({err}): plan again"
            )
            raise InvalidPlan(msg, tensor=pair.weight) from err


def column_factors(reader: Reader, factors: Tensor, layer: Layer) -> Tensor:
    """Return ``[groups, columns]``: what each column gets, in each group of consecutive rows."""
    return _by_column(reader.spread(factors), layer)


def _by_column(inputs: Tensor, layer: Layer) -> Tensor:
    taps = _taps(layer)
    return inputs.repeat_interleave(taps).reshape(-1, layer.columns)


def _taps(layer: Layer) -> int:
    """Return how many columns stand for one input channel."""
    return math.prod(layer.weight_shape[2:]) if layer.kind.name.startswith("CONV") else 1


def _share_a_scale(candidate: Candidate) -> bool:
    return candidate.scheme.granularity is Granularity.TENSOR


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Part:
    """A layer whose rounding error a place changes.

    Attributes:
        rows: f64[groups, rows, columns]: its weights, or some of them.
        gram: f64[groups, columns, columns].
        layer: The layer.
        candidate: How it is quantized.
        reader: How it reads the channels; ``None`` for the producer.
        counts: f64[channels]: what an error of the producer's channel counts for.
    """

    rows: Tensor
    gram: Tensor
    layer: Layer
    candidate: Candidate
    reader: Reader | None = None
    counts: Tensor | None = None

    def squares(self) -> tuple[Tensor, Tensor]:
        """Return mean squares of a reader's inputs and weights, f64[channels] each."""
        assert self.reader is not None  # noqa: S101  # only readers are asked
        inputs = self.gram.diagonal(dim1=1, dim2=2)
        weights = self.rows.square().mean(dim=1)
        taps = _taps(self.layer)
        first, second = (
            self.reader.gathered(part.reshape(-1, taps).mean(dim=1)) for part in (inputs, weights)
        )
        return first, second

    def error(self, factors: Tensor) -> float:
        """Return the layer's output error if channels are scaled by ``factors``, f64[channels]."""
        if self.reader is None:
            by_row = factors.reshape(len(self.rows), -1, 1)
            rows, gram = self.rows / by_row, self.gram
        else:
            columns = column_factors(self.reader, factors, self.layer)
            rows = self.rows * columns[:, None]
            gram = self.gram / (columns[:, :, None] * columns[:, None, :])
        flat = rows.reshape(-1, rows.shape[2])
        bits, scheme = self.candidate.weight_bits, self.candidate.scheme
        if bits >= FINE_BITS:
            scheme = replace(scheme, scale_rule=ScaleRule.ABSMAX)
        stored = quantize(flat, bits, scheme, rounding=Rounder.NEAREST)
        errors = (stored.dequantize().double() - flat).reshape(rows.shape)
        found = ((errors @ gram) * errors).sum(dim=2)
        if self.counts is not None:
            found = found * (self.counts * factors.square()).reshape(found.shape)
        total = float(found.sum())
        input_bits = self.candidate.activation_bits
        if input_bits is not None and self.reader is not None:
            # A step of (largest - least) / 2^bits, an error of step^2 / 12 in every input.
            largest = float(gram.diagonal(dim1=1, dim2=2).max())
            total += largest * PEAK**2 / (3 * 4**input_bits) * float(rows.square().sum())
        return total


def _parts(
    pair: ChannelPair,
    module: nn.Module,
    layers: Mapping[str, Layer],
    chosen: Mapping[str, Candidate],
    grams: Mapping[str, Tensor],
) -> list[_Part]:
    """Return the readers of a place, and its producer where that has one scale for all rows."""

    def matrix(name: str) -> Tensor:
        layer = layers[name]
        return to_matrix(tensor_of(module, layer.weight_name).detach(), layer).double()

    parts = []
    for reader in pair.readers:
        name = reader.layer
        if name not in chosen or name not in grams:
            continue
        gram = grams[name]
        rows = matrix(name).reshape(len(gram), -1, layers[name].columns)
        if not _share_a_scale(chosen[name]):
            n = min(rows.shape[1], max(1, ROWS // len(gram)))
            rows = rows[:, torch.linspace(0, rows.shape[1] - 1, n).long()]
        parts.append(
            _Part(rows=rows, gram=gram, layer=layers[name], candidate=chosen[name], reader=reader)
        )
    producer = pair.layer
    if parts and producer is not None and producer in grams and _share_a_scale(chosen[producer]):
        gram = grams[producer]
        parts.append(
            _Part(
                rows=matrix(producer).reshape(len(gram), -1, layers[producer].columns),
                gram=gram,
                layer=layers[producer],
                candidate=chosen[producer],
                counts=torch.stack([part.squares()[1] for part in parts]).sum(dim=0),
            )
        )
    return parts


def _best_factors(
    channels: int, parts: Sequence[_Part], powers: Sequence[tuple[float, float]]
) -> Tensor | None:
    """Return f64[channels] with the smallest error, or ``None`` if 1 is best."""
    readers = [part.squares() for part in parts if part.reader is not None]
    if not readers:
        return None
    device = readers[0][0].device
    inputs, weights = (
        _relative(torch.stack([_relative(squares[k]) for squares in readers]).mean(dim=0))
        for k in range(2)
    )
    ones = torch.ones(channels, dtype=torch.float64, device=device)
    alone = [max(part.error(ones), 1e-300) for part in parts]
    least, best = float(len(parts)), None
    for a, b in powers:
        factors = inputs ** (a / 2) / weights ** (b / 2)
        factors = factors / factors.log().mean().exp()
        # Functions between were tried within this range.
        factors = factors.clamp(2.0**-FARTHEST, 2.0**FARTHEST)
        total = sum(part.error(factors) / own for part, own in zip(parts, alone, strict=True))
        if total < least:
            least, best = total, factors
    return best


def _relative(squares: Tensor) -> Tensor:
    found: Tensor = squares / squares.mean().clamp(min=1e-300)
    return found.clamp(min=LEAST_SQUARE)

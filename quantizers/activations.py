"""Quantize the inputs of layers: calibrated ranges, and running a model with them.

A layer's input is what is multiplied with its weight, seen at the operator's call, so ordinary
modules and graphs of ``torch.export`` are treated alike. Integer inputs (token ids) pass through.
Ranges are those of a calibration set, or of each token when it comes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch

from bitquota.candidates.layers import MATRICES, LayerKind
from bitquota.candidates.storage import Grid
from bitquota.errors import InvalidInput, MeasurementFailed
from bitquota.models.calls import LayerWatcher, tensor_key, with_input
from bitquota.quantizers.float_formats import E4M3, float_values

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor, nn

    from bitquota.candidates.layers import Inventory
    from bitquota.models.calls import LayerCall

ACTIVATION_BITS = (2, 3, 4, 5, 6, 7, 8, 16)
N_BINS = 2048
PERCENTILE = 0.9999
"""Share of values that the percentile rule keeps inside the range, each side counted alone."""

CLIP_SHARES = 40
"""Shares of each end of the range that the MSE rule tries."""


class RangeRule(StrEnum):
    """How the range of an activation is chosen from calibration data."""

    MINMAX = "minmax"
    """Everything that was seen, zero included."""
    PERCENTILE = "percentile"
    """All but the outermost values."""
    MSE = "mse"
    """The range with the smallest mean squared rounding and clipping error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationQuantizer:
    """A uniform grid for a layer's input, one scale per tensor.

    Attributes:
        bits: Bit-width.
        scale: Step of the grid; 0 for an input that is always zero.
        zero_point: Code of zero, 0 on a symmetric grid.
        lowest: Lowest code.
        highest: Highest code.
    """

    bits: int
    scale: float
    zero_point: int
    lowest: int
    highest: int

    def __call__(self, values: Tensor) -> Tensor:
        """Return ``values`` rounded to the grid: same shape and dtype; integers as they are."""
        if not values.is_floating_point():
            return values
        if self.scale <= 0.0:
            return torch.zeros_like(values)
        codes = torch.round(values / self.scale) + self.zero_point
        return (codes.clamp(self.lowest, self.highest) - self.zero_point) * self.scale


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenQuantizer:
    """A grid for each token of a layer's input, fitted to its largest value when it comes.

    Integers are symmetric with the step ``max|x| / (2^(bits-1) - ½)``, floating-point numbers E4M3
    in units of ``max|x| / 448``, both as compressed-tensors has them.

    Attributes:
        bits: Bit-width.
        floats: Whether codes are floating-point numbers, of 8 bits.
    """

    bits: int
    floats: bool = False

    def __call__(self, values: Tensor) -> Tensor:
        """Return ``values`` rounded, the last axis being one token: same shape and dtype."""
        if not values.is_floating_point():
            return values
        most = values.abs().amax(dim=-1, keepdim=True)
        half = 2 ** (self.bits - 1)
        step = most / (E4M3.largest if self.floats else half - 0.5)
        # A token of zeros stays one.
        scaled = values / torch.where(step == 0, torch.ones_like(step), step)
        if self.floats:
            return float_values(scaled, E4M3) * step
        return scaled.round().clamp(-half, half - 1) * step


InputGrid = ActivationQuantizer | TokenQuantizer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenInputs:
    """Called with layer and bits it gives the quantizer of each token of the layer's input.

    Attributes:
        kinds: Of the layers, by name.
        floats: See ``TokenQuantizer``.
    """

    kinds: Mapping[str, LayerKind]
    floats: bool

    def __call__(self, layer: str, bits: int) -> Callable[[Tensor], Tensor]:
        """Return the fake-quantizer of ``layer``'s input.

        Raises:
            InvalidInput: A layer whose input has no tokens, or a bit-width that there is not.
        """
        kind = self.kinds[layer]
        if kind is LayerKind.EMBEDDING:
            return _unchanged
        if kind not in TOKEN_KINDS:
            msg = (
                f"ranges per token belong to inputs of linear layers; '{layer}' is of kind {kind}: "
                "take another --activation-fit, or exclude it"
            )
            raise InvalidInput(msg, layer=layer)
        if bits not in ((8,) if self.floats else ACTIVATION_BITS):
            allowed = "8" if self.floats else f"one of {', '.join(map(str, ACTIVATION_BITS))}"
            msg = (
                f"a bit-width of inputs with ranges per token must be one of {allowed}; got {bits}"
            )
            raise InvalidInput(msg, activation_bits=bits)
        return TokenQuantizer(bits=bits, floats=self.floats)


TOKEN_KINDS = frozenset({LayerKind.LINEAR, LayerKind.LINEAR_TRANSPOSED})


@dataclass(slots=True, eq=False)
class InputHistogram:
    """The values that one layer's input takes: ``counts`` over ``N_BINS`` equal bins.

    Attributes:
        low: Smallest value seen, at most 0.
        high: Largest value seen, at least 0.
        counts: f64[N_BINS].
    """

    low: float = 0.0
    high: float = 0.0
    counts: Tensor = field(default_factory=lambda: torch.zeros(N_BINS, dtype=torch.float64))

    def quantizer(
        self, bits: int, rule: RangeRule = RangeRule.MSE, grid: Grid = Grid.ASYMMETRIC
    ) -> ActivationQuantizer:
        """Return the quantizer of ``bits`` for these values.

        The MSE rule tries ``CLIP_SHARES`` shares of each end and takes each bin's centre for its
        values; above 8 bits the bins are too coarse for that, and it takes the whole range.

        Raises:
            InvalidInput: ``bits`` is not an activation bit-width.
        """
        if bits not in ACTIVATION_BITS:
            allowed = ", ".join(map(str, ACTIVATION_BITS))
            msg = f"an activation bit-width must be one of {allowed}; got {bits}"
            raise InvalidInput(msg, activation_bits=bits)
        if rule is RangeRule.PERCENTILE:
            return _grid_of_range(*self._percentile_range(), bits, grid)
        if rule is RangeRule.MINMAX or bits > 8 or self.high - self.low <= 0:
            return _grid_of_range(self.low, self.high, bits, grid)
        return self._best_range(bits, grid)

    def _centres(self) -> Tensor:
        width = (self.high - self.low) / N_BINS
        return self.low + width * (torch.arange(N_BINS, dtype=torch.float64) + 0.5)

    def _percentile_range(self) -> tuple[float, float]:
        total = float(self.counts.sum())
        if total == 0:
            return self.low, self.high
        share = self.counts.cumsum(0) / total
        edges = torch.linspace(self.low, self.high, N_BINS + 1, dtype=torch.float64)
        below = int((share <= 1 - PERCENTILE).sum())
        above = int((share < PERCENTILE).sum()) + 1
        return min(0.0, float(edges[below])), max(0.0, float(edges[min(above, N_BINS)]))

    def _best_range(self, bits: int, grid: Grid) -> ActivationQuantizer:
        centres, total = self._centres(), self.counts.sum().clamp(min=1.0)
        shares = [(k + 1) / CLIP_SHARES for k in range(CLIP_SHARES)]
        lows = [self.low * s for s in shares] if self.low < 0 else [0.0]
        highs = [self.high * s for s in shares] if self.high > 0 else [0.0]
        if grid is Grid.SYMMETRIC:
            reach = max(-self.low, self.high)
            lows, highs = [0.0], [reach * s for s in shares]
        best = _grid_of_range(self.low, self.high, bits, grid)
        best_error = float("inf")
        for low in lows:
            for high in highs:
                tried = _grid_of_range(low, high, bits, grid)
                if tried.scale <= 0:
                    continue
                error = float((self.counts * (centres - tried(centres)).square()).sum() / total)
                if error < best_error:
                    best, best_error = tried, error
        return best


def _grid_of_range(low: float, high: float, bits: int, grid: Grid) -> ActivationQuantizer:
    top = 2**bits - 1
    if grid is Grid.SYMMETRIC:
        half = 2 ** (bits - 1)
        # No error beyond half a step at the largest value, as for weights.
        scale = max(-low, high) / (half - 0.5)
        return ActivationQuantizer(
            bits=bits, scale=scale, zero_point=0, lowest=-half, highest=half - 1
        )
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / top
    zero = round(-low / scale) if scale > 0 else 0
    return ActivationQuantizer(
        bits=bits, scale=scale, zero_point=min(max(zero, 0), top), lowest=0, highest=top
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CalibratedInputs:
    """Histograms of every layer's input; called with layer and bits it gives the quantizer.

    Attributes:
        histograms: By layer name; layers whose input is integer are missing.
        passing: Layers whose input is never quantized: it is integer, or no sample reaches them.
        rule: How ranges are chosen.
        grid: Symmetric or asymmetric.
    """

    histograms: Mapping[str, InputHistogram]
    passing: frozenset[str] = frozenset()
    rule: RangeRule = RangeRule.MSE
    grid: Grid = Grid.ASYMMETRIC
    _known: dict[tuple[str, int], ActivationQuantizer] = field(default_factory=dict)

    def __call__(self, layer: str, bits: int) -> Callable[[Tensor], Tensor]:
        """Return the fake-quantizer of ``layer``'s input.

        Raises:
            InvalidInput: No input of the layer was seen during calibration, or a wrong bit-width.
        """
        if layer in self.passing:
            return _unchanged
        if layer not in self.histograms:
            msg = (
                f"the input of layer '{layer}' was not seen on the calibration set, so it has no "
                "range; leave its activations in full precision"
            )
            raise InvalidInput(msg, layer=layer)
        key = (layer, bits)
        if key not in self._known:
            self._known[key] = self.histograms[layer].quantizer(bits, self.rule, self.grid)
        return self._known[key]


def _unchanged(values: Tensor) -> Tensor:
    return values


class InputWatcher(LayerWatcher[str]):
    """Hands each named layer's input to ``look``, and passes on what that returns.

    Args:
        names: Layer by ``tensor_key`` of its weight; see ``weights_of``.
        look: Takes a layer's name and its input.
    """

    def __init__(
        self, names: Mapping[tuple[Any, ...], str], look: Callable[[str, Tensor], Tensor]
    ) -> None:
        super().__init__(names)
        self.look = look

    def around(
        self,
        known: str,
        call: LayerCall,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:  # noqa: ANN401
        """Run the call on what ``look`` makes of its input."""
        replaced = self.look(known, call.inputs)
        args, kwargs = with_input(call.operator, args, kwargs, replaced)
        return func(*args, **kwargs)


def weights_of(module: nn.Module, inventory: Inventory) -> dict[tuple[Any, ...], str]:
    """Return the name of each layer by ``tensor_key`` of its weight."""
    return {
        tensor_key(module.get_parameter(la.weight_name)): la.name
        for la in inventory.layers
        if la.kind not in MATRICES  # no module's call shows what they are multiplied with
    }


def quantize_inputs_of(
    module: nn.Module, layer: str, quantizer: Callable[[Tensor], Tensor]
) -> None:
    """Let ``layer`` of ``module`` see its first input through ``quantizer`` from now on."""
    module.get_submodule(layer).register_forward_pre_hook(
        lambda _, args: (quantizer(args[0]), *args[1:])
    )


def collect_inputs(
    module: nn.Module,
    inventory: Inventory,
    batches: Iterable[tuple[Tensor, ...]],
    *,
    rule: RangeRule = RangeRule.MSE,
    grid: Grid = Grid.ASYMMETRIC,
) -> CalibratedInputs:
    """Return histograms of every layer's input over ``batches``.

    Args:
        module: The full-precision model in eval mode: calibrate before weights are quantized.
        inventory: Its layers.
        batches: Positional arguments, gone through twice (ranges, then counts).
        rule: How ranges will be chosen.
        grid: Symmetric or asymmetric.

    Raises:
        MeasurementFailed: An activation is NaN or infinite.

    Cost: two forward passes over the batches.
    """
    kept = list(batches)
    found: dict[str, InputHistogram] = {}

    def ranges(layer: str, values: Tensor) -> Tensor:
        low, high = values.aminmax()
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            msg = (
                f"the input of layer '{layer}' must be finite on the calibration set; it is not: "
                "check model and samples for NaN and infinity"
            )
            raise MeasurementFailed(msg, layer=layer)
        histogram = found.setdefault(layer, InputHistogram())
        histogram.low = min(histogram.low, float(low))
        histogram.high = max(histogram.high, float(high))
        return values

    def counts(layer: str, values: Tensor) -> Tensor:
        histogram = found[layer]
        if histogram.high > histogram.low:
            flat = values.detach().float().reshape(-1).cpu()
            counted = torch.histc(flat, N_BINS, histogram.low, histogram.high)
            histogram.counts += counted.double()
        return values

    with torch.no_grad():
        for look in (ranges, counts):
            with InputWatcher(weights_of(module, inventory), look):
                for inputs in kept:
                    module(*inputs)
    # A layer that no sample reaches has no range, and needs none.
    passing = {
        layer.name
        for layer in inventory.layers
        if layer.kind is LayerKind.EMBEDDING or (kept and layer.n_macs == 0)
    }
    return CalibratedInputs(
        histograms=found, passing=frozenset(passing - set(found)), rule=rule, grid=grid
    )


def layers_of_one_input(
    module: nn.Module, inventory: Inventory, inputs: tuple[Tensor, ...]
) -> list[tuple[str, ...]]:
    """Return the layers that are multiplied with one and the same tensor, where several are.

    A runtime quantizes such a tensor once, so these layers share the bit-width of their input.

    Args:
        module: The model in eval mode.
        inventory: Its layers; those that share a weight already are one layer.
        inputs: Positional arguments of one forward pass, which is what it costs. What layers read
            is held until it ends, so that no memory is used twice.
    """
    read: dict[tuple[Any, ...], dict[str, None]] = {}
    held: list[Tensor] = []

    def look(layer: str, values: Tensor) -> Tensor:
        if values.is_floating_point():
            held.append(values)
            read.setdefault((tensor_key(values), values._version), {})[layer] = None  # noqa: SLF001
        return values

    with torch.no_grad(), InputWatcher(weights_of(module, inventory), look):
        module(*inputs)
    return [tuple(names) for names in read.values() if len(names) > 1]


class quantized_inputs(InputWatcher):  # noqa: N801  # used as a context manager
    """Within the context, layers named in ``quantizers`` see quantized inputs.

    Args:
        module: The model.
        inventory: Its layers.
        quantizers: Layer name to quantizer; other layers are left alone.
    """

    def __init__(
        self,
        module: nn.Module,
        inventory: Inventory,
        quantizers: Mapping[str, Callable[[Tensor], Tensor]],
    ) -> None:
        def look(layer: str, values: Tensor) -> Tensor:
            return quantizers[layer](values) if layer in quantizers else values

        super().__init__(weights_of(module, inventory), look)

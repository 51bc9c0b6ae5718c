"""The quantized weight of every candidate of a model, computed once each."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from bitquota.candidates.storage import FULL_PRECISION_BITS
from bitquota.candidates.table import Candidate
from bitquota.errors import InvalidInput, MeasurementFailed
from bitquota.models.layout import from_matrix, to_matrix
from bitquota.models.running import tensor_of
from bitquota.quantizers.rounders import Rounder
from bitquota.quantizers.weights import finite_matrix, quantize, rows_by_width

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    from bitquota.candidates.layers import Inventory, Layer
    from bitquota.quantizers.weights import QuantizedWeight


class QuantizedWeights:
    """The fake-quantized weight of every candidate, computed once each.

    Args:
        module: The full-precision model.
        inventory: Its layers.
        grams: Returns second moments of layer inputs by layer name (see ``input_grams``), for
            rounding with error feedback. Called once, when the first weight is asked for: where
            layers have no choice of candidates, rounding in sequence is all that is needed.
        importance: Weight of each column's squared error in the fit of scales, f64[columns] by
            layer name (see ``imatrix.importance_of``).
        rounding: How weights are rounded where the scheme does not say so itself.
        estimates: Whether what ships is rounded otherwise anyway (in sequence), so that a weight
            to measure with need not be polished (see ``quantize``). Measured on a ResNet-56 a
            third of the time, and plans as good.
    """

    def __init__(
        self,
        module: nn.Module,
        inventory: Inventory,
        grams: Callable[[], Mapping[str, Tensor]] | None = None,
        importance: Mapping[str, Tensor] | None = None,
        rounding: Rounder = Rounder.NEAREST,
        *,
        estimates: bool = False,
    ) -> None:
        self._module = module
        self._estimates = estimates
        self.rounding = rounding
        self._grams = None if grams is None else functools.cache(grams)
        self.importance = importance or {}
        self._inventory = inventory
        self._layers = {layer.name: layer for layer in inventory.layers}
        self._cache: dict[tuple[Any, ...], Tensor] = {}

    def nearest(self) -> QuantizedWeights:
        """Return the same, but for weights that are rounded to nearest."""
        return QuantizedWeights(
            self._module, self._inventory, self._grams, self.importance, Rounder.NEAREST
        )

    def forget(self) -> None:
        """Forget what was computed."""
        self._cache.clear()

    def layer(self, name: str) -> Layer:
        """Return the layer; raises ``InvalidInput`` for a name that the inventory lacks."""
        if name not in self._layers:
            msg = f"a change must name layers of the inventory; got '{name}'"
            raise InvalidInput(msg, layer=name)
        return self._layers[name]

    def original(self, name: str) -> Tensor:
        """Return the full-precision weight."""
        return tensor_of(self._module, self.layer(name).weight_name)

    def __call__(self, candidate: Candidate) -> Tensor:
        """Return the weight of ``candidate``'s layer as that candidate stores it, or near it."""
        if candidate.weight_bits == FULL_PRECISION_BITS:
            return self.original(candidate.layer)
        key = (candidate.layer, candidate.weight_bits, candidate.scheme)
        if candidate.row_bits:
            return self._of_rows(candidate)
        if key not in self._cache:
            found = self._quantized(candidate, polish=not self._estimates)
            self._keep(candidate, found)
        return self._cache[key]

    def _of_rows(self, candidate: Candidate) -> Tensor:
        """Return rows of the weights of one bit-width: no row depends on another."""
        layer, scheme = self.layer(candidate.layer), candidate.scheme
        mixed = to_matrix(self.original(layer.name), layer).clone()
        for bits, rows in rows_by_width(candidate.row_bits):
            whole = self(Candidate.of(layer, bits, scheme.of_parts))
            own = rows.to(mixed.device)
            mixed[own] = to_matrix(whole, layer)[own]
        return from_matrix(mixed, layer)

    def stored(self, candidate: Candidate) -> QuantizedWeight:
        """Return codes and scales of a candidate other than full precision."""
        found = self._quantized(candidate, polish=True)
        if not self._estimates and not candidate.row_bits:
            self._keep(candidate, found)
        return found

    def _quantized(self, candidate: Candidate, *, polish: bool) -> QuantizedWeight:
        layer = self.layer(candidate.layer)
        gram = None if self._grams is None else self._grams().get(layer.name)
        return quantize(
            finite_matrix(self.original(layer.name), layer),
            candidate.weight_bits,
            candidate.scheme,
            importance=self.importance.get(layer.name),
            inputs_gram=gram,
            # Where no Gram could be seen, weights are rounded to nearest.
            rounding=None if gram is None or self.rounding is Rounder.NEAREST else self.rounding,
            polish=polish,
        )

    def _keep(self, candidate: Candidate, found: QuantizedWeight) -> None:
        quantized = from_matrix(found.dequantize(), self.layer(candidate.layer))
        if not bool(torch.isfinite(quantized).all()):
            msg = (
                f"the weights of layer '{candidate.layer}' must be finite after quantization "
                f"to {candidate.label}; they are not: check the layer's weights"
            )
            raise MeasurementFailed(msg, layer=candidate.layer)
        key = (candidate.layer, candidate.weight_bits, candidate.scheme)
        self._cache[key] = quantized.to(self.original(candidate.layer).dtype)

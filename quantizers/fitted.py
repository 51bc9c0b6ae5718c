"""Quantizers fitted to samples: input ranges, Grams for error feedback, importance of columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from bitquota.candidates.storage import FULL_PRECISION_BITS, Rounding
from bitquota.canonical import digest_json
from bitquota.errors import InvalidInput, MeasurementFailed
from bitquota.models.layout import from_matrix, to_matrix
from bitquota.models.running import tensor_of
from bitquota.quantizers.channel_fit import collect_by
from bitquota.quantizers.input_moments import input_grams
from bitquota.quantizers.weights import fake_quantize, quantize

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from torch import Tensor, nn

    from bitquota.candidates.layers import Inventory, Layer
    from bitquota.candidates.table import Candidate
    from bitquota.models.calibration import CalibrationSet
    from bitquota.quantizers.imatrix import Importance
    from bitquota.quantizers.weights import QuantizedWeight

BATCH = 64
"""Samples of one forward pass."""


class QuantizedWeights:
    """The fake-quantized weight of every candidate, computed once each.

    Args:
        module: The full-precision model.
        inventory: Its layers.
        grams: Second moments of layer inputs by layer name (see ``input_grams``), for schemes
            that round with error feedback.
        importance: Weight of each column's squared error in the fit of scales, f64[columns] by
            layer name (see ``imatrix.importance_of``).
    """

    def __init__(
        self,
        module: nn.Module,
        inventory: Inventory,
        grams: Mapping[str, Tensor] | None = None,
        importance: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._module = module
        self._grams = grams or {}
        self.importance = importance or {}
        self._layers = {layer.name: layer for layer in inventory.layers}
        self._cache: dict[tuple[Any, ...], Tensor] = {}

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
        """Return the weight of ``candidate``'s layer as that candidate stores it."""
        original = self.original(candidate.layer)
        if candidate.weight_bits == FULL_PRECISION_BITS:
            return original
        key = (candidate.layer, candidate.weight_bits, candidate.scheme)
        if key not in self._cache:
            with torch.no_grad():
                quantized = fake_quantize(
                    original.detach(),
                    self.layer(candidate.layer),
                    candidate.weight_bits,
                    candidate.scheme,
                    inputs_gram=self._grams.get(candidate.layer),
                    importance=self.importance.get(candidate.layer),
                )
            self._keep(candidate, quantized)
        return self._cache[key]

    def stored(self, candidate: Candidate) -> QuantizedWeight:
        """Return codes and scales of a candidate; its weight is known from then on.

        Not for error feedback, nor for full precision.
        """
        layer = self.layer(candidate.layer)
        found = quantize(
            to_matrix(self.original(candidate.layer).detach(), layer),
            candidate.weight_bits,
            candidate.scheme,
            importance=self.importance.get(candidate.layer),
        )
        self._keep(candidate, from_matrix(found.dequantize(), layer))
        return found

    def _keep(self, candidate: Candidate, quantized: Tensor) -> None:
        if not bool(torch.isfinite(quantized).all()):
            msg = (
                f"the weights of layer '{candidate.layer}' must be finite after quantization "
                f"to {candidate.label}; they are not: check the layer's weights"
            )
            raise MeasurementFailed(msg, layer=candidate.layer)
        key = (candidate.layer, candidate.weight_bits, candidate.scheme)
        self._cache[key] = quantized.to(self.original(candidate.layer).dtype)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fitted:
    """The quantizers of one model, as a set of candidates needs them.

    Attributes:
        weights: Quantized weights.
        activations: Calibrated input quantizers, when candidates quantize inputs.
        origin: Digest of what both were fitted on, or empty: part of keys of the cache.
    """

    weights: QuantizedWeights
    activations: Callable[[str, int], Callable[[Tensor], Tensor]] | None = None
    origin: str = ""


def fit_quantizers(
    module: nn.Module,
    inventory: Inventory,
    candidates: Iterable[Candidate],
    samples: CalibrationSet | None,
    *,
    activation_fit: str = "mse",
    importance: Importance | None = None,
) -> Fitted:
    """Fit what any of ``candidates`` needs on ``samples``.

    Args:
        module: The full-precision model in eval mode, batch norms folded if they will be.
        inventory: Its layers.
        candidates: What the quantizers will be asked for.
        samples: Unlabelled samples; ``None`` will do where nothing is fitted to inputs.
        activation_fit: How input ranges are chosen (``channel_fit.collect_by``).
        importance: What the columns of weights count for, if not alike.

    Raises:
        InvalidInput: Activation ranges or error feedback, and no samples.

    Cost: two passes over the samples for input ranges, one for error feedback, else none.
    """
    offered = list(candidates)
    needs_ranges = any(c.activation_bits is not None for c in offered)
    needs_grams = any(
        c.scheme.rounding is Rounding.ERROR_FEEDBACK and c.weight_bits != FULL_PRECISION_BITS
        for c in offered
    )
    grams = activations = None
    origin = ""
    if needs_ranges or needs_grams:
        if samples is None:
            what = "ranges of activations are" if needs_ranges else "error feedback is"
            msg = f"{what} fitted on samples: provide correction data, such as the calibration set"
            raise InvalidInput(msg)
        origin = digest_json(samples.to_json())
        batches = [b.inputs for b in samples.batches(BATCH)]
        if needs_grams:
            grams = input_grams(module, inventory, batches)
        if needs_ranges:
            activations = collect_by(activation_fit, module, inventory, batches)
            if activation_fit != "mse":
                origin = digest_json([origin, activation_fit])
    if importance is not None:
        origin = digest_json([origin, importance.digest])
    columns = None if importance is None else importance.columns
    return Fitted(
        weights=QuantizedWeights(module, inventory, grams, columns),
        activations=activations,
        origin=origin,
    )

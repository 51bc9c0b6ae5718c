"""Apply a choice of candidates to a model: quantized weights and inputs, then the corrections."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from bitquota.candidates.storage import FULL_PRECISION_BITS
from bitquota.corrections import Correction
from bitquota.errors import InvalidInput, MeasurementFailed
from bitquota.models.running import (
    put_in_eval_mode,
    tensor_of,
)
from bitquota.quantizers.weights import fake_quantize

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from bitquota.candidates.layers import Inventory, Layer
    from bitquota.candidates.table import Candidate
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.references import References


class QuantizedWeights:
    """The fake-quantized weight of every candidate, computed once each.

    Args:
        module: The full-precision model.
        inventory: Its layers.
        grams: Second moments of layer inputs by layer name (see ``input_grams``), for schemes
            that round with error feedback.
        importance: Weight of each column's squared error in the fit of scales, f64[columns] by
            layer name (see ``foreign.importance_of``).
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
        self._importance = importance or {}
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
                    importance=self._importance.get(candidate.layer),
                )
            if not bool(torch.isfinite(quantized).all()):
                msg = (
                    f"the weights of layer '{candidate.layer}' must be finite after quantization "
                    f"to {candidate.label}; they are not: check the layer's weights"
                )
                raise MeasurementFailed(msg, layer=candidate.layer)
            self._cache[key] = quantized.to(original.dtype)
        return self._cache[key]


def as_change(candidates: Sequence[Candidate]) -> dict[str, Candidate]:
    """Return candidates by layer name."""
    return {candidate.layer: candidate for candidate in candidates}


def input_quantizer(
    activations: Callable[[str, int], Callable[[Tensor], Tensor]] | None, layer: str, bits: int
) -> Callable[[Tensor], Tensor]:
    """Return the input quantizer of a layer.

    Raises:
        InvalidInput: A candidate quantizes activations and no quantizers were given.
    """
    if activations is None:
        msg = (
            f"layer '{layer}' has a candidate with {bits}-bit activations: give the runner "
            "'activations', the calibrated input quantizers"
        )
        raise InvalidInput(msg, layer=layer)
    return activations(layer, bits)


def apply_plan(
    module: nn.Module,
    inventory: Inventory,
    candidates: Sequence[Candidate],
    *,
    corrections: Sequence[Correction] = (),
    correction_data: CalibrationSet | None = None,
    activations: Callable[[str, int], Callable[[Tensor], Tensor]] | None = None,
    weights: QuantizedWeights | None = None,
    references: References | None = None,
) -> nn.Module:
    """Return a copy of ``module`` with fake-quantized weights and the corrections applied.

    Args:
        module: The full-precision model in eval mode. Where ``fold_batch_norm`` is among the
            corrections it must be folded already: the inventory speaks of the folded weights.
        inventory: Its layers.
        candidates: One for each layer that changes.
        corrections: Applied in this order: bias correction, then batch-norm statistics.
        correction_data: Unlabelled samples for the corrections.
        activations: Input quantizers, when candidates have activation bits.
        weights: Quantized weights of ``module``, when they need more than the weights themselves.
        references: Keeps what corrections see of ``module`` on ``correction_data``.

    Raises:
        InvalidInput: A correction needs samples and got none.
    """
    quantized = put_in_eval_mode(copy.deepcopy(module))
    weights = weights or QuantizedWeights(module, inventory)
    own = QuantizedWeights(quantized, inventory)
    for name, candidate in as_change(candidates).items():
        # The same storage may be reached under several names (tied weights): copy in place.
        with torch.no_grad():
            own.original(name).copy_(weights(candidate))
        if candidate.activation_bits is not None:
            quantizer = input_quantizer(activations, name, candidate.activation_bits)
            quantized.get_submodule(name).register_forward_pre_hook(
                lambda _, args, q=quantizer: (q(args[0]), *args[1:])
            )
    wanted = [c for c in corrections if c is not Correction.FOLD_BATCH_NORM]
    if wanted and correction_data is None:
        msg = (
            f"the corrections {', '.join(wanted)} need samples and got none; hand in correction "
            "data, such as the calibration set"
        )
        raise InvalidInput(msg, corrections=[str(c) for c in wanted])
    if wanted and correction_data is not None:
        from bitquota.quantizers.corrections import bias_correction, reestimate_batch_norm

        if Correction.BIAS_CORRECTION in wanted:
            bias_correction(module, quantized, inventory, correction_data)
        if Correction.BATCH_NORM_STATISTICS in wanted:
            known = None if references is None else references.statistics
            reestimate_batch_norm(quantized, correction_data, reference=module, known=known)
    return quantized

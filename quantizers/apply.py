"""Apply a choice of candidates to a model: quantized weights and inputs, then the corrections."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from bitquota.candidates.storage import FULL_PRECISION_BITS
from bitquota.context import Context
from bitquota.corrections import BEFORE_QUANTIZING, Correction
from bitquota.errors import InvalidInput
from bitquota.models.running import (
    put_in_eval_mode,
)
from bitquota.quantizers.activations import quantize_inputs_of
from bitquota.quantizers.corrections import DEFAULT_BATCH, bias_correction, reestimate_batch_norm
from bitquota.quantizers.fitted import WALK_BYTES, Fitted
from bitquota.quantizers.kv_cache import put_caches
from bitquota.quantizers.learned import learn_in_blocks
from bitquota.quantizers.quantized_weights import QuantizedWeights
from bitquota.quantizers.sequential import round_in_sequence

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from bitquota.candidates.layers import Inventory
    from bitquota.candidates.table import Candidate
    from bitquota.models.batch_norm import Followed
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.references import References
    from bitquota.quantizers.weights import QuantizedWeight


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
    fitted: Fitted | None = None,
    references: References | None = None,
    stored: dict[str, QuantizedWeight] | None = None,
    context: Context | None = None,
) -> nn.Module:
    """Return a copy of ``module`` with fake-quantized weights and the corrections applied.

    Keys and values of a KV cache are fake-quantized too, where ``candidates`` say so.

    Args:
        module: The full-precision model in eval mode, with the corrections of
            ``BEFORE_QUANTIZING``: the inventory speaks of folded weights.
        inventory: Its layers.
        candidates: One for each layer that changes.
        corrections: Applied in this order: bias correction, then batch-norm statistics. If only
            these are moved, that happens while weights are rounded in order, on the samples of
            the rounding.
        correction_data: Unlabelled samples for the corrections.
        fitted: Quantizers of ``module``, when candidates need more than the weights themselves.
        references: Keeps what corrections see of ``module`` on ``correction_data``.
        stored: Takes codes and scales of every quantized layer, by name.
        context: When to stop rounding, and whom to tell of rounding that is learned.

    Raises:
        InvalidInput: A correction needs samples and got none.
        Cancelled: The context said so.
    """
    (quantized,) = apply_plans(
        module,
        inventory,
        [candidates],
        corrections=corrections,
        correction_data=correction_data,
        fitted=fitted,
        references=references,
        stored=None if stored is None else [stored],
        context=context,
    )
    return quantized


def apply_plans(
    module: nn.Module,
    inventory: Inventory,
    choices: Sequence[Sequence[Candidate]],
    *,
    corrections: Sequence[Correction] = (),
    correction_data: CalibrationSet | None = None,
    fitted: Fitted | None = None,
    references: References | None = None,
    stored: Sequence[dict[str, QuantizedWeight]] | None = None,
    context: Context | None = None,
) -> list[nn.Module]:
    """Return for each of ``choices`` what ``apply_plan`` does; ``stored`` has a place for each.

    Other arguments and errors as there. Where weights are rounded in order, what is seen of
    ``module`` serves all: memory for the activations of all samples between two layers, in each.
    """
    fitted = Fitted(weights=QuantizedWeights(module, inventory)) if fitted is None else fitted
    context = Context() if context is None else context
    wanted = [c for c in corrections if c not in BEFORE_QUANTIZING]
    if wanted and correction_data is None:
        msg = (
            f"the corrections {', '.join(wanted)} need samples and got none; provide correction "
            "data, such as the calibration set"
        )
        raise InvalidInput(msg, corrections=[str(c) for c in wanted])
    applied = [
        _Applied(
            quantized=put_in_eval_mode(copy.deepcopy(module)),
            chosen=as_change([c for c in each if not c.cached]),
            stored=None if stored is None else stored[k],
        )
        for k, each in enumerate(choices)
    ]
    for one, candidates in zip(applied, choices, strict=True):
        put_caches(one.quantized, candidates)
        for name, candidate in one.chosen.items():
            if candidate.activation_bits is not None:
                quantizer = input_quantizer(fitted.activations, name, candidate.activation_bits)
                quantize_inputs_of(one.quantized, name, quantizer)
    follow = Correction.BATCH_NORM_STATISTICS in wanted
    _put_weights(module, inventory, applied, fitted, follow=follow, context=context)
    if correction_data is not None:
        for one in applied:
            _correct(module, inventory, one, wanted, correction_data, references)
    return [one.quantized for one in applied]


@dataclass(slots=True, kw_only=True, eq=False)
class _Applied:
    """A choice on its way into a copy of the model.

    Attributes:
        quantized: The copy.
        chosen: Candidates by layer name.
        stored: Takes codes and scales, by layer name, if they are wanted.
        followed: What its batch norms saw while weights were rounded in order, if they are as they
            will stay.
    """

    quantized: nn.Module
    chosen: dict[str, Candidate]
    stored: dict[str, QuantizedWeight] | None
    followed: dict[tuple[Any, ...], Followed] = field(default_factory=dict)


def _correct(
    module: nn.Module,
    inventory: Inventory,
    one: _Applied,
    wanted: Sequence[Correction],
    data: CalibrationSet,
    references: References | None,
) -> None:
    """Apply the corrections of a copy whose weights are quantized."""
    if Correction.BIAS_CORRECTION in wanted:
        n = inventory.samples_at_once(len(data), WALK_BYTES)
        bias_correction(module, one.quantized, inventory, data.first(n))
    if one.followed and wanted == [Correction.BATCH_NORM_STATISTICS]:
        for statistics in one.followed.values():
            statistics.store()
    elif Correction.BATCH_NORM_STATISTICS in wanted:
        reestimate_batch_norm(
            one.quantized,
            data,
            reference=module,
            known=None if references is None else references.statistics,
            batch_size=inventory.samples_at_once(DEFAULT_BATCH),
        )


def _put_weights(
    module: nn.Module,
    inventory: Inventory,
    applied: Sequence[_Applied],
    fitted: Fitted,
    *,
    follow: bool,
    context: Context,
) -> None:
    """Put quantized weights into the copies, rounded in order or each by itself."""
    if fitted.order is None:
        for one in applied:
            own = QuantizedWeights(one.quantized, inventory)
            for name, candidate in one.chosen.items():
                if one.stored is not None and candidate.weight_bits != FULL_PRECISION_BITS:
                    one.stored[name] = fitted.weights.stored(candidate)
                # The same storage may be reached under several names (tied weights): copy in place.
                with torch.no_grad():
                    own.original(name).copy_(fitted.weights(candidate))
        return
    order = fitted.order
    found = round_in_sequence(
        module,
        [one.quantized for one in applied],
        [one.chosen for one in applied],
        order.batches,
        fitted.weights,
        rounding=order.rounding,
        followed=[one.followed for one in applied] if follow else (),
        context=context,
    )
    for one, weights in zip(applied, found, strict=True):
        made = weights
        if order.iterations:
            one.followed.clear()
            made = weights | learn_in_blocks(
                module,
                one.quantized,
                weights,
                {layer.name: layer for layer in inventory.layers},
                order.batches,
                iterations=order.iterations,
                context=context,
            )
        if one.stored is not None:
            one.stored.update(made)

"""Quantizers fitted to samples: input ranges, Grams for error feedback, importance of columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from bitquota.candidates.storage import FULL_PRECISION_BITS, Rounding
from bitquota.canonical import digest_json
from bitquota.errors import InvalidInput
from bitquota.quantizers.channel_fit import collect_by
from bitquota.quantizers.input_moments import input_grams
from bitquota.quantizers.quantized_weights import QuantizedWeights
from bitquota.quantizers.rounders import Rounder
from bitquota.quantizers.sequential import rounder_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor, nn

    from bitquota.candidates.layers import Inventory
    from bitquota.candidates.table import Candidate
    from bitquota.models.calibration import CalibrationSet
    from bitquota.quantizers.imatrix import Importance

BATCH = 64
"""Samples of one forward pass."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoundingOrder:
    """How the weights that ship are rounded, layer after layer.

    Attributes:
        rounding: One of ``request.ROUNDINGS``, not ``nearest``.
        batches: Positional arguments of the passes whose inputs count.
    """

    rounding: str
    batches: Sequence[tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fitted:
    """The quantizers of one model, as a set of candidates needs them.

    Attributes:
        weights: Quantized weights.
        activations: Calibrated input quantizers, when candidates quantize inputs.
        origin: Digest of what both were fitted on, or empty: part of keys of the cache.
        order: How weights that ship are rounded, if not each by itself.
    """

    weights: QuantizedWeights
    activations: Callable[[str, int], Callable[[Tensor], Tensor]] | None = None
    origin: str = ""
    order: RoundingOrder | None = None


def fit_quantizers(
    module: nn.Module,
    inventory: Inventory,
    candidates: Iterable[Candidate],
    samples: CalibrationSet | None,
    *,
    activation_fit: str = "mse",
    importance: Importance | None = None,
    rounding: str | None = None,
) -> Fitted:
    """Fit what any of ``candidates`` needs on ``samples``.

    Args:
        module: The full-precision model in eval mode, batch norms folded if they will be.
        inventory: Its layers.
        candidates: What the quantizers will be asked for.
        samples: Unlabelled samples; ``None`` will do where nothing is fitted to inputs.
        activation_fit: How input ranges are chosen (``channel_fit.collect_by``).
        importance: What the columns of weights count for, if not alike.
        rounding: One of ``request.ROUNDINGS``; to nearest if left out.

    Raises:
        InvalidInput: Activation ranges or feedback, and no samples.

    Cost: two passes over the samples for input ranges, one for error feedback, else none.
    """
    offered = list(candidates)
    needs_ranges = any(c.activation_bits is not None for c in offered)
    rounded = [c for c in offered if c.weight_bits != FULL_PRECISION_BITS]
    in_order = rounding not in (None, Rounder.NEAREST) and bool(rounded)
    needs_grams = in_order or any(c.scheme.rounding is Rounding.ERROR_FEEDBACK for c in rounded)
    grams = activations = order = None
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
        if in_order:
            assert rounding is not None  # noqa: S101
            order = RoundingOrder(rounding=rounding, batches=batches)
            origin = digest_json([origin, {"rounding": rounding}])
    if importance is not None:
        origin = digest_json([origin, importance.digest])
    columns = None if importance is None else importance.columns
    return Fitted(
        weights=QuantizedWeights(
            module,
            inventory,
            grams,
            columns,
            Rounder.NEAREST if order is None else rounder_in(order.rounding),
        ),
        activations=activations,
        origin=origin,
        order=order,
    )

"""Quantizers fitted to samples: input ranges, Grams for error feedback, importance of columns."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from bitquota.candidates.storage import FULL_PRECISION_BITS, Rounding
from bitquota.candidates.targets.target import DYNAMIC_FITS
from bitquota.canonical import digest_json
from bitquota.errors import InvalidInput
from bitquota.quantizers.activations import InputGrid
from bitquota.quantizers.channel_fit import collect_by
from bitquota.quantizers.input_moments import input_grams, moment_bytes
from bitquota.quantizers.quantized_weights import QuantizedWeights
from bitquota.quantizers.refit import ROUNDS
from bitquota.quantizers.rounders import Rounder
from bitquota.quantizers.sequential import AUTO, LEARNED, QEP, rounder_in
from bitquota.quantizers.shrinkage import PRIOR

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor, nn

    from bitquota.candidates.layers import Inventory
    from bitquota.candidates.table import Candidate
    from bitquota.models.calibration import CalibrationSet
    from bitquota.quantizers.imatrix import Importance

BATCH = 64
"""Samples of one forward pass at most."""

WALK_BYTES = 2**31
"""What the inputs and outputs of a layer may take in all samples that weights are rounded on."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoundingOrder:
    """How the weights that ship are rounded, layer after layer.

    Attributes:
        rounding: ``gpfq``, ``gptq`` or ``qep``.
        batches: Positional arguments of the passes whose inputs count.
        iterations: Steps of learned rounding that follow for each block.
    """

    rounding: str
    batches: Sequence[tuple[Tensor, ...]]
    iterations: int = 0

    @property
    def name(self) -> str:
        """What a plan calls it."""
        return LEARNED if self.iterations else self.rounding


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fitted:
    """The quantizers of one model, as a set of candidates needs them.

    Attributes:
        weights: Quantized weights.
        activations: Calibrated input quantizers, when candidates quantize inputs.
        origin: Digest of what both were fitted on, or empty: part of keys of the cache.
        nearest_origin: The same where weights are rounded to nearest.
        order: How weights that ship are rounded, if not each by itself.
    """

    weights: QuantizedWeights
    activations: Callable[[str, int], Callable[[Tensor], Tensor]] | None = None
    origin: str = ""
    nearest_origin: str = ""
    order: RoundingOrder | None = None

    def input_grids(self, candidates: Iterable[Candidate]) -> dict[str, InputGrid]:
        """Return the grid of each layer's input that candidates quantize, by layer.

        An input that is never quantized has none, nor has one of token ids.
        """
        if self.activations is None:
            return {}
        asked = [c for c in candidates if not c.cached and c.activation_bits is not None]
        grids = {c.layer: self.activations(c.layer, c.activation_bits or 0) for c in asked}
        return {k: grid for k, grid in grids.items() if isinstance(grid, InputGrid)}

    def nearest(self) -> Fitted:
        """Return the same quantizers, but for weights that are rounded to nearest."""
        return replace(self, weights=self.weights.nearest(), origin=self.nearest_origin, order=None)

    def learning(self, iterations: int) -> Fitted:
        """Return the same quantizers, but for weights whose rounding is learned at the end."""
        assert self.order is not None  # noqa: S101  # callers ask first
        return replace(
            self,
            origin=digest_json([self.origin, {"learned": iterations}]),
            order=replace(self.order, iterations=iterations),
        )


def fit_quantizers(
    module: nn.Module,
    inventory: Inventory,
    candidates: Iterable[Candidate],
    samples: CalibrationSet | None,
    *,
    activation_fit: str = "mse",
    importance: Importance | None = None,
    rounding: str = Rounder.NEAREST,
    memory_bytes: int = 2**30,
    by_parts: bool = False,
) -> Fitted:
    """Fit what any of ``candidates`` needs on ``samples``.

    Args:
        module: The full-precision model in eval mode, batch norms folded if they will be.
        inventory: Its layers.
        candidates: What the quantizers will be asked for.
        samples: Unlabelled samples; ``None`` will do where nothing is fitted to inputs.
        activation_fit: How input ranges are chosen (``channel_fit.collect_by``).
        importance: What the columns of weights count for, if not alike.
        rounding: One of ``request.ROUNDINGS``; ``learned`` begins as ``qep`` (see ``learning``).
        memory_bytes: What the moments of inputs may take where ``rounding`` is ``auto``; where they
            would take more, weights are rounded to nearest.
        by_parts: The model is a chain that is quantized part by part (``stacked``): Grams are
            taken then, and need not fit into memory all at once.

    Raises:
        InvalidInput: Activation ranges or feedback, and no samples.

    Cost: two passes over the samples for input ranges, else none; one for error feedback once a
    weight is asked for that is rounded by itself.
    """
    # What the candidates need.
    offered = list(candidates)
    needs_ranges = any(c.activation_bits is not None for c in offered)
    rounded = [c for c in offered if c.weight_bits != FULL_PRECISION_BITS]
    rounding = _first_rounding(rounding, inventory, rounded, math.inf if by_parts else memory_bytes)
    in_order = rounding != Rounder.NEAREST and bool(rounded)
    fed = any(c.scheme.rounding is Rounding.ERROR_FEEDBACK for c in rounded)

    # Fit that, on the samples where there is need of them.
    grams = activations = order = None
    dynamic = activation_fit in DYNAMIC_FITS
    if needs_ranges and dynamic:
        activations = collect_by(activation_fit, module, inventory, ())
    if (needs_ranges and not dynamic) or in_order or fed:
        if samples is None:
            ranged = needs_ranges and not dynamic
            what = "ranges of activations are" if ranged else "rounding with feedback is"
            msg = f"{what} fitted on samples: provide correction data, such as the calibration set"
            raise InvalidInput(msg)
        size = inventory.samples_at_once(BATCH)
        batches = [b.inputs for b in samples.batches(size)]
        if (in_order or fed) and not by_parts:
            grams = partial(input_grams, module, inventory, batches, shrunk=True)
        if needs_ranges and not dynamic:
            activations = collect_by(activation_fit, module, inventory, batches)
        if in_order:
            n = inventory.samples_at_once(len(samples), WALK_BYTES)
            order = RoundingOrder(rounding=rounding, batches=batches[: -(-n // size)])

    origin = partial(
        _origin, samples, importance, activation_fit=activation_fit, ranges=needs_ranges, fed=fed
    )
    columns = None if importance is None else importance.columns
    rounder = Rounder.NEAREST if order is None else rounder_in(order.rounding)
    return Fitted(
        weights=QuantizedWeights(
            module, inventory, grams, columns, rounder, estimates=rounded if order else ()
        ),
        activations=activations,
        origin=origin(order),
        nearest_origin=origin(None),
        order=order,
    )


def _first_rounding(
    asked: str, inventory: Inventory, rounded: Sequence[Candidate], memory_bytes: float
) -> str:
    """Return ``asked``, or the rounding that ``auto`` or ``learned`` begins with."""
    if asked == AUTO:
        fits = moment_bytes(inventory, rounded) <= memory_bytes
        return QEP if fits else Rounder.NEAREST
    return QEP if asked == LEARNED else asked


def _origin(
    samples: CalibrationSet | None,
    importance: Importance | None,
    order: RoundingOrder | None,
    *,
    activation_fit: str,
    ranges: bool,
    fed: bool,
) -> str:
    """Return a digest of what quantizers were fitted on, or nothing if they were not fitted."""
    found = ""
    if samples is not None and (ranges or fed or order is not None):
        found = digest_json(samples.to_json())
    if ranges and activation_fit != "mse":
        found = digest_json([found, activation_fit])
    if fed or order is not None:
        rounding = None if order is None else order.rounding
        how = {
            "rounding": rounding,
            "prior": PRIOR,
            "refitted": ROUNDS,
            "norms": "moved on the way",
        }
        found = digest_json([found, how])
    return found if importance is None else digest_json([found, importance.digest])

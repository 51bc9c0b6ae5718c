"""The weights of a language model that ship, rounded part by part.

Design: docs/design/language-models.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bitquota.candidates.storage import FULL_PRECISION_BITS
from bitquota.journal import short_name
from bitquota.models.layout import from_matrix
from bitquota.models.running import tensor_of
from bitquota.quantizers.part_batches import Batches, Remembering, run_through
from bitquota.quantizers.quantized_weights import QuantizedWeights
from bitquota.quantizers.rounders import Rounder
from bitquota.quantizers.sequential import STAGE, round_in_sequence

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from bitquota.candidates.table import Candidate
    from bitquota.context import Context
    from bitquota.models.kept import Series
    from bitquota.models.stack import Part
    from bitquota.quantizers.stacked import StackedWeights
    from bitquota.quantizers.weights import QuantizedWeight

ROUNDING = 8.0
"""Passes over its samples that rounding a stack takes as long as, roughly: two are passes."""


def round_stack(
    known: StackedWeights,
    candidates: Sequence[Candidate],
    *,
    rounding: str,
    context: Context,
) -> Mapping[str, QuantizedWeight]:
    """Return codes and scales of a choice by layer name, rounded layer after layer.

    As ``round_in_sequence`` rounds a whole model, part by part. Each is read when it is asked for.

    Cost: two passes over the samples (full precision, whose activations between parts are known,
    and quantized), the moments of all inputs, and the rounding of every layer.
    """
    chosen = {c.layer: c for c in candidates if c.weight_bits != FULL_PRECISION_BITS}
    if rounding == Rounder.NEAREST:
        return _to_nearest(known, chosen)
    known.prepare(context)
    stack = known.stack
    numbers = [k for k, c in enumerate(known.candidates) if chosen.get(c.layer) == c]
    made_for = short_name({"rounding": rounding, "candidates": numbers})
    # What was rounded before is only run, and that only if something behind it is not.
    done = [known.recall_rounded(f"rounded-{made_for}-{k}") for k in range(len(stack))]
    found = known.put_away({})
    for one in done:
        if one is not None:
            found.join(one)
    missing = chosen.keys() - found.keys()
    parts = [k for k, names in enumerate(stack.layers) if missing.intersection(names)]
    given: Series | None = None
    for k in range(max(parts, default=-1) + 1):
        context.check(STAGE)
        context.report(STAGE, k, len(stack), weight=ROUNDING * len(known.samples))
        last = k == len(stack) - 1
        full, part = stack.part(k), stack.part(k)
        names = stack.layers[k]
        for name in names:
            # What the rounding writes into must not be the model's own memory.
            place = tensor_of(part, known.layers[name].weight_name)
            place.data = place.data.clone()
            if name in found:
                layer = known.layers[name]
                part.put(layer.weight_name, from_matrix(found[name].dequantize(), layer))
        own = {name: chosen[name] for name in names if name in chosen and name not in found}
        batches = Batches(
            spans=known.spans,
            samples=known.samples,
            given=() if given is None else (known.given[k], given),
            size=known.sizes.end if last else None,
        )
        following = known.keeper.series()
        side = None if given is None else 1
        quantized = Remembering(part, None if last else following, len(batches), side)
        if done[k] is None:
            (made,) = round_in_sequence(
                Remembering(full, None, 0, None if given is None else 0),
                [quantized],
                [own],
                batches,
                _Candidates(full, known),
                rounding=rounding,
                processes=known.processes,
            )
            found.join(known.write_down_rounded(f"rounded-{made_for}-{k}", made))
        else:
            run_through(quantized, batches, known.processes)
        if given is not None:
            given.drop()
        given = following
    if given is not None:
        given.drop()
    return found


def _to_nearest(
    known: StackedWeights, chosen: Mapping[str, Candidate]
) -> Mapping[str, QuantizedWeight]:
    found = known.put_away({})
    for k, names in enumerate(known.stack.layers):
        own = [name for name in names if name in chosen and name not in found]
        if not own:
            continue
        part = known.stack.part(k)
        nearest = QuantizedWeights(part, known.inventory, None, known.importance)
        for name in own:
            found.add(name, nearest.quantized(chosen[name]))
    return found


class _Candidates(QuantizedWeights):
    """The quantized weights of a part, each rounded by itself."""

    def __init__(self, part: Part, known: StackedWeights) -> None:
        super().__init__(part, known.inventory, importance=known.importance)
        self._known = known

    def stored(self, candidate: Candidate) -> QuantizedWeight:
        """Return codes and scales of a candidate."""
        return self._known.stored(candidate).read()

"""Several variants of a stack run side by side, part by part.

Design: docs/design/language-models.md
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from bitquota.candidates.table import Candidate
from bitquota.models.layout import from_matrix
from bitquota.models.processes import Processes
from bitquota.models.running import inputs_of, tensor_of
from bitquota.quantizers.kv_cache import quantized_caches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor

    from bitquota.candidates.layers import Layer
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.kept import Keeper, Series
    from bitquota.models.stack import Part, Stack
    from bitquota.quantizers.weights import QuantizedWeight


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replaced:
    """A tensor that takes the place of the model's own, read when it is needed.

    Attributes:
        weight_name: Name of the tensor.
        weight: Returns it in its shape.
    """

    weight_name: str
    weight: Callable[[], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stored:
    """A quantized weight that is read when it is needed.

    Attributes:
        layer: Whose weight it is.
        read: Returns it.
    """

    layer: Layer
    read: Callable[[], QuantizedWeight]

    @property
    def weight_name(self) -> str:
        """Return the name of the tensor."""
        return self.layer.weight_name

    def weight(self) -> Tensor:
        """Return the weight in the shape of the layer's own."""
        return from_matrix(self.read().dequantize(), self.layer)


Chosen = Replaced | Stored | Candidate
"""What a variant has under a name: another weight, or the candidate of a KV cache."""


def run_variants(
    stack: Stack,
    samples: CalibrationSet,
    spans: Sequence[range],
    variants: Sequence[Mapping[str, Chosen]],
    keeper: Keeper,
    on_part: Callable[[int, int], None],
    names_in: Callable[[int], Sequence[str]] | None = None,
    processes: Processes = Processes(),  # noqa: B008  # frozen
) -> list[Series]:
    """Return for each variant what its last part is given, batch after batch.

    Variants that are equal up to a part run together up to there.

    Args:
        stack: The model.
        samples: What to run on.
        spans: Batches of them.
        variants: Weights by layer name, and candidates of KV caches by theirs.
        keeper: Keeps activations.
        on_part: Called with the number of a part and how many different variants of it ran.
        names_in: Names under which a part looks into variants, by default those of its layers and
            caches.
        processes: Share the batches of a part.

    Cost: one pass for each variant, less what they share; every weight is read once.
    """
    groups: list[tuple[list[int], Series | None]] = [(list(range(len(variants))), None)]
    for k in range(len(stack) - 1):
        own = (*stack.layers[k], *stack.caches_in(k)) if names_in is None else names_in(k)
        apart = _apart(groups, variants, own)
        part = stack.part(k)
        places = {
            one.weight_name: tensor_of(part, one.weight_name)
            for *_, chosen in apart
            for one in chosen
            if isinstance(one, (Replaced, Stored))
        }
        originals = {name: place.data for name, place in places.items()}
        weights: dict[int, Tensor] = {}
        after: list[tuple[list[int], Series | None]] = []
        for position, (together, given, chosen) in enumerate(apart):
            for name, original in originals.items():
                places[name].data = original
            for one in chosen:
                if isinstance(one, (Replaced, Stored)):
                    if id(one) not in weights:
                        weights[id(one)] = one.weight()
                    part.put(one.weight_name, weights[id(one)])
            following = keeper.series()
            cached = [one for one in chosen if isinstance(one, Candidate)]
            with torch.no_grad(), quantized_caches(part, cached):
                before = () if given is None else (given,)
                run_part(part, samples, spans, before, following, processes)
            after.append((together, following))
            later = apart[position + 1 :]
            if given is not None and all(other is not given for _, other, _ in later):
                given.drop()
        groups = after
        on_part(k, len(groups))
    found: dict[int, Series] = {}
    for members, given in groups:
        assert given is not None  # noqa: S101  # part 0 made it
        found |= dict.fromkeys(members, given)
    return [found[v] for v in range(len(variants))]


def run_part(
    part: Part,
    samples: CalibrationSet,
    spans: Sequence[range],
    given: tuple[Series, ...],
    following: Series,
    processes: Processes,
) -> None:
    """Run a part on all batches; what it returns is added to ``following``."""

    def run(b: int) -> dict[str, Tensor]:
        before = (series[b] for series in given)
        return {"output": part(*before, *inputs_of(samples, spans[b]))}

    for found in processes.map(run, len(spans)):
        following.append(found["output"])


Together = tuple[list[int], "Series | None", "tuple[Chosen | None, ...]"]
"""Variants that run a part together, what it is given there, and the weights of its layers."""


def _apart(
    groups: Sequence[tuple[list[int], Series | None]],
    variants: Sequence[Mapping[str, Chosen]],
    names: Sequence[str],
) -> list[Together]:
    """Return the variants that are equal so far and in their weights of a part's layers."""
    apart: list[Together] = []
    for members, given in groups:
        own: dict[tuple[int, ...], list[int]] = {}
        for v in members:
            own.setdefault(tuple(id(variants[v].get(name)) for name in names), []).append(v)
        for together in own.values():
            chosen = tuple(variants[together[0]].get(name) for name in names)
            apart.append((together, given, chosen))
    return apart


def run_parts(
    stack: Stack,
    samples: CalibrationSet,
    spans: Sequence[range],
    weights: Mapping[str, Stored],
    keeper: Keeper,
    on_part: Callable[[int, int], None],
    processes: Processes,
) -> list[Series]:
    """Return what each part is given with these weights, batch after batch (nothing for part 0).

    Arguments and cost as ``run_variants``.
    """
    given = [keeper.series()]
    for k in range(len(stack) - 1):
        part = stack.part(k)
        following = keeper.series()
        for name in stack.layers[k]:
            if name in weights:
                part.put(weights[name].weight_name, weights[name].weight())
        with torch.no_grad():
            before = (given[k],) if k else ()
            run_part(part, samples, spans, before, following, processes)
        given.append(following)
        on_part(k, 1)
    return given


def ending_key(names: Iterable[str], variant: Mapping[str, Chosen]) -> tuple[int, ...]:
    """Return what is equal for variants whose last parts are."""
    return tuple(id(variant.get(name)) for name in names)


def endings(
    stack: Stack, names: Sequence[str], variants: Sequence[Mapping[str, Chosen]]
) -> list[Part]:
    """Return the last part of each variant; equal ones are one."""
    different = {ending_key(names, variant): variant for variant in variants}
    made = {key: ending_in(stack, names, variant) for key, variant in different.items()}
    return [made[ending_key(names, variant)] for variant in variants]


def ending_in(stack: Stack, names: Iterable[str], variant: Mapping[str, Chosen]) -> Part:
    """Return the last part with the weights that a variant has under some names."""
    part = stack.part(len(stack) - 1)
    for name in names:
        one = variant.get(name)
        if isinstance(one, (Replaced, Stored)):
            part.put(one.weight_name, one.weight())
    return part

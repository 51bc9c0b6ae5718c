"""Models whose weights stay in files, run block by block over all samples of a comparison.

Run from end to end, every weight is read for each batch (``models.on_demand``). Here each block is
read once and run on all batches, for every model that shares its files; what is between two blocks
is kept. A batch comes to its output when it is asked for, as if the model were called.

Design: docs/design/language-models.md
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from bitquota.models.kept import Keeper
from bitquota.models.kv_cache import open_caches
from bitquota.models.loaded import inventory_of
from bitquota.models.on_demand import replaced_in
from bitquota.models.running import cut, inputs_of, tensor_of
from bitquota.models.sharing import sharing_weights
from bitquota.models.stack import stack_of
from bitquota.quantizers.variants import Replaced, ending_key, endings, run_variants

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from bitquota.candidates.table import Candidate
    from bitquota.context import Context
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.kept import Series
    from bitquota.models.loaded import LoadedModel
    from bitquota.models.stack import Part, Stack
    from bitquota.quantizers.variants import Chosen

STAGE = "evaluate"


class Walked:
    """A model that has run up to its last part; called batch after batch, in their order.

    Outputs are those of the model to the last bit.
    """

    def __init__(
        self, last: Part, given: Series, samples: CalibrationSet, spans: Sequence[range]
    ) -> None:
        self._last, self._given, self._samples, self._spans = last, given, samples, spans
        self._next = 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the output for the next batch."""
        b = self._next
        expected = inputs_of(self._samples, self._spans[b])
        assert all(map(torch.equal, inputs, expected))  # noqa: S101  # in the order of the walk
        self._next += 1
        output: Tensor = self._last(self._given[b], *inputs)
        return output


def walked(
    models: Mapping[str, Callable[..., Any]],
    caches: Mapping[str, Sequence[Candidate]],
    model: LoadedModel,
    samples: CalibrationSet,
    batch_size: int,
    context: Context,
) -> tuple[dict[str, Callable[..., Any]], int]:
    """Run the models that read their weights from files up to their last part, block by block.

    Args:
        models: By name; those that are not from ``on_demand`` are left as they are, and so are all
            where there is one batch only, or where the model is no chain of blocks.
        caches: What the KV caches of some of them hold.
        model: With its weights in files; the models are made of it.
        samples: What they will be called with.
        batch_size: Samples of each call.
        context: Half of its memory is for what is between two blocks; beyond that, files are.

    Returns:
        What takes the place of each model, and how many parts were run, each reported as a step
        of ``STAGE`` that has the batches as its other steps.

    Raises:
        Cancelled: ``context`` said so.

    Cost: one pass for each model, less what they share; every block is read once. The last part of
    a model is held while its batches run if all of them take a quarter of the memory at most, and
    read for each batch otherwise.
    """
    made = {name: replaced_in(module) for name, module in models.items()}
    own = {name: readers for name, readers in made.items() if readers is not None}
    spans = cut(len(samples), batch_size)
    if not own or len(spans) < 2:
        return dict(models), 0
    module = sharing_weights(model.module)
    open_caches(module, [c.layer for name in own for c in caches.get(name, ())])
    layers = {layer.name: layer for layer in inventory_of(model.module, model, samples).layers}
    stack = stack_of(model, module, layers, samples.first(2).inputs)
    if stack is None:
        return dict(models), 0
    variants: list[dict[str, Chosen]] = []
    for name, readers in own.items():
        variants.append({c.layer: c for c in caches.get(name, ())})
        for tensor, read in readers.items():
            variants[-1][tensor] = Replaced(weight_name=tensor, weight=read)
    names = _names_by_part(stack, [*dict.fromkeys(name for v in variants for name in v)])
    n_parts = len(stack) - 1

    def tell(k: int, _variants: int) -> None:
        context.report(STAGE, k + 1, n_parts + len(spans))
        context.check(STAGE)

    ends = run_variants(
        stack,
        samples,
        spans,
        variants,
        Keeper(context.memory_bytes // 2),
        tell,
        names.__getitem__,
    )
    last = _last_parts(stack, names[n_parts], variants, context.memory_bytes // 4)
    found = dict(models)
    for name, end, held in zip(own, ends, last, strict=True):
        part = held or stack.last_of(models[name])  # type: ignore[arg-type]  # from ``on_demand``
        found[name] = Walked(part, end, samples, spans)
    return found, n_parts


def _names_by_part(stack: Stack, names: Sequence[str]) -> list[list[str]]:
    """Return which of some tensors and caches each part has; of those outside blocks, reads."""
    found: list[list[str]] = [[] for _ in range(len(stack))]
    before, all_read = stack.reads
    early, late = (
        {id(tensor_of(stack.module, name)) for name in read} for read in (before, all_read - before)
    )
    blocks = {f"{block}.": k for k, block in enumerate(stack.blocks, start=1)}
    for name in names:
        inside = [k for prefix, k in blocks.items() if name.startswith(prefix)]
        if inside:
            found[inside[0]].append(name)
            continue
        own = id(tensor_of(stack.module, name))
        if own in early:
            found[0].append(name)
        if own in late:
            found[-1].append(name)
    return found


def _last_parts(
    stack: Stack, names: Sequence[str], variants: Sequence[Mapping[str, Chosen]], limit_bytes: int
) -> list[Part | None]:
    """Return the last part of each variant, equal ones once, or none where they are too large."""
    before, all_read = stack.reads
    size = sum(4 * tensor_of(stack.module, name).numel() for name in all_read - before)
    if len({ending_key(names, variant) for variant in variants}) * size > limit_bytes:
        return [None] * len(variants)
    return [*endings(stack, names, variants)]

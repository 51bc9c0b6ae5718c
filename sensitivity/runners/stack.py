"""A runner that walks a chain of blocks, one block after the other over all samples of a chunk.

Several choices run side by side: those that are equal up to a block share the way to it, and every
weight is read once for all of them.

Design: docs/design/language-models.md
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch

from bitquota.models.running import inputs_of, labels_of, run_module
from bitquota.quantizers.part_batches import pieces, spans_of
from bitquota.quantizers.variants import endings, run_variants
from bitquota.sensitivity.runners.eager import EagerRunner

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from bitquota.quantizers.stacked import StackedWeights
    from bitquota.quantizers.variants import Chosen
    from bitquota.sensitivity.losses import Loss
    from bitquota.sensitivity.runners.base import Change

FOLDS = 8
"""Parts of the samples of a measurement that scores are averaged over, for their errors."""


@dataclass(slots=True)
class StackRunner(EagerRunner):
    """Walks the parts of a stack; see the module.

    Attributes:
        known: The stack, and the weights of its candidates.
    """

    known: StackedWeights = field(kw_only=True)
    engine: str = "stack"

    def losses(self, chunk: int, changes: Sequence[Change | None], loss: Loss) -> list[Tensor]:
        """Return ``f64[n]`` for each change on a chunk; ``None`` is the model itself.

        Cost: one pass for each change, less what they share, and one for full precision.
        """
        variants = [{} if c is None else self.known.variant(c.values()) for c in changes]
        found: list[list[Tensor]] = [[] for _ in variants]
        for rows, reference, outputs in self.outputs(self.chunks[chunk], variants):
            labels = labels_of(self.calibration, rows)
            for k, output in enumerate(outputs):
                found[k].append(loss.per_sample(output, reference, labels))
        return [torch.cat(values) for values in found]

    def outputs(
        self, span: range, variants: Sequence[Mapping[str, Chosen]]
    ) -> Iterator[tuple[range, Tensor, Iterator[Tensor]]]:
        """Yield, a few samples at a time, which they are, the full-precision output and others'.

        The others' outputs, one for each variant, are computed as they are asked for.
        """
        known = self.known
        spans = spans_of(known.sizes.block, [span])
        charge = partial(self.charge, len(span))
        own = run_variants(
            known.stack, self.calibration, spans, variants, known.keeper, charge,
            processes=known.processes,
        )  # fmt: skip
        ends = [known.reference(self.calibration, spans, charge), *own]
        charge(len(known.stack) - 1, len(ends))
        stack = self.known.stack
        parts = endings(stack, stack.layers[-1], ({}, *variants))
        for b, rows in enumerate(spans):
            values = [end[b] for end in ends]
            batch = pieces(known.sizes.end, *values, *inputs_of(self.calibration, rows))
            for a, piece in zip(rows[:: known.sizes.end], batch, strict=True):
                given, inputs = piece[: len(ends)], piece[len(ends) :]
                outputs = (
                    run_module(part, (one, *inputs)) for part, one in zip(parts, given, strict=True)
                )
                yield range(a, a + len(inputs[0])), next(outputs), outputs
        for end in own:
            end.drop()

    def charge(self, n_samples: int, k: int, variants: int) -> None:
        """Count that a part ran so many times."""
        layers = self.inventory.layers
        own = sum(la.n_macs for la in layers if la.name in self.known.stack.layers[k])
        total = sum(layer.n_macs for layer in layers)
        self.passes.macs += n_samples * variants * own / max(1, total)
        self.passes.calls += variants

    def _output(self, chunk: int, change: Change) -> Tensor:
        found = self.outputs(self.chunks[chunk], [self.known.variant(change.values())])
        return torch.cat([next(others) for _, _, others in found])

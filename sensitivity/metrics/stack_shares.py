"""What each layer of a quantized chain of blocks adds to its loss: one walk forwards, one back.

Where all changes ``e`` of the weights together lose ``½ eᵀ H e``, the gradient at the quantized
weights is ``H e``, and half its product with the change of a layer is that layer's share of the
loss: its own square and half of all that it loses together with others. Unlike a score around full
precision it knows what rounding made up for.

Design: docs/design/language-models.md
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from bitquota.models.running import checked_output, inputs_of, labels_of, run_module, tensor_of
from bitquota.quantizers.part_batches import spans_of
from bitquota.quantizers.variants import Stored, ending_in, run_parts
from bitquota.sensitivity.metrics.gradients import gradients_at
from bitquota.sensitivity.metrics.stack_backwards import walk_back

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from bitquota.context import Context
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.kept import Series
    from bitquota.models.stack import Part
    from bitquota.quantizers.stacked import StackedWeights
    from bitquota.sensitivity.losses import Loss
    from bitquota.sensitivity.metrics.stack_backwards import Note
    from bitquota.sensitivity.runners.stack import StackRunner

ROWS = 1024
"""Rows of a weight whose products are taken at once."""

SHARES = "shares"
"""Name of the walk in progress reports, and of its errors."""

FORWARD_AND_BACK = 4
"""Passes that a walk takes: one forwards, and on the way back one more and its gradients."""


def layer_shares(
    runner: StackRunner, weights: Mapping[str, Stored], loss: Loss, name: str, context: Context
) -> dict[str, float]:
    """Return the share of each quantized layer in the mean loss over the samples of the runner.

    Args:
        runner: Has the model, and samples that nothing was fitted to: on those that weights were
            rounded for, what rounding made up for is too good to be true.
        weights: Those that are quantized, by layer name.
        loss: The loss.
        name: Of this walk in the journal; tells what ``weights`` are.
        context: Whom to tell, when to stop.

    Raises:
        InvalidModel: The output has no gradient.
        Cancelled: The context said so.

    Cost: ``FORWARD_AND_BACK`` passes.
    """
    known, samples = runner.known, runner.calibration
    spans = spans_of(known.sizes.block, [range(len(samples))])
    charge = partial(runner.charge, len(samples))
    given = run_parts(known.stack, samples, spans, weights, known.keeper, charge, known.processes)
    ends = known.reference(samples, spans, charge)
    for k in range(len(known.stack)):
        charge(k, FORWARD_AND_BACK - 1)
    found = walk_back(
        known,
        samples,
        spans,
        given,
        _Gradient(known, samples, spans, ends, loss),
        partial(_Shared, known, weights),
        wanted=weights,
        name=f"{SHARES}-{name}",
        stage=SHARES,
        context=context,
    )
    for series in given:
        series.drop()
    return {layer: float(value) / len(samples) for layer, value in found.items()}


class _Gradient:
    """The gradient of the loss at the output of some samples, given that output."""

    def __init__(
        self,
        known: StackedWeights,
        samples: CalibrationSet,
        spans: list[range],
        ends: Series,
        loss: Loss,
    ) -> None:
        self._samples, self._spans, self._ends, self._loss = samples, spans, ends, loss
        self._last = ending_in(known.stack, (), {})

    def __call__(self, output: Tensor, rows: range) -> Tensor:
        b = next(b for b, span in enumerate(self._spans) if rows.start in span)
        inside = slice(rows.start - self._spans[b].start, rows.stop - self._spans[b].start)
        reference = run_module(self._last, (self._ends[b][inside], *inputs_of(self._samples, rows)))
        leaf = output.detach().requires_grad_()
        with torch.enable_grad():
            labels = labels_of(self._samples, rows)
            total = self._loss.per_sample(checked_output(leaf, len(rows)), reference, labels).sum()
        (gradient,) = gradients_at(total, [leaf], SHARES)
        assert gradient is not None  # noqa: S101  # a loss reads its output
        return gradient


class _Shared:
    """A part on the way back."""

    def __init__(
        self, known: StackedWeights, weights: Mapping[str, Stored], k: int, part: Part
    ) -> None:
        self._part, self._at_input = part, k > 0
        self._places: dict[str, Tensor] = {}
        self._changes: dict[str, Tensor] = {}
        for name in known.stack.layers[k]:
            if name not in weights:
                continue
            place = tensor_of(part, known.layers[name].weight_name)
            original = place.data
            part.put(weights[name].weight_name, weights[name].weight())
            self._places[name] = place.requires_grad_()
            self._changes[name] = place.data - original
        self._shares = {
            name: torch.zeros((), dtype=torch.float64, device=known.device) for name in self._places
        }

    def run(
        self, values: tuple[Tensor, ...], at_output: Callable[[Tensor], Tensor], span: range
    ) -> tuple[Tensor, list[Note]]:
        """Return the gradient at the input for some samples, and what they add to the shares."""
        del span
        notes: list[Note] = []
        first, *others = values
        leaf = first.detach().requires_grad_(self._at_input)
        with torch.enable_grad():
            output = self._part(leaf, *others)
            total = (output * at_output(output.detach()).to(output.dtype)).sum()
        leaves = [*self._places.values(), *([leaf] if self._at_input else [])]
        gradients = gradients_at(total, leaves, SHARES)
        for name, gradient in zip(self._places, gradients, strict=False):
            if gradient is not None:
                # Some rows at a time: the product of a head's would take as much as the head.
                changes = torch.split(self._changes[name], ROWS)
                pairs = zip(torch.split(gradient, ROWS), changes, strict=True)
                product = torch.stack([(g * c).sum(dtype=torch.float64) for g, c in pairs]).sum()
                notes.append((name, 0.5 * product))
        back = gradients[-1] if self._at_input else None
        return torch.zeros_like(first) if back is None else back, notes

    def add(self, note: Note, span: range) -> None:
        """Add to the shares what some samples told."""
        del span
        name, value = note
        self._shares[name] += value

    def finish(self) -> dict[str, Tensor]:
        """Return the share of each layer."""
        return self._shares

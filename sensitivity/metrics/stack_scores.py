"""What candidates of a chain of blocks lose: one walk forwards, one backwards, part by part.

The walk forwards is that of ``StackedWeights.prepare``, which keeps what every part is given and
how each candidate changes some rows of its weight. The walk backwards runs each part again with
gradients and hands the gradient at its input to the part before.

With ``g`` the gradient of a sample's loss in one random direction of its Hessian, a change ``e`` of
a row of a weight moves the output along that direction by ``Σ_t g_t (e · x_t)``, whose square is on
average twice what the loss grows by. Rows are rounded independently, so their squares add up.
Second moments of inputs and gradients apart, as for convolutions, would not do here: tokens with
inputs a thousand times as large as others', which every language model has, have gradients that
are as much smaller.

Design: docs/design/language-models.md
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from bitquota.models.calls import tensor_key
from bitquota.models.running import tensor_of
from bitquota.sensitivity.metrics.cache_scores import scored_caches
from bitquota.sensitivity.metrics.layer_trace import check_all_seen, trace_gradients
from bitquota.sensitivity.metrics.metric import BACKWARD, FORWARD, changes_anything
from bitquota.sensitivity.metrics.stack_backwards import walk_back
from bitquota.sensitivity.recorder import checked_losses

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from bitquota.candidates.table import Candidate
    from bitquota.models.stack import Part
    from bitquota.quantizers.stacked import StackedWeights
    from bitquota.sensitivity.metrics.layer_trace import TracedCall
    from bitquota.sensitivity.metrics.metric import Work
    from bitquota.sensitivity.metrics.stack_backwards import Note
    from bitquota.sensitivity.runners.stack import StackRunner


_CALL, _CURVATURE, _SLOPES, _CACHE = "seen ", "bend ", "tilt ", "kept "
"""What a note is about, in front of a layer's name: calls of it, squared gradients of its output
channels, squared slopes of its candidates; or in front of a cache's: its score."""

BACKWARDS = "backwards"
"""Name of the walk backwards in the journal."""


def measure_stack(
    work: Work, runner: StackRunner, direction: Callable[[Tensor, Sequence[int]], Tensor]
) -> list[NDArray[np.float64]]:
    """Return for every chunk ``f64[n_rows, 1]``: the Gram-weighted error of each row.

    Args:
        work: The measurement.
        runner: Its runner; its chunks are the folds of ``runner.known``.
        direction: Returns the gradient at the output of some samples, given that output and their
            positions within their chunk.

    Raises:
        InvalidModel: A layer's multiplication is not visible, or no gradient reaches it.

    Cost: two passes forwards and one backwards, and what ``StackedWeights.prepare`` takes.
    """
    table = work.table
    rows = [r for r, row in enumerate(table.rows) if any(map(changes_anything, row.candidates))]
    keys = [[work.row_key(c, r, "directions") for r in rows] for c in range(len(runner.chunks))]
    found = work.recorder.context.ledger.get_many([key for own in keys for key in own])
    values = np.zeros((len(runner.chunks), len(table.rows)))
    if len(found) < len(keys) * len(rows):
        runner.known.prepare(work.recorder.context)
        scores = _walk_back(work, runner, direction)
        for r in rows:
            for candidate in filter(changes_anything, table.rows[r].candidates):
                values[:, r] += scores[candidate].cpu().numpy()
        scored = torch.from_numpy(values[:, rows])
        checked = checked_losses(scored.T, str(work.settings["metric"]))
        work.recorder.context.ledger.put_many(
            {keys[c][i]: checked[i][c : c + 1] for c in range(len(keys)) for i in range(len(rows))}
        )
        work.charge_samples(len(runner.calibration), 2 * FORWARD + BACKWARD)
    else:
        for c, own in enumerate(keys):
            values[c, rows] = [found[key][0] for key in own]
    return [own[:, None] for own in values]


def _walk_back(
    work: Work, runner: StackRunner, direction: Callable[[Tensor, Sequence[int]], Tensor]
) -> dict[Candidate, Tensor]:
    """Return f64[folds] by candidate: what it loses, in all parts that read its layer."""
    known = runner.known
    numbers = {str(n): candidate for n, candidate in enumerate(known.candidates)}
    found = walk_back(
        known,
        runner.calibration,
        known.spans,
        known.given,
        lambda output, rows: direction(output.detach(), rows),
        partial(_Scored, work, known, {c: n for n, c in numbers.items()}),
        wanted=work.layers,
        name=BACKWARDS,
        stage=work.recorder.stage,
        context=work.recorder.context,
    )
    return {numbers[n]: score for n, score in found.items()}


class _Scored:
    """A part on the way back: what the calls of its layers tell of their candidates.

    Attributes:
        found: f64[folds] by the candidate's name in the journal.
    """

    def __init__(
        self, work: Work, known: StackedWeights, names: dict[Candidate, str], k: int, part: Part
    ) -> None:
        self._known, self._names = known, names
        self._metric = str(work.settings["metric"])
        self._layers = [name for name in known.stack.layers[k] if name in set(work.layers)]
        keys = {name: tensor_of(part, known.layers[name].weight_name) for name in self._layers}
        self._by_key = {tensor_key(tensor): name for name, tensor in keys.items()}
        self._seen = {name: _Seen(known, k, name) for name in self._layers}
        self._caches = _candidates_of(work, known.stack.caches_in(k))
        self._part, self._at_input = part, k > 0
        self.found: dict[str, Tensor] = {}

    def run(
        self, values: tuple[Tensor, ...], at_output: Callable[[Tensor], Tensor], span: range
    ) -> tuple[Tensor, list[Note]]:
        """Look at the calls of the layers for some samples; return the gradient at the input."""
        notes: list[Note] = []

        def note_cache(candidate: Candidate, score: Tensor) -> None:
            notes.append((f"{_CACHE}{self._names[candidate]}", score))

        with scored_caches(self._part, self._caches, note_cache):
            calls, gradient = trace_gradients(
                self._part, values, at_output, self._by_key, self._metric, at_input=self._at_input
            )
        for call in calls:
            notes += self._seen[call.layer].notes(call, self._known.fold_of(span))
        return gradient, notes

    def add(self, note: Note, span: range) -> None:
        """Add what samples of a batch told."""
        fold, (name, value) = self._known.fold_of(span), note
        kind, about = name[: len(_CACHE)], name[len(_CACHE) :]
        if kind == _CACHE:
            own = value.new_zeros(len(self._known.folds))
            own[fold] = value / len(self._known.folds[fold])
            self.found[about] = self.found.get(about, 0.0) + own
        else:
            self._seen[about].add(kind, value, fold)

    def finish(self) -> dict[str, Tensor]:
        """Return what was found."""
        seen = {name for name, one in self._seen.items() if one.calls}
        check_all_seen(seen, self._layers, self._metric)
        for one in self._seen.values():
            for candidate, score in one.scores().items():
                name = self._names[candidate]
                self.found[name] = self.found.get(name, 0.0) + score
        return self.found


def _candidates_of(work: Work, names: Sequence[str]) -> list[Candidate]:
    """Return the candidates that quantize the caches of these names."""
    everything = (c for row in work.table.rows for c in filter(changes_anything, row.candidates))
    return [c for c in everything if c.layer in names]


class _Seen:
    """What the calls of one layer in one part tell of its candidates."""

    def __init__(self, known: StackedWeights, k: int, name: str) -> None:
        self._known, self._k = known, k
        self.calls = 0
        self._candidates = [
            c for c in known.candidates if c.layer == name and (k, c) in known.energies
        ]
        self._rows = known.sampled.get((k, name))
        self._errors: Tensor | None = None
        if self._rows is not None:
            kept = [known.kept_errors[known.errors[k, c]] for c in self._candidates]
            self._errors = torch.stack(kept).float()  # [candidates, sampled rows, columns]
        self._slopes: Tensor | None = None
        self._curvature: Tensor | None = None

    def add(self, kind: str, value: Tensor, fold: int) -> None:
        """Add what ``notes`` returned for samples of a fold."""
        if kind == _CALL:
            self.calls += 1
            return
        if self._curvature is None:
            n = len(self._known.folds)
            self._curvature = value.new_zeros(n, len(value))
            self._slopes = value.new_zeros(n, len(self._candidates))
        assert self._slopes is not None  # noqa: S101  # made together
        (self._curvature if kind == _CURVATURE else self._slopes)[fold] += value

    def notes(self, call: TracedCall, fold: int) -> list[Note]:
        """Return what one call tells."""
        gradient, folds = call.gradient, self._known.folds
        found: list[Note] = [(_CALL + call.layer, torch.empty(0))]
        if gradient is None:
            return found
        # The mean squared gradient of each output channel, of the samples of a fold.
        axis = call.channel_axis % call.output_dims
        others = [d for d in range(call.output_dims) if d != axis]
        squared = gradient.square().sum(dim=others, dtype=torch.float64)
        positions = gradient.numel() // len(squared) // len(gradient)
        n = len(folds[fold])
        found.append((_CURVATURE + call.layer, squared / positions / n / folds[-1].stop))
        if self._errors is None or self._rows is None:
            return found
        # What the loss in the random direction of each sample does along each row's change.
        n_samples, inputs = len(gradient), call.inputs
        if axis < call.output_dims - 1:
            # The weight stands before its inputs, which are columns.
            gradient, inputs = gradient.transpose(-1, -2), inputs.transpose(-1, -2)
        inputs = inputs.reshape(n_samples, -1, inputs.shape[-1])
        own = gradient.reshape(n_samples, -1, gradient.shape[-1])[..., self._rows]
        slopes = own.transpose(1, 2) @ inputs  # [samples, sampled rows, columns]
        along = torch.einsum("nrc,brc->bnr", slopes, self._errors)
        found.append((_SLOPES + call.layer, along.double().square().sum(dim=(1, 2)) / n))
        return found

    def scores(self) -> dict[Candidate, Tensor]:
        """Return f64[folds] by candidate."""
        found: dict[Candidate, Tensor] = {}
        if self._curvature is None or self._slopes is None:
            zero = torch.zeros(len(self._known.folds), dtype=torch.float64)
            return dict.fromkeys(self._candidates, zero.to(self._known.device))
        for c, candidate in enumerate(self._candidates):
            energy = self._known.energies[self._k, candidate]
            if self._rows is None:
                found[candidate] = 0.5 * (self._curvature @ energy)
                continue
            # Rows that were not sampled, in proportion to what the second moments say of them.
            every = self._curvature.sum(dim=0) * energy
            share = every.sum() / every[self._rows].sum().clamp_min(1e-300)
            found[candidate] = 0.5 * share * self._slopes[:, c]
        return found

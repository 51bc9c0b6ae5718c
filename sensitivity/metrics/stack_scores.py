"""The Gram-weighted error of a chain of blocks: one walk forwards, one backwards, part by part.

The walk forwards is that of ``StackedWeights.prepare``, which keeps what every part is given and
what each candidate's error does to the outputs of its layer. The walk backwards runs each part
again with gradients and hands the gradient at its input to the part before.

Design: docs/design/language-models.md
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from bitquota.models.calls import tensor_key
from bitquota.models.running import inputs_of, tensor_of
from bitquota.quantizers.part_batches import pieces
from bitquota.sensitivity.metrics.cache_scores import score_name, scored_caches
from bitquota.sensitivity.metrics.layer_trace import check_all_seen, trace_gradients
from bitquota.sensitivity.metrics.metric import BACKWARD, FORWARD, changes_anything
from bitquota.sensitivity.recorder import checked_losses

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from bitquota.candidates.table import Candidate
    from bitquota.models.kept import Series
    from bitquota.quantizers.stacked import StackedWeights
    from bitquota.sensitivity.metrics.layer_trace import TracedCall
    from bitquota.sensitivity.metrics.metric import Work
    from bitquota.sensitivity.runners.stack import StackRunner


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
    keys = [[work.row_key(c, r, "row") for r in rows] for c in range(len(runner.chunks))]
    found = work.recorder.context.ledger.get_many([key for own in keys for key in own])
    values = np.zeros((len(runner.chunks), len(table.rows)))
    if len(found) < len(keys) * len(rows):
        runner.known.prepare(work.recorder.context)
        curvature = _curvature(work, runner, direction)
        for r in rows:
            for candidate in filter(changes_anything, table.rows[r].candidates):
                values[:, r] += _score(runner.known, candidate, curvature)
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


Curvature = dict[tuple[int, str], Tensor]
"""By part and layer f64[folds, channels]: the mean squared gradient over samples and positions of
each fold, divided by the number of all samples. By part and ``score_name`` f64[folds]: the score of
a candidate of a KV cache."""


def _score(
    known: StackedWeights, candidate: Candidate, curvature: Curvature
) -> NDArray[np.float64]:
    """Return f64[folds], ``½ Σ_r E[g_r²] e_r G e_rᵀ`` of a candidate, gradients of each fold."""
    total = np.zeros(len(known.folds))
    for k in range(len(known.stack)):
        if candidate.cached:
            scored = curvature.get((k, score_name(candidate)))
            total += 0.0 if scored is None else scored.cpu().numpy()
            continue
        at = curvature.get((k, candidate.layer))
        if at is not None:
            energy = known.energies[k, candidate]
            total += 0.5 * (at @ energy).cpu().numpy()
    return total


def _curvature(
    work: Work, runner: StackRunner, direction: Callable[[Tensor, Sequence[int]], Tensor]
) -> Curvature:
    """Walk from the output back to the first part that has layers; scores caches on the way."""
    known, samples, metric = runner.known, runner.calibration, str(work.settings["metric"])
    stack, wanted = known.stack, set(work.layers)
    found, behind, parts = _recall(known)
    for k in reversed(range(parts)):
        work.recorder.context.check(work.recorder.stage)
        own = [name for name in stack.layers[k] if name in wanted]
        if k == 0 and not own:
            break
        part = stack.part(k)
        caches = _candidates_of(work, stack.caches_in(k))
        names = {tensor_key(tensor_of(part, known.layers[n].weight_name)): n for n in own}
        # The output of the model is large: a few samples at a time there.
        size = known.sizes.end if behind is None else known.sizes.block
        before, seen = known.keeper.series(), set[str]()
        for b, span in enumerate(known.spans):
            batch = ((known.given[k][b],) if k else ()) + inputs_of(samples, span)
            gradients: list[Tensor] = []
            for a, values in zip(span[::size], pieces(size, *batch), strict=True):
                rows = range(a, min(a + size, span.stop))
                at_output = (
                    (lambda output, rows=rows: direction(output, rows))
                    if behind is None
                    else (lambda _, b=b, behind=behind: behind[b])
                )
                fold = known.fold_of(span)
                add = partial(_add_score, found, k, fold, known.folds)
                with scored_caches(part, caches, add):
                    calls, gradient = trace_gradients(
                        part, values, at_output, names, metric, at_input=k > 0
                    )
                gradients.append(gradient)
                for call in calls:
                    seen.add(call.layer)
                    _add(found, k, call, fold, known.folds)
            if k:
                before.append(torch.cat(gradients))
        check_all_seen(seen, own, metric)
        if behind is not None:
            behind.drop()
        behind = before
        _write_down(known, found, behind, k)
        work.recorder.context.report(work.recorder.stage, len(stack) - k, len(stack))
    if behind is not None:
        behind.drop()
    return found


def _candidates_of(work: Work, names: Sequence[str]) -> list[Candidate]:
    """Return the candidates that quantize the caches of these names."""
    everything = (c for row in work.table.rows for c in filter(changes_anything, row.candidates))
    return [c for c in everything if c.layer in names]


def _add_score(
    found: Curvature,
    k: int,
    fold: int,
    folds: Sequence[range],
    candidate: Candidate,
    score: Tensor,
) -> None:
    """Add what a candidate of a cache loses on some samples of a fold."""
    key = k, score_name(candidate)
    if key not in found:
        found[key] = score.new_zeros(len(folds))
    found[key][fold] += score / len(folds[fold])


def _write_down(known: StackedWeights, found: Curvature, behind: Series, k: int) -> None:
    """Keep what was found from the output back to part ``k``, and the gradients at its input."""
    held = {f"{part}:{name}": squares for (part, name), squares in found.items()}
    held |= {f"gradient:{b}": behind[b] for b in range(len(behind))}
    known.journal.write(BACKWARDS, save({**held, "part": torch.tensor(k)}))


def _recall(known: StackedWeights) -> tuple[Curvature, Series | None, int]:
    """Return what was found before an interruption, and how many parts are still to be walked."""
    content = known.journal.read(BACKWARDS)
    if content is None:
        return {}, None, len(known.stack)
    held = load(content)
    k = int(held.pop("part"))
    behind = known.keeper.series()
    for b in range(len(known.spans) if k else 0):
        behind.append(held.pop(f"gradient:{b}").to(known.device))
    found: Curvature = {}
    for key, squares in held.items():
        part, _, name = key.partition(":")
        found[int(part), name] = squares.to(known.device)
    return found, behind, k


def _add(found: Curvature, k: int, call: TracedCall, fold: int, folds: Sequence[range]) -> None:
    """Add the squared gradients of one call."""
    if call.gradient is None:
        return
    axis = call.channel_axis % call.output_dims
    others = [d for d in range(call.output_dims) if d != axis]
    squared = call.gradient.square().sum(dim=others, dtype=torch.float64)
    positions = call.gradient.numel() // len(squared) // len(call.gradient) * len(folds[fold])
    key = k, call.layer
    if key not in found:
        found[key] = squared.new_zeros(len(folds), len(squared))
    found[key][fold] += squared / positions / folds[-1].stop

"""True losses of several choices on one runner, each re-executed only where it differs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from bitquota.sensitivity.errands import CHOICES
from bitquota.sensitivity.recorder import base_change, make_recorder, merged, one_for_each_chunk

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from bitquota.candidates.table import Candidate, CandidateTable
    from bitquota.progress import IsCancelled, OnProgress
    from bitquota.sensitivity.cache import Ledger
    from bitquota.sensitivity.losses import Loss
    from bitquota.sensitivity.runners.base import Change, Runner, State


def measure_choices(
    runner: Runner,
    table: CandidateTable,
    loss: Loss,
    choices: Sequence[Sequence[int]],
    *,
    centre: Sequence[int] | None = None,
    ledger: Ledger | None = None,
    on_progress: OnProgress | None = None,
    cancelled: IsCancelled | None = None,
    stage: str = "choices",
) -> NDArray[np.float64]:
    """Return ``f64[k, N]``: the loss increase of each choice over full precision, by sample.

    Args:
        runner: Executes the model.
        table: What choices speak of.
        loss: The loss.
        choices: What to measure.
        centre: Run this choice once and re-execute the others behind the groups in which they
            differ from it; by default each choice is a pass of its own.
        ledger: Where measurements are kept.
        on_progress: Called after every chunk.
        cancelled: Asked between chunks.
        stage: Name for progress.

    Cost: one pass for the centre and, for each choice, the suffix behind its first difference.
    """
    n_samples = len(runner.calibration)
    recorder = make_recorder(
        runner,
        loss,
        stage,
        len(runner.chunks),
        ledger=ledger,
        on_progress=on_progress,
        cancelled=cancelled,
        ahead=(table, one_for_each_chunk(runner, CHOICES, centre, choices)),
    )
    changes = [base_change(table, choice) for choice in choices]
    base = base_change(table, centre)
    values = np.empty((len(choices), n_samples))
    for chunk, span in recorder.spans():
        reference_key = recorder.key(chunk, "reference", "loss")
        keys = recorder.keys(chunk, [merged(base, change) for change in changes])

        def run(chunk: int = chunk) -> list[NDArray[np.float64]]:
            state: State | None = None
            outputs = [runner.reference(chunk)]
            for change in changes:
                if centre is None:
                    outputs.append(runner.start(chunk, change).output)
                    continue
                if state is None:
                    state = runner.start(chunk, base)
                different = _moved(base, change)
                outputs.append(runner.output(state, different) if different else state.output)
            return recorder.losses(chunk, outputs)

        found = recorder.shard([reference_key, *keys], run)
        for k, key in enumerate(keys):
            values[k, span.start : span.stop] = found[key] - found[reference_key]
    return values


def passes_of(
    runner: Runner,
    table: CandidateTable,
    choices: Sequence[Sequence[int]],
    centre: Sequence[int] | None,
) -> float:
    """Return the forward-equivalents of ``measure_choices`` where the ledger holds nothing."""
    if centre is None:
        return float(len(choices))
    base = base_change(table, centre)
    moved = [_moved(base, base_change(table, choice)) for choice in choices]
    return 1.0 + sum(runner.share(list(change)) for change in moved if change)


def _moved(base: Change, change: Change) -> dict[str, Candidate]:
    """Return the part of ``change`` that differs from ``base``."""
    return {name: candidate for name, candidate in change.items() if base.get(name) != candidate}

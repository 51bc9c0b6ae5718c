"""True losses of several choices on one runner, each re-executed only where it differs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from bitquota.context import Context
from bitquota.sensitivity.recorder import (
    Recorder,
    Shared,
    base_change,
    checked_losses,
    merged,
)
from bitquota.sensitivity.runners.stack import StackRunner
from bitquota.sensitivity.tasks import CHOICES, Task, as_point

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from bitquota.candidates.table import Candidate, CandidateTable
    from bitquota.sensitivity.losses import Loss
    from bitquota.sensitivity.runners.base import Change, Runner, State


def measure_choices(
    runner: Runner,
    table: CandidateTable,
    loss: Loss,
    choices: Sequence[Sequence[int]],
    *,
    centre: Sequence[int] | None = None,
    context: Context | None = None,
    stage: str = "choices",
    chunks: Sequence[int] | None = None,
) -> NDArray[np.float64]:
    """Return ``f64[k, N]``: the loss increase of each choice over full precision, by sample.

    Args:
        runner: Executes the model.
        table: What choices speak of.
        loss: The loss.
        choices: What to measure.
        centre: Run this choice once and re-execute the others behind the groups in which they
            differ from it; by default each choice is a pass of its own.
        context: Where measurements are kept, whom to tell, when to stop.
        stage: Name for progress.
        chunks: Which chunks to measure on, by default all; ``N`` counts their samples.

    Cost: one pass for the centre and, for each choice, the suffix behind its first difference;
    what is known already is not run again.
    """
    context = context or Context()
    task = Task(
        measure=CHOICES, chunk=0, point=as_point(centre), choices=tuple(map(as_point, choices))
    )

    def one_chunk(chunk: int) -> None:
        measure_choices(
            runner, table, loss, choices, centre=centre, context=context.part(), chunks=[chunk]
        )

    recorder = Recorder(
        runner=runner,
        loss=loss,
        stage=stage,
        context=context,
        only=chunks,
        passes=lambda: runner.passes_before + passes_of(runner, table, choices, centre),
        shared=Shared(task=task, measure=one_chunk),
    )

    # Chunk by chunk: every choice, from the centre's activations where there is one.
    changes = [base_change(table, choice) for choice in choices]
    base = base_change(table, centre)
    values = np.empty((len(choices), len(recorder.positions)))
    for chunk, where in recorder.spans():
        reference_key = recorder.key(chunk, "reference", "loss")
        keys = recorder.keys(chunk, [merged(base, change) for change in changes])

        def run(places: list[int], chunk: int = chunk) -> list[NDArray[np.float64]]:
            if isinstance(runner, StackRunner):
                asked = [
                    None if place == 0 else merged(base, changes[place - 1]) for place in places
                ]
                return checked_losses(torch.stack(runner.losses(chunk, asked, loss)), loss.name)
            state: State | None = None
            outputs: list[Tensor] = []
            for place in places:
                if place == 0:
                    outputs.append(runner.reference(chunk))
                    continue
                change = changes[place - 1]
                if centre is None:
                    outputs.append(runner.start(chunk, change).output)
                    continue
                if state is None:
                    state = runner.start(chunk, base)
                different = _moved(base, change)
                outputs.append(runner.output(state, different) if different else state.output)
            return recorder.losses(chunk, outputs)

        found = recorder.parts([reference_key, *keys], run)
        for k, key in enumerate(keys):
            values[k, where] = found[key] - found[reference_key]
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

"""A walk backwards through a chain of blocks, over all samples at once, part by part.

Each part runs again with gradients on what it was given on the way forwards, and hands the gradient
at its input to the part before. What was found behind a part is in the journal, so that work that
was interrupted goes on there.

Design: docs/design/language-models.md
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors.torch import load, save

from bitquota.models.running import inputs_of
from bitquota.quantizers.part_batches import pieces

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from torch import Tensor

    from bitquota.context import Context
    from bitquota.models.calibration import CalibrationSet
    from bitquota.models.kept import Series
    from bitquota.models.stack import Part
    from bitquota.quantizers.stacked import StackedWeights


Note = tuple[str, "Tensor"]
"""Something that was found, and what it is about."""


class Visit(Protocol):
    """What is done at one part."""

    def run(
        self, values: tuple[Tensor, ...], at_output: Callable[[Tensor], Tensor], span: range
    ) -> tuple[Tensor, list[Note]]:
        """Run the part on some samples; return the gradient at its input, and what they tell.

        It may run in another process, so it changes nothing.

        Args:
            values: What it is called with.
            at_output: Returns the gradient at its output, given that.
            span: The batch that the samples are of.
        """
        ...

    def add(self, note: Note, span: range) -> None:
        """Add what samples of a batch told; called in the order of the samples."""
        ...

    def finish(self) -> dict[str, Tensor]:
        """Return what was found; what several parts found under one name is added."""
        ...


_GRADIENT = "gradient"

PASSES = 3.0
"""What a walk backwards takes: parts run once more, and their gradients are as two passes."""


def walk_back(
    known: StackedWeights,
    samples: CalibrationSet,
    spans: Sequence[range],
    given: Sequence[Series],
    at_end: Callable[[Tensor, range], Tensor],
    visit: Callable[[int, Part], Visit],
    *,
    wanted: Collection[str],
    name: str,
    stage: str,
    context: Context,
) -> dict[str, Tensor]:
    """Walk from the output back to the first part that has layers.

    Args:
        known: The stack, its journal, and how much runs at a time.
        samples: What to run on.
        spans: Batches of them.
        given: What each part is given, batch after batch (nothing for part 0).
        at_end: Returns the gradient at the model's output for some samples, given that output.
        visit: Called with the number of each part and the part, which it may change.
        wanted: Layers that matter; the walk ends before a first part without any.
        name: Of the walk in the journal.
        stage: Name for progress.
        context: Whom to tell, when to stop.

    Raises:
        Cancelled: The context said so.

    Cost: one pass forwards and one backwards.
    """
    stack = known.stack
    found, behind, parts = _recall(known, name, len(spans))
    for k in reversed(range(parts)):
        context.check(stage)
        if k == 0 and not set(wanted).intersection(stack.layers[0]):
            break
        here = visit(k, stack.part(k))
        # The output of the model is large: a few samples at a time there.
        size = known.sizes.end if behind is None else known.sizes.block
        before = known.keeper.series()
        batches = (given[k],) if k else ()
        run = partial(_run_back, here, samples, spans, batches, behind, at_end, size)
        for b, told in enumerate(known.processes.map(run, len(spans))):
            if k:
                before.append(told[_GRADIENT])
            for key, value in told.items():
                if key != _GRADIENT:
                    here.add((key.partition(":")[2], value), spans[b])
        for key, value in here.finish().items():
            found[key] = found.get(key, 0.0) + value
        if behind is not None:
            behind.drop()
        behind = before
        _write_down(known, name, found, behind, k)
        context.report(stage, len(stack) - k, len(stack), weight=PASSES * len(samples))
    if behind is not None:
        behind.drop()
    return found


def _run_back(
    here: Visit,
    samples: CalibrationSet,
    spans: Sequence[range],
    given: tuple[Series, ...],
    behind: Series | None,
    at_end: Callable[[Tensor, range], Tensor],
    size: int,
    b: int,
) -> dict[str, Tensor]:
    """Return the gradient at a part's input for one batch, and the notes in their order."""
    span = spans[b]
    batch = (*(series[b] for series in given), *inputs_of(samples, span))
    gradients: list[Tensor] = []
    found: dict[str, Tensor] = {}
    for a, values in zip(span[::size], pieces(size, *batch), strict=True):
        rows = range(a, min(a + size, span.stop))

        def at_output(output: Tensor, rows: range = rows) -> Tensor:
            return at_end(output, rows) if behind is None else behind[b]

        gradient, notes = here.run(values, at_output, span)
        gradients.append(gradient)
        for name, value in notes:
            found[f"{len(found)}:{name}"] = value
    return found | {_GRADIENT: torch.cat(gradients)}


def _write_down(
    known: StackedWeights, name: str, found: dict[str, Tensor], behind: Series, k: int
) -> None:
    """Keep what was found from the output back to part ``k``, and the gradients at its input."""

    def content() -> bytes:
        held = {f"found:{key}": value for key, value in found.items()}
        held |= {f"gradient:{b}": behind[b] for b in range(len(behind))}
        made: bytes = save({**held, "part": torch.tensor(k)})
        return made

    known.journal.write(name, content)


def _recall(
    known: StackedWeights, name: str, n_spans: int
) -> tuple[dict[str, Tensor], Series | None, int]:
    """Return what was found before an interruption, and how many parts are still to be walked."""
    content = known.journal.read(name)
    if content is None:
        return {}, None, len(known.stack)
    held = load(content)
    k = int(held.pop("part"))
    behind = known.keeper.series()
    for b in range(n_spans if k else 0):
        behind.append(held.pop(f"gradient:{b}").to(known.device))
    found = {
        key.partition(":")[2]: value.to(known.device)
        for key, value in held.items()
        if key.startswith("found:")
    }
    return found, behind, k

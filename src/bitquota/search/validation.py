"""True losses of choices on hold-out samples: on more of them where they do not decide.

Samples come in *blocks*. Every choice is measured on the first; two choices whose difference there
is within its standard error are measured on the next block too, and so on. Comparisons are paired,
sample by sample, over the blocks that both choices were measured on.

Design: docs/design/search.md
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from bitquota.sensitivity.measures.choices import measure_choices, passes_of
from bitquota.sensitivity.recorder import standard_error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from bitquota.candidates.table import CandidateTable
    from bitquota.context import Context
    from bitquota.search.neighborhood import Choice
    from bitquota.sensitivity.losses import Loss
    from bitquota.sensitivity.runners.base import Runner


@dataclass(slots=True, kw_only=True)
class HoldOut:
    """Measured losses of choices on blocks of samples.

    Attributes:
        blocks: One runner for each block, on disjoint samples, or what makes it when it is needed.
        table: What choices speak of.
        loss: The loss.
        context: Where measurements are kept, whom to tell, when to stop.
        losses: ``f64[n]`` of every choice on each block it was measured on.
        asked: What the questions so far cost where nothing is known yet, in samples run in full.
    """

    blocks: tuple[Runner | Callable[[], Runner], ...]
    table: CandidateTable
    loss: Loss
    context: Context | None = None
    losses: dict[Choice, list[NDArray[np.float64]]] = field(default_factory=dict)
    asked: float = 0.0
    _runners: dict[int, Runner] = field(default_factory=dict)
    _before: dict[int, float] = field(default_factory=dict)

    def runner(self, block: int) -> Runner:
        """Return the runner of a block."""
        if block not in self._runners:
            made = self.blocks[block]
            self._runners[block] = made() if callable(made) else made
            self._before[block] = self._runners[block].passes.passes
        return self._runners[block]

    def samples_run(self, besides: Runner) -> float:
        """Return how many samples were run for this, in forward-equivalents.

        Work of ``besides`` is left out; so is what a runner did before it was needed here.
        """
        return sum(
            (runner.passes.passes - self._before[block]) * len(runner.calibration)
            for block, runner in self._runners.items()
            if runner is not besides
        )

    def measure(
        self, choices: Sequence[Choice], centre: Choice | None, stage: str, *, blocks: int = 1
    ) -> None:
        """Measure those ``choices`` that are new on the first ``blocks`` blocks.

        Cost: as ``measure_choices``, on each block.
        """
        for k in range(blocks):
            new = [c for c in dict.fromkeys(choices) if len(self.losses.get(c, ())) <= k]
            if not new:
                continue
            runner = self.runner(k)
            self.asked += passes_of(runner, self.table, new, centre) * len(runner.calibration)
            values = measure_choices(
                runner,
                self.table,
                self.loss,
                new,
                centre=centre,
                context=self.context,
                stage=stage,
            )
            for choice, row in zip(new, values, strict=True):
                self.losses.setdefault(choice, []).append(row)

    def mean(self, choice: Choice) -> float:
        """Return the mean loss increase on the first block, where all choices were measured."""
        return float(self.losses[choice][0].mean())

    def per_sample(self, choice: Choice) -> NDArray[np.float64]:
        """Return ``f64[N]`` over all blocks that ``choice`` was measured on."""
        return np.concatenate(self.losses[choice])

    def gain(self, choice: Choice, over: Choice) -> tuple[float, float]:
        """Return by how much ``choice`` is better than ``over``, and the paired standard error."""
        a, b = self.losses[over], self.losses[choice]
        common = min(len(a), len(b))
        difference = np.concatenate(a[:common]) - np.concatenate(b[:common])
        return float(difference.mean()), float(standard_error(difference))

    def best(self, choices: Sequence[Choice]) -> Choice:
        """Return the choice with the least mean over the blocks that all were measured on."""
        common = min(len(self.losses[c]) for c in choices)
        return min(
            choices, key=lambda c: (float(np.concatenate(self.losses[c][:common]).mean()), c)
        )

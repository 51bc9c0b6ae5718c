"""Shapley values: each layer's share of what all layers lose together at their fewest bits.

References:
    [CoopQ] J. Zhao et al. CoopQ: Cooperative game inspired layerwise mixed precision quantization
    for LLMs (IMPQ in its first version). 2025. arXiv 2509.15455.

Design: docs/design/measures.md
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch.func import functional_call

from bitquota.models.running import checked_output, inputs_of
from bitquota.sensitivity.metrics.metric import (
    FORWARD,
    Metric,
    Scores,
    Work,
    chunk_weights,
    over_chunks,
)
from bitquota.sensitivity.metrics.weight_error import relative_error
from bitquota.sensitivity.recorder import checked_losses
from bitquota.sensitivity.runners.base import describe_change

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from bitquota.candidates.table import Candidate, CandidateTable
    from bitquota.sensitivity.runners.base import Runner


@dataclass(frozen=True, slots=True)
class ShapleyShare(Metric):
    """``s = φ_g e(row) / e(lowest row of g)``, ``φ_g`` the Shapley value of group ``g``.

    The groups of layers go one after another from full precision to their row of fewest bits, in
    ``permutations`` orders, half of them the other half backwards; ``φ_g`` is the mean of what the
    loss grows by at the step of ``g`` [CoopQ]. So the shares of all groups add up to the loss at
    the fewest bits, with what layers do to each other in them. Rows of more bits get the part of
    the share that their relative squared weight error ``e`` is of the lowest row's.

    We differ: [CoopQ] walks from 4 to 2 bits and knows no other, and solves a quadratic program
    with the interactions of pairs; here full precision is the start, bit-widths between are scaled,
    and there are no cross terms.

    Pitfalls: a share is right for mixes near the fewest bits, and too large for high budgets,
    where the loss is less than proportional to the error. A layer whose errors make up for those
    of others has a negative one.
    """

    permutations: int = 8
    seed: int = 0

    name: ClassVar[str] = "shapley"
    known_as: ClassVar[str] = "Shapley share (CoopQ without pairs, widths between scaled)"
    estimates_loss: ClassVar[bool] = True
    may_be_negative: ClassVar[bool] = True

    def cost(self, runner: Runner, table: CandidateTable) -> float:
        """Return a pass for each group and order, and the references."""
        del runner
        return FORWARD * (1 + self.permutations * len(table.groups))

    def scores(self, work: Work) -> Scores:
        """Score every row."""
        table, n_chunks = work.table, len(work.runner.chunks)
        work.recorder.shards = self.permutations
        bits = np.array([sum(c.size_bits for c in row.candidates) for row in table.rows])
        errors = np.array(
            [sum(relative_error(work, c) for c in row.candidates) for row in table.rows]
        )
        spans = zip(table.offsets[:-1], table.offsets[1:], strict=True)
        lowest = [int(a + bits[a:b].argmin()) for a, b in spans]
        shares = np.array([self._shares(work, k, lowest) for k in range(n_chunks)])
        scale = errors / np.maximum(errors[lowest], 1e-30)[table.group_of_row]
        return Scores(
            diagonal=scale * (chunk_weights(work.runner) @ shares)[table.group_of_row],
            error=scale * over_chunks(shares)[table.group_of_row],
            loss=work.loss.name,
            unit=work.loss.unit,
        )

    def _shares(self, work: Work, chunk: int, lowest: list[int]) -> NDArray[np.float64]:
        """Return f64[groups]: the mean growth at each group's step, on a chunk."""
        rows = [work.table.rows[r].candidates for r in lowest]
        ends = [describe_change({c.layer: c for c in row}) for row in rows]
        growths = []
        for order in self._orders(len(rows)):
            key = work.key(chunk, {"order": order, "ends": ends}, "shapley")

            def run(order: list[int] = order) -> list[NDArray[np.float64]]:
                found = torch.stack(self._walk(work, chunk, [rows[g] for g in order]))
                work.charge(chunk, FORWARD * len(order))
                return checked_losses(found[None], self.name)

            losses = work.recorder.shard([key], run)[key]
            growth = np.empty(len(order))
            growth[order] = np.diff(losses)
            growths.append(growth)
        mean: NDArray[np.float64] = np.mean(growths, axis=0)
        return mean

    def _orders(self, n: int) -> list[list[int]]:
        """Return the orders: permutations drawn from the seed, each followed by its reverse."""
        drawn = np.random.default_rng(self.seed)
        found: list[list[int]] = []
        while len(found) < self.permutations:
            order = drawn.permutation(n).tolist()
            found += [order, order[::-1]]
        return found[: self.permutations]

    @staticmethod
    def _walk(work: Work, chunk: int, rows: list[tuple[Candidate, ...]]) -> list[Tensor]:
        """Return f64[]s: the mean loss before the first step, and after each."""
        runner, span = work.runner, work.runner.chunks[chunk]
        reference, labels = runner.reference(chunk), runner.labels(chunk)
        inputs = inputs_of(runner.calibration, span)
        changed: dict[str, Tensor] = {}

        def loss_of(output: Tensor) -> Tensor:
            return work.loss.per_sample(output, reference, labels).double().mean().cpu()

        losses = [loss_of(reference)]
        with torch.no_grad():
            for row in rows:
                for c in row:
                    name = runner.weights.layer(c.layer).weight_name
                    changed[name] = runner.weights(c).detach()
                output = functional_call(runner.module, changed, inputs)
                losses.append(loss_of(checked_output(output, len(span))))
        return losses

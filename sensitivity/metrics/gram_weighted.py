"""The loss's own curvature at every layer's output, against the full second moments of its input.

With ``H`` the Hessian of each sample's loss in the model's output and ``v = B ξ``, ``B Bᵀ = H``,
``ξ`` random signs, one backward pass with ``v`` gives ``g`` at every layer's output, and
``E[g gᵀ]`` is the Gauss-Newton matrix there: for KL the true Fisher matrix. So no labels are
needed, and all candidates of all layers take one pass forwards and backwards and one run of each
candidate's own layer.

References:
    [CASA] Activation-aware bit allocation for language models with swap search on the loss, 2026.
    [KFC] R. Grosse, J. Martens. A Kronecker-factored approximate Fisher matrix for convolution
    layers. ICML 2016. arXiv 1602.01407.

Design: docs/design/measures.md
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from bitquota.sensitivity.curvature import curvature_factor
from bitquota.sensitivity.losses import VOCABULARY
from bitquota.sensitivity.metrics.local_response import measure_rows, response_to
from bitquota.sensitivity.metrics.metric import (
    BACKWARD,
    FORWARD,
    Metric,
    Scores,
    Work,
    changes_anything,
    chunk_weights,
    local_cost,
    over_chunks,
)
from bitquota.sensitivity.metrics.stack_scores import measure_stack
from bitquota.sensitivity.runners.stack import StackRunner

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from bitquota.candidates.table import Candidate, CandidateTable, Row
    from bitquota.sensitivity.losses import Loss
    from bitquota.sensitivity.metrics.layer_trace import TracedCall
    from bitquota.sensitivity.metrics.local_response import Calls
    from bitquota.sensitivity.runners.base import Runner


SEQUENCES = 3
"""Dimensions of an output of sequences. Each of them draws signs of its own, so that a few may be
run at a time; other outputs draw them together, as they always did: caches hold such scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Direction:
    """A linear loss whose gradient in the output is one random direction ``v`` per sample."""

    of: Loss
    chunk: int
    samples: Sequence[int]

    @property
    def name(self) -> str:
        return self.of.name

    @property
    def unit(self) -> str:
        return self.of.unit

    @property
    def needs_labels(self) -> bool:
        return False

    def per_sample(self, output: Tensor, reference: Tensor, labels: Tensor | None) -> Tensor:
        """Return ``f64[n]``: ``v · output``."""
        del reference, labels
        output_only = output.detach()
        if output.ndim == SEQUENCES:
            direction = random_direction(self.of, output_only, self.samples)
        else:
            generator = torch.Generator().manual_seed(self.chunk)
            signs = torch.randint(0, 2, (1, *output.shape), generator=generator)
            noise = (2.0 * signs - 1.0).double().to(output.device)
            direction = curvature_factor(self.of, output_only, noise)[0]
        return (direction * output.double()).reshape(len(output), -1).sum(dim=1)


def random_direction(loss: Loss, output: Tensor, seeds: Sequence[int]) -> Tensor:
    """Return ``v = B ξ`` of each sample, ``[n, ...]``, ``B Bᵀ`` being the loss's Hessian there.

    Args:
        loss: The loss.
        output: ``[n, ...]``, where the Hessian is taken.
        seeds: Of the random signs of each sample.

    Raises:
        InvalidInput: No factor of the loss's Hessian is known.
    """
    signs = torch.stack(
        [
            torch.randint(
                0,
                2,
                output.shape[1:],
                generator=torch.Generator().manual_seed(seed),
                dtype=torch.int8,
            )
            for seed in seeds
        ]
    )
    # Directions are random: those of a vocabulary need no more than float32.
    exact = torch.float64 if output.shape[-1] < VOCABULARY else torch.float32
    noise = signs.to(output.device).to(exact).mul_(2.0).sub_(1.0)
    return curvature_factor(loss, output, noise[None])[0]


class _Channels:
    """What is needed of a call for every candidate of its layer: sums over each output channel."""

    def __init__(self, work: Work, call: TracedCall) -> None:
        assert call.gradient is not None  # noqa: S101  # traced with a loss
        self.call, axis = call, call.channel_axis % call.output_dims
        self.others = [d for d in range(call.output_dims) if d != axis]
        squared = call.gradient.square().mean(dim=self.others, dtype=torch.float64)
        self.curvature = squared / len(call.gradient)
        self.output: Tensor | None = None
        if call.normalised and work.runner.describe()["batch_norm"] == "moved":
            self.output = call.respond(work.runner.weights.original(call.layer).detach())
            self.n = self.output.numel() // len(self.curvature)
            self.mean = self._sum(self.output) / self.n
            self.energy = self._sum(self.output.square()) - self.n * self.mean.square()

    def _sum(self, values: Tensor) -> Tensor:
        return values.sum(dim=self.others, dtype=torch.float64)

    def squared_change(self, moved: Tensor, *, centred: bool = False) -> Tensor:
        """Return ``f64[channels]``, the summed squares of a change of the output.

        ``centred`` leaves out the mean of each channel's change, which a bias makes up for.

        Where a batch norm follows whose statistics are adjusted, of what is left of the change
        once the channel's mean and variance are those of full precision again: with ``y`` and
        ``m`` the output and the change without their means, ``Σ (s (y + m) - y)²`` is ``2 Σ y² -
        2 s Σ y (y + m)``, ``s² = Σ y² / Σ (y + m)²``.
        """
        squares = self._sum(moved.square())
        if self.output is None:
            n = moved.numel() // len(squares)
            return squares - self._sum(moved).square() / n if centred else squares
        mean = self._sum(moved) / self.n
        product = self._sum(self.output * moved) - self.n * self.mean * mean
        now = self.energy + 2 * product + squares - self.n * mean.square()
        scale = torch.where(now > 0, self.energy / now.clamp_min(1e-300), 1.0).sqrt()
        return (2 * self.energy - 2 * scale * (self.energy + product)).clamp_min(0.0)


class _Score:
    """Scores one row on one chunk: ``f64[1]``."""

    def __init__(self) -> None:
        self._calls: Calls | None = None
        self._channels: dict[int, _Channels] = {}

    def __call__(self, work: Work, calls: Calls, row: Row) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for candidate in filter(changes_anything, row.candidates):
            for curvature, change in self.changes(work, calls, candidate):
                total = total.to(change.device) + 0.5 * (curvature @ change)
        return total[None]

    def changes(
        self, work: Work, calls: Calls, candidate: Candidate
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield for each call f64[channels] twice: curvatures, summed squares of changes."""
        if calls is not self._calls:
            self._calls, self._channels = calls, {}
        for call in calls[candidate.layer]:
            known = self._channels.get(id(call))
            if known is None:
                known = self._channels[id(call)] = _Channels(work, call)
            change = response_to(work, call, candidate)
            # The mean output of a layer of zeros goes into a bias.
            yield known.curvature, known.squared_change(change, centred=candidate.pruned)


class ScoreByRow(_Score):
    """Scores each row of the weight of a single layer on one chunk: ``f64[n]``.

    Args:
        n: Rows of the largest layer; others have zeros at the end.
    """

    def __init__(self, n: int) -> None:
        super().__init__()
        self._n = n

    def __call__(self, work: Work, calls: Calls, row: Row) -> Tensor:
        """Score the only layer of a row."""
        found = torch.zeros(self._n, dtype=torch.float64)
        for curvature, change in self.changes(work, calls, row.candidates[0]):
            found[: len(change)] += 0.5 * (curvature * change).cpu()
        return found


@dataclass(frozen=True, slots=True)
class GramWeightedError(Metric):
    """``s = ½ Σ_r E[g_r²] e_r G e_rᵀ``, ``e_r`` row ``r`` of ``Q(W) - W``, ``G = E[Σ x xᵀ]``.

    The Kronecker score with the **full** second moments of the inputs [CASA, KFC]: ``e_r G e_rᵀ``
    is the mean squared change of output channel ``r``, summed over positions, so errors that
    correlated inputs cancel or add up count as they are. ``g`` is the gradient in a random
    direction of the loss's curvature, see the module; ``E[g_r²]`` is over samples and positions
    of a chunk. The score is the mean over chunks and its standard error theirs.

    Where the statistics of batch norms are adjusted to what quantization does, a layer that one
    follows counts with what is left of its change.

    Pitfall: gradient and change are taken to be uncorrelated within a channel.
    """

    name: ClassVar[str] = "gram_weighted"
    known_as: ClassVar[str] = "Gram-weighted error (Bitquota)"
    needs_gradients: ClassVar[bool] = True
    sees_activations: ClassVar[bool] = True
    estimates_loss: ClassVar[bool] = True

    def cost(self, runner: Runner, table: CandidateTable) -> float:
        """Return one pass forwards and backwards, and each row's own layers once.

        Of a chain of blocks two forwards and one backwards, whatever the number of rows.
        """
        if isinstance(runner, StackRunner):
            return 2 * FORWARD + BACKWARD
        return FORWARD + BACKWARD + local_cost(runner, table)

    def per_chunk(self, work: Work, score: _Score) -> list[NDArray[np.float64]]:
        """Return for every chunk what ``score`` returns for each row."""
        chunks = work.runner.chunks
        return measure_rows(
            work,
            score,
            lambda chunk: _Direction(of=work.loss, chunk=chunk, samples=chunks[chunk]),
        )

    def scores(self, work: Work) -> Scores:
        """Score every row.

        Raises:
            InvalidInput: No factor of the loss's Hessian is known.
        """
        if isinstance(work.runner, StackRunner):
            found = measure_stack(work, work.runner, partial(random_direction, work.loss))
        else:
            found = self.per_chunk(work, _Score())
        per_chunk = np.concatenate(found, axis=1).T  # f64[C, n_rows]
        return Scores(
            diagonal=chunk_weights(work.runner) @ per_chunk,
            error=over_chunks(per_chunk),
            loss=work.loss.name,
            unit=work.loss.unit,
        )

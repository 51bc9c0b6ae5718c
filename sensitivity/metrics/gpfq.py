"""Greedy path-following quantization: what error remains when rounding repays its own errors.

References:
    [GPFQ] J. Zhang, Y. Zhou, R. Saab. Post-training quantization for neural networks with
    provable guarantees. SIAM Journal on Mathematics of Data Science, 2023. arXiv 2201.11113.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from bitquota.candidates.storage import FULL_PRECISION_BITS, Scheme
from bitquota.errors import InvalidInput
from bitquota.models.layout import from_matrix, to_matrix
from bitquota.models.running import inputs_of
from bitquota.quantizers.input_moments import input_grams
from bitquota.quantizers.rounders import Rounder
from bitquota.quantizers.weights import quantize
from bitquota.sensitivity.metrics.layer_trace import trace_layers
from bitquota.sensitivity.metrics.metric import (
    FORWARD,
    Metric,
    Scores,
    Work,
    layer_shares,
    local_cost,
)
from bitquota.sensitivity.recorder import checked_losses

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from bitquota.candidates.table import Candidate, CandidateTable
    from bitquota.sensitivity.runners.base import Runner

GRAM_BYTES = 2**30
"""Input Grams kept at a time; more layers take another pass."""


@dataclass(frozen=True, slots=True)
class GpfqError(Metric):
    """``s = Σ ‖X W - X Q‖² / Σ ‖X W‖²`` with ``Q`` from greedy path following [GPFQ].

    The relative error of a layer's own output on its full-precision inputs that is left after
    error-feedback rounding, in the candidate's grid (see ``quantizers.gpfq``). The error is
    evaluated on all samples, codes are fitted to the Gram of the first ``fit_samples`` of them. The
    model itself is not changed: plans still round as their scheme says.

    Pitfalls: the loss is ignored, as by weight errors; the last layers' outputs matter more than
    their relative error says; weights only.

    Attributes:
        fit_samples: Samples for the Grams, rounded up to whole chunks.
    """

    fit_samples: int = 128

    name: ClassVar[str] = "gpfq"
    known_as: ClassVar[str] = "output error after GPFQ"

    def __post_init__(self) -> None:
        """Check that there is something to fit to."""
        if self.fit_samples < 1:
            msg = f"GPFQ needs at least one sample to fit to; got {self.fit_samples}"
            raise InvalidInput(msg, fit_samples=self.fit_samples)

    def cost(self, runner: Runner, table: CandidateTable) -> float:
        """Return the passes for Grams, for the errors, and each row's own layers once."""
        layers = sorted({c.layer for row in table.rows for c in row.candidates})
        chunks = self._fit_chunks(runner)
        fitted = sum(len(runner.chunks[c]) for c in chunks) / len(runner.calibration)
        grams = len(_batches(runner, layers)) * FORWARD + self._unfolding(runner, layers)
        return fitted * grams + FORWARD + local_cost(runner, table)

    def scores(self, work: Work) -> Scores:
        """Score every row."""
        runner, table = work.runner, work.table
        fit = self._fit_chunks(runner)
        fitted_on = [i for c in fit for i in self._indices(runner, c)]
        layers = work.layers
        candidates = {
            (c.layer, c.weight_bits, c.scheme): c
            for row in table.rows
            for c in row.candidates
            if c.weight_bits != FULL_PRECISION_BITS
        }
        deltas: dict[tuple[str, int, Scheme], Tensor] = {}
        per_candidate: dict[tuple[str, int, Scheme], list[NDArray[np.float64]]] = {
            key: [] for key in candidates
        }

        # Chunk by chunk: energy of each layer's output, and of its error under each candidate.
        for chunk in range(len(runner.chunks)):
            keys = {
                key: work.key(
                    chunk,
                    {"layer": key[0], "bits": key[1], "scheme": key[2].to_json(), "on": fitted_on},
                    "error and energy",
                )
                for key in candidates
            }

            def run(chunk: int = chunk) -> list[NDArray[np.float64]]:
                if not deltas:
                    deltas.update(self._fit(work, candidates, fit))
                calls = trace_layers(runner, chunk, layers, self.name)
                work.charge(chunk, FORWARD + local_cost(runner, table))
                found = []
                for key in candidates:
                    original = runner.weights.original(key[0]).detach()
                    error = sum(_energy(call.respond(deltas[key])) for call in calls[key[0]])
                    energy = sum(_energy(call.respond(original)) for call in calls[key[0]])
                    both = torch.stack([torch.as_tensor(error), torch.as_tensor(energy)])
                    found.append(np.stack(checked_losses(both, self.name)))
                return found

            arrays = work.recorder.shard(list(keys.values()), run) if keys else {}
            for key, name in keys.items():
                per_candidate[key].append(arrays[name])

        # Errors relative to outputs, summed over the layers of a group.
        relative = {key: _ratio(np.concatenate(v, axis=1)) for key, v in per_candidate.items()}

        def pick(candidate: Candidate) -> tuple[float, float]:
            key = (candidate.layer, candidate.weight_bits, candidate.scheme)
            return relative.get(key, (0.0, 0.0))

        rows = [[pick(c) for c in row.candidates] for row in table.rows]
        return Scores(
            diagonal=np.array([sum(v for v, _ in row) for row in rows]),
            error=np.array([float(np.sqrt(sum(e**2 for _, e in row))) for row in rows]),
            loss=self.name,
            unit="relative squared output",
        )

    @staticmethod
    def _unfolding(runner: Runner, layers: Sequence[str]) -> float:
        """Return the passes of ``XᵀX``: each layer run with as many outputs as columns."""
        sizes = {la.name: la.columns / la.rows for la in runner.inventory.layers}
        shares = layer_shares(runner, layers)
        return sum(shares[name] * sizes[name] for name in layers)

    def _fit_chunks(self, runner: Runner) -> list[int]:
        chosen, seen = [], 0
        for chunk, span in enumerate(runner.chunks):
            if seen >= self.fit_samples:
                break
            chosen.append(chunk)
            seen += len(span)
        return chosen

    @staticmethod
    def _indices(runner: Runner, chunk: int) -> list[int]:
        span = runner.chunks[chunk]
        return list(runner.calibration.indices[span.start : span.stop])

    def _fit(
        self,
        work: Work,
        candidates: dict[tuple[str, int, Scheme], Candidate],
        chunks: Sequence[int],
    ) -> dict[tuple[str, int, Scheme], Tensor]:
        """Return ``Q - W`` of every candidate, in the shape of the weight."""
        runner = work.runner
        deltas = {}
        for batch in _batches(runner, work.layers):
            work.recorder.context.check(self.name)
            inputs = (inputs_of(runner.calibration, runner.chunks[c]) for c in chunks)
            grams = input_grams(runner.module, runner.inventory, inputs, layers=batch)
            unfolded = self._unfolding(runner, batch)
            for chunk in chunks:
                work.charge(chunk, FORWARD + unfolded)
            for key in candidates:
                if key[0] not in batch:
                    continue
                layer = runner.inventory.layer(key[0])
                original = runner.weights.original(key[0]).detach()
                matrix = to_matrix(original, layer)
                gram = grams.get(key[0])
                stored = quantize(
                    matrix,
                    key[1],
                    key[2],
                    importance=torch.ones(()),  # the candidate's own scales
                    inputs_gram=gram,
                    rounding=Rounder.NEAREST if gram is None else Rounder.GPFQ,
                )
                rounded = stored.dequantize().to(original.dtype)
                deltas[key] = from_matrix(rounded, layer) - original
        return deltas


def _batches(runner: Runner, layers: Sequence[str]) -> list[list[str]]:
    """Return the layers in batches whose Grams fit the limit; at least one layer each."""
    columns = {la.name: la.columns for la in runner.inventory.layers}
    batches: list[list[str]] = []
    used = GRAM_BYTES
    for name in layers:
        size = 8 * columns[name] ** 2
        if used + size > GRAM_BYTES:
            batches.append([])
            used = 0
        batches[-1].append(name)
        used += size
    return batches


def _energy(output: Tensor) -> Tensor:
    """Return ``f64[n]``: the sum of squares of each sample's output."""
    return output.double().square().reshape(len(output), -1).sum(dim=1)


def _ratio(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return mean error over mean energy of ``f64[2, N]``, and the ratio's standard error."""
    error, energy = values
    total = float(energy.mean())
    if total <= 0:
        return 0.0, 0.0
    ratio = float(error.mean()) / total
    n = len(error)
    spread_of = float((error - ratio * energy).std(ddof=1)) if n > 1 else 0.0
    return ratio, spread_of / total / float(np.sqrt(n))

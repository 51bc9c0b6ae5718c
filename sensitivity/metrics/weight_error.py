"""Weight error: how far quantization moves the weights, no data at all.

References:
    [MixQuant] E. Kloberdanz, W. Le. MixQuant: mixed precision quantization with a bit-width
    optimization search. 2023. arXiv 2309.17341.

Pitfalls. The loss is ignored entirely: a layer whose error does not matter counts like one whose
error does. The plain sum favours layers with large weights, whatever the following batch norm
makes of them; the relative error is free of that and ranks better on ResNet-20. Multiplying the
relative error by the number of weights, as is sometimes done, ruins it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from bitquota.sensitivity.metrics.metric import Metric, Scores, Work, changes_anything, row_sums

if TYPE_CHECKING:
    from bitquota.candidates.table import Candidate, CandidateTable
    from bitquota.sensitivity.runners.base import Runner


def squared_error(work: Work, candidate: Candidate) -> float:
    """Return ``‖Q(W) - W‖²`` in float64."""
    if not changes_anything(candidate):
        return 0.0
    return float(work.delta(candidate).double().square().sum())


def relative_error(work: Work, candidate: Candidate) -> float:
    """Return ``‖Q(W) - W‖² / ‖W‖²``; a layer of zeros has no error."""
    original = work.runner.weights.original(candidate.layer).detach()
    energy = float(original.double().square().sum())
    return squared_error(work, candidate) / energy if energy else 0.0


@dataclass(frozen=True, slots=True)
class WeightMse(Metric):
    """``s = ‖Q(W) - W‖²``, summed over the layers of a group. Exact; weights only; no passes."""

    name: ClassVar[str] = "weight_mse"
    known_as: ClassVar[str] = "weight MSE (AMD Quark planner)"
    needs_data: ClassVar[bool] = False

    def cost(self, runner: Runner, table: CandidateTable) -> float:
        """Return zero: the model never runs."""
        del runner, table
        return 0.0

    def scores(self, work: Work) -> Scores:
        """Score every row."""
        values = row_sums(work.table, lambda c: squared_error(work, c))
        return Scores(diagonal=values, error=None, loss=self.name, unit="squared weight")


@dataclass(frozen=True, slots=True)
class RelativeWeightMse(Metric):
    """``s = ‖Q(W) - W‖² / ‖W‖²``, summed over the layers of a group. Exact; no passes.

    The round-trip error of [MixQuant], in relative form; its threshold rule is in
    ``threshold.py``. HIGGS weighs it layer by layer (``noise_response``).
    """

    name: ClassVar[str] = "relative_mse"
    known_as: ClassVar[str] = "relative weight MSE (MixQuant)"
    needs_data: ClassVar[bool] = False

    def cost(self, runner: Runner, table: CandidateTable) -> float:
        """Return zero: the model never runs."""
        del runner, table
        return 0.0

    def scores(self, work: Work) -> Scores:
        """Score every row."""
        values = row_sums(work.table, lambda c: relative_error(work, c))
        return Scores(diagonal=values, error=None, loss=self.name, unit="relative squared weight")

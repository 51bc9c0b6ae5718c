"""What all metrics share: how they are named, what they may see, and how their numbers are kept.

A metric scores every row of a candidate table by itself, around full precision, from something
cheaper than running every candidate: from weights, activations or gradients of a few passes. It is
a ``Measure`` without cross terms, so that it can be solved, compared and replaced like any other.

Scores are not negative by construction unless a metric says otherwise, zero for a candidate that
leaves the layer as it is, and kept as they are where they grow with the bit-width: ``flags.py``
finds those, nothing hides them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from bitquota.candidates.storage import FULL_PRECISION_BITS
from bitquota.context import Context
from bitquota.errors import InvalidInput, InvalidModel
from bitquota.matrix import SensitivityMatrix
from bitquota.models.onnx.program import source_of
from bitquota.sensitivity.losses import CrossEntropy
from bitquota.sensitivity.recorder import Recorder, check_labels, provenance
from bitquota.sensitivity.runners.base import Runner, describe_change

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor, nn

    from bitquota.candidates.table import Candidate, CandidateTable
    from bitquota.canonical import JsonObject
    from bitquota.quantizers.quantized_weights import QuantizedWeights
    from bitquota.sensitivity.losses import Loss

METRIC_VERSION = 1
"""Part of every ledger key of a metric; raised whenever the same call gives other numbers."""

FORWARD, BACKWARD = 1.0, 2.0
"""Forward-equivalents of one pass each way."""


class TorchRunner(Runner, Protocol):
    """A runner that has the model as a module, with weights and (perhaps) gradients."""

    module: nn.Module
    weights: QuantizedWeights
    activations: Callable[[str, int], Callable[[Tensor], Tensor]] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What a metric found.

    Attributes:
        diagonal: f64[n], one score per row.
        error: f64[n], standard errors, or ``None`` where nothing is sampled.
        loss: What the scores are: the name of a loss that they estimate, or of the metric.
        unit: Unit of ``diagonal``.
        details: What else a reader may want to know, JSON-serialisable.
    """

    diagonal: NDArray[np.float64]
    error: NDArray[np.float64] | None
    loss: str
    unit: str
    details: JsonObject = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One measurement that is under way."""

    runner: TorchRunner
    table: CandidateTable
    loss: Loss
    recorder: Recorder
    settings: JsonObject

    @property
    def layers(self) -> list[str]:
        """Names of the layers in the table, each once, sorted: no result depends on their order."""
        return sorted({c.layer for row in self.table.rows for c in row.candidates})

    def row_key(self, chunk: int, row: int, kind: str) -> str:
        """Return the ledger key of what belongs to one row on one chunk."""
        change = {c.layer: c for c in self.table.rows[row].candidates}
        return self.key(chunk, {"row": describe_change(change)}, kind)

    def key(self, chunk: int, variant: JsonObject, kind: str) -> str:
        """Return the ledger key of anything that depends on the metric's settings."""
        described = {"settings": self.settings, "version": METRIC_VERSION, **variant}
        return self.recorder.key(chunk, described, f"metric {kind}")

    def delta(self, candidate: Candidate) -> Tensor:
        """Return ``Q(W) - W`` of the candidate's layer, in the shape of the weight."""
        weights = self.runner.weights
        original = weights.original(candidate.layer).detach()
        return weights(candidate).detach() - original

    def charge(self, chunk: int, passes: float) -> None:
        """Count work on one chunk, given in passes over that chunk."""
        self.charge_samples(len(self.runner.chunks[chunk]), passes)

    def charge_samples(self, n: int, passes: float) -> None:
        """Count work on ``n`` samples, given in passes over them."""
        counter = self.runner.passes
        counter.macs += passes * n / len(self.runner.calibration) * counter.macs_per_pass
        counter.calls += 1


class Metric(ABC):
    """A measure that scores single rows around full precision.

    Attributes:
        name: Stable name, as users write it.
        known_as: Under which name, and where, users know it.
        has_cross_terms: Never.
        needs_labels: Whether the calibration set must be labelled.
        needs_gradients: Whether the model must be differentiable by autograd.
        needs_data: Whether the calibration samples matter at all.
        sees_activations: Whether candidates that differ in activation bits alone differ in score.
        estimates_loss: Whether scores estimate a loss increase in its own unit, so that sums can
            be compared with measured losses and not only ranked.
        may_be_negative: Whether a layer that makes up for others scores below zero; flagged.
    """

    name: ClassVar[str]
    known_as: ClassVar[str]
    has_cross_terms: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False
    needs_data: ClassVar[bool] = True
    sees_activations: ClassVar[bool] = False
    estimates_loss: ClassVar[bool] = False
    may_be_negative: ClassVar[bool] = False

    @abstractmethod
    def cost(self, runner: Runner, table: CandidateTable) -> float:
        """Return the forward-equivalents that ``measure`` will take."""

    @abstractmethod
    def scores(self, work: Work) -> Scores:
        """Score every row; ``measure`` has checked the arguments."""

    def check(self, runner: Runner, loss: Loss) -> None:
        """Raise what can be told before anything is run.

        Raises:
            InvalidModel: The model is not a torch module.
            InvalidCalibration: Labels are missing.
        """
        if self.needs_data:
            must_run_in_torch(runner, self.name)
        check_labels(self.judged_by(loss), runner)

    def judged_by(self, loss: Loss) -> Loss:
        """Return the loss that the scores are made from, given the one that was asked for.

        With labels it is cross entropy: the gradient of a divergence to the model itself is zero.
        """
        return CrossEntropy() if self.needs_labels else loss

    @property
    def settings(self) -> JsonObject:
        """Name and settings: what a ledger key and the provenance must know of the metric."""
        return {"metric": self.name, **asdict(self)}  # type: ignore[call-overload]

    def work_on(
        self, runner: Runner, table: CandidateTable, judged: Loss, context: Context | None
    ) -> Work:
        """Return a measurement that is about to begin; ``check`` has been asked."""
        return Work(
            runner=as_torch(runner, self.name),
            table=table,
            loss=judged,
            recorder=Recorder(
                runner=runner, loss=judged, stage=self.name, context=context or Context()
            ),
            settings=self.settings,
        )

    def measure(
        self,
        runner: Runner,
        table: CandidateTable,
        loss: Loss,
        *,
        base_point: Sequence[int] | None = None,
        context: Context | None = None,
    ) -> SensitivityMatrix:
        """Measure; arguments as in ``bitquota.sensitivity.base.Measure``.

        Raises:
            InvalidInput: A base point was given: metrics are defined around full precision.
            InvalidModel: The model is not a torch module, or a layer's work cannot be seen.
            InvalidCalibration: Labels are missing.
            MeasurementFailed: A score is not finite.
            Cancelled: The context said so; what was measured is in the ledger.
        """
        if base_point is not None:
            msg = (
                f"the metric '{self.name}' is defined around full precision; got a base point: "
                "leave it out, or measure 'gram', 'pairs' or 'diagonal' there"
            )
            raise InvalidInput(msg, measure=self.name)
        self.check(runner, loss)
        judged = self.judged_by(loss)
        found = self.scores(self.work_on(runner, table, judged, context))
        return SensitivityMatrix(
            table=table,
            diagonal=found.diagonal,
            diagonal_error=found.error,
            loss=found.loss,
            unit=found.unit,
            provenance={
                **provenance(runner, self.name, judged),
                "metric": {"version": METRIC_VERSION, **self.settings, **found.details},
            },
        )


def must_run_in_torch(runner: Runner, metric: str) -> None:
    """Raise ``InvalidModel`` if the model's work happens where torch does not see it."""
    module = getattr(runner, "module", None)
    if module is not None and source_of(module) is not None:
        msg = (
            "metrics that look inside a model need a torch module, and an ONNX file is not "
            "one: use "
            "'gram', 'pairs', 'diagonal', 'relative_mse' or 'weight_mse', or provide a .pt2"
        )
        raise InvalidModel(msg, measure=metric, engine=runner.engine)


def as_torch(runner: Runner, metric: str) -> TorchRunner:
    """Return ``runner`` as one that has the module.

    Raises:
        InvalidModel: It has none (it runs the model outside torch).
    """
    if not (hasattr(runner, "module") and hasattr(runner, "weights")):
        msg = (
            f"the metric '{metric}' looks into the model and needs it as a torch module; the "
            f"engine '{runner.engine}' only runs it: use 'diagonal', 'gram' or 'pairs'"
        )
        raise InvalidModel(msg, measure=metric, engine=runner.engine)
    return runner  # type: ignore[return-value]  # has what the protocol adds


def layer_shares(runner: Runner, layers: Iterable[str]) -> dict[str, float]:
    """Return each layer's share of the model's multiply-accumulates (equal where none counted)."""
    everything = runner.inventory.layers
    total = sum(layer.n_macs for layer in everything)
    macs = {layer.name: layer.n_macs for layer in everything}
    # A KV cache multiplies nothing.
    return {n: macs.get(n, 0) / total if total else 1.0 / len(everything) for n in layers}


def local_cost(runner: Runner, table: CandidateTable) -> float:
    """Return the passes of running, for every row, its layers once on their own inputs."""
    shares = layer_shares(runner, {c.layer for row in table.rows for c in row.candidates})
    return sum(shares[c.layer] for row in table.rows for c in row.candidates if changes_anything(c))


def changes_anything(candidate: Candidate) -> bool:
    """Whether the candidate differs from full precision."""
    return candidate.weight_bits != FULL_PRECISION_BITS or candidate.activation_bits is not None


def over_chunks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the standard error of the mean of ``values: f64[C, ...]`` over its first axis."""
    if len(values) < 2:
        return np.zeros(values.shape[1:])
    error: NDArray[np.float64] = values.std(axis=0, ddof=1) / np.sqrt(len(values))
    return error


def chunk_weights(runner: Runner) -> NDArray[np.float64]:
    """Return ``f64[C]``: each chunk's share of the samples."""
    sizes = np.array([len(chunk) for chunk in runner.chunks], dtype=np.float64)
    weights: NDArray[np.float64] = sizes / sizes.sum()
    return weights


def row_sums(table: CandidateTable, value: Callable[[Candidate], float]) -> Any:  # noqa: ANN401
    """Return ``f64[n]``: the sum of ``value`` over the candidates of every row."""
    sums = [sum(value(c) for c in row.candidates) for row in table.rows]
    return np.array(sums, dtype=np.float64)

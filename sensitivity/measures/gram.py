"""Cross-layer terms from output differences: one pass per candidate instead of one per pair.

With ``z_b`` the output at the base point and ``d_i = z(b with row i) - z_b``, a second-order
expansion of the loss in the *output* gives the extra loss of two rows together,

    ``cross_ij ≈ mean over samples of d_iᵀ H d_j``,   ``H`` the loss's Hessian at ``z_b``,

if the differences of two rows add. The diagonal is not expanded: the loss of every single row is
measured anyway, so ``diagonal_i = L(i) - L()`` exactly, slope included. Around full precision
this is a Gauss-Newton matrix; around a plan it is the honest local picture, in which all other
layers are quantized already.

The sums ``z_b + Σ d_i`` themselves predict more than the quadratic: see ``OutputDifferences``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Unpack

import numpy as np
import torch

from bitquota.context import Context
from bitquota.matrix import SensitivityMatrix
from bitquota.sensitivity.curvature import curvature_products
from bitquota.sensitivity.measures.kept_outputs import KeptOutputs
from bitquota.sensitivity.measures.pairs import DiagonalMeasure, passes_of_shards
from bitquota.sensitivity.recorder import (
    Recorder,
    Shared,
    base_change,
    checked_losses,
    cross_terms,
    free_rows,
    merged,
    provenance,
    row_changes,
    standard_error,
)
from bitquota.sensitivity.tasks import Task, as_point

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from bitquota.candidates.table import CandidateTable
    from bitquota.sensitivity.base import MeasureOptions
    from bitquota.sensitivity.losses import Loss
    from bitquota.sensitivity.runners.base import Change, Runner

_PREDICTION_ELEMENTS = 2**22
KEPT_DIFFERENCE_BYTES = 2**28
"""Differences are kept for ``OutputDifferences`` up to this size."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OutputDifferences:
    """Output differences of every row around a base point, and what they predict.

    Attributes:
        table: What the rows stand for.
        base_point: Row within each group at the base point, or ``None`` for full precision.
        base_output: f64[N, E], flattened output at the base point.
        reference: f64[N, E], of the full-precision model.
        differences: f32[n, N, E].
        output_shape: Shape of one sample's output, ``E`` its product.
        labels: Labels of the samples, if there are any.
        loss: The loss.
    """

    table: CandidateTable
    base_point: tuple[int, ...] | None
    base_output: Tensor
    reference: Tensor
    differences: Tensor
    output_shape: tuple[int, ...]
    labels: Tensor | None
    loss: Loss

    def predict(self, choices: Sequence[Sequence[int]]) -> NDArray[np.float64]:
        """Return the predicted mean loss of each choice: that of ``z_b + Σ d_i``; no passes.

        Heuristic: exact for the base point and for one changed group, beyond that it assumes
        that output differences add. It knows that a loss saturates, which a quadratic does not.
        """
        offsets = self.table.offsets
        predicted = np.empty(len(choices))
        shape = (len(self.base_output), *self.output_shape)
        reference = self.reference.reshape(shape)
        for k, choice in enumerate(choices):
            rows = torch.as_tensor([int(offsets[g] + r) for g, r in enumerate(choice)])
            total = self.base_output + self.differences[rows].double().sum(dim=0)
            values = self.loss.per_sample(total.reshape(shape), reference, self.labels)
            predicted[k] = float(values.mean())
        return predicted

    def predict_near(
        self, centre: Sequence[int], choices: Sequence[Sequence[int]]
    ) -> NDArray[np.float64]:
        """Return ``predict(choices)`` in float32, for choices that differ little from ``centre``.

        Many are evaluated at once; good for ranking.
        """
        offsets = self.table.offsets
        at = [int(offsets[g] + r) for g, r in enumerate(centre)]
        n, e = self.base_output.shape
        total = (self.base_output + self.differences[at].double().sum(dim=0)).float()
        reference = self.reference.float().reshape(n, *self.output_shape)
        predicted = np.empty(len(choices))
        per_batch = max(1, _PREDICTION_ELEMENTS // (n * e))
        for start in range(0, len(choices), per_batch):
            part = choices[start : start + per_batch]
            sums = total.repeat(len(part), 1, 1)
            for k, choice in enumerate(part):
                for g, (old, new) in enumerate(zip(centre, choice, strict=True)):
                    if old != new:
                        sums[k] += self.differences[int(offsets[g] + new)]
                        sums[k] -= self.differences[int(offsets[g] + old)]
            values = _batched_losses(
                self.loss, sums.reshape(len(part), n, *self.output_shape), reference, self.labels
            )
            predicted[start : start + len(part)] = values
        return predicted


def _batched_losses(
    loss: Loss, outputs: Tensor, reference: Tensor, labels: Tensor | None
) -> NDArray[np.float64]:
    """Return ``f64[k]``: the mean loss of ``outputs: f32[k, n, ..., C]``."""
    k, n = outputs.shape[:2]
    if loss.name == "kl":
        # In float32, where the per-sample loss would go through float64: this ranks thousands.
        log_p = torch.log_softmax(reference, dim=-1)
        log_q = torch.log_softmax(outputs, dim=-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
        means: NDArray[np.float64] = divergence.reshape(k, -1).mean(dim=1).double().numpy()
        return means
    flat = outputs.reshape(k * n, *outputs.shape[2:])
    repeated = reference.repeat(k, *(1,) * (reference.ndim - 1))
    wanted = None if labels is None else labels.repeat(k, *(1,) * (labels.ndim - 1))
    values: NDArray[np.float64] = (
        loss.per_sample(flat, repeated, wanted).reshape(k, n).mean(dim=1).numpy()
    )
    return values


@dataclass(frozen=True, slots=True)
class GramMeasure:
    """``measure_gram`` as a ``Measure``."""

    name: ClassVar[str] = "gram"
    has_cross_terms: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    def cost(self, runner: Runner, table: CandidateTable) -> float:
        """Return the forward-equivalents of all singles."""
        return DiagonalMeasure().cost(runner, table)

    def measure(
        self,
        runner: Runner,
        table: CandidateTable,
        loss: Loss,
        **options: Unpack[MeasureOptions],
    ) -> SensitivityMatrix:
        """Measure; see ``measure_gram``."""
        return measure_gram(runner, table, loss, **options)


def measure_gram(
    runner: Runner,
    table: CandidateTable,
    loss: Loss,
    **options: Unpack[MeasureOptions],
) -> SensitivityMatrix:
    """Measure exact singles and Gram cross terms around a base point; heuristic cross terms.

    Cost: ``1 + n`` runs, each behind one group: on a chain of equal layers half a pass. See
    ``Measure.measure`` for arguments and errors, the module for the formulas.
    """
    matrix, _ = measure_differences(runner, table, loss, **options)
    return matrix


def measure_differences(
    runner: Runner,
    table: CandidateTable,
    loss: Loss,
    *,
    base_point: Sequence[int] | None = None,
    context: Context | None = None,
    stage: str = "gram",
    only: Sequence[int] | None = None,
    chunks: Sequence[int] | None = None,
) -> tuple[SensitivityMatrix, OutputDifferences | None]:
    """Measure as ``measure_gram`` does, and also return the differences unless they are huge.

    ``only`` names the rows to measure, by default all; the others are left as if they changed
    nothing, and must not be offered to a solver. ``chunks`` names the chunks to measure on, by
    default all.
    """
    context, point = context or Context(), as_point(base_point)
    changes, base = row_changes(table), base_change(table, base_point)
    n, rows = len(table.rows), free_rows(table, base_point, only)

    def one_chunk(chunk: int) -> None:
        measure_differences(
            runner, table, loss, base_point=base_point, context=context.part(), chunks=[chunk]
        )

    recorder = Recorder(
        runner=runner,
        loss=loss,
        stage=stage,
        context=context,
        only=chunks,
        passes=lambda: passes_of_shards(runner, table, [(row, []) for row in rows]),
        shared=None
        if only or chunks
        else Shared(task=Task(measure="gram", chunk=0, point=point), measure=one_chunk),
    )

    # Chunk by chunk: losses of full precision, of the base point and of every row; their moments.
    n_samples = len(recorder.positions)
    start_losses, base_losses = np.empty(n_samples), np.empty(n_samples)
    singles, moments = np.empty((n, n_samples)), np.zeros((2, n, n))
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    output_shape: tuple[int, ...] = ()
    for chunk, where in recorder.spans():
        part = _Chunk(recorder, chunk, base, rows)
        found = part.measure(changes)
        start_losses[where], base_losses[where] = found.reference_losses, found.base_losses
        singles[:, where] = found.base_losses
        singles[rows, where] = found.row_losses
        moments[np.ix_((0, 1), rows, rows)] += found.moments
        if found.differences is not None and found.output is not None:
            full = torch.zeros((n, *found.differences.shape[1:]), dtype=torch.float32)
            full[rows] = found.differences
            kept.append((found.output, part.reference(), full))
            output_shape = found.output_shape

    # Means over the samples, and their standard errors.
    increases = singles - base_losses
    cross, error = cross_terms(table, moments, n_samples)
    matrix = SensitivityMatrix(
        table=table,
        diagonal=increases.mean(axis=1),
        diagonal_error=standard_error(increases),
        cross=cross,
        cross_error=error,
        constant=float((base_losses - start_losses).mean()),
        base_point=point,
        loss=loss.name,
        unit=loss.unit,
        provenance=provenance(runner, "gram", loss),
    )
    if len(kept) < len(recorder.chunks):
        return matrix, None

    # The differences of all chunks side by side, for predictions of whole plans.
    labels = runner.calibration.labels
    if labels is not None and chunks is not None:
        labels = labels[torch.as_tensor(recorder.positions, device=labels.device)]
    differences = OutputDifferences(
        table=table,
        base_point=point,
        base_output=torch.cat([k[0] for k in kept]),
        reference=torch.cat([k[1] for k in kept]),
        differences=torch.cat([k[2] for k in kept], dim=1),
        output_shape=output_shape,
        labels=None if labels is None else labels.cpu(),
        loss=loss,
    )
    return matrix, differences


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Found:
    """What one chunk gave."""

    reference_losses: NDArray[np.float64]
    base_losses: NDArray[np.float64]
    row_losses: NDArray[np.float64]
    moments: NDArray[np.float64]
    """f64[2, k, k]: sums over samples of ``d_iᵀ H d_j`` and of its square."""
    output: Tensor | None = None
    """f64[n, E] at the base point."""
    differences: Tensor | None = None
    """f32[k, n, E]."""
    output_shape: tuple[int, ...] = ()


class _Chunk:
    """One chunk of a Gram measurement."""

    def __init__(
        self,
        recorder: Recorder,
        chunk: int,
        base: Change,
        rows: Sequence[int],
    ) -> None:
        self._recorder, self._chunk, self._base, self._rows = recorder, chunk, base, rows

    def reference(self) -> Tensor:
        """Return ``f64[n, E]`` of the full-precision model."""
        output = self._recorder.runner.reference(self._chunk)
        return output.reshape(len(output), -1).double().cpu()

    def measure(self, changes: Sequence[Change]) -> _Found:
        """Return the chunk's numbers, from the ledger or by running the model."""
        recorder, chunk = self._recorder, self._chunk
        runner, loss = recorder.runner, recorder.loss
        variants = [merged(self._base, changes[r]) for r in self._rows]
        keys = recorder.keys(chunk, [self._base, *variants])
        reference_key = recorder.key(chunk, "reference", "loss")
        described = {"base": keys[0], "rows": keys[1:]}
        moment_key = recorder.key(chunk, described, "gram")
        output_key = recorder.key(chunk, described, "outputs")
        span = runner.chunks[chunk]
        n, k = len(span), len(self._rows)
        shape = tuple(runner.reference(chunk).shape[1:])
        n_elements = int(np.prod(shape))
        # All chunks together must fit, or none is worth keeping.
        keep = 4 * (k + 1) * len(runner.calibration) * n_elements <= KEPT_DIFFERENCE_BYTES
        wanted = [reference_key, *keys, moment_key, *([output_key] if keep else [])]

        def run() -> list[NDArray[np.float64]]:
            state = runner.start(chunk, self._base)
            base_output = state.output.double()
            reference, labels = runner.reference(chunk), runner.labels(chunk)
            # Half of the memory is for what the runner keeps, the rest for outputs and differences.
            limit = recorder.context.memory_bytes // 4
            # A difference and its product with the curvature are float64, and each is computed
            # through one more tensor of its size.
            step = max(1, min(n, limit // max(1, 32 * k * n_elements)))
            losses = [loss.per_sample(o, reference, labels) for o in (reference, state.output)]
            grams, flat = [], []
            with KeptOutputs(k, state.output, limit) as outputs:
                for row in self._rows:
                    outputs.append(output := runner.output(state, changes[row]))
                    losses.append(loss.per_sample(output, reference, labels))
                for start in range(0, n, step):
                    at = slice(start, start + step)
                    differences = outputs.samples(at).double() - base_output[at]
                    products = curvature_products(
                        loss,
                        state.output[at],
                        reference[at],
                        None if labels is None else labels[at],
                        differences,
                    )
                    left = differences.reshape(k, -1, n_elements).transpose(0, 1)  # [step, k, E]
                    right = products.reshape(k, -1, n_elements).permute(1, 2, 0)  # [step, E, k]
                    grams.append(left @ right)
                    if keep:
                        flat.append(left)
            gram = torch.cat(grams)  # [n, k, k]
            moments = torch.stack([gram.sum(dim=0), gram.square().sum(dim=0)])
            arrays = [*checked_losses(torch.stack(losses), loss.name), moments.cpu().numpy()]
            if keep:
                base = base_output.reshape(1, n, n_elements)
                arrays.append(torch.cat([base, torch.cat(flat).transpose(0, 1)]).cpu().numpy())
            return arrays

        found = recorder.shard(wanted, run)
        output = differences = None
        if keep:
            flat = torch.from_numpy(np.array(found[output_key]))
            output, differences = flat[0], flat[1:].float()
        row_losses = np.stack([found[key] for key in keys[1:]]) if k else np.empty((0, n))
        return _Found(
            reference_losses=found[reference_key],
            base_losses=found[keys[0]],
            row_losses=row_losses,
            moments=found[moment_key],
            output=output,
            differences=differences,
            output_shape=shape,
        )

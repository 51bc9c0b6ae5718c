"""Cross-layer terms by reverse-mode differentiation: cost independent of the number of layers.

To first order in the weights the output moves by ``t_i = J ΔW_i``. With the loss's gradient ``g``
and Hessian ``H`` in output space,

    ``diagonal_i ≈ mean of g·t_i + ½ t_iᵀ H t_i``,  ``cross_ij ≈ mean of t_iᵀ H t_j``.

A backward pass with the output direction ``v`` gives ``v·t_i`` for all rows at once. Small outputs
are differentiated element by element, which gives ``t_i`` itself; for large ones ``H = B Bᵀ`` and
random directions ``v = B ξ`` estimate the products without bias. Around full precision with the
KL loss this is the Gauss-Newton matrix, and KL is never measured: there is no measured single in
it. A heuristic: at 2 bits first order is far off, see ``research/log.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from bitquota.context import Context
from bitquota.corrections import SAMPLES_DEPEND
from bitquota.errors import InvalidInput
from bitquota.matrix import SensitivityMatrix
from bitquota.sensitivity.curvature import curvature_factor, curvature_products
from bitquota.sensitivity.recorder import (
    Recorder,
    base_change,
    cross_terms,
    free_rows,
    provenance,
    row_changes,
    standard_error,
)
from bitquota.sensitivity.runners.base import describe_change
from bitquota.sensitivity.runners.graph import GraphRunner
from bitquota.sensitivity.runners.reverse import linear_responses, local_passes
from bitquota.sensitivity.tasks import as_point

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from bitquota.candidates.table import CandidateTable
    from bitquota.sensitivity.losses import Loss
    from bitquota.sensitivity.runners.base import Runner

EXACT_OUTPUTS = 16
"""Outputs with at most this many elements per sample are differentiated one by one."""

RANDOM_DIRECTIONS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class TangentMeasure:
    """Reverse-mode sensitivities as a ``Measure``.

    Attributes:
        directions: Random directions per sample where the output is large.
        seed: Of the random directions.
    """

    name: ClassVar[str] = "tangent"
    has_cross_terms: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    directions: int = RANDOM_DIRECTIONS
    seed: int = 0

    def cost(self, runner: Runner, table: CandidateTable) -> float:
        """Return two forward passes, local operations of every row, and backward passes.

        Raises:
            InvalidInput: As ``measure``, where the runner has no graph.
        """
        graph_runner = _with_graph(runner)
        elements = runner.reference(0)[0].numel()
        backward = elements if elements <= EXACT_OUTPUTS else self.directions + 1
        layers = [c.layer for row in table.rows for c in row.candidates]
        return 2.0 + local_passes(graph_runner, layers) + backward

    def measure(
        self,
        runner: Runner,
        table: CandidateTable,
        loss: Loss,
        *,
        base_point: Sequence[int] | None = None,
        context: Context | None = None,
    ) -> SensitivityMatrix:
        """Measure; see the module. Arguments and errors as in ``Measure.measure``.

        Raises:
            InvalidInput: The runner has no graph to differentiate, its corrections make the
                samples of a chunk depend on each other, or a large output comes with a loss whose
                Hessian has no known factor.
        """
        runner = _with_graph(runner)
        changes, base = row_changes(table), base_change(table, base_point)
        n, rows = len(table.rows), free_rows(table, base_point)

        # Chunk by chunk: losses at the base point, first and second order of every row.
        recorder = Recorder(runner=runner, loss=loss, stage=self.name, context=context or Context())
        singles: list[NDArray[np.float64]] = []
        starts: list[NDArray[np.float64]] = []
        moments = np.zeros((2, n, n))
        described = {
            "base": describe_change(base),
            "rows": [describe_change(changes[r]) for r in rows],
            "directions": self.directions,
            "seed": self.seed,
        }
        for chunk in range(len(runner.chunks)):
            keys = [recorder.key(chunk, described, f"tangent {k}") for k in range(3)]

            def run(chunk: int = chunk) -> list[NDArray[np.float64]]:
                return self._chunk(runner, chunk, base, [changes[r] for r in rows], loss)

            found = recorder.shard(keys, run)
            starts.append(found[keys[0]])
            singles.append(found[keys[1]])
            moments[np.ix_((0, 1), rows, rows)] += found[keys[2]]

        # Means over the samples, and their standard errors.
        n_samples = len(runner.calibration)
        increases = np.zeros((n, n_samples))
        increases[rows] = np.concatenate(singles, axis=1)
        cross, error = cross_terms(table, moments, n_samples)
        return SensitivityMatrix(
            table=table,
            diagonal=increases.mean(axis=1),
            diagonal_error=standard_error(increases),
            cross=cross,
            cross_error=error,
            constant=float(np.concatenate(starts).mean()),
            base_point=as_point(base_point),
            loss=loss.name,
            unit=loss.unit,
            provenance=provenance(runner, self.name, loss) | {"directions": self.directions},
        )

    def _chunk(
        self,
        runner: GraphRunner,
        chunk: int,
        base: dict[str, object],
        rows: Sequence[dict[str, object]],
        loss: Loss,
    ) -> list[NDArray[np.float64]]:
        """Return base losses ``[n]``, singles ``[k, n]`` and moments ``[2, k, k]``."""
        reference, labels = runner.reference(chunk), runner.labels(chunk)
        elements = reference[0].numel()
        exact = elements <= EXACT_OUTPUTS

        def seeds(output: Tensor) -> Tensor:
            if exact:
                unit = torch.eye(elements, device=output.device, dtype=output.dtype)
                shape = (elements, 1, *output.shape[1:])
                return unit.reshape(shape).expand(elements, *output.shape)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + chunk)
            shape = (self.directions, *output.shape)
            noise = torch.randn(shape, generator=generator, dtype=torch.float64).to(output.device)
            slope = _gradient(loss, output, reference, labels)
            return torch.cat([curvature_factor(loss, output, noise), slope[None]])

        output, responses = linear_responses(runner, chunk, base, rows, seeds)  # type: ignore[arg-type]
        start = loss.per_sample(reference, reference, labels)
        losses = loss.per_sample(output, reference, labels) - start
        n, k = len(output), len(rows)
        if exact:
            moved = responses.permute(1, 2, 0).reshape(k, *output.shape)  # [k, n, ...]
            products = curvature_products(loss, output, reference, labels, moved)
            left = moved.reshape(k, n, -1).transpose(0, 1)
            grams = left @ products.reshape(k, n, -1).permute(1, 2, 0)  # [n, k, k]
            slope = _gradient(loss, output, reference, labels)
            first = (moved * slope).reshape(k, n, -1).sum(dim=2)
        else:
            random, first = responses[:-1], responses[-1]  # [r, k, n], [k, n]
            grams = torch.einsum("rin,rjn->nij", random, random) / self.directions
        second = torch.diagonal(grams, dim1=1, dim2=2).transpose(0, 1)  # [k, n]
        moments = torch.stack([grams.sum(dim=0), grams.square().sum(dim=0)])
        single = first + 0.5 * second
        return [part.cpu().numpy() for part in (losses, single, moments)]


def _with_graph(runner: Runner) -> GraphRunner:
    """Return a runner that can be differentiated; raises ``InvalidInput``."""
    if not isinstance(runner, GraphRunner):
        msg = (
            "reverse-mode sensitivities need a graph of torch; this model is run by the engine "
            f"'{runner.engine}': use the measure 'gram' or 'pairs'"
        )
        raise InvalidInput(msg)
    if runner.batch_norm != "eval" or runner.bias_correction:
        raise InvalidInput(SAMPLES_DEPEND)
    return runner


def _gradient(loss: Loss, output: Tensor, reference: Tensor, labels: Tensor | None) -> Tensor:
    """Return ``∂ loss / ∂ output`` of every sample, ``f64[n, ...]``."""
    with torch.enable_grad():
        z = output.detach().double().requires_grad_()
        (slope,) = torch.autograd.grad(loss.per_sample(z, reference, labels).sum(), z)
    return slope

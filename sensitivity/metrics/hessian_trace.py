"""Hessian trace: how curved the loss is around each layer's weights, in all directions alike.

References:
    [HAWQ-V2] Z. Dong, Z. Yao, D. Arfeen, A. Gholami, M. Mahoney, K. Keutzer. HAWQ-V2:
    Hessian aware trace-weighted quantization of neural networks. NeurIPS 2020. arXiv 1911.03852.
    [HAWQ-V3] Z. Yao et al. HAWQ-V3: dyadic neural network quantization. ICML 2021.
    arXiv 2011.10680.
    [Hutchinson] M. Hutchinson. A stochastic estimator of the trace of the influence matrix for
    Laplacian smoothing splines. Communications in Statistics 18, 1989.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bitquota.errors import InvalidInput
from bitquota.models.running import checked_output, inputs_of
from bitquota.sensitivity.metrics.gradients import gradients_at
from bitquota.sensitivity.metrics.metric import (
    BACKWARD,
    FORWARD,
    Metric,
    Scores,
    Work,
    changes_anything,
    chunk_weights,
    over_chunks,
    row_sums,
)
from bitquota.sensitivity.metrics.weight_error import squared_error
from bitquota.sensitivity.recorder import checked_losses

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray
    from torch import Tensor

    from bitquota.candidates.table import Candidate, CandidateTable
    from bitquota.sensitivity.runners.base import Runner

HESSIAN_PASS = 2 * (FORWARD + BACKWARD)
"""Forward-equivalents of one Hessian-vector product: backwards through both passes."""


@dataclass(frozen=True, slots=True)
class HessianTrace(Metric):
    """``s = ½ (tr H_l / n_l) ‖Q(W_l) - W_l‖²`` [HAWQ-V2, equation 8; HAWQ-V3].

    ``H_l`` is the Hessian of the mean loss with respect to layer ``l``'s ``n_l`` weights, its
    trace estimated as the mean of ``zᵀ H z`` over random signs ``z`` [Hutchinson]; one product
    serves all layers, as blocks of other layers vanish in expectation. The score is the expected
    second-order increase if the change pointed in a random direction; the paper leaves the ½ out,
    which changes no ranking.

    With the loss ``kl`` the Hessian around full precision is the Gauss-Newton matrix: no labels,
    no negative curvature (for networks of piecewise linear activations and in expectation). With
    ``cross_entropy`` it is that of the papers.

    Pitfalls: ignores the direction of the change; expensive (six passes per probe); noisy, 8-35 %
    relative standard error per layer on ResNet-20 with 64 probes; a trace of a labelled loss may
    come out negative: it is clamped to zero in the score and kept as it is in the provenance.
    Batch norm is in eval mode, sums are float64.

    Attributes:
        probes: Random sign vectors on each chunk.
        seed: Of the signs; each layer's come from the seed and its name, so that neither order
            nor number of layers matters.
    """

    probes: int = 8
    seed: int = 0

    name: ClassVar[str] = "hessian_trace"
    known_as: ClassVar[str] = "Hessian trace (HAWQ-V2, HAWQ-V3)"
    needs_gradients: ClassVar[bool] = True
    estimates_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check that there is at least one probe."""
        if self.probes < 1:
            msg = f"the Hessian trace needs at least one probe; got {self.probes}"
            raise InvalidInput(msg, probes=self.probes)

    def cost(self, runner: Runner, table: CandidateTable) -> float:
        """Return one pass forwards and backwards, and one Hessian product per probe."""
        del runner, table
        return FORWARD + BACKWARD + self.probes * HESSIAN_PASS

    def scores(self, work: Work) -> Scores:
        """Estimate every layer's trace, then score every row."""
        layers, runner = work.layers, work.runner
        found = np.empty((len(runner.chunks), len(layers), self.probes))
        for chunk in range(len(runner.chunks)):
            keys = [work.key(chunk, {"layer": name}, "trace") for name in layers]

            def run(chunk: int = chunk) -> list[NDArray[np.float64]]:
                work.charge(chunk, self.cost(runner, work.table))
                return self._traces(work, chunk)

            arrays = work.recorder.shard(keys, run)
            found[chunk] = np.stack([arrays[key] for key in keys])
        per_chunk = found.mean(axis=2)  # f64[C, L]
        traces = chunk_weights(runner) @ per_chunk
        # Chunks differ in samples and in probes; a single chunk has only its probes to tell.
        errors = over_chunks(per_chunk if len(found) > 1 else found[0].T)
        index = {name: k for k, name in enumerate(layers)}
        n_weights = {layer.name: layer.n_weights for layer in runner.inventory.layers}

        def scaled(values: NDArray[np.float64], candidate: Candidate) -> float:
            if not changes_anything(candidate):
                return 0.0
            value = max(float(values[index[candidate.layer]]), 0.0)
            return 0.5 * value / n_weights[candidate.layer] * squared_error(work, candidate)

        return Scores(
            diagonal=row_sums(work.table, lambda c: scaled(traces, c)),
            error=np.sqrt(row_sums(work.table, lambda c: scaled(errors, c) ** 2)),
            loss=work.loss.name,
            unit=work.loss.unit,
            details={
                "traces": dict(zip(layers, traces.tolist(), strict=True)),
                "trace_errors": dict(zip(layers, errors.tolist(), strict=True)),
                "clamped": [n for n, t in zip(layers, traces, strict=True) if t < 0],
            },
        )

    def _traces(self, work: Work, chunk: int) -> list[NDArray[np.float64]]:
        """Return ``f64[probes]`` for each layer: ``zᵀ H z`` of the chunk's mean loss."""
        runner, layers = work.runner, work.layers
        weights = [runner.weights.original(name) for name in layers]
        span = runner.chunks[chunk]
        with trainable(weights), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            # Fused attention has no second derivative; the plain one has.
            output = checked_output(runner.module(*inputs_of(runner.calibration, span)), len(span))
            loss = work.loss.per_sample(output, output.detach(), runner.labels(chunk)).mean()
            gradients = gradients_at(loss, weights, self.name, create_graph=True)
            used = [k for k, g in enumerate(gradients) if g is not None and g.requires_grad]
            values = torch.zeros(len(layers), self.probes, dtype=torch.float64)
            for probe in range(self.probes if used else 0):
                signs = [self._signs(layers[k], weights[k], chunk, probe) for k in used]
                products = torch.autograd.grad(
                    [g for g in map(gradients.__getitem__, used) if g is not None],
                    [weights[k] for k in used],
                    grad_outputs=signs,
                    retain_graph=probe + 1 < self.probes,
                    allow_unused=True,
                )
                for k, z, product in zip(used, signs, products, strict=True):
                    if product is not None:
                        values[k, probe] = (z.double() * product.double()).sum().cpu()
        return checked_losses(values, self.name)

    def _signs(self, layer: str, weight: Tensor, chunk: int, probe: int) -> Tensor:
        text = f"{self.seed}|{layer}|{chunk}|{probe}".encode()
        seed = int.from_bytes(hashlib.sha256(text).digest()[:8]) >> 1
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, weight.shape, generator=generator) * 2 - 1
        return signs.to(device=weight.device, dtype=weight.dtype)


class trainable:  # noqa: N801  # used as a context manager
    """Within the context autograd follows the given weights."""

    def __init__(self, weights: list[Tensor]) -> None:
        self._before = [(w, w.requires_grad) for w in weights]

    def __enter__(self) -> None:
        """Follow them."""
        for weight, _ in self._before:
            weight.requires_grad_(True)  # noqa: FBT003  # torch's signature

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Restore what was."""
        for weight, before in self._before:
            weight.requires_grad_(before)

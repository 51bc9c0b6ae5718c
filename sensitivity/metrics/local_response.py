"""Metrics from a layer's own response: what its output does when its own candidate is put in.

One pass of the full-precision model gives every layer's input and, with a backward pass, the
gradient at its output. Each candidate then costs one run of its own layer, whatever the depth of
the network behind it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from bitquota.quantizers.apply import input_quantizer
from bitquota.sensitivity.metrics.layer_trace import trace_layers
from bitquota.sensitivity.metrics.metric import (
    BACKWARD,
    FORWARD,
    Metric,
    changes_anything,
    layer_shares,
    local_cost,
)
from bitquota.sensitivity.recorder import checked_losses

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from bitquota.candidates.table import Candidate, CandidateTable, Row
    from bitquota.sensitivity.losses import Loss
    from bitquota.sensitivity.metrics.layer_trace import TracedCall
    from bitquota.sensitivity.metrics.metric import Work
    from bitquota.sensitivity.runners.base import Runner

    Calls = Mapping[str, Sequence[TracedCall]]
    RowScore = Callable[[Work, Calls, Row], Tensor]
    """``-> f64[n]``, one value per sample of the chunk, or ``f64[1]``, one for all of them."""


class LabelledGradientMetric(Metric):
    """A metric of gradients of the labelled loss at each layer's output."""

    needs_labels: ClassVar[bool] = True
    needs_gradients: ClassVar[bool] = True
    estimates_loss: ClassVar[bool] = True

    def cost(self, runner: Runner, table: CandidateTable) -> float:
        """Return one pass forwards and backwards, and each row's own layers once."""
        return FORWARD + BACKWARD + local_cost(runner, table)


def response_to(work: Work, call: TracedCall, candidate: Candidate) -> Tensor:
    """Return by how much the layer's own output changes, ``[n, ...]``.

    ``layer(x; Q(W)) - layer(x; W)``, computed as ``layer(x; Q(W) - W)`` without cancellation; with
    quantized inputs ``layer(q(x); Q(W)) - layer(x; W)``.
    """
    if candidate.activation_bits is None:
        return call.respond(work.delta(candidate))
    runner = work.runner
    quantizer = input_quantizer(runner.activations, candidate.layer, candidate.activation_bits)
    quantized = runner.weights(candidate).detach()
    original = runner.weights.original(candidate.layer).detach()
    return call.respond(quantized, quantizer(call.inputs)) - call.respond(original)


def per_sample_dot(gradient: Tensor, response: Tensor) -> Tensor:
    """Return ``f64[n]``: the inner product over everything but the samples."""
    n = len(gradient)
    return (gradient.double() * response.double()).reshape(n, -1).sum(dim=1)


def measure_rows(
    work: Work, score: RowScore, loss_of: Callable[[int], Loss] | None = None
) -> list[NDArray[np.float64]]:
    """Return for every chunk ``f64[n_rows, k]``, ``k`` being what ``score`` returns.

    Gradients are those of ``loss_of(chunk)``, by default of the loss of the work.

    A row that changes nothing scores zero and is not computed. What the ledger holds is reused
    row by row; only a chunk that lacks something is run again.
    """
    runner, table = work.runner, work.table
    rows = [r for r, row in enumerate(table.rows) if any(map(changes_anything, row.candidates))]
    found: list[NDArray[np.float64]] = []
    for chunk in range(len(runner.chunks)):
        keys = [work.row_key(chunk, r, "row") for r in rows]

        def run(chunk: int = chunk) -> list[NDArray[np.float64]]:
            loss = work.loss if loss_of is None else loss_of(chunk)
            metric = str(work.settings["metric"])
            calls = trace_layers(runner, chunk, work.layers, metric, loss=loss)
            values = torch.stack([score(work, calls, table.rows[r]) for r in rows])
            shares = layer_shares(runner, work.layers)
            local = sum(shares[c.layer] for r in rows for c in table.rows[r].candidates)
            work.charge(chunk, FORWARD + BACKWARD + local)
            return checked_losses(values, metric)

        arrays = work.recorder.shard(keys, run) if rows else {}
        width = len(next(iter(arrays.values()))) if arrays else 1
        values = np.zeros((len(table.rows), width))
        for r, key in zip(rows, keys, strict=True):
            values[r] = arrays[key]
        found.append(values)
    return found

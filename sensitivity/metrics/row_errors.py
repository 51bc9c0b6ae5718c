"""What each row of a layer adds to the loss at each bit-width: the Gram-weighted error, row by row.

Design: docs/design/rows.md
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from bitquota.candidates.rows import mixable
from bitquota.candidates.table import CandidateTable, Row
from bitquota.errors import InvalidInput
from bitquota.models.layout import to_matrix
from bitquota.sensitivity.metrics.gram_weighted import GramWeightedError, ScoreByRow
from bitquota.sensitivity.metrics.metric import as_torch, chunk_weights

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bitquota.candidates.table import Candidate
    from bitquota.context import Context
    from bitquota.sensitivity.losses import Loss
    from bitquota.sensitivity.runners.base import Runner


def row_errors(
    runner: Runner, table: CandidateTable, loss: Loss, *, context: Context | None = None
) -> dict[str, dict[int, NDArray[np.float64]]]:
    """Return by layer and bit-width f64[rows]: ``½ E[g_r²] e_r G e_rᵀ`` of each row.

    Where the model shows no gradients of its layers' outputs (an ONNX file), or no factor of the
    loss's Hessian is known, the squared error of the row's weights: within a layer that is what can
    be told.

    Raises:
        MeasurementFailed: A score is not finite.
        Cancelled: The context said so.

    Cost: a pass forwards and backwards, and each candidate's own layer once.
    """
    offered = _plain(runner, table)
    if not offered:
        return {}
    singles = CandidateTable(rows=tuple(Row(group=c.layer, candidates=(c,)) for c in offered))
    try:
        scored = RowErrors().of_rows(runner, singles, loss, context=context)
    except InvalidInput:
        scored = _squares(runner, offered)
    layers = {layer.name: layer for layer in runner.inventory.layers}
    found: dict[str, dict[int, NDArray[np.float64]]] = {}
    for candidate, values in zip(offered, scored, strict=True):
        own = found.setdefault(candidate.layer, {})
        own[candidate.weight_bits] = values[: layers[candidate.layer].rows]
    return found


def _plain(runner: Runner, table: CandidateTable) -> list[Candidate]:
    """Return the candidates that may stand side by side in the rows of a layer, by layer."""
    layers = {layer.name: layer for layer in runner.inventory.layers}
    by_layer: dict[str, list[Candidate]] = {}
    for row in table.rows:
        for candidate in row.candidates:
            if candidate.layer in layers:
                by_layer.setdefault(candidate.layer, []).append(candidate)
    return [c for name, own in by_layer.items() for c in mixable(own, layers[name]).values()]


def _squares(runner: Runner, offered: list[Candidate]) -> list[NDArray[np.float64]]:
    """Return the squared error of the weights of each row of each candidate."""
    weights = as_torch(runner, RowErrors.name).weights
    found = []
    for candidate in offered:
        with torch.no_grad():
            off = weights(candidate).double() - weights.original(candidate.layer).double()
            squares = to_matrix(off, weights.layer(candidate.layer)).square().sum(dim=1)
        found.append(squares.cpu().numpy())
    return found


@dataclass(frozen=True, slots=True)
class RowErrors(GramWeightedError):
    """The summands of the Gram-weighted error of each layer, one for each of its rows."""

    name: ClassVar[str] = "gram_weighted_rows"

    def of_rows(
        self, runner: Runner, table: CandidateTable, loss: Loss, *, context: Context | None = None
    ) -> list[NDArray[np.float64]]:
        """Return f64[most rows] for each row of a table of single layers, zeros at the end.

        Raises:
            InvalidInput: As ``measure``.
        """
        self.check(runner, loss)
        work = self.work_on(runner, table, loss, context)
        rows = {layer.name: layer.rows for layer in runner.inventory.layers}
        most = max(rows[row.candidates[0].layer] for row in table.rows)
        found = np.stack(self.per_chunk(work, ScoreByRow(most)))  # f64[C, n_rows, most]
        return list(np.tensordot(chunk_weights(runner), found, 1))

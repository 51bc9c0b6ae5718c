"""First-order delta loss: gradient times change, element by element.

References:
    [AutoScheme] Intel AutoRound 0.16, ``auto_scheme/delta_loss.py``: a layer's weight score is the
    sum of ``|gradient ⊙ (W - Q(W))|``, the gradient taken at the quantized weights, with the whole
    model in one scheme at a time.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch

from bitquota.models.running import checked_output, inputs_of
from bitquota.sensitivity.metrics.gradients import gradients_at
from bitquota.sensitivity.metrics.hessian_trace import trainable
from bitquota.sensitivity.metrics.metric import (
    BACKWARD,
    FORWARD,
    Metric,
    Scores,
    Work,
    changes_anything,
    chunk_weights,
    over_chunks,
)
from bitquota.sensitivity.recorder import checked_losses
from bitquota.sensitivity.runners.eager import replaced_weights

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from bitquota.candidates.table import Candidate, CandidateTable, Row
    from bitquota.sensitivity.runners.base import Runner


@dataclass(frozen=True, slots=True)
class FirstOrder(Metric):
    """``s = Σ |∂L/∂W ⊙ (Q(W) - W)|`` with the gradient at the quantized model [AutoScheme].

    ``L`` is the mean loss of a chunk. All groups are quantized together, once per row label
    (``W2``, ``W4``, …), and every row is scored in the pass of its own label, so the gradient is
    that of the model which a uniform plan would ship. The loss is the one asked for: unlike
    around full precision, the gradient of a divergence is not zero there, so no labels are
    needed. The score is the mean over chunks and its standard error theirs.

    We differ from the original in the loss (they differentiate the language model's), and leave
    out their second sum over quantized inputs: weights only.

    Pitfalls: absolute values make every layer's errors add up and never cancel; the gradient of a
    broken 2-bit model says little about a mixed one; scores of different widths come from
    different points and need not decrease with the bit-width (see ``flags``).
    """

    name: ClassVar[str] = "first_order"
    known_as: ClassVar[str] = "first-order delta loss (Intel AutoRound)"
    needs_gradients: ClassVar[bool] = True

    def cost(self, runner: Runner, table: CandidateTable) -> float:
        """Return one pass forwards and backwards for every distinct label, and the references."""
        del runner
        return FORWARD + (FORWARD + BACKWARD) * len(_uniform_points(table))

    def scores(self, work: Work) -> Scores:
        """Score every row."""
        runner, table = work.runner, work.table
        points = _uniform_points(table)
        values = np.zeros((len(runner.chunks), len(table.rows)))
        for chunk in range(len(runner.chunks)):
            wanted = {
                r: self._key(work, chunk, point, r)
                for point in points.values()
                for r in point.scored
            }

            def run(chunk: int = chunk) -> list[NDArray[np.float64]]:
                found = torch.cat([self._at(work, chunk, point) for point in points.values()])
                work.charge(chunk, (FORWARD + BACKWARD) * len(points))
                return checked_losses(found[:, None], self.name)

            if not wanted:
                continue
            arrays = work.recorder.shard(list(wanted.values()), run)
            for r, key in wanted.items():
                values[chunk, r] = arrays[key][0]
        return Scores(
            diagonal=chunk_weights(runner) @ values,
            error=over_chunks(values),
            loss=self.name,
            unit=work.loss.unit,
        )

    @staticmethod
    def _key(work: Work, chunk: int, point: _Point, row: int) -> str:
        # The gradient depends on what all groups are at: the whole point is part of the key.
        where = sorted((c.layer, c.weight_bits, str(c.scheme.to_json())) for c in point.candidates)
        return work.key(chunk, {"at": where, "row": work.row_key(chunk, row, "row")}, "first order")

    def _at(self, work: Work, chunk: int, point: _Point) -> torch.Tensor:
        """Return ``f64[k]``: the score of each row in ``point.scored``."""
        runner, span = work.runner, work.runner.chunks[chunk]
        reference = runner.reference(chunk)
        # Rounding inputs would stop every gradient in front of it.
        plain = [replace(c, activation_bits=None) for c in point.candidates]
        change = {c.layer: c for c in plain if changes_anything(c)}
        names = sorted(change)
        weights = [runner.weights.original(name) for name in names]
        with replaced_weights(runner.module, runner.weights, change, None), trainable(weights):
            with torch.enable_grad():
                value = runner.module(*inputs_of(runner.calibration, span))
                output = checked_output(value, len(span))
                loss = work.loss.per_sample(output, reference, runner.labels(chunk)).mean()
            gradients = gradients_at(loss, weights, self.name)
        slopes = dict(zip(names, gradients, strict=True))
        found = []
        for r in point.scored:
            total = torch.zeros((), dtype=torch.float64)
            for candidate in filter(changes_anything, work.table.rows[r].candidates):
                slope = slopes.get(candidate.layer)
                if slope is not None:
                    product = slope.double() * work.delta(candidate).double()
                    total += product.abs().sum().cpu()
            found.append(total)
        return torch.stack(found)


@dataclass(frozen=True, slots=True)
class _Point:
    """One uniform plan and the rows that are scored at it."""

    candidates: tuple[Candidate, ...]
    scored: tuple[int, ...]


def _weight_bits(row: Row) -> int:
    return max(c.weight_bits for c in row.candidates)


def _uniform_points(table: CandidateTable) -> dict[tuple[str, int], _Point]:
    """Return, for every label (and repetition of it in a group), the plan that is uniform in it.

    A group without the label takes its row of the nearest width there.
    """
    offsets, labels = table.offsets, [row.label for row in table.rows]
    wanted: dict[tuple[str, int], list[int]] = {}
    for a, b in itertools.pairwise(offsets):
        for r in range(a, b):
            if any(map(changes_anything, table.rows[r].candidates)):
                nth = labels[a:r].count(labels[r])
                wanted.setdefault((labels[r], nth), []).append(r)
    points = {}
    for key, rows in sorted(wanted.items()):
        bits = _weight_bits(table.rows[rows[0]])
        own = {int(table.group_of_row[r]): r for r in rows}
        chosen: list[Candidate] = []
        for g in range(len(offsets) - 1):
            at = own.get(g)
            if at is None:
                at = min(
                    range(offsets[g], offsets[g + 1]),
                    key=lambda r: (abs(_weight_bits(table.rows[r]) - bits), r),
                )
            chosen.extend(table.rows[at].candidates)
        points[key] = _Point(candidates=tuple(chosen), scored=tuple(rows))
    return points

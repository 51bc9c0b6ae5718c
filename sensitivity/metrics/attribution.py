"""How much a quantized layer changes what the model's answers are attributed to.

References:
    [GMPQ] Z. Wang, H. Xiao, J. Lu, J. Zhou. Generalizable mixed-precision quantization via
    attribution rank preservation. ICCV 2021. arXiv 2108.02720.

Design: docs/design/measures.md
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch.func import functional_call

from bitquota.errors import InvalidModel
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
)
from bitquota.sensitivity.recorder import checked_losses

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from bitquota.candidates.table import Candidate, CandidateTable
    from bitquota.sensitivity.losses import Loss
    from bitquota.sensitivity.runners.base import Runner


@dataclass(frozen=True, slots=True)
class AttributionChange(Metric):
    """``s = mean_n ‖A_row − A‖² / ‖A‖²`` with the attributions ``A = |x ⊙ ∂z/∂x|`` of a sample.

    ``z`` is the output that is largest in full precision (summed over positions, where there are
    several), ``A_row`` the attribution with the layers of one row quantized [GMPQ].

    We differ: [GMPQ] searches bit-widths by gradient, with the distance between *ranks* of Grad-CAM
    attributions in its loss, on a small data set for a large one; here the distance is of values
    and inputs are what is attributed to, and it scores single layers.

    Pitfalls: it sees what the model looks at, not what it says: a layer may change the one and not
    the other.
    """

    name: ClassVar[str] = "attribution"
    known_as: ClassVar[str] = "change of attributions (after GMPQ, values instead of ranks)"
    needs_gradients: ClassVar[bool] = True

    def cost(self, runner: Runner, table: CandidateTable) -> float:
        """Return one pass forwards and backwards for each row and full precision, and a reference.

        A row in full precision takes none.
        """
        del runner
        changed = sum(any(map(changes_anything, row.candidates)) for row in table.rows)
        return FORWARD + (FORWARD + BACKWARD) * (1 + changed)

    def check(self, runner: Runner, loss: Loss) -> None:
        """Raise what can be told before anything is run.

        Raises:
            InvalidModel: As for any metric, or no input is a number that gradients reach.
        """
        Metric.check(self, runner, loss)
        if not any(t.is_floating_point() for t in runner.calibration.inputs):
            msg = (
                f"the metric '{self.name}' attributes answers to inputs that are numbers; this "
                "model reads integers such as tokens: use 'diagonal', 'gram' or 'pairs'"
            )
            raise InvalidModel(msg, measure=self.name)

    def scores(self, work: Work) -> Scores:
        """Score every row."""
        runner, rows = work.runner, work.table.rows
        changed = [r for r, row in enumerate(rows) if any(map(changes_anything, row.candidates))]
        values = np.zeros((len(runner.chunks), len(rows)))
        for chunk in range(len(runner.chunks)):
            keys = [work.row_key(chunk, r, "attribution") for r in changed]

            def run(chunk: int = chunk) -> list[NDArray[np.float64]]:
                before = self._attribution(work, chunk, ())
                energy = before.square().sum(dim=1).clamp(min=1e-30)
                found = [
                    (self._attribution(work, chunk, rows[r].candidates) - before).square().sum(1)
                    for r in changed
                ]
                work.charge(chunk, (FORWARD + BACKWARD) * (1 + len(changed)))
                shares = torch.stack([(f / energy).mean() for f in found])
                return checked_losses(shares[:, None], self.name)

            if keys:
                arrays = work.recorder.shard(keys, run)
                values[chunk, changed] = [float(arrays[key][0]) for key in keys]
        return Scores(
            diagonal=chunk_weights(runner) @ values,
            error=over_chunks(values),
            loss=self.name,
            unit="1",
        )

    def _attribution(self, work: Work, chunk: int, row: tuple[Candidate, ...]) -> Tensor:
        """Return f64[n, elements]: the attribution of each sample to all floating inputs."""
        runner, span = work.runner, work.runner.chunks[chunk]
        layer = runner.weights.layer
        weights = {layer(c.layer).weight_name: runner.weights(c).detach() for c in row}
        inputs = [
            t.detach().clone().requires_grad_() if t.is_floating_point() else t
            for t in inputs_of(runner.calibration, span)
        ]
        watched = [t for t in inputs if t.requires_grad]
        top = runner.reference(chunk).argmax(dim=-1, keepdim=True)
        with torch.enable_grad():
            output = checked_output(
                functional_call(runner.module, weights, tuple(inputs)), len(span)
            )
            total = output.gather(-1, top).sum()
            slopes = gradients_at(total, watched, self.name)
        parts = [
            (t.detach() * s).abs().double().flatten(1)
            for t, s in zip(watched, slopes, strict=True)
            if s is not None
        ]
        return torch.cat(parts, dim=1).cpu()

"""What a plan changes in the answers, in terms that need no knowledge of a loss.

Design: docs/design/outputs.md
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from bitquota.models.running import DEFAULT_CHUNK, cut, inputs_of, run_module
from bitquota.sensitivity.losses import losses_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    from bitquota.models.calibration import CalibrationSet
    from bitquota.plan import PlanOutput
    from bitquota.sensitivity.losses import Loss


def changed_answers(loss: Loss, output: Tensor, reference: Tensor) -> Tensor | None:
    """Return ``f64[N]``, the share of answers that differ, or ``None`` where there are none.

    An answer is the arg-max of classes, or the side of 0 of a logit of its own.
    """
    if loss.name in {"kl", "cross_entropy"} and output.ndim > 1 and output.shape[-1] > 1:
        different = output.argmax(dim=-1) != reference.argmax(dim=-1)
    elif loss.name == "binary_kl":
        different = (output > 0) != (reference > 0)
    else:
        return None
    return different.reshape(len(output), -1).double().mean(dim=1)


@dataclass(slots=True)
class _Sums:
    """Sums over elements, from which norms and correlation follow."""

    changed: list[Tensor] = field(default_factory=list)
    moments: Tensor = field(default_factory=lambda: torch.zeros(7, dtype=torch.float64))

    def add(self, loss: Loss, output: Tensor, reference: Tensor) -> None:
        found = changed_answers(loss, output, reference)
        if found is not None:
            self.changed.append(found.cpu())
        o, r = output.double().reshape(-1).cpu(), reference.double().reshape(-1).cpu()
        if loss.name in {"kl", "cross_entropy"}:
            # A constant added to all logits changes nothing.
            o = (output.double() - output.double().mean(dim=-1, keepdim=True)).reshape(-1).cpu()
            r = (reference.double() - reference.double().mean(dim=-1, keepdim=True)).reshape(-1)
            r = r.cpu()
        self.moments += torch.stack(
            [
                torch.tensor(float(len(o)), dtype=torch.float64),
                o.sum(), r.sum(), o.square().sum(), r.square().sum(), (o * r).sum(),
                (o - r).square().sum(),
            ]
        )  # fmt: skip

    def of(self, output: PlanOutput) -> PlanOutput:
        """Return ``output`` with what was found."""
        n, o, r, oo, rr, both, gap = self.moments.tolist()
        spread = max(0.0, oo - o * o / n) * max(0.0, rr - r * r / n)
        return replace(
            output,
            changed=float(torch.cat(self.changed).mean()) if self.changed else None,
            relative_error=(gap / rr) ** 0.5 if rr else None,
            correlation=max(-1.0, min(1.0, (both - o * r / n) / spread**0.5))
            if spread > 0
            else None,
        )


def output_effects(
    quantized: nn.Module,
    module: nn.Module,
    data: CalibrationSet,
    loss: Loss,
    outputs: Sequence[PlanOutput],
) -> tuple[PlanOutput, ...]:
    """Return ``outputs`` with what ``quantized`` changes in each on ``data``.

    Cost: one pass of each of the two modules.
    """
    sums = [_Sums() for _ in outputs]
    for chunk in cut(len(data), DEFAULT_CHUNK):
        inputs = inputs_of(data, chunk)
        mine, other = (run_module(m, inputs) for m in (quantized, module))
        pairs = zip(losses_of(loss, mine), losses_of(loss, other), sums, strict=True)
        for (output, own), (reference, _), total in pairs:
            total.add(own, output, reference)
    return tuple(total.of(output) for total, output in zip(sums, outputs, strict=True))

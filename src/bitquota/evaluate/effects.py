"""What a plan changes in the answers, in terms that need no knowledge of a loss.

Design: docs/design/outputs.md
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from bitquota.sensitivity.losses import losses_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

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


def effect_sums(loss: Loss, output: Tensor, reference: Tensor) -> NDArray[np.float64]:
    """Return ``f64[k, 9]``: for each output sums over elements and samples, which add up.

    Of ``o`` (the output) and ``r`` (the reference): the number of elements, ``Σo``, ``Σr``,
    ``Σo²``, ``Σr²``, ``Σor``, ``Σ(o - r)²``; then the sum of ``changed_answers``, and the number of
    samples that have answers.
    """
    pairs = zip(losses_of(loss, output), losses_of(loss, reference), strict=True)
    return np.stack([_sums(own, mine, other) for (mine, own), (other, _) in pairs])


def _sums(loss: Loss, output: Tensor, reference: Tensor) -> NDArray[np.float64]:
    found = changed_answers(loss, output, reference)
    o, r = output.double(), reference.double()
    if loss.name in {"kl", "cross_entropy"}:
        # A constant added to all logits changes nothing.
        o, r = o - o.mean(dim=-1, keepdim=True), r - r.mean(dim=-1, keepdim=True)
    o, r = o.reshape(-1).cpu(), r.reshape(-1).cpu()
    moments = [
        torch.tensor(float(len(o)), dtype=torch.float64),
        o.sum(), r.sum(), o.square().sum(), r.square().sum(), (o * r).sum(), (o - r).square().sum(),
    ]  # fmt: skip
    answers = [0.0, 0.0] if found is None else [float(found.sum()), float(len(found))]
    return np.array([*(float(m) for m in moments), *answers])


def with_effects(
    outputs: Sequence[PlanOutput], sums: NDArray[np.float64]
) -> tuple[PlanOutput, ...]:
    """Return ``outputs`` with what ``effect_sums``, added up over all samples, say of each."""
    return tuple(_with_effect(o, row) for o, row in zip(outputs, sums.tolist(), strict=True))


def _with_effect(output: PlanOutput, sums: Sequence[float]) -> PlanOutput:
    n, o, r, oo, rr, both, gap, changed, n_answers = sums
    spread = max(0.0, oo - o * o / n) * max(0.0, rr - r * r / n)
    return replace(
        output,
        changed=changed / n_answers if n_answers else None,
        relative_error=(gap / rr) ** 0.5 if rr else None,
        correlation=max(-1.0, min(1.0, (both - o * r / n) / spread**0.5)) if spread > 0 else None,
    )

"""What each layer takes of each budget at each bit-width on offer, also between them.

Design: docs/design/training.md
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from bitquota.candidates.table import CandidateTable, Row
from bitquota.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from bitquota.candidates.budget import Budget
    from bitquota.candidates.layers import Layer
    from bitquota.candidates.table import Candidate

PEAK = "activation_bits_max"
"""The resource of which every layer takes for itself: a limit on it adds nothing up."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prices:
    """Exact costs of every layer under every budget.

    Attributes:
        budgets: All of them; they hold together.
        layers: In the order of the inventory.
        widths: Bit-widths of weights on offer, rising.
        input_widths: Bit-widths of inputs on offer, rising; ``(None,)`` for full precision.
        costs: ``i64[budgets, layers, widths, input widths]``, in each budget's unit.
        candidate: The candidate of a layer at two bit-widths.
    """

    budgets: tuple[Budget, ...]
    layers: tuple[Layer, ...]
    widths: tuple[int, ...]
    input_widths: tuple[int | None, ...]
    costs: NDArray[np.int64]
    candidate: Callable[[Layer, int, int | None], Candidate]

    @classmethod
    def of(
        cls,
        layers: Sequence[Layer],
        budgets: Sequence[Budget],
        widths: Sequence[int],
        input_widths: Sequence[int | None],
        candidate: Callable[[Layer, int, int | None], Candidate],
        least: Callable[[Layer], Candidate] | None = None,
    ) -> Self:
        """Return the prices of every candidate.

        ``least`` is what a layer may become beside them; budgets need to hold with it alone.

        Raises:
            BudgetTooSmall: The cheapest candidates exceed a budget.
            InvalidInput: A cost table lacks a candidate.
        """
        order = {la.name: k for k, la in enumerate(layers)}
        pairs = list(itertools.product(sorted(widths), input_widths))
        # An input that stays in full precision has one row only, though two offers lead to it.
        offered = {la.name: [candidate(la, w, a) for w, a in pairs] for la in layers}
        rows = [
            Row(group=name, candidates=(c,))
            for name, found in offered.items()
            for c in dict.fromkeys(found)
        ]
        table = CandidateTable(rows=tuple(rows))
        floor = (
            [] if least is None else [Row(group=la.name, candidates=(least(la),)) for la in layers]
        )
        whole = sorted({*rows, *floor}, key=lambda row: order[row.group])
        priced = []
        for budget in budgets:
            budget.check(CandidateTable(rows=tuple(whole)))
            costs = dict(zip((r.candidates[0] for r in rows), budget.costs(table), strict=True))
            priced.append([[costs[c] for c in found] for found in offered.values()])
        shape = (len(budgets), len(layers), len(widths), len(input_widths))
        return cls(
            budgets=tuple(budgets),
            layers=tuple(layers),
            widths=tuple(sorted(widths)),
            input_widths=tuple(input_widths),
            costs=np.array(priced, dtype=np.int64).reshape(shape),
            candidate=candidate,
        )

    def check_weights_limited(self) -> None:
        """Raise ``InvalidInput`` unless some budget depends on the bit-widths of weights."""
        if not any(self.limits_weights(k) for k in range(len(self.budgets))):
            got = ", ".join(f"'{b.text or b.resource}'" for b in self.budgets) or "none"
            msg = (
                "bit-widths are learned under at least one limit on weights: a size, bit "
                f"operations, a time or an energy; got {got}"
            )
            raise InvalidInput(msg, resources=[b.resource for b in self.budgets])

    def limits_weights(self, k: int) -> bool:
        """Whether budget ``k`` depends on the bit-widths of weights."""
        return bool((self.costs[k] != self.costs[k][:, :1]).any())

    def limits_inputs(self, k: int) -> bool:
        """Whether budget ``k`` depends on the bit-widths of inputs."""
        return bool((self.costs[k] != self.costs[k][:, :, :1]).any())

    def is_peak(self, k: int) -> bool:
        """Whether budget ``k`` holds for every layer alone."""
        return self.budgets[k].resource == PEAK

    def plane(self, *, of_inputs: bool = False) -> tuple[int, Tensor, float] | None:
        """Return the first sum over weights, or inputs, that is linear in their bit-widths.

        That is ``sum slope_l b_l <= limit``.

        Returns:
            Its position, ``f32[layers]`` slopes, and the limit without what does not depend on
            bit-widths; ``None`` if every one bends, or depends on both.
        """
        for k, budget in enumerate(self.budgets):
            both = (self.limits_weights(k), self.limits_inputs(k))
            if both != (not of_inputs, of_inputs) or self.is_peak(k):
                continue
            costs = (self.costs[k, :, 0] if of_inputs else self.costs[k, :, :, 0]).astype(float)
            at = np.array(self.input_widths if of_inputs else self.widths, dtype=float)
            slopes = (costs[:, -1] - costs[:, 0]) / (at[-1] - at[0])
            lines = costs[:, :1] + slopes[:, None] * (at - at[0])
            if (np.abs(lines - costs).sum(0) > 0.01 * costs.sum(0)).any() or (slopes < 0).any():
                continue
            offsets = float((costs[:, 0] - slopes * at[0]).sum())
            return k, torch.tensor(slopes, dtype=torch.float32), budget.available - offsets
        return None

    def taken(self, k: int, bits: Tensor, input_bits: Tensor | None) -> Tensor:
        """Return ``f32[layers]`` of budget ``k``, linear between the bit-widths on offer.

        Args:
            k: Position of the budget.
            bits: ``f32[layers]`` of weights; beyond the offer they count like its ends.
            input_bits: ``f32[layers]`` of inputs, or ``None`` for full precision.
        """
        costs = torch.as_tensor(self.costs[k], dtype=torch.float32, device=bits.device)
        low, high, share = _between(self.widths, bits)
        rows = torch.arange(len(bits), device=bits.device)
        across = costs[rows, low] + share[:, None] * (costs[rows, high] - costs[rows, low])
        if input_bits is None or len(self.input_widths) == 1:
            return across[:, 0]
        low, high, share = _between([float(a or 32) for a in self.input_widths], input_bits)
        return across[rows, low] + share * (across[rows, high] - across[rows, low])

    def excess(
        self, k: int, bits: Tensor, input_bits: Tensor | None, stored: Tensor | None = None
    ) -> Tensor:
        """Return how far budget ``k`` is exceeded, as a share of it; 0 where it holds.

        ``stored`` is f32[layers], the share of each layer's weights that is left, by default all.
        """
        shares = self.taken(k, bits, input_bits) / self.budgets[k].available
        if stored is not None and self.limits_weights(k):
            shares = shares * stored
        if self.is_peak(k):
            return torch.relu(shares - 1).sum()
        return torch.relu(shares.sum() - 1)


def _between(offered: Sequence[float], bits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the neighbours of ``bits`` on offer by position, and the way from one to the other."""
    widths = torch.tensor(offered, dtype=torch.float32, device=bits.device)
    inside = bits.clamp(float(widths[0]), float(widths[-1]))
    high = torch.searchsorted(widths, inside.detach()).clamp(1, max(1, len(offered) - 1))
    low = high - 1
    return low, high, (inside - widths[low]) / (widths[high] - widths[low])

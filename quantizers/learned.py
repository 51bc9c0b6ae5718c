"""Learned rounding: codes and scales that signed gradient descent moves towards a smaller error.

References:
    [SignRound] W. Cheng, W. Zhang, H. Shen, Y. Cai, X. He, K. Lv, Y. Liu, "Optimize Weight Rounding
    via Signed Gradient Descent for the Quantization of LLMs", 2023, arXiv 2309.05516.

Design: docs/design/grids-and-scales.md
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from bitquota.candidates.storage import Granularity, Grid
from bitquota.errors import InvalidInput
from bitquota.quantizers.differentiable import ste_round
from bitquota.quantizers.grid import code_range, matrix_grid
from bitquota.quantizers.rounders import Rounder, checked_gram

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from bitquota.quantizers.grid import MatrixGrid
    from bitquota.quantizers.weights import QuantizedWeight

    Objective = Callable[[Mapping[str, Tensor], int | None], Tensor]

ITERATIONS = 200

SCALE_SHARE = 0.1
"""Steps of scale factors, as a share of those of rounding offsets."""

SCALE_RANGE = (0.5, 1.5)

_NEARLY_HALF = 0.499
"""How far a weight may lie from the code that it starts with, in steps."""


def learn_layer(
    values: Tensor, start: QuantizedWeight, inputs_gram: Tensor, *, iterations: int = ITERATIONS
) -> QuantizedWeight:
    """Return codes and scales with a smaller ``tr(E G E^T)`` than ``start`` has, or ``start``'s.

    Every row keeps the best that it met, and so is never worse than it was. Heuristic.

    Args:
        values: What to come close to, floating-point [rows, columns].
        start: Codes to start from, as GPTQ's.
        inputs_gram: As ``weights.quantize`` takes it.
        iterations: Steps of descent.

    Raises:
        InvalidInput: The grid has no steps (see ``learn_block``), or the Gram does not fit.

    Cost: ``iterations`` products of [rows, columns] by [columns, columns].
    """
    gram = checked_gram(inputs_gram, Rounder.GPTQ, values)
    gram = (gram / gram.diagonal(dim1=1, dim2=2).mean().clamp(min=1e-300)).float()
    target = values.detach().float()

    def row_errors(weights: Mapping[str, Tensor], iteration: int | None) -> Tensor:
        del iteration
        error = (weights["layer"] - target).reshape(len(gram), -1, target.shape[1])
        return ((error @ gram) * error).sum(dim=2).reshape(-1)

    return learn_block({"layer": values}, {"layer": start}, row_errors, iterations=iterations)[
        "layer"
    ]


def learn_block(
    values: Mapping[str, Tensor],
    start: Mapping[str, QuantizedWeight],
    objective: Objective,
    *,
    iterations: int = ITERATIONS,
) -> dict[str, QuantizedWeight]:
    """Return codes and scales of several layers with a smaller ``objective`` than ``start``.

    A weight is read back as ``s f (round(w / (s f) + v) - z)`` with an offset ``v`` in [-1/2, 1/2]
    for each weight and a factor ``f`` for each scale; both move by the sign of their gradients,
    which pass the rounding straight through, at a rate that falls linearly from ``1/iterations`` to
    zero [SignRound]. Unlike the paper's, codes start where ``start`` has them: ``w / s`` is held
    within half a step of that code, so that ``v = 0`` reads as ``start``. Scales move where they
    are stored as numbers of their own (symmetric and asymmetric grids by channel or group).

    Args:
        values: What each layer's weights would be in full precision, [rows, columns] by name.
        start: Codes to start from, by the same names.
        objective: Called with weights ``f32[rows, columns]`` by name and the number of the step;
            returns a loss to minimise, or one for each row of the only layer. A step may look at a
            part of the data; with ``None`` for the step it must look at all, which decides
            whether the best of the steps replaces ``start``.
        iterations: Steps of descent.

    Raises:
        InvalidInput: A codebook, powers of two, or one bit: their codes are not steps apart.

    Cost: ``iterations`` evaluations of the objective and its gradient.
    """
    learned = {name: _Learned(values[name], start[name]) for name in start}
    first = {name: layer.parameters() for name, layer in learned.items()}
    best, found = None, first
    for iteration in range(iterations):
        loss = objective({name: layer.weight() for name, layer in learned.items()}, iteration)
        found = _better(found, learned, loss if best is None else loss.detach() < best)
        best = loss.detach() if best is None else torch.minimum(best, loss.detach())
        rate = (1 - iteration / iterations) / iterations
        loss.sum().backward()  # type: ignore[no-untyped-call]
        for layer in learned.values():
            layer.move(rate)

    # Chosen on all data, each row for itself where rows have losses of their own.
    with torch.no_grad():
        losses = []
        for state in (first, found):
            for name, layer in learned.items():
                layer.restore(*state[name])
            losses.append(objective({n: la.weight() for n, la in learned.items()}, None))
        for name, layer in learned.items():
            layer.restore(*first[name])
        kept = {name: layer.parameters() for name, layer in learned.items()}
        for name, layer in learned.items():
            layer.restore(*found[name])
        for name, (offset, factor) in _better(kept, learned, losses[1] < losses[0]).items():
            learned[name].restore(offset, factor)
    return {name: layer.stored() for name, layer in learned.items()}


_Parameters = tuple["Tensor", "Tensor"]


def _better(
    kept: Mapping[str, _Parameters], learned: Mapping[str, _Learned], better: Tensor
) -> dict[str, _Parameters]:
    """Return the parameters of ``learned`` where they are better, else those that were kept."""
    chosen = {}
    for name, layer in learned.items():
        now = layer.parameters()
        mask = better if better.dtype == torch.bool else torch.ones_like(better, dtype=torch.bool)
        rows = mask.reshape(-1, 1)
        chosen[name] = tuple(
            torch.where(rows if len(part) == len(rows) else rows.all(), part, old)
            for part, old in zip(now, kept[name], strict=True)
        )
    return chosen  # type: ignore[return-value]


class _Learned:
    """Offsets and scale factors of one layer."""

    def __init__(self, values: Tensor, start: QuantizedWeight) -> None:
        scheme = start.scheme
        if scheme.grid in (Grid.CODEBOOK, Grid.POWER_OF_TWO) or (
            start.bits == 1 and scheme.grid is Grid.SYMMETRIC
        ):
            msg = (
                "learned rounding moves codes by steps of a scale; got the grid "
                f"'{scheme.grid}' at {start.bits} bits, whose codes are not steps apart"
            )
            raise InvalidInput(msg, grid=str(scheme.grid), weight_bits=start.bits)
        self._start = start
        self._values = values.detach().float()
        self._codes = start.codes.float()
        self._offset = torch.zeros_like(self._values).requires_grad_()
        self._factor = torch.ones_like(start.scales, dtype=torch.float32)
        if (
            scheme.grid in (Grid.SYMMETRIC, Grid.ASYMMETRIC)
            and scheme.granularity is not Granularity.TENSOR
        ):
            self._factor.requires_grad_()

    def weight(self) -> Tensor:
        """Return f32[rows, columns] as it would be read, differentiable."""
        scales = self._start.scales.float() * self._factor
        # Stored in their own format; the gradient passes.
        scales = scales + (scales.detach().to(self._start.scales.dtype).float() - scales.detach())
        codes, grid = self._rounded(scales)
        return grid.read(codes)

    def _rounded(self, scales: Tensor) -> tuple[Tensor, MatrixGrid]:
        start, columns = self._start, self._values.shape[1]
        stored = (scales, start.zero_points, start.bits, start.scheme)
        grid = matrix_grid(*stored, columns, torch.float32)
        moved = self._values if grid.offset is None else self._values - grid.offset
        place = moved / torch.where(grid.step == 0, torch.inf, grid.step)
        place = place if grid.zero is None else place + grid.zero
        near = torch.clamp(place, self._codes - _NEARLY_HALF, self._codes + _NEARLY_HALF)
        least, most = code_range(start.scheme.grid, start.bits)
        return ste_round(near + self._offset).clamp(least, most), grid

    def move(self, rate: float) -> None:
        """Take a step against the gradients' signs."""
        with torch.no_grad():
            for part, step, (least, most) in (
                (self._offset, rate, (-0.5, 0.5)),
                (self._factor, SCALE_SHARE * rate, SCALE_RANGE),
            ):
                if part.grad is not None:
                    part.sub_(step * part.grad.sign()).clamp_(least, most)
                    part.grad = None

    def parameters(self) -> _Parameters:
        """Return copies of offsets and factors."""
        return self._offset.detach().clone(), self._factor.detach().clone()

    def restore(self, offset: Tensor, factor: Tensor) -> None:
        """Put parameters back."""
        with torch.no_grad():
            self._offset.copy_(offset)
            self._factor.copy_(factor)

    def stored(self) -> QuantizedWeight:
        """Return codes and scales as they are stored."""
        with torch.no_grad():
            scales = (self._start.scales.float() * self._factor).to(self._start.scales.dtype)
            codes, _ = self._rounded(scales.float())
        return replace(self._start, codes=codes.int(), scales=scales)

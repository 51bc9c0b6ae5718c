"""Learned rounding: codes and scales that gradients of a block's output error move.

References:
    [SignRound] W. Cheng, W. Zhang, H. Shen, Y. Cai, X. He, K. Lv, Y. Liu, "Optimize Weight Rounding
    via Signed Gradient Descent for the Quantization of LLMs", 2023, arXiv 2309.05516.
    [Adam] D. Kingma, J. Ba, "Adam: A Method for Stochastic Optimization", 2014, arXiv 1412.6980.

Design: docs/design/rounding.md
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from bitquota.candidates.storage import Granularity, Grid
from bitquota.context import Context
from bitquota.errors import InvalidInput
from bitquota.models.blocks import at_block, leading, repeated_blocks
from bitquota.models.layout import from_matrix, to_matrix
from bitquota.models.running import tensor_of
from bitquota.quantizers.differentiable import ste_round
from bitquota.quantizers.grid import NOT_WHOLE, code_range, matrix_grid
from bitquota.quantizers.sequential import STAGE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, nn

    from bitquota.candidates.layers import Layer
    from bitquota.quantizers.grid import MatrixGrid
    from bitquota.quantizers.weights import QuantizedWeight

    Objective = Callable[[Mapping[str, Tensor], int], Tensor]

ITERATIONS = 200

BATCH = 8
"""Samples of one step."""

OFFSET_RATE = 0.01
"""Rate of rounding offsets at first, in steps of the grid; it falls linearly to zero."""

SCALE_RATE = 0.001
"""The same of scale factors."""

SCALE_RANGE = (0.5, 1.5)

_FARTHEST = 0.25
"""How far from its code a weight may start, in steps: half way to the next one."""


def learn_in_blocks(
    module: nn.Module,
    quantized: nn.Module,
    start: Mapping[str, QuantizedWeight],
    layers: Mapping[str, Layer],
    batches: Sequence[tuple[Tensor, ...]],
    *,
    iterations: int = ITERATIONS,
    context: Context | None = None,
) -> dict[str, QuantizedWeight]:
    """Change the weights of ``quantized`` in place so that each block's output errs less.

    Blocks (``repeated_blocks``) are taken in the order in which they run. With ``Y`` the output of
    the block in ``module`` and ``Z`` that of the block in ``quantized``, which gets what earlier
    blocks of ``quantized`` make of the samples, the mean over tokens (or samples, where outputs are
    not sequences) of ``|Z - Y|^2 / |Y|^2`` becomes smaller, or the block stays as it is. The norm
    that follows most blocks makes errors count relative to a token's size; without the division a
    few tokens of huge activations decide everything.

    Args:
        module: The full-precision model in eval mode.
        quantized: A copy of it that holds ``start``.
        start: Codes and scales by layer.
        layers: Those layers.
        batches: Positional arguments of forward passes.
        iterations: Steps of descent for each block.
        context: Told after each block, asked before each step whether to go on.

    Returns:
        Codes and scales of the layers that changed.

    Raises:
        Cancelled: The context said so.

    Cost: for each block ``iterations`` times its forward and backward pass over ``BATCH`` samples,
    and a pass of both models over all batches up to this block.
    """
    parts = [
        tuple(tensor[at : at + BATCH] for tensor in batch)
        for batch in batches
        for at in range(0, len(batch[0]), BATCH)
    ]
    learnable = {n: layers[n] for n, weight in start.items() if _has_steps(weight)}
    found: dict[str, QuantizedWeight] = {}
    context = Context() if context is None else context
    blocks = repeated_blocks(module, learnable, parts[0])
    for done, (block, names) in enumerate(blocks.items()):
        context.report(STAGE, done, len(blocks), weight=0.0)
        targets = [output for _, _, output in at_block(module, block, parts)]
        calls = [(args, kwargs) for args, kwargs, _ in at_block(quantized, block, parts)]
        within = quantized.get_submodule(block)

        def loss(
            weights: Mapping[str, Tensor],
            k: int,
            context: Context = context,
            block: str = block,
            within: nn.Module = within,
            calls: Sequence[tuple[tuple[object, ...], dict[str, object]]] = calls,
            targets: Sequence[Tensor] = targets,
        ) -> Tensor:
            context.check(STAGE)
            held = {
                layers[n].weight_name.removeprefix(f"{block}."): from_matrix(w, layers[n])
                for n, w in weights.items()
            }
            args, kwargs = calls[k]
            output = leading(torch.func.functional_call(within, held, args, dict(kwargs)))
            return _relative_error(output, targets[k])  # type: ignore[arg-type]

        values = {
            n: to_matrix(tensor_of(module, layers[n].weight_name).detach(), layers[n])
            for n in names
        }
        learned = learn_block(
            values,
            {n: start[n] for n in names},
            loss,
            n_batches=len(parts),
            iterations=iterations,
        )
        for n, weight in learned.items():
            place = tensor_of(quantized, layers[n].weight_name)
            with torch.no_grad():
                place.copy_(from_matrix(weight.dequantize().to(place.dtype), layers[n]))
        found |= learned
    context.report(STAGE, len(blocks), len(blocks), weight=0.0)
    return found


def _relative_error(output: Tensor, target: Tensor) -> Tensor:
    first = 2 if output.ndim == 3 else 1
    error, size = (
        part.square().flatten(first).sum(-1) if part.ndim > first else part.square()
        for part in (output - target, target)
    )
    return (error / size.clamp(min=1e-12)).mean()


def learn_block(
    values: Mapping[str, Tensor],
    start: Mapping[str, QuantizedWeight],
    objective: Objective,
    *,
    n_batches: int,
    iterations: int = ITERATIONS,
) -> dict[str, QuantizedWeight]:
    """Return codes and scales of several layers with a smaller ``objective`` than ``start``.

    A weight is read back as ``s f (round(p + v) - z)`` with an offset ``v`` for each weight and a
    factor ``f`` for each scale, whose gradients pass the rounding straight through [SignRound].
    ``p`` is half way between ``w / s`` and the code that ``start`` has, at most a quarter of a step
    from that code: ``v = 0`` reads as ``start``, and leaving it takes gradients that agree.

    Unlike the paper's, steps are those of [Adam]. Signs of gradients move every weight by as much,
    also where batches disagree; from GPTQ's codes, whose errors cancel, that loses more than it
    gains. Scales move where they are stored as numbers of their own (symmetric and asymmetric grids
    by channel or group).

    Args:
        values: What each layer's weights would be in full precision, [rows, columns] by name.
        start: Codes to start from, by the same names.
        objective: Called with weights ``f32[rows, columns]`` by name and the number of a batch;
            returns a loss.
        n_batches: How many batches there are.
        iterations: Steps of descent.

    Returns:
        What the last step found, or ``start`` if that is no worse on all batches.

    Raises:
        InvalidInput: A codebook, powers of two, or one bit: their codes are not steps apart.

    Cost: ``iterations`` evaluations of the objective and its gradient, and twice all batches.
    """
    learned = {name: _Learned(values[name], start[name]) for name in start}

    def total() -> float:
        with torch.no_grad():
            weights = {name: layer.weight() for name, layer in learned.items()}
            return sum(float(objective(weights, k)) for k in range(n_batches))

    before = total()
    offsets = [layer.offset for layer in learned.values()]
    factors = [layer.factor for layer in learned.values() if layer.factor.requires_grad]
    groups = ((offsets, OFFSET_RATE), (factors, SCALE_RATE))
    optimizer = torch.optim.Adam([{"params": part, "lr": rate} for part, rate in groups if part])
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=1.0, end_factor=0.0, total_iters=iterations
    )
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    for _ in range(iterations):
        order = order or torch.randperm(n_batches, generator=generator).tolist()
        loss = objective({name: layer.weight() for name, layer in learned.items()}, order.pop())
        # Not backward(): other parameters of the model keep the gradients that they have. Weights
        # before a quantized input get none.
        moving = [*offsets, *factors]
        gradients = torch.autograd.grad(loss, moving, allow_unused=True)
        for part, gradient in zip(moving, gradients, strict=True):
            part.grad = gradient
        optimizer.step()
        schedule.step()
        for layer in learned.values():
            layer.limit()
    better = total() < before
    return {n: layer.stored() if better else start[n] for n, layer in learned.items()}


def _has_steps(weight: QuantizedWeight) -> bool:
    """Return whether codes are steps of a scale apart."""
    scheme = weight.scheme
    return scheme.grid not in NOT_WHOLE and not (weight.bits == 1 and scheme.grid is Grid.SYMMETRIC)


class _Learned:
    """Offsets and scale factors of one layer."""

    def __init__(self, values: Tensor, start: QuantizedWeight) -> None:
        scheme = start.scheme
        if not _has_steps(start):
            msg = (
                "learned rounding moves codes by steps of a scale; got the grid "
                f"'{scheme.grid}' at {start.bits} bits, whose codes are not steps apart"
            )
            raise InvalidInput(msg, grid=str(scheme.grid), weight_bits=start.bits)
        self._start = start
        grid = self._grid(start.scales.float())
        moved = values.detach().float()
        moved = moved if grid.offset is None else moved - grid.offset
        place = moved / grid.divisor
        place = place if grid.zero is None else place + grid.zero
        codes = start.codes.float()
        self._place = torch.clamp((place - codes) / 2, -_FARTHEST, _FARTHEST) + codes
        self.offset = torch.zeros_like(self._place).requires_grad_()
        self.factor = torch.ones_like(start.scales, dtype=torch.float32)
        if (
            scheme.grid in (Grid.SYMMETRIC, Grid.ASYMMETRIC)
            and scheme.granularity is not Granularity.TENSOR
        ):
            self.factor.requires_grad_()

    def weight(self) -> Tensor:
        """Return f32[rows, columns] as it would be read, differentiable."""
        scales = self._start.scales.float() * self.factor
        # Stored in their own format; the gradient passes.
        scales = scales + (scales.detach().to(self._start.scales.dtype).float() - scales.detach())
        return self._grid(scales).read(self._codes())

    def _grid(self, scales: Tensor) -> MatrixGrid:
        start = self._start
        stored = (scales, start.zero_points, start.bits, start.scheme)
        return matrix_grid(*stored, start.codes.shape[1], torch.float32)

    def _codes(self) -> Tensor:
        start = self._start
        widths = start.scheme.row_bits or (start.bits,)
        ends = torch.tensor([code_range(start.scheme.grid, bits) for bits in widths])
        least, most = ends.to(self._place)[:, :, None].unbind(1)
        return ste_round(self._place + self.offset).clamp(least, most)

    def limit(self) -> None:
        """Keep offsets within a step, and factors within their range."""
        with torch.no_grad():
            self.offset.clamp_(-1, 1)
            self.factor.clamp_(*SCALE_RANGE)

    def stored(self) -> QuantizedWeight:
        """Return codes and scales as they are stored."""
        with torch.no_grad():
            scales = (self._start.scales.float() * self.factor).to(self._start.scales.dtype)
            return replace(self._start, codes=self._codes().int(), scales=scales)

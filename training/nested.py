"""One set of weights for several bit-widths: the codes of fewer bits are the top bits of more.

References:
    [AdaBits] Q. Jin, L. Yang, Z. Liao, "AdaBits: Neural Network Quantization with Adaptive
    Bit-Widths", CVPR 2020, arXiv 1912.09666 (joint training, statistics for each width).
    [AnyPrecision] H. Yu et al., "Any-Precision Deep Neural Networks", AAAI 2021, arXiv 1911.07346
    (top bits of one code).

Design: docs/design/training.md
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitquota.candidates.storage import Granularity, Grid, Rounding, ScaleFormat, ScaleRule, Scheme
from bitquota.candidates.table import Candidate
from bitquota.errors import InvalidInput
from bitquota.models.layout import from_matrix, to_matrix
from bitquota.quantizers.differentiable import ste_round
from bitquota.quantizers.scales import least_squares_scale
from bitquota.quantizers.weights import QuantizedWeight
from bitquota.training.finetune import grouped
from bitquota.training.input_quantizers import LearnedInputSteps

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from bitquota.candidates.layers import Layer
    from bitquota.quantizers.activations import ActivationQuantizer
    from bitquota.training.settings import TrainingSettings

TOP = 8
"""Bits of the codes that are stored."""

SCHEME = Scheme(
    grid=Grid.SYMMETRIC,
    granularity=Granularity.CHANNEL,
    scale_format=ScaleFormat.FP32,
    scale_rule=ScaleRule.LEAST_SQUARES_POSITIVE,
    rounding=Rounding.NEAREST,
)
"""How the weights of every width are stored: what all runtimes of whole codes take."""


def top_bits(codes: Tensor, bits: int) -> Tensor:
    """Return the codes of ``bits`` bits in those of ``TOP``: rounded top bits, within the range.

    ``min((c + 2^(k-1)) >> k, 2^(bits-1) - 1)`` with ``k = TOP - bits``: plain shifting would lower
    every weight by half a step on average.

    Args:
        codes: Whole numbers from ``-2^(TOP-1)`` to ``2^(TOP-1) - 1``, of any shape.
        bits: 2 to ``TOP``.
    """
    if bits == TOP:
        return codes
    shift = TOP - bits
    top: Tensor = (codes + 2 ** (shift - 1)) >> shift
    return top.clamp(max=2 ** (bits - 1) - 1)


class NestedModel(nn.Module):
    """A model that is trained at several assignments of bit-widths in turn, on one set of codes.

    Weights have one learned step for each output channel at ``TOP`` bits; at ``b`` bits the step is
    ``2^(TOP-b)`` times as large, times a learned factor for each layer and width. Every assignment
    (*mode*) has its own batch-norm statistics; all other tensors are shared [AdaBits].

    Args:
        model: The model; it is copied.
        layers: The layers that are quantized.
        modes: Bit-width of each layer, by name of the assignment.
        inputs: Calibrated quantizers of inputs, by layer; their learned steps serve all modes.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        modes: Mapping[str, Sequence[int]],
        inputs: Mapping[str, ActivationQuantizer] | None = None,
    ) -> None:
        super().__init__()
        self.widths = sorted({b for bits in modes.values() for b in bits})
        if not self.widths or self.widths[0] < 2 or self.widths[-1] > TOP:
            msg = f"nested bit-widths must be from 2 to {TOP}; got {self.widths}"
            raise InvalidInput(msg, weight_bits=self.widths)
        self.model = copy.deepcopy(model)
        self.layers, self.assignments = tuple(layers), {k: tuple(v) for k, v in modes.items()}
        self.modes = tuple(modes)
        self.log_steps, self.log_factors = nn.ParameterList(), nn.ParameterList()
        for layer in layers:
            matrix = to_matrix(self.latent(layer).detach(), layer)
            self.log_steps.append(nn.Parameter(_first_steps(matrix, self.widths).log2()))
            self.log_factors.append(nn.Parameter(torch.zeros(len(self.widths))))
        watched = [la for la in layers if la.name in (inputs or {})]
        self.inputs = LearnedInputSteps(watched, [(inputs or {})[la.name] for la in watched])
        # Statistics of the mode that is selected are those of the model.
        self.statistics: dict[tuple[str, str], str] = {}
        for mode in self.modes:
            for name, value in statistics_of(self.model).items():
                key = f"statistics_{len(self.statistics)}"
                self.register_buffer(key, value.detach().clone())
                self.statistics[mode, name] = key
        self.mode = self.modes[-1]

    def latent(self, layer: Layer) -> Tensor:
        """Return the full-precision weight that training moves."""
        return self.model.get_parameter(layer.weight_name)

    @torch.no_grad()
    def select(self, mode: str) -> None:
        """Run at another assignment from now on, with its statistics."""
        for name, live in statistics_of(self.model).items():
            self.get_buffer(self.statistics[self.mode, name]).copy_(live)
            live.copy_(self.get_buffer(self.statistics[mode, name]))
        self.mode = mode

    def bits(self) -> tuple[int, ...]:
        """Return the bit-width of each layer now."""
        return self.assignments[self.mode]

    def steps(self, k: int, bits: int) -> Tensor:
        """Return ``f32[rows, 1]``: the step of layer ``k`` at ``bits`` bits, differentiable."""
        return self.top_steps(k) * self.factor(k, bits)

    def top_steps(self, k: int) -> Tensor:
        """Return ``f32[rows, 1]``: the step of each output channel of layer ``k``'s codes."""
        return torch.exp2(self.log_steps[k])

    def factor(self, k: int, bits: int) -> Tensor:
        """Return how many of these steps one code of ``bits`` bits stands for, a number."""
        factor = self.log_factors[k][self.widths.index(bits)]
        return torch.exp2(factor + (TOP - bits))

    def weights(self) -> dict[str, Tensor]:
        """Return the quantized weights at the present assignment."""
        found = {}
        for k, (layer, bits) in enumerate(zip(self.layers, self.bits(), strict=True)):
            codes = self._codes(k)
            whole = top_bits(codes.detach().to(torch.int32), bits)
            # Straight-through from whole codes of fewer bits to the codes in front.
            span = 2.0 ** (TOP - bits)
            inside = codes.clamp(max=(2 ** (bits - 1) - 1) * span) / span
            quantized = inside + (whole - inside).detach()
            found[layer.weight_name] = from_matrix(quantized * self.steps(k, bits), layer)
        return found

    def _codes(self, k: int) -> Tensor:
        """Return f32 whole codes of ``TOP`` bits, differentiable by straight-through."""
        matrix = to_matrix(self.latent(self.layers[k]), self.layers[k])
        ratio = matrix / self.top_steps(k)
        half = 2.0 ** (TOP - 1)
        return ste_round(ratio.clamp(-half, half - 1))

    @torch.no_grad()
    def codes(self) -> dict[str, Tensor]:
        """Return i8 codes of ``TOP`` bits of every layer: all that is stored of weights."""
        return {la.name: self._codes(k).to(torch.int8) for k, la in enumerate(self.layers)}

    @torch.no_grad()
    def stored(self) -> dict[str, QuantizedWeight]:
        """Return what each layer is at the present assignment."""
        return {
            layer.name: nested_weight(self._codes(k).int(), self.steps(k, bits), bits)
            for k, (layer, bits) in enumerate(zip(self.layers, self.bits(), strict=True))
        }

    def candidates(self) -> tuple[Candidate, ...]:
        """Return the quantization of each layer at the present assignment."""
        of_inputs = {name: q.bits for name, q in self.inputs.trained().items()}
        pairs = zip(self.layers, self.bits(), strict=True)
        return tuple(Candidate.of(la, b, SCHEME, of_inputs.get(la.name)) for la, b in pairs)

    def parameter_groups(self, settings: TrainingSettings) -> list[dict[str, Any]]:
        """Return groups for weights, biases and norms, and quantizers."""
        learned = nn.ModuleList([self.log_steps, self.log_factors, self.inputs])
        return grouped(self.model, learned, settings)

    def input_quantizers(self, weights: dict[str, Tensor]) -> AbstractContextManager[object]:
        """Return the context in which inputs are quantized, where they are."""
        return self.inputs.watch(self.model, weights)

    def penalty(self, progress: float) -> Tensor | float:
        """Return what channels of inputs add: sizes are fixed."""
        del progress
        return self.inputs.channel_price()

    def before_step(self) -> None:
        """Gradients stay as they are."""

    def after_step(self) -> None:
        """Parameters stay as they are."""

    def is_eligible(self) -> bool:
        """Every state fits its plans."""
        return True


def statistics_of(module: nn.Module) -> dict[str, Tensor]:
    """Return running means and variances of batch norms, by name."""
    return {
        name: value
        for name, value in module.named_buffers()
        if name.endswith(("running_mean", "running_var"))
    }


def nested_weight(codes: Tensor, steps: Tensor, bits: int) -> QuantizedWeight:
    """Return the weight of ``bits`` bits that ``codes`` of ``TOP`` bits hold.

    Args:
        codes: ``[rows, columns]`` whole codes.
        steps: ``[rows, 1]`` at these bits.
        bits: Bit-width.
    """
    return QuantizedWeight(
        codes=top_bits(codes.int(), bits),
        scales=steps.float(),
        zero_points=None,
        bits=bits,
        scheme=SCHEME,
    )


def _first_steps(matrix: Tensor, widths: Sequence[int]) -> Tensor:
    """Return f32[rows, 1]: of the best steps of each width, those that serve all widths best.

    One range serves all: the best one of few bits clips, that of many wastes levels of few.
    """
    exact = matrix.double()
    energy = exact.square().sum(dim=1, keepdim=True).clamp(min=1e-30)
    best = torch.full_like(energy, torch.inf)
    chosen = torch.ones_like(energy)
    for width in widths:
        highest = 2 ** (width - 1) - 1
        scales = least_squares_scale(exact, -highest - 1, highest)[:, None].abs()
        steps = scales.clamp(min=1e-8) * 2.0 ** (width - TOP)
        codes = torch.round(exact / steps).clamp(-(2 ** (TOP - 1)), 2 ** (TOP - 1) - 1).int()
        total = torch.zeros_like(energy)
        for other in widths:
            back = top_bits(codes, other) * steps * 2.0 ** (TOP - other)
            error = (exact - back).square().sum(dim=1, keepdim=True) / energy
            total += error.clamp(min=1e-12).log()
        better = total < best
        best, chosen = torch.where(better, total, best), torch.where(better, steps, chosen)
    return chosen.float()

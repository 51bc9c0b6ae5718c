"""Bit-widths by sparsity of bits: what no weight needs is dropped.

References:
    [BSQ] H. Yang et al., "BSQ: Exploring Bit-Level Sparsity for Mixed-Precision Neural Network
    Quantization", ICLR 2021, arXiv 2102.10462.
    [MSQ] S. Han et al., "MSQ: Memory-Efficient Bit Sparsification Quantization", 2025, arXiv
    2507.22349.

Design: docs/design/training.md
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bitquota.models.layout import from_matrix
from bitquota.quantizers.differentiable import ste_round
from bitquota.training.bit_learners import BitLearner

EVENTS = 12
"""Moments at which bits are dropped."""

LAST_EVENT = 0.7
"""Part of the run after which bit-widths stay."""


class LastBitLearner(BitLearner):
    """Weights are pressed until their last bit is zero, and the bit is dropped [MSQ].

    Every layer starts at ``most`` bits. With step ``s``, the distance of ``w/s`` to the nearest
    even number, ``|w/s - 2 round(w/2s)|``, is what the last bit holds; its mean over all weights
    is the penalty. At ``EVENTS`` moments of the first part of the run the layers whose last bit is
    set least often lose it, as many as the size needs to come down to the limit in equal steps (the
    paper has a threshold on that share and no limit). A layer whose sensitivity ``tr(H) |dw|^2/n``
    is below the median is pressed towards two zero bits and loses both at the next event, ``dw``
    what dropping them changes; for the trace of the Hessian stands the mean square of the gradients
    since the last event (empirical Fisher).
    """

    strength = 0.05

    def prepare(self) -> None:
        """Register range, bit-width and the number of events that are over."""
        for k, part in enumerate(self.parts):
            largest = float(self._scaled(k).detach().abs().max())
            part.log_range = nn.Parameter(torch.tensor(math.log2(max(largest, 1e-8))))
        start = [self.most if self.start_bits is None else self.start_of(k) + 1
                 for k in range(len(self.layers))]  # fmt: skip
        self.bits: Tensor
        self.register_buffer("bits", torch.tensor(start).clamp(max=self.most))
        self.held = frozenset(
            k for k in range(len(self.prices.budgets)) if not self.prices.limits_inputs(k)
        )
        self.first: Tensor
        self.register_buffer("first", self._taken())
        self.events: Tensor
        self.register_buffer("events", torch.tensor(0))
        self.by: Tensor
        self.register_buffer("by", torch.ones(len(self.layers)))
        self.squares: Tensor
        self.register_buffer("squares", torch.zeros(len(self.layers)))
        self._progress = 0.0

    def relaxed_bits(self) -> Tensor:
        """Return the present bit-widths, whole numbers."""
        return self.bits

    def _step(self, k: int) -> Tensor:
        return 2.0 ** (self._tensor(k, "log_range") - self.bits[k] + 1)

    def quantized(self, k: int) -> Tensor:
        """Return the matrix on its full signed range of codes."""
        step, half = self._step(k), 2.0 ** (self.bits[k] - 1)
        codes = torch.minimum(torch.maximum(self._scaled(k) / step, -half), half - 1)
        return step * ste_round(codes)

    def last_bits(self, k: int) -> Tensor:
        """Return how far each weight is from a code whose last bits are zero, 1 for halfway.

        These are the bits that the layer loses at the next event, one or two.
        """
        half: float = 2.0 ** (float(self.by[k]) - 1)
        ratio = self._scaled(k) / (half * self._step(k).detach())
        distance: Tensor = (ratio - 2 * torch.round(ratio / 2).detach()).abs()
        return distance.clamp(max=1)

    def weight_penalty(self, progress: float) -> Tensor:
        """Return the mean of the last bits, while there are bits to drop."""
        self._progress = float(progress)
        if self._progress >= LAST_EVENT:
            return self.counts.new_zeros(())
        sums = [self.last_bits(k).sum() for k in range(len(self.layers)) if self._can_drop(k)]
        total: Tensor = sum(sums, self.counts.new_zeros(())) / self.counts.sum()
        return self.strength * total

    @torch.no_grad()
    def before_step(self) -> None:
        """Add up squares of gradients, for the traces."""
        for k, layer in enumerate(self.layers):
            gradient = self.latent(layer).grad
            if gradient is not None:
                self.squares[k] += gradient.square().sum()

    def _sensitivities(self) -> Tensor:
        """Return f32[layers]: what losing two bits changes, by the curvature of the loss."""
        changes = []
        for k in range(len(self.layers)):
            matrix, coarse = self._scaled(k), 4 * self._step(k)
            error = (matrix - coarse * torch.round(matrix / coarse)) * self._tensor(k, "ratios")
            changes.append(error.square().mean())
        return self.squares * torch.stack(changes)

    def _can_drop(self, k: int) -> bool:
        return float(self.bits[k]) > self.least

    @torch.no_grad()
    def after_step(self) -> None:
        """Drop last bits when an event is due."""
        super().after_step()
        due = min(EVENTS, math.floor(self._progress / LAST_EVENT * EVENTS))
        if due <= int(self.events):
            return
        self.events.fill_(due)
        limits = torch.tensor([float(b.available) for b in self.prices.budgets])
        allowed = self.first + due / EVENTS * (limits.to(self.first) - self.first).clamp(max=0)
        while self._exceeds(allowed):
            # Share of weights whose last bit is set, by rounding: the layer that loses least, and
            # of several the largest. Each loses its bits before any loses the next.
            used = [
                (float((self.last_bits(k) > 0.5).float().mean()), -float(self.counts[k]), k)
                for k in range(len(self.layers))
                if self._can_drop(k)
            ]
            if not used:
                break
            for _, _, k in sorted(used):
                if not self._exceeds(allowed):
                    break
                self.bits[k] = max(self.least, float(self.bits[k]) - float(self.by[k]))
        sensitivities = self._sensitivities()
        self.by.copy_(1.0 + (sensitivities < sensitivities.median()))
        self.squares.zero_()

    def _taken(self) -> Tensor:
        """Return f32[budgets]: what the present bit-widths take of each."""
        inputs = self.input_bits()
        return torch.stack(
            [self.prices.taken(k, self.bits, inputs).sum().detach()
             for k in range(len(self.prices.budgets))]
        )  # fmt: skip

    def _exceeds(self, allowed: Tensor) -> bool:
        """Whether the present bit-widths take more than allowed of a budget on weights."""
        over = self._taken() > allowed * (1 + 1e-6)
        return any(bool(over[k]) for k in range(len(over)) if self.prices.limits_weights(k))


class BitPlaneLearner(BitLearner):
    """Bits of every weight are parameters, and whole planes of them are dropped [BSQ].

    ``W = d round(sum_b 2^b (P_b - N_b))`` with planes ``P_b, N_b`` in [0, 2] for positive and
    negative weights and the rounding straight-through (equation 3). The penalty is the group lasso
    ``a sum_l (n_l bits_l / n) sum_b |[P_b, N_b]|_2`` (equation 6). At ``EVENTS`` moments weights
    are re-quantized: planes become the bits of the rounded codes, planes that are empty at either
    end are dropped, the step ``d`` following the lowest. As in the paper a layer may regain a bit,
    up to the largest width.

    Differences: the sign counts as a bit, as it is stored; ``a`` acts only while a budget is
    exceeded, where the paper has no budget and a fixed ``a``; Adam instead of momentum SGD;
    re-quantization in parts of a run instead of every 100 of 350 epochs. Memory: as many times two
    weights as there are bits.
    """

    strength = 5e-3

    def prepare(self) -> None:
        """Register the planes of every layer, from its rounded weights."""
        self.held = frozenset(
            k for k in range(len(self.prices.budgets)) if not self.prices.limits_inputs(k)
        )
        n = len(self.layers)
        self.planes = round(self.most) - 1
        self.bits: Tensor
        self.register_buffer("bits", torch.zeros(n))
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros(n))
        self.events: Tensor
        self.register_buffer("events", torch.tensor(0))
        start = [self.most if self.start_bits is None else self.start_of(k) for k in range(n)]
        for k, part in enumerate(self.parts):
            matrix = self._scaled(k).detach()
            highest = 2 ** (round(start[k]) - 1) - 1
            self.steps[k] = max(float(matrix.abs().max()), 1e-8) / highest
            for name in ("positive", "negative"):
                empty = matrix.new_zeros(self.planes, *matrix.shape)
                part.register_parameter(name, nn.Parameter(empty))
            self._decompose(k, torch.round(matrix / self.steps[k]))
        self._progress = 0.0

    def relaxed_bits(self) -> Tensor:
        """Return the planes that are left and the sign, whole numbers."""
        return self.bits.clamp(self.least, self.most)

    def codes(self, k: int) -> Tensor:
        """Return the weighted sum of the planes of layer ``k``, not rounded."""
        difference = self._tensor(k, "positive") - self._tensor(k, "negative")
        weights = 2.0 ** torch.arange(self.planes, device=difference.device)
        return torch.einsum("b,brc->rc", weights, difference)

    def quantized(self, k: int) -> Tensor:
        """Return the quantized matrix."""
        return self.steps[k] * ste_round(self.codes(k))

    def weight_penalty(self, progress: float) -> Tensor:
        """Return the group lasso over planes, while a budget is exceeded."""
        self._progress = float(progress)
        total = self.counts.new_zeros(())
        if not self._over():
            return total
        for k in range(len(self.layers)):
            squares = self._tensor(k, "positive").square() + self._tensor(k, "negative").square()
            norms = (squares.sum(dim=(1, 2)) + 1e-12).sqrt().sum()
            total = total + self.counts[k] * self.bits[k] / self.counts.sum() * norms
        return self.strength * total

    def _over(self) -> bool:
        bits, inputs = self.relaxed_bits(), self.input_bits()
        budgets = [k for k in range(len(self.prices.budgets)) if self.prices.limits_weights(k)]
        return any(float(self.prices.excess(k, bits, inputs)) > 0 for k in budgets)

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep planes within [0, 2], those that were dropped empty; re-quantize when due."""
        super().after_step()
        for k in range(len(self.layers)):
            for name in ("positive", "negative"):
                plane = self._tensor(k, name)
                plane.clamp_(0, 2)
                plane[max(0, round(float(self.bits[k])) - 1) :] = 0
        due = min(EVENTS, math.floor(self._progress / LAST_EVENT * EVENTS))
        if due > int(self.events):
            self.events.fill_(due)
            for k in range(len(self.layers)):
                self._decompose(k, torch.round(self.codes(k)))

    @torch.no_grad()
    def _decompose(self, k: int, codes: Tensor) -> None:
        """Put the bits of whole ``codes`` into the planes; drop what is empty at either end."""
        sizes = codes.abs().long()
        while bool((sizes > 0).any()) and not bool((sizes & 1).any()):
            sizes >>= 1
            self.steps[k] *= 2
        while bool((sizes >= 2**self.planes).any()):
            sizes = torch.round(sizes / 2).long()
            self.steps[k] *= 2
        needed = max(1, int(sizes.max()).bit_length())
        self.bits[k] = needed + 1
        planes = torch.arange(self.planes, device=codes.device)
        bits = ((sizes >> planes[:, None, None]) & 1).to(codes.dtype)
        for name, sign in (("positive", codes > 0), ("negative", codes < 0)):
            self._tensor(k, name).copy_(bits * sign)

    @torch.no_grad()
    def finish(self) -> None:
        """Put the weights that the planes stand for where the second phase takes them up."""
        for k, layer in enumerate(self.layers):
            matrix = self.steps[k] * self.codes(k) * self._tensor(k, "ratios")
            self.latent(layer).copy_(from_matrix(matrix, layer))

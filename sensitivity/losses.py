"""Losses: what a quantized model's output costs against the full-precision output or labels.

The forward pass is float32 (or whatever the model is); every loss converts to float64 first, so
that differences of nearly equal losses survive.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch.nn import functional

from bitquota.errors import InvalidCalibration, InvalidInput, MeasurementFailed
from bitquota.models.padding import positions_that_count

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class Loss(Protocol):
    """A per-sample loss.

    Attributes:
        name: Stable name; part of every ledger key.
        unit: Unit of one value.
        needs_labels: Whether ``labels`` must be given.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def unit(self) -> str: ...  # noqa: D102
    @property
    def needs_labels(self) -> bool: ...  # noqa: D102

    def per_sample(self, output: Tensor, reference: Tensor, labels: Tensor | None) -> Tensor:
        """Return ``f64[N]``.

        Args:
            output: ``[N, ..., C]`` of the quantized model.
            reference: The same of the full-precision model.
            labels: ``[N, ...]``, or ``None`` when the loss needs none.
        """
        ...


def _mean_over_positions(values: Tensor) -> Tensor:
    """``[N, ...] -> [N]``: a sequence counts as the mean over its positions."""
    return values.reshape(len(values), -1).mean(dim=1)


def position_weights(*outputs: Tensor) -> Tensor | float:
    """Return what a position counts in a sample's mean, of outputs ``[N, ..., C]``.

    Padded positions (see ``models.padding``), which are zero in all outputs, count nothing, all
    others alike.

    Returns:
        ``f64[N, ..., 1]``, or one number where nothing is padded.
    """
    n, *shape, _ = outputs[0].shape
    every = 1.0 / math.prod(shape)
    if not shape:
        return every
    counted = torch.stack([positions_that_count(output) for output in outputs]).any(dim=0)
    if bool(counted.all()):
        return every
    share = counted.double()
    total = share.reshape(n, -1).sum(dim=1).clamp_min(1)
    return (share / total.reshape(n, *(1,) * len(shape)))[..., None]


VOCABULARY = 2**12
"""Classes from which on a divergence is computed in float32, with sums in float64 where it counts.
"""


def divergence(output: Tensor, reference: Tensor) -> Tensor:
    """Return ``Σ_c p_c (log p_c - log q_c)`` of every position: ``[N, ..., C] -> f64[N, ...]``.

    Float32 logits of a vocabulary stay float32: half the time and a third of the memory, for an
    error of at most 3e-7 at a position and 1e-8 in the mean.
    """
    small = output.dtype == reference.dtype == torch.float32
    differentiated = output.requires_grad or reference.requires_grad
    if output.shape[-1] >= VOCABULARY and small and not differentiated:
        return _divergence_of_vocabulary(output, reference)
    log_q = functional.log_softmax(output.double(), dim=-1)
    log_p = functional.log_softmax(reference.double(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def _divergence_of_vocabulary(output: Tensor, reference: Tensor) -> Tensor:
    """Return the divergence as ``E_p[r - z] + log Σ exp z - log Σ exp r``.

    Differences of logits are small where a divergence is, so float32 does not cancel there.
    """
    highest = reference.amax(dim=-1, keepdim=True)
    weights = (reference - highest).exp_()
    total = weights.sum(dim=-1).double()
    # Both are shifted by the same, which the difference does not see.
    shifted = output - highest
    top = shifted.amax(dim=-1, keepdim=True)
    expected = weights.mul_(reference - output).sum(dim=-1).double() / total
    normaliser = shifted.sub_(top).exp_().sum(dim=-1).double().log() + top[..., 0].double()
    return expected + normaliser - total.log()


@dataclass(frozen=True, slots=True)
class KullbackLeibler:
    """``Σ_c p_c (log p_c - log q_c)``, p = softmax(reference), q = softmax(output).

    Needs no labels, is never negative, and is zero for the full-precision model.
    """

    name: ClassVar[str] = "kl"
    unit: ClassVar[str] = "nats/sample"
    needs_labels: ClassVar[bool] = False

    def per_sample(self, output: Tensor, reference: Tensor, labels: Tensor | None) -> Tensor:
        """Return ``f64[N]``; for ``[N, ..., C]`` the mean over the inner positions that count."""
        del labels
        values, weights = divergence(output, reference), position_weights(output, reference)
        if isinstance(weights, float):
            return _mean_over_positions(values)
        return (values * weights[..., 0]).reshape(len(values), -1).sum(dim=1)


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """``-log q_label``; a label below 0 marks a position that does not count."""

    name: ClassVar[str] = "cross_entropy"
    unit: ClassVar[str] = "nats/sample"
    needs_labels: ClassVar[bool] = True

    def per_sample(self, output: Tensor, reference: Tensor, labels: Tensor | None) -> Tensor:
        """Return ``f64[N]``.

        Raises:
            InvalidCalibration: No labels, or labels of another shape than the positions.
        """
        del reference
        if labels is None:
            msg = "cross entropy needs labels; got none: give labels, or use the loss 'kl'"
            raise InvalidCalibration(msg)
        if labels.shape != output.shape[:-1]:
            msg = (
                f"labels must have the shape of the output without its last dimension, "
                f"{list(output.shape[:-1])}; got {list(labels.shape)}"
            )
            raise InvalidCalibration(msg, shape=list(labels.shape))
        log_q = functional.log_softmax(output.double(), dim=-1)
        counts = labels >= 0
        picked = log_q.gather(-1, labels.clamp_min(0).long()[..., None])[..., 0]
        summed = torch.where(counts, -picked, 0.0).reshape(len(output), -1).sum(dim=1)
        return summed / counts.reshape(len(output), -1).sum(dim=1).clamp_min(1)


@dataclass(frozen=True, slots=True)
class MeanSquaredError:
    """Mean over all output elements of the squared difference to the reference."""

    name: ClassVar[str] = "mse"
    unit: ClassVar[str] = "squared output/sample"
    needs_labels: ClassVar[bool] = False

    def per_sample(self, output: Tensor, reference: Tensor, labels: Tensor | None) -> Tensor:
        """Return ``f64[N]``."""
        del labels
        return _mean_over_positions((output.double() - reference.double()).square())


@dataclass(frozen=True, slots=True)
class CosineDistance:
    """``1 - cos(output, reference)`` along the last dimension, mean over positions.

    Two zero vectors are equal (distance 0); a zero and a non-zero vector are at distance 1.
    """

    name: ClassVar[str] = "cosine"
    unit: ClassVar[str] = "1/sample"
    needs_labels: ClassVar[bool] = False

    def per_sample(self, output: Tensor, reference: Tensor, labels: Tensor | None) -> Tensor:
        """Return ``f64[N]``."""
        del labels
        a, b = output.double(), reference.double()
        norms = a.norm(dim=-1) * b.norm(dim=-1)
        # 1 - a·b/(|a||b|) cancels for nearly equal vectors; half the squared distance of the
        # unit vectors is the same number without the cancellation.
        unit_a = a / a.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        unit_b = b / b.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        distance = 0.5 * (unit_a - unit_b).square().sum(dim=-1)
        both_zero = (a.norm(dim=-1) == 0) & (b.norm(dim=-1) == 0)
        distance = torch.where(norms > 0, distance, torch.where(both_zero, 0.0, 1.0))
        return _mean_over_positions(distance)


@dataclass(frozen=True, slots=True)
class BinaryKullbackLeibler:
    """``Σ_c KL(Bernoulli(p_c) ‖ Bernoulli(q_c))``, p = sigmoid(reference), q = sigmoid(output).

    Every column answers a question of its own; one column is allowed.
    """

    name: ClassVar[str] = "binary_kl"
    unit: ClassVar[str] = "nats/sample"
    needs_labels: ClassVar[bool] = False

    def per_sample(self, output: Tensor, reference: Tensor, labels: Tensor | None) -> Tensor:
        """Return ``f64[N]``: the sum over columns, the mean over inner positions."""
        del labels
        z, r = output.double(), reference.double()
        p = r.sigmoid()
        # log(p/q) = softplus(-z) - softplus(-r): no logarithm of a probability near 0 or 1.
        yes = functional.softplus(-z) - functional.softplus(-r)
        no = functional.softplus(z) - functional.softplus(r)
        columns = (p * yes + (1 - p) * no).reshape(len(z), -1, z.shape[-1] if z.ndim > 1 else 1)
        return columns.sum(dim=-1).mean(dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RelativeSquaredError:
    """Mean squared difference to the reference, over the variance of the reference.

    Attributes:
        scale: That variance, of the reference on the first calibration samples.
    """

    scale: float = 1.0
    name: ClassVar[str] = "relative_mse"
    unit: ClassVar[str] = "of the variance/sample"
    needs_labels: ClassVar[bool] = False

    def per_sample(self, output: Tensor, reference: Tensor, labels: Tensor | None) -> Tensor:
        """Return ``f64[N]``."""
        return MeanSquaredError().per_sample(output, reference, labels) / self.scale


@dataclass(frozen=True, slots=True, kw_only=True)
class SumOfLosses:
    """``Σ_k weight_k loss_k`` over outputs that stand flattened beside each other, ``[N, E]``.

    Attributes:
        name: ``NAME=LOSS`` of every output.
        key: Everything that the values depend on; part of every key of the measurement cache.
        parts: Weight, loss and shape of one sample of each output, in order.
        unit: Of the values.
    """

    name: str
    key: str
    parts: tuple[tuple[float, Loss, tuple[int, ...]], ...]
    unit: str = "weighted loss/sample"

    @property
    def needs_labels(self) -> bool:
        """Whether any of the losses does."""
        return any(loss.needs_labels for _, loss, _ in self.parts)

    def split(self, joined: Tensor) -> list[Tensor]:
        """Return the outputs in their own shapes; a single one is as it is."""
        if len(self.parts) == 1:
            return [joined]
        sizes = [math.prod(shape) for _, _, shape in self.parts]
        pieces = torch.split(joined, sizes, dim=1)
        return [
            piece.reshape(len(joined), *shape)
            for piece, (_, _, shape) in zip(pieces, self.parts, strict=True)
        ]

    def per_sample(self, output: Tensor, reference: Tensor, labels: Tensor | None) -> Tensor:
        """Return ``f64[N]``."""
        total = torch.zeros(len(output), dtype=torch.float64, device=output.device)
        pairs = zip(self.split(output), self.split(reference), self.parts, strict=True)
        for mine, other, (weight, loss, _) in pairs:
            total = total + weight * loss.per_sample(mine, other, labels)
        return total


def key_of(loss: Loss) -> str:
    """Return what a key of the measurement cache must know of a loss."""
    return str(getattr(loss, "key", loss.name))


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomLoss:
    """A callable of the user's: ``function(output, reference, labels) -> [N]``."""

    name: str
    function: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    unit: str = "1/sample"
    needs_labels: bool = False

    def per_sample(self, output: Tensor, reference: Tensor, labels: Tensor | None) -> Tensor:
        """Return ``f64[N]``.

        Raises:
            MeasurementFailed: The callable returned another shape than ``[N]``.
        """
        values = self.function(output, reference, labels)
        if values.shape != (len(output),):
            msg = (
                f"the loss '{self.name}' must return one value per sample, shape "
                f"[{len(output)}]; got {list(values.shape)}"
            )
            raise MeasurementFailed(msg, loss=self.name)
        return values.double()


LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        KullbackLeibler(),
        BinaryKullbackLeibler(),
        CrossEntropy(),
        RelativeSquaredError(),
        MeanSquaredError(),
        CosineDistance(),
    )
}
"""Losses by name; the first is the default."""


def loss_by_name(name: str) -> Loss:
    """Return the loss called ``name``.

    Raises:
        InvalidInput: There is no such loss.
    """
    if name not in LOSSES:
        msg = f"a loss must be one of {', '.join(LOSSES)}; got '{name}'"
        raise InvalidInput(msg, loss=name)
    return LOSSES[name]


def losses_of(loss: Loss, output: Tensor) -> list[tuple[Tensor, Loss]]:
    """Return each output with the loss that is measured on it."""
    if isinstance(loss, SumOfLosses):
        parts = zip(loss.split(output), loss.parts, strict=True)
        return [(piece, own) for piece, (_, own, _) in parts]
    return [(output, loss)]


def n_right(loss: Loss, output: Tensor, labels: Tensor) -> Tensor | None:
    """Return ``f64[N]``, the share of right answers of each sample, of the first output with any.

    Classes are answered by the arg-max, a single logit by its side of 0; ``None`` where the labels
    fit no output.
    """
    if labels.is_floating_point() and not bool(((labels == 0) | (labels == 1)).all()):
        return None
    for piece, own in losses_of(loss, output):
        if own.name == "binary_kl" and labels.numel() == piece.numel():
            right = (piece.reshape(labels.shape) > 0) == (labels > 0)
            return _mean_over_positions(right.double())
        if piece.ndim > 1 and piece.shape[-1] > 1 and labels.shape == piece.shape[:-1]:
            return None if labels.is_floating_point() else n_correct(piece, labels)
    return None


def n_correct(output: Tensor, labels: Tensor) -> Tensor:
    """Return ``f64[N]``: share of each sample's counted positions whose arg-max is the label."""
    counts = labels >= 0
    hits = (output.argmax(dim=-1) == labels) & counts
    n = len(output)
    return hits.reshape(n, -1).sum(dim=1).double() / counts.reshape(n, -1).sum(dim=1).clamp_min(1)

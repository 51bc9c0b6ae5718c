"""What a training step computes: the forward pass with quantized weights, and the loss.

Design: docs/design/training.md
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from bitquota.errors import InvalidCalibration
from bitquota.models.running import primary_output
from bitquota.sensitivity.losses import (
    CustomLoss,
    KullbackLeibler,
    RelativeSquaredError,
    SumOfLosses,
    losses_of,
    n_right,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from bitquota.sensitivity.losses import Loss
    from bitquota.training.settings import TrainingSettings


class Trainee(Protocol):
    """What is trained: a module that holds the model, and how its weights are made.

    Attributes:
        model: The model, whose quantized weights are replaced during a step.
    """

    model: nn.Module

    def parameter_groups(self, settings: TrainingSettings) -> list[dict[str, Any]]:
        """Return optimizer groups with ``params``, ``lr`` and ``weight_decay``."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """Return the quantized weight of each parameter name, differentiable."""
        ...

    def input_quantizers(self, weights: dict[str, Tensor]) -> AbstractContextManager[object]:
        """Return a context in which the layers of these weights see quantized inputs."""
        ...

    def penalty(self, progress: float) -> Tensor | float:
        """Return what is added to the loss, at 0 to 1 of the run."""
        ...

    def before_step(self) -> None:
        """Look at gradients before the optimizer does."""
        ...

    def after_step(self) -> None:
        """Repair parameters after a step."""
        ...

    def is_eligible(self) -> bool:
        """Whether the present state may be selected (a budget may forbid it)."""
        ...


class Pass(nn.Module):
    """One forward pass of a trainee, as a module that can be compiled and made parallel."""

    def __init__(self, trainee: nn.Module, *, mixed_precision: bool, device_type: str) -> None:
        super().__init__()
        self.trainee = trainee
        self.mixed_precision, self.device_type = mixed_precision, device_type

    def forward(self, progress: float, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the primary output in float32, and the penalty."""
        subject: Trainee = self.trainee  # type: ignore[assignment]
        with reduced_precision(self.device_type, wanted=self.mixed_precision):
            output = run_with(subject, inputs)
        return output.float(), torch.as_tensor(subject.penalty(progress), dtype=torch.float32)


def reduced_precision(device_type: str, *, wanted: bool) -> AbstractContextManager[object]:
    """Return the context in which products run in bfloat16, if that is wanted."""
    return torch.autocast(device_type, torch.bfloat16) if wanted else nullcontext()


def run_with(subject: Trainee, inputs: Sequence[Tensor]) -> Tensor:
    """Return the primary output of the model with its quantized weights and inputs."""
    weights = subject.weights()
    with subject.input_quantizers(weights):
        return primary_output(functional_call(subject.model, weights, tuple(inputs)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What training minimises: distance to the full-precision output, and to labels.

    Attributes:
        loss: The distance to the full-precision output. Labels of classes add cross-entropy, labels
            of yes-or-no answers binary cross-entropy, and labels that are numbers or images the
            same distance to them. A ``CustomLoss`` sees output, reference and labels, and is all
            that is minimised.
        distillation: Share of the distance to the full-precision output; the whole where there are
            no labels.
    """

    loss: Loss = field(default_factory=KullbackLeibler)
    distillation: float = 0.5

    def __call__(self, output: Tensor, reference: Tensor | None, labels: Tensor | None) -> Tensor:
        """Return the mean over samples, of outputs ``[N, ...]``, differentiable.

        Raises:
            InvalidCalibration: The labels fit no output.
        """
        total = output.new_zeros(())
        share = 1.0 if labels is None else self.distillation
        if share < 1 and labels is not None:
            total = total + (1 - share) * self._to_labels(output, labels)
        if reference is None:
            return total
        if isinstance(self.loss, CustomLoss):
            return self.loss.per_sample(output, reference, labels).mean()
        if share > 0:
            pairs = zip(
                losses_of(self.loss, output), losses_of(self.loss, reference), self._weights(),
                strict=True,
            )  # fmt: skip
            for (mine, own), (other, _), weight in pairs:
                total = total + share * weight * _distance(own, mine, other)
        return total

    def needs_reference(self, labels: Tensor | None) -> bool:
        """Whether the full-precision output is looked at."""
        return labels is None or self.distillation > 0 or isinstance(self.loss, CustomLoss)

    def check_labels(self, labels: Tensor | None) -> None:
        """Raise ``InvalidCalibration`` if labels are needed and missing."""
        if labels is None and (self.distillation == 0 or self.loss.needs_labels):
            msg = (
                "training on labels needs a labelled set; this one has none: add labels, or "
                "follow the full-precision model, with a distillation share above 0 and a loss "
                "without labels"
            )
            raise InvalidCalibration(msg)

    def _weights(self) -> list[float]:
        return [w for w, _, _ in self.loss.parts] if isinstance(self.loss, SumOfLosses) else [1.0]

    def _to_labels(self, output: Tensor, labels: Tensor) -> Tensor:
        """Return the distance of the first output that labels fit."""
        if isinstance(self.loss, CustomLoss):
            return output.new_zeros(())
        # Classes belong to an output with a loss of classes, where there is one.
        found = sorted(losses_of(self.loss, output), key=lambda f: f[1].name not in _OF_CLASSES)
        for mine, own in found:
            if own.name == "binary_kl" and labels.numel() == mine.numel():
                answers = labels.reshape(mine.shape).to(mine.dtype)
                return functional.binary_cross_entropy_with_logits(mine, answers)
            if not labels.is_floating_point() and labels.shape == mine.shape[:-1]:
                counted = torch.where(labels < 0, _IGNORED, labels).reshape(-1)
                return functional.cross_entropy(mine.reshape(-1, mine.shape[-1]), counted)
            if own.name in _OF_NUMBERS and labels.numel() == mine.numel():
                return _distance(own, mine, labels.reshape(mine.shape).to(mine.dtype))
        shapes = " or ".join(str(list(mine.shape[1:])) for mine, _ in found)
        msg = (
            f"labels must fit an output: classes for all but its last dimension, or numbers for "
            f"each of its elements; outputs have shape {shapes} a sample, labels "
            f"{list(labels.shape[1:])}: give other labels, or set distillation to 1"
        )
        raise InvalidCalibration(msg, labels=list(labels.shape))


_IGNORED = -100
_OF_CLASSES = frozenset({"kl", "cross_entropy"})
_OF_NUMBERS = frozenset({"mse", "relative_mse", "cosine"})
"""Losses that compare an output with labels of its own shape as with another output."""


def _distance(loss: Loss, output: Tensor, reference: Tensor) -> Tensor:
    """Return the mean distance; of classes and of numbers in the model's own precision."""
    if loss.name == "kl":
        flat, target = (t.reshape(-1, t.shape[-1]) for t in (output, reference))
        return functional.kl_div(
            flat.log_softmax(dim=1), target.float().log_softmax(dim=1),
            log_target=True, reduction="batchmean",
        )  # fmt: skip
    if loss.name == "cross_entropy":
        return _distance(KullbackLeibler(), output, reference)
    if loss.name in {"mse", "relative_mse"}:
        mean = functional.mse_loss(output, reference.to(output.dtype))
        return mean / loss.scale if isinstance(loss, RelativeSquaredError) else mean
    return loss.per_sample(output, reference, None).mean()


class Scores:
    """How good outputs are beside their loss: right answers, and noise of images.

    Args:
        loss: What tells which output labels belong to.
    """

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        self.right: list[Tensor] = []
        self.squares, self.elements = 0.0, 0
        self.lowest, self.highest = math.inf, -math.inf

    def add(self, output: Tensor, labels: Tensor | None) -> None:
        """Look at one batch."""
        if labels is None:
            return
        right = n_right(self.loss, output, labels)
        if right is not None:
            self.right.append(right)
        elif labels.is_floating_point() and labels.ndim == 4 and labels.shape == output.shape:
            self.squares += float((output - labels).double().square().sum())
            self.elements += labels.numel()
            self.lowest = min(self.lowest, float(labels.min()))
            self.highest = max(self.highest, float(labels.max()))

    def accuracy(self) -> float | None:
        """Return the share of right answers."""
        return float(torch.cat(self.right).mean()) if self.right else None

    def psnr(self) -> float | None:
        """Return the peak signal-to-noise ratio of images in dB; the peak is the labels' range."""
        if not self.elements or not self.squares or self.highest <= self.lowest:
            return None
        return 10 * math.log10((self.highest - self.lowest) ** 2 * self.elements / self.squares)


def shift_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images ``[N, C, H, W]`` shifted by up to an eighth of their size and mirrored.

    What moves in from outside is zero.
    """
    n, _, height, width = images.shape
    reach_y, reach_x = height // 8, width // 8
    padded = functional.pad(images, (reach_x, reach_x, reach_y, reach_y))
    top = torch.randint(0, 2 * reach_y + 1, (n, 1), generator=generator)
    left = torch.randint(0, 2 * reach_x + 1, (n, 1), generator=generator)
    rows = top + torch.arange(height)
    columns = left + torch.arange(width)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    where = images.device
    rows, columns = rows.to(where), columns.to(where)
    samples = torch.arange(n, device=where)
    picked: Tensor = padded[samples[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)

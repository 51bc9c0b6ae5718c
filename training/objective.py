"""What a training step computes: the forward pass with quantized weights, and the loss."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from bitquota.models.running import primary_output

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

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


def objective(
    output: Tensor, teacher_output: Tensor | None, labels: Tensor | None, distillation: float
) -> Tensor:
    """Return the mean loss: cross-entropy and divergence to the teacher, by their shares."""
    classes = output.shape[-1]
    flat = output.reshape(-1, classes)
    loss = flat.new_zeros(())
    if distillation < 1 and labels is not None:
        loss = loss + (1 - distillation) * functional.cross_entropy(flat, labels.reshape(-1))
    if distillation > 0 and teacher_output is not None:
        target = teacher_output.reshape(-1, classes).float().log_softmax(dim=1)
        divergence = functional.kl_div(
            flat.log_softmax(dim=1), target, log_target=True, reduction="batchmean"
        )
        loss = loss + distillation * divergence
    return loss


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

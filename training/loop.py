"""The training loop that fine-tuning and learning share: seeded, resumable, early stopping."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.func import functional_call
from torch.nn import functional

from bitquota.canonical import digest_json
from bitquota.errors import InvalidCalibration, InvalidInput, MeasurementFailed
from bitquota.progress import Progress, check_cancelled
from bitquota.sensitivity.losses import primary_output
from bitquota.training.checkpoint import load_checkpoint, save_checkpoint

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from bitquota.progress import IsCancelled, OnProgress
    from bitquota.sensitivity.calibration import CalibrationSet


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingSettings:
    """How to train.

    Attributes:
        epochs: Passes over the training part of the data.
        batch_size: Samples per step.
        learning_rate: Of all ordinary weights; falls to zero along a cosine.
        quantizer_learning_rate: Of steps, levels and bit-widths.
        weight_decay: Of ordinary weights with more than one dimension; never of quantizers.
        distillation: Share of the loss that is the divergence to the full-precision model's
            output; the rest is labelled cross-entropy. 1 needs no labels.
        holdout_fraction: Share of the data that selects the best epoch and is not trained on.
        patience: Stop after this many epochs without a better hold-out loss; ``None`` never.
        augmentation: ``none``, or ``shift_flip`` for images (shift by up to an eighth, mirror).
        final_statistics: Re-estimate batch-norm statistics on the training part before every
            look at the hold-out, so that what is selected is what ships.
        checkpoint_steps: Write a checkpoint after so many steps, and after every epoch.
        seed: Of the order of samples, the split, and augmentation.
    """

    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 1e-3
    quantizer_learning_rate: float = 5e-3
    weight_decay: float = 1e-4
    distillation: float = 0.5
    holdout_fraction: float = 0.1
    patience: int | None = None
    augmentation: str = "none"
    final_statistics: bool = True
    checkpoint_steps: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.epochs < 1 or self.batch_size < 2 or not 0 <= self.distillation <= 1:
            msg = (
                "training needs at least one epoch, batches of at least two samples, and a "
                f"distillation share in 0..1; got {self.epochs}, {self.batch_size}, "
                f"{self.distillation}"
            )
            raise InvalidInput(msg)
        if self.augmentation not in ("none", "shift_flip"):
            msg = f"augmentation must be 'none' or 'shift_flip'; got '{self.augmentation}'"
            raise InvalidInput(msg)


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


@dataclass(slots=True, kw_only=True)
class TrainingRecord:
    """What a run did.

    Attributes:
        epochs: For each epoch: training loss, hold-out loss and accuracy, eligibility.
        best_epoch: The epoch whose state was kept.
        steps: Optimizer steps.
    """

    epochs: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int = -1
    steps: int = 0


def train(
    trainee: nn.Module,
    teacher: nn.Module,
    data: CalibrationSet,
    settings: TrainingSettings,
    *,
    identity: object = None,
    checkpoint: Path | None = None,
    stage: str = "training",
    keep_last: bool = False,
    on_progress: OnProgress | None = None,
    cancelled: IsCancelled | None = None,
) -> TrainingRecord:
    """Train ``trainee`` in place and leave it in its best eligible state.

    The order of samples and every random number follow from the seed, the epoch and the step, so
    a run that continues from a checkpoint ends with the same bits as an undisturbed one. If no
    state was ever eligible, the last one is left.

    Args:
        trainee: A ``Trainee`` that is a module; everything it trains is in its state dictionary.
        teacher: The full-precision model.
        data: Labelled samples, or unlabelled with ``distillation`` 1.
        settings: How to train.
        identity: JSON that names model and plan; part of what a checkpoint must agree with.
        checkpoint: File for resuming; continued from if it exists.
        stage: Name in progress reports.
        keep_last: Leave the last state, whatever the hold-out says.
        on_progress: Called after every step.
        cancelled: Asked before every step; a checkpoint is written before ``Cancelled``.

    Raises:
        InvalidCalibration: Labels are needed and missing.
        InvalidInput: The checkpoint is of another run.
        MeasurementFailed: The loss is not finite.
        Cancelled: ``cancelled`` said so.

    Cost: about three forward passes a sample and epoch, one more with distillation.
    """
    if data.labels is None and settings.distillation < 1:
        msg = (
            "training on labels needs a labelled set; this one has none: add labels, or set "
            "distillation to 1"
        )
        raise InvalidCalibration(msg)
    subject: Trainee = trainee  # type: ignore[assignment]
    fit, holdout = data.split(settings.holdout_fraction, settings.seed)
    optimizer = torch.optim.AdamW(subject.parameter_groups(settings))
    base_rates = [group["lr"] for group in optimizer.param_groups]
    digest = digest_json(
        {"settings": asdict(settings), "data": data.to_json(), "identity": identity}
    )
    record, best, best_loss = TrainingRecord(), None, math.inf
    steps_per_epoch = max(1, len(fit) // settings.batch_size)
    total = settings.epochs * steps_per_epoch
    start, running = 0, 0.0
    if checkpoint is not None and checkpoint.exists():
        progress, restored = load_checkpoint(checkpoint, trainee, optimizer, digest)
        start, running = progress["step"], progress["running"]
        record = TrainingRecord(**progress["record"])
        best, best_loss = restored or None, progress["best_loss"]
        if best_loss is None:
            best_loss = math.inf

    def save(step: int) -> None:
        if checkpoint is None:
            return
        progress = {
            "settings": digest,
            "step": step,
            "running": running,
            "record": asdict(record),
            "best_loss": None if math.isinf(best_loss) else best_loss,
        }
        save_checkpoint(checkpoint, trainee, optimizer, progress, best=best)

    teacher = copy.deepcopy(teacher).eval()
    for step in range(start, total):
        if cancelled is not None and cancelled():
            save(step)
            check_cancelled(cancelled, stage)
        epoch, within = divmod(step, steps_per_epoch)
        if _stopped(record, settings):
            break
        batch = fit.take(_rows(len(fit), epoch, within, settings))
        for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / total))
        running += _step(subject, teacher, optimizer, batch, settings, step, total)
        record.steps = step + 1
        if within == steps_per_epoch - 1:
            entry = _look(subject, fit, holdout, teacher, settings)
            record.epochs.append({"training_loss": running / steps_per_epoch, **entry})
            running = 0.0
            if not keep_last and entry["eligible"] and entry["holdout_loss"] < best_loss:
                best_loss, record.best_epoch = entry["holdout_loss"], epoch
                best = {k: v.detach().clone() for k, v in trainee.state_dict().items()}
            save(step + 1)
        elif (step + 1) % settings.checkpoint_steps == 0:
            save(step + 1)
        if on_progress is not None:
            on_progress(Progress(stage=stage, done=step + 1, total=total))
    if best is not None:
        trainee.load_state_dict(best)
    subject.model.eval()
    return record


def run_with(model: nn.Module, weights: dict[str, Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """Return the primary output of ``model`` with ``weights`` in place of its own."""
    return primary_output(functional_call(model, weights, tuple(inputs)))


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
        target = teacher_output.reshape(-1, classes).log_softmax(dim=1)
        divergence = functional.kl_div(
            flat.log_softmax(dim=1), target, log_target=True, reduction="batchmean"
        )
        loss = loss + distillation * divergence
    return loss


def _step(
    subject: Trainee,
    teacher: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: CalibrationSet,
    settings: TrainingSettings,
    step: int,
    total: int,
) -> float:
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    inputs = batch.inputs
    if settings.augmentation == "shift_flip":
        inputs = (shift_flip(inputs[0], generator), *inputs[1:])
    teacher_output = None
    if settings.distillation > 0:
        with torch.no_grad():
            teacher_output = primary_output(teacher(*inputs))
    subject.model.train()
    # Dropout draws from the global generator: give every step its own numbers, and put it back.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed * 1_000_003 + step)
        output = run_with(subject.model, subject.weights(), inputs)
    loss = objective(output, teacher_output, batch.labels, settings.distillation)
    if not bool(torch.isfinite(loss)):
        msg = (
            f"the training loss must stay finite; it is not at step {step}: lower the learning "
            "rate, or check the data"
        )
        raise MeasurementFailed(msg, step=step)
    optimizer.zero_grad(set_to_none=True)
    (loss + subject.penalty(step / total)).backward()  # type: ignore[no-untyped-call]
    subject.before_step()
    optimizer.step()
    subject.after_step()
    return float(loss.detach())


def _look(
    subject: Trainee,
    fit: CalibrationSet,
    holdout: CalibrationSet,
    teacher: nn.Module,
    settings: TrainingSettings,
) -> dict[str, Any]:
    """Measure the hold-out; with ``final_statistics`` batch norms are re-estimated first."""
    subject.model.eval()
    with torch.no_grad():
        weights = subject.weights()
        if settings.final_statistics:
            _statistics(subject.model, weights, fit.first(1024))
        losses, right, counted = 0.0, 0.0, 0
        for batch in holdout.batches(256):
            output = run_with(subject.model, weights, batch.inputs)
            reference = primary_output(teacher(*batch.inputs))
            n = len(batch)
            losses += n * float(objective(output, reference, batch.labels, settings.distillation))
            if batch.labels is not None:
                hits = (output.argmax(dim=-1) == batch.labels).double()
                right += float(hits.reshape(n, -1).mean(dim=1).sum())
            counted += n
    return {
        "holdout_loss": losses / counted,
        "holdout_accuracy": right / counted if holdout.labels is not None else None,
        "eligible": bool(subject.is_eligible()),
    }


def _statistics(model: nn.Module, weights: dict[str, Tensor], data: CalibrationSet) -> None:
    from bitquota.sensitivity.corrections import reestimate_batch_norm

    class Bound(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, *inputs: Tensor) -> Tensor:
            return run_with(self.inner, weights, inputs)

    reestimate_batch_norm(Bound(), data)


def _rows(n: int, epoch: int, within: int, settings: TrainingSettings) -> list[int]:
    generator = torch.Generator().manual_seed(settings.seed * 7_919 + epoch)
    order = torch.randperm(n, generator=generator)
    size = min(settings.batch_size, n)
    rows: list[int] = order[within * size : (within + 1) * size].tolist()
    return rows


def _stopped(record: TrainingRecord, settings: TrainingSettings) -> bool:
    if settings.patience is None or record.best_epoch < 0:
        return False
    return len(record.epochs) - 1 - record.best_epoch >= settings.patience


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

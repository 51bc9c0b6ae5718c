"""The training loop that fine-tuning and learning share: seeded, resumable, early stopping.

Design: docs/design/training.md
"""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from bitquota.canonical import digest_json
from bitquota.context import Context, cancelled_during
from bitquota.errors import InvalidCalibration, InvalidInput, MeasurementFailed
from bitquota.models.running import primary_output
from bitquota.quantizers.corrections import DEFAULT_BATCH, reestimate_batch_norm
from bitquota.training.checkpoint import load_checkpoint, save_checkpoint
from bitquota.training.distributed import present_group
from bitquota.training.objective import Pass, objective, reduced_precision, run_with, shift_flip

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from bitquota.models.calibration import CalibrationSet
    from bitquota.training.distributed import Group
    from bitquota.training.objective import Trainee
    from bitquota.training.settings import TrainingSettings

STATISTICS_SAMPLES = 1024
"""Training samples that batch-norm statistics are re-estimated on."""


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
    context: Context | None = None,
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
        context: Whom to tell, and when to stop.

    Raises:
        InvalidCalibration: Labels are needed and missing.
        InvalidInput: The checkpoint is of another run, or the step cannot be compiled.
        MeasurementFailed: The loss is not finite.
        Cancelled: The context said so.

    Cost: about three forward passes a sample and epoch, one more with distillation. Under
    ``torch.distributed`` every process takes its share of each batch.
    """
    context = context or Context()
    if data.labels is None and settings.distillation < 1:
        msg = (
            "training on labels needs a labelled set; this one has none: add labels, or set "
            "distillation to 1"
        )
        raise InvalidCalibration(msg)
    run = _Run(trainee, teacher, data, settings, present_group())
    digest = run.digest(identity)
    optimizer = optimizer_of(run.subject.parameter_groups(settings), settings)
    base_rates = [group["lr"] for group in optimizer.param_groups]
    record, best, best_loss = TrainingRecord(), None, math.inf
    total = settings.epochs * run.steps_per_epoch

    # Go on where a checkpoint ends.
    start, running = 0, 0.0
    if checkpoint is not None and checkpoint.exists():
        progress, restored = load_checkpoint(checkpoint, trainee, optimizer, digest)
        start, running = progress["step"], progress["running"]
        record = TrainingRecord(**progress["record"])
        best, best_loss = restored or None, progress["best_loss"]
        if best_loss is None:
            best_loss = math.inf

    def save(step: int) -> None:
        if checkpoint is not None and run.group.is_first:
            progress = {
                "settings": digest,
                "step": step,
                "running": running,
                "record": asdict(record),
                "best_loss": None if math.isinf(best_loss) else best_loss,
            }
            save_checkpoint(checkpoint, trainee, optimizer, progress, best=best)
        run.group.wait()

    # Step by step; after each epoch the hold-out part decides what is kept.
    for step in range(start, total):
        if run.agreed(context):
            save(step)
            raise cancelled_during(stage)
        epoch, within = divmod(step, run.steps_per_epoch)
        if _stopped(record, settings):
            break
        for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = rate * rate_factor(settings.schedule, step / total)
        running += run.step(optimizer, step, epoch, within, total)
        record.steps = step + 1
        if within == run.steps_per_epoch - 1:
            entry = run.look()
            record.epochs.append({"training_loss": running / run.steps_per_epoch, **entry})
            running = 0.0
            if not keep_last and entry["eligible"] and entry["holdout_loss"] < best_loss:
                best_loss, record.best_epoch = entry["holdout_loss"], epoch
                best = {k: v.detach().clone() for k, v in trainee.state_dict().items()}
            save(step + 1)
        elif (step + 1) % settings.checkpoint_steps == 0:
            save(step + 1)
        context.report(stage, step + 1, total)
    if best is not None:
        trainee.load_state_dict(best)
    run.subject.model.eval()
    return record


class _Run:
    """What stays the same from step to step."""

    def __init__(
        self,
        trainee: nn.Module,
        teacher: nn.Module,
        data: CalibrationSet,
        settings: TrainingSettings,
        group: Group,
    ) -> None:
        self.subject: Trainee = trainee  # type: ignore[assignment]
        self.teacher = copy.deepcopy(teacher).eval()
        self.data, self.settings, self.group = data, settings, group
        self.fit, self.holdout = data.split(settings.holdout_fraction, settings.seed)
        self.steps_per_epoch = max(1, len(self.fit) // settings.batch_size)
        self.device_type = data.inputs[0].device.type
        trainee.to(data.inputs[0].device)
        self.teacher.to(data.inputs[0].device)
        forward = Pass(
            trainee, mixed_precision=settings.mixed_precision, device_type=self.device_type
        )
        if settings.compiled:
            forward.compile()
        self.forward = group.wrap(forward)
        self._taught: list[Tensor] | None = None

    def digest(self, identity: object) -> str:
        """Return what a checkpoint must agree with."""
        named = {
            "settings": asdict(self.settings),
            "data": self.data.to_json(),
            "identity": identity,
        }
        # Several processes add their gradients up in another order.
        return digest_json(named | ({"size": self.group.size} if self.group.size > 1 else {}))

    def agreed(self, context: Context) -> bool:
        """Return whether any process was asked to stop."""
        asked = context.cancelled is not None and context.cancelled()
        if self.group.size == 1:
            return asked
        where = self.data.inputs[0].device
        return float(self.group.mean(torch.tensor(float(asked), device=where))) > 0

    def _augmented(self, inputs: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
        if self.settings.augmentation == "none":
            return inputs
        generator = torch.Generator().manual_seed(seed)
        return shift_flip(inputs[0], generator), *inputs[1:]

    def step(
        self, optimizer: torch.optim.Optimizer, step: int, epoch: int, within: int, total: int
    ) -> float:
        """Take one optimizer step; return the loss without the penalty."""
        settings = self.settings
        batch = self.fit.take(_rows(len(self.fit), epoch, within, settings))
        seen = self._augmented(batch.inputs, settings.seed * 1_000_003 + step)
        inputs = tuple(self._laid_out(self.group.share(x)) for x in seen)
        labels = None if batch.labels is None else self.group.share(batch.labels)
        teacher_output = None
        if settings.distillation > 0:
            precision = reduced_precision(self.device_type, wanted=settings.mixed_precision)
            with torch.no_grad(), precision:
                teacher_output = primary_output(self.teacher(*inputs)).float()
        self.subject.model.train()
        # Dropout draws from the global generator: give every step its own numbers, and put it back.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(
                (settings.seed * 1_000_003 + step) * self.group.size + self.group.rank
            )
            output, penalty = self._output(step / total, inputs)
        loss = objective(output, teacher_output, labels, settings.distillation)
        shown = float(self.group.mean(loss.detach()))
        if not math.isfinite(shown):
            msg = (
                f"the training loss must stay finite; it is not at step {step}: lower the learning "
                "rate, or check the data"
            )
            raise MeasurementFailed(msg, step=step)
        optimizer.zero_grad(set_to_none=True)
        (loss + penalty).backward()  # type: ignore[no-untyped-call]
        self.subject.before_step()
        optimizer.step()
        self.subject.after_step()
        return shown

    def _laid_out(self, values: Tensor) -> Tensor:
        if self.settings.channels_last and values.ndim == 4:
            return values.contiguous(memory_format=torch.channels_last)
        return values

    def _output(self, progress: float, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        if not self.settings.compiled:
            output, penalty = self.forward(progress, *inputs)
            return output, penalty
        from torch._dynamo.exc import TorchDynamoException

        try:
            # A number would be compiled into the step, anew for each; a tensor is not.
            output, penalty = self.forward(torch.tensor(progress), *inputs)
        except (TorchDynamoException, OSError) as err:
            msg = (
                "a compiled step needs a model that torch.compile can translate, and a C++ "
                f"compiler; it failed with {type(err).__name__}: {str(err).splitlines()[0]}; "
                "train without compiling"
            )
            raise InvalidInput(msg) from err
        return output, penalty

    def look(self) -> dict[str, Any]:
        """Measure the hold-out in full precision arithmetic, batch norms re-estimated first."""
        self.subject.model.eval()
        with torch.no_grad():
            if self.settings.final_statistics:
                parts = self.fit.first(STATISTICS_SAMPLES).batches(DEFAULT_BATCH)
                # Of what was trained on: plain images have other statistics, and cost accuracy.
                seen = [self._augmented(b.inputs, self.settings.seed) for b in parts]
                reestimate_batch_norm(_Bound(self.subject), seen)
            losses, right, counted = 0.0, 0.0, 0
            batches = list(self.holdout.batches(256))
            if self._taught is None:
                self._taught = [primary_output(self.teacher(*b.inputs)) for b in batches]
            for batch, taught in zip(batches, self._taught, strict=True):
                inputs = tuple(self._laid_out(x) for x in batch.inputs)
                output = run_with(self.subject, inputs)
                n = len(batch)
                loss = objective(output, taught, batch.labels, self.settings.distillation)
                losses += n * float(loss)
                if batch.labels is not None:
                    hits = (output.argmax(dim=-1) == batch.labels).double()
                    right += float(hits.reshape(n, -1).mean(dim=1).sum())
                counted += n
        return {
            "holdout_loss": losses / counted,
            "holdout_accuracy": right / counted if self.holdout.labels is not None else None,
            "eligible": bool(self.subject.is_eligible()),
        }


class _Bound(torch.nn.Module):
    """A trainee as a plain model, for the correction of batch norms."""

    def __init__(self, subject: Trainee) -> None:
        super().__init__()
        self.inner, self.subject = subject.model, subject

    def forward(self, *inputs: Tensor) -> Tensor:
        return run_with(self.subject, inputs)


def optimizer_of(groups: list[dict[str, Any]], settings: TrainingSettings) -> torch.optim.Optimizer:
    """Return the optimizer that the settings name."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9)
    return torch.optim.AdamW(groups)


def rate_factor(schedule: str, progress: float) -> float:
    """Return the share of the learning rate at ``progress`` (0 to 1) of a run."""
    if schedule == "steps":
        return 0.1 ** ((progress >= 0.5) + (progress >= 0.75))
    return 0.5 * (1 + math.cos(math.pi * progress))


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
